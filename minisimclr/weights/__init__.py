"""Published weights into our networks, and ours out again: PyTorch, Keras, TensorFlow, safetensors.

    preprocessing = weights.load(nn.resnet50("imagenet"), "resnet50.pth")
    preprocessing = weights.load(inception, "inception_v3_notop.h5", until="mixed8")
    encoder, preprocessing = weights.encoder("model.ckpt-250228")
    h = encoder.eval()(Tensor(preprocessing(images)))

Files are told apart by their content, not by their names, and none can run code here. A module
takes over all of the arrays it needs or none: names, shapes and dtypes are checked first.
"""

from pathlib import Path

import numpy as np

from .. import checkpoint
from ..config import first_layers
from ..errors import DataError
from ..nn import ENCODERS, InceptionV3, Module
from . import keras, names, safetensors, tf_bundle, torch_zip
from .preprocessing import Preprocessing
from .stored import Spec, Stored, damage_reported

CONVOLUTIONS = {9: "resnet_small", 12: "resnet10", 20: "resnet18", 36: "resnet34", 53: "resnet50"}


def read(path: str | Path) -> Stored:
    """Open a file of weights: its format, names, shapes and dtypes; arrays can be fetched from it.

    A TensorFlow checkpoint is given as its .index file or as the name without that suffix; the
    folder of a run stands for its newest checkpoint. Raises DataError for anything that is
    incomplete or not of a known format.
    """
    path = Path(path)
    with damage_reported(path):
        path = [path, *checkpoint.listed(path / "checkpoints")][-1]
        index = path.parent / f"{path.name}.index"
        path = index if index.exists() and not path.exists() else path
    with damage_reported(path), path.open("rb") as f:
        start = f.read(512)
        f.seek(-min(path.stat().st_size, len(tf_bundle.MAGIC)), 2)
        end = f.read()
        if start.startswith(b"PK\x03\x04"):
            stored = torch_zip.read(path)
        elif start.startswith(b"\x89HDF\r\n\x1a\n"):
            stored = keras.read(path)
        elif start.startswith(checkpoint.MARK):
            stored = read_own(path)
        elif end == tf_bundle.MAGIC:
            stored = tf_bundle.read(path)
        elif start[8:].lstrip().startswith(b"{"):
            stored = safetensors.read(path)
        elif start.startswith(b"\x80") or start[257:262] == b"ustar":
            state = "torch.load('OLD.pth', 'cpu', weights_only=True)"
            raise ValueError(torch_zip.CONVERT.format("PyTorch's form before 1.6, a pickle", state))
        else:
            raise ValueError("neither PyTorch, Keras, TensorFlow (.index) nor safetensors")
        if "" in stored.specs or not all(map(str.isprintable, stored.specs)):
            raise ValueError("a name that cannot be printed")
        return stored


def read_own(path: Path) -> Stored:
    """The encoder in a checkpoint of a run."""
    arrays, state = checkpoint.load(path)
    if "config" not in state:
        raise ValueError("it holds features, not weights")
    arrays, config = checkpoint.unprefixed("encoder", arrays), state["config"]
    specs = {name: Spec(array.shape, array.dtype.name) for name, array in arrays.items()}
    stem = first_layers(config["stem"], config["encoder"], config["image_size"])
    metadata = {"size": str(config["image_size"]), "pixels": "unit", "stem": stem}
    return Stored(path, "minisimclr checkpoint", specs, arrays.__getitem__, metadata)


def load(module: Module, path: str | Path | Stored, until: str | None = None) -> Preprocessing:
    """Take over the weights in a file; returns what the module's input must look like.

    The module is an encoder or a ProjectionHead; `until` names the last of its parts to load
    ("mixed8", "layer3"); later ones stay as they are. All or nothing, rounded to float32 and then
    in the module's own dtype. Raises DataError for a file that is damaged, does not fit or holds
    numbers that are not finite, ConfigError for another `until`.
    """
    stored = path if isinstance(path, Stored) else read(path)
    stem = getattr(module, "stem", "")
    usual = "simclr" if stored.format == names.TENSORFLOW and stem == "imagenet" else stem
    said = stored.metadata.get("stem", usual)
    if stem and said != stem:
        raise DataError(f"{stored.path} is for the stem {said!r}, and this network has {stem!r}")
    state = module.state_dict()
    for name, source in names.match(module, stored, until).items():
        state[name] = fetch(stored, source) if source else np.ones_like(state[name])
    module.load_state_dict(state)
    return preprocessing_for(module, stored)


def preprocessing_for(module: Module, stored: Stored) -> Preprocessing:
    """What the module's input must look like with these weights: what their file says, or the
    convention of those who publish in its format.
    """
    size, pixels = 32 if getattr(module, "stem", "") == "cifar" else 224, "imagenet"
    if isinstance(module, InceptionV3):
        size, pixels = 299, "symmetric"
    with damage_reported(stored.path):
        size = int(stored.metadata.get("size", size))
        return Preprocessing(size, stored.metadata.get("pixels", pixels))


def fetch(stored: Stored, source: str) -> np.ndarray:
    """One array in torchvision's layout; floating-point numbers as float32."""
    with damage_reported(stored.path), np.errstate(over="ignore"):
        array = stored.fetch(source).transpose(names.axes(stored, source))
        array = array.astype(np.float32 if array.dtype.kind == "f" else array.dtype)
    variance = source.endswith(("running_var", "moving_variance"))
    if not np.isfinite(array).all() or (variance and (array < 0).any()):
        raise DataError(f"{stored.path}: {source} holds NaN, infinity or a negative variance")
    return array


def encoder(path: str | Path, until: str | None = None) -> tuple[Module, Preprocessing]:
    """The network that the shapes in a file belong to, with its weights; and its preprocessing.

    Raises DataError if no network of ours has such shapes.
    """
    stored = read(path)
    return (module := network(stored)), load(module, stored, until)


def network(stored: Stored) -> Module:
    """The network that the shapes in a file belong to, with random weights. Raises DataError."""
    shapes = names.kernels(stored)
    width, _, side, _ = next((s for s in shapes if s[1] == 3), (0, 3, 3, 3))
    # Flat kernels come after mixed3, and Keras' names say nothing.
    if any(s[2] != s[3] for s in shapes) or any("Conv2d_1a_3x3" in n for n in stored.specs):
        return InceptionV3()
    # ResNets made with Keras pad and normalise otherwise.
    large = {names.TENSORFLOW: "simclr", names.KERAS: ""}.get(stored.format, "imagenet")
    if large and (name := CONVOLUTIONS.get(len(shapes))) and 0 < width <= 1024:
        stem = large if side == 7 else "small" if name == "resnet_small" else "cifar"
        with damage_reported(stored.path):
            return ENCODERS[name](stored.metadata.get("stem", stem), width)
    raise DataError(f"{stored.path}: {len(shapes)} convolutions are no network of ours")


def save(
    module: Module, path: str | Path, prep: Preprocessing, until: str | None = None, **about: object
) -> None:
    """Publish an encoder, up to its part `until`, as .safetensors with torchvision's names.

    Its preprocessing and stem go into the metadata, with what is said `about` it. Raises OSError.
    """
    about |= {"size": int(prep.size), "pixels": prep.pixels, "stem": getattr(module, "stem", "")}
    kept, state = names.part(module, until), module.state_dict()
    metadata = {name: str(value) for name, value in about.items()}
    safetensors.write(Path(path), {name: state[name] for name in kept}, metadata)
