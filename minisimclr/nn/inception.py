"""InceptionV3 (Szegedy et al. 2016, arXiv:1512.00567) as one table, with torchvision's names.

The tables below are the network. A path is a list of steps: a convolution `(name, O, kernel,
stride, padding)`, a pool, or a fork, which is a list of paths that all read the same input and
whose channels are joined. Stride is 1 and padding keeps the size (none at stride 2) unless given.
A block is one fork; blocks go by Keras' names, mixed0 to mixed10.
"""

import numpy as np

from ..errors import ConfigError
from ..ops.basic import concatenate
from ..ops.conv import pair
from ..ops.pool import average_pool, global_average_pool, max_pool
from ..tensor import Tensor
from .layers import BatchNorm, Conv2d
from .module import Module

AVERAGE, MAX = "average", "max"  # 3x3 pools, of stride 1 and 2
ROW, COLUMN = (1, 7), (7, 1)

STEM = [
    ("Conv2d_1a_3x3", 32, 3, 2), ("Conv2d_2a_3x3", 32, 3, 1, 0), ("Conv2d_2b_3x3", 64, 3), MAX,
    ("Conv2d_3b_1x1", 80, 1), ("Conv2d_4a_3x3", 192, 3, 1, 0), MAX,
]  # fmt: skip


def chain(name: str, *convolutions: tuple) -> list:
    """A path of convolutions called name_1, name_2, ..."""
    return [(f"{name}_{i}", *rest) for i, rest in enumerate(convolutions, 1)]


def forked(name: str) -> list:
    return [[(f"{name}a", 384, (1, 3))], [(f"{name}b", 384, (3, 1))]]


def block_a(pool: int) -> list:
    return [
        [("branch1x1", 64, 1)],
        chain("branch5x5", (48, 1), (64, 5)),
        chain("branch3x3dbl", (64, 1), (96, 3), (96, 3)),
        [AVERAGE, ("branch_pool", pool, 1)],
    ]


def block_c(o: int) -> list:
    return [
        [("branch1x1", 192, 1)],
        chain("branch7x7", (o, 1), (o, ROW), (192, COLUMN)),
        chain("branch7x7dbl", (o, 1), (o, COLUMN), (o, ROW), (o, COLUMN), (192, ROW)),
        [AVERAGE, ("branch_pool", 192, 1)],
    ]


BLOCK_B = [[("branch3x3", 384, 3, 2)], chain("branch3x3dbl", (64, 1), (96, 3), (96, 3, 2)), [MAX]]
BLOCK_D = [
    chain("branch3x3", (192, 1), (320, 3, 2)),
    chain("branch7x7x3", (192, 1), (192, ROW), (192, COLUMN), (192, 3, 2)),
    [MAX],
]
BLOCK_E = [
    [("branch1x1", 320, 1)],
    [("branch3x3_1", 384, 1), forked("branch3x3_2")],
    [*chain("branch3x3dbl", (448, 1), (384, 3)), forked("branch3x3dbl_3")],
    [AVERAGE, ("branch_pool", 192, 1)],
]
BLOCKS = {
    "mixed0": ("Mixed_5b", block_a(32)),
    "mixed1": ("Mixed_5c", block_a(64)),
    "mixed2": ("Mixed_5d", block_a(64)),  # (N, 35, 35, 288)
    "mixed3": ("Mixed_6a", BLOCK_B),
    "mixed4": ("Mixed_6b", block_c(128)),
    "mixed5": ("Mixed_6c", block_c(160)),
    "mixed6": ("Mixed_6d", block_c(160)),
    "mixed7": ("Mixed_6e", block_c(192)),  # (N, 17, 17, 768)
    "mixed8": ("Mixed_7a", BLOCK_D),  # (N, 8, 8, 1280)
    "mixed9": ("Mixed_7b", BLOCK_E),
    "mixed10": ("Mixed_7c", BLOCK_E),  # (N, 8, 8, 2048)
}


class ConvBN(Module):
    """relu(bn(conv(x))); epsilon 1e-3, as the published weights need."""

    def __init__(self, c: int, o: int, kernel, stride=1, padding=None, *, rng: np.random.Generator):
        rows, columns = pair(kernel)
        same = (rows // 2, columns // 2) if stride == 1 else 0
        self.conv = Conv2d(c, o, kernel, stride, same if padding is None else padding, rng=rng)
        self.bn = BatchNorm(o, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x), relu=True)


def build(owner: Module, steps: list, c: int, rng: np.random.Generator) -> int:
    """Give `owner` the convolutions of a path that reads c channels; returns how many it makes."""
    for step in steps:
        if isinstance(step, list):
            c = sum(build(owner, path, c, rng) for path in step)
        elif step not in (AVERAGE, MAX):
            setattr(owner, step[0], ConvBN(c, *step[1:], rng=rng))
            c = step[1]
    return c


def run(owner: Module, steps: list, x: Tensor) -> Tensor:
    """Apply a path of `owner` to x."""
    for step in steps:
        if isinstance(step, list):
            x = concatenate([run(owner, path, x) for path in step], axis=3)
        elif step == AVERAGE:
            x = average_pool(x, 3, 1, 1)
        elif step == MAX:
            x = max_pool(x, 3, 2)
        else:
            x = getattr(owner, step[0])(x)
    return x


class InceptionV3(Module):
    """Images (N, H, W, 3) in [-1, 1], at least 75 px, made for 299 -> features (N, 2048).

    No classifier. Random weights are a pure function of `seed`.
    """

    def __init__(self, seed: int = 0):
        rng = np.random.Generator(np.random.Philox(seed))
        c = build(self, STEM, 3, rng)
        for attribute, fork in BLOCKS.values():
            block = Module()
            c = build(block, [fork], c, rng)
            setattr(self, attribute, block)

    def features(self, x: Tensor, block: str) -> Tensor:
        """Output (N, H', W', C) of the block "mixed0" ... "mixed10"; later blocks do not run.

        Raises ConfigError for another name.
        """
        if block not in BLOCKS:
            raise ConfigError(f"InceptionV3 has no block {block!r}: use mixed0 to mixed10")
        x = run(self, STEM, x)  # (N, 35, 35, 192)
        for name, (attribute, fork) in BLOCKS.items():
            x = run(getattr(self, attribute), [fork], x)
            if name == block:
                break
        return x

    def forward(self, x: Tensor) -> Tensor:
        return global_average_pool(self.features(x, "mixed10"))  # (N, 2048)


inception_v3 = InceptionV3
