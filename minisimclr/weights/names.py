"""Which array of a file each parameter comes from: torchvision's, Keras' and SimCLR's names.

PyTorch files carry torchvision's names, perhaps behind a prefix such as `module.`. Keras and
SimCLR's authors number layers in the order in which a network makes them: conv2d, conv2d_1, ... and
batch_normalization likewise; in SimCLR's ResNets a stage's projection shortcut comes before the
convolutions of its block.
"""

import re

from ..errors import ConfigError, DataError
from ..nn import Module, ProjectionHead
from ..nn.inception import BLOCKS
from .stored import KERAS, NUMBERED, TENSORFLOW, Stored

FLOATS = ("float16", "bfloat16", "float32", "float64")
MEAN = "running_mean"
NORM = {"weight": "gamma", "bias": "beta", MEAN: "moving_mean", "running_var": "moving_variance"}
ENCODER = r"(?P<layer>(base_model/)?(?P<kind>conv2d|batch_normalization)_?(?P<i>\d*))/[a-z_]+"
HEAD = r"(?P<layer>head_contrastive/nl_(?P<i>\d+)/(?P<kind>dense|batch_normalization))/[a-z_]+"
# Classifiers, and what optimizers and averages keep beside a variable.
SKIPPED = r"(fc|AuxLogits)\..*|predictions/.*|.*/(Momentum|ExponentialMovingAverage)"
INNER = "layer1.0.conv1.weight"  # in every ResNet, once
TWO = "{}: two models fit, {!r} and {!r}: keep one (docs/weights.md shows how)"

Shape = tuple[int, ...]


def axes(stored: Stored, name: str) -> Shape:
    """The transposition that takes an array of the file to torchvision's layout."""
    ndim = len(stored.specs[name].shape)
    turned = {4: (3, 2, 0, 1), 2: (1, 0)} if stored.format in NUMBERED else {}
    return turned.get(ndim, tuple(range(ndim)))  # HWIO -> OIHW, (C, O) -> (O, C)


def torch_shape(stored: Stored, name: str) -> Shape:
    """The shape of an array of the file in torchvision's layout."""
    return tuple(stored.specs[name].shape[axis] for axis in axes(stored, name))


def kernels(stored: Stored) -> list[Shape]:
    """Shapes (O, C, KH, KW) of an encoder's convolutions. Raises DataError for two encoders."""
    pattern = ENCODER if stored.format in NUMBERED else "(?!.*AuxLogits).*"
    found = [name for name in stored.specs if re.fullmatch(pattern, name)]
    roots = [name.removesuffix(INNER) for name in found if name.endswith(INNER)]
    if len(roots) > 1:
        raise DataError(TWO.format(stored.path, *roots))
    return [shape for name in found if len(shape := torch_shape(stored, name)) == 4]


def match(module: Module, stored: Stored, until: str | None = None) -> dict[str, str]:
    """The file's name for every parameter and buffer of the module, up to its part `until`.

    Names, shapes and dtypes are those the module needs; else DataError names the first differences.
    Raises ConfigError for an `until` that the module does not have.
    """
    own = module.shapes()
    kept = part(module, until)
    named = numbered(module, stored) if stored.format in NUMBERED else prefixed(module, stored)
    sources = {n: source for n, source in named.items() if n in kept or until is None}
    shapes = {name: shape for name, shape in own.items() if name not in kept}
    shapes |= {n: torch_shape(stored, s) if s else own[n] for n, s in sources.items()}
    module.check_shapes(shapes, stored.path)
    for name, source in sources.items():
        dtype = stored.specs[source].dtype if source else "float32"
        if dtype not in (("int64",) if name.endswith("batches_tracked") else FLOATS):
            raise DataError(f"{stored.path}: {source} is of type {dtype}")
    return sources


def part(module: Module, until: str | None) -> list[str]:
    """Names in a state dict of the module's children up to `until`."""
    if until is None:
        return list(module.shapes())
    children = [name for name, _ in module.children()]
    last = BLOCKS.get(until, (until,))[0]
    if last not in children:
        shown = {attribute: name for name, (attribute, _) in BLOCKS.items()}
        named = ", ".join(shown.get(name, name) for name in children)
        raise ConfigError(f"no part {until!r}: this model has {named}")
    later = children[children.index(last) + 1 :]
    return [name for name in module.shapes() if name.split(".")[0] not in later]


def prefixed(module: Module, stored: Stored) -> dict[str, str]:
    """Torchvision's names after the prefix with which most of them are found."""
    own = list(module.shapes())
    found = [name.removesuffix(own[0]) for name in stored.specs if name.endswith(own[0])]
    hits = {p: sum(p + name in stored.specs for name in own) for p in [*found, ""]}
    best, *more = [p for p in hits if hits[p] == max(hits.values())]
    if more:
        raise DataError(TWO.format(stored.path, best, *more))
    names = [name.removeprefix(best) for name in stored.specs if name.startswith(best)]
    return {name: best + name for name in names if name in own or not re.fullmatch(SKIPPED, name)}


def numbered(module: Module, stored: Stored) -> dict[str, str]:
    """Layers in the order of their numbers, which differs from that of their names as text."""
    own, head = module.shapes(), isinstance(module, ProjectionHead)
    made = [m for name in stored.specs if (m := re.fullmatch(HEAD if head else ENCODER, name))]
    layers = [layer for _, layer in sorted({(int(m["i"] or 0), m["layer"]) for m in made})]
    norms = [layer for layer in layers if "batch_normalization" in layer]
    others = [layer for layer in layers if "batch_normalization" not in layer]
    means = as_made([name for name in own if name.endswith(MEAN)])
    weights = as_made([name for name, shape in own.items() if len(shape) > 1])

    pairs = [(ours, f"{layer}/kernel") for ours, layer in zip(weights, others, strict=False)]
    for mean, layer in zip(means, norms, strict=False):
        pairs += [(mean.replace(MEAN, ours), f"{layer}/{theirs}") for ours, theirs in NORM.items()]
    sources = {ours: theirs for ours, theirs in pairs if theirs in stored.specs}
    if stored.format == KERAS:
        gammas = [ours for ours, theirs in pairs if theirs.endswith("gamma")]
        sources = dict.fromkeys(gammas, "") | sources
    root = {KERAS: "", TENSORFLOW: "head_contrastive/" if head else "base_model/"}[stored.format]
    rest = [n for n in stored.specs if n.startswith(root) and n not in sources.values()]
    return sources | {name: name for name in rest if not re.fullmatch(SKIPPED, name)}


def as_made(names: list[str]) -> list[str]:
    """Torchvision's names, but with the shortcut first in its block."""
    blocks = [".".join(name.split(".")[:2]) for name in names]
    place = {name: blocks.index(block) for name, block in zip(names, blocks, strict=True)}
    return sorted(names, key=lambda name: (place[name], ".downsample." not in name))
