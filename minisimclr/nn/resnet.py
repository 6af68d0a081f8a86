"""ResNets (He et al. 2016, arXiv:1512.03385) with torchvision's names; stride on the 3x3 ("v1.5").

An encoder maps images (N, H, W, 3) to features h (N, D); there is no classifier on top. The stem is
the original one for large images (7x7 stride 2, max-pool), one 3x3 convolution for images of 32 px
(CIFAR), or, in `resnet_small`, one 3x3 convolution of stride 2. "simclr" is the original stem as
SimCLR's authors built it: TensorFlow's SAME padding puts the max-pool one pixel further on (at even
sizes), so their weights need it.
"""

import numpy as np

from ..backend import activations
from ..errors import ConfigError
from ..ops.basic import cast
from ..ops.pool import global_average_pool, max_pool
from ..tensor import Tensor
from .layers import BatchNorm, Conv2d
from .module import Module, Sequential

# Kernel, stride, padding of the first convolution.
STEMS = {"cifar": (3, 1, 1), "imagenet": (7, 2, 3), "simclr": (7, 2, 3), "small": (3, 2, 1)}


def shortcut(c: int, o: int, stride: int, rng: np.random.Generator) -> Module:
    """What x goes through beside a block: nothing, or a 1x1 convolution if the shape changes."""
    if stride == 1 and c == o:
        return Sequential()
    return Sequential(Conv2d(c, o, 1, stride, rng=rng), BatchNorm(o))


class BasicBlock(Module):
    """relu(x + bn(conv3x3(relu(bn(conv3x3(x))))))"""

    expansion = 1

    def __init__(self, c: int, width: int, stride: int, rng: np.random.Generator):
        self.conv1, self.bn1 = Conv2d(c, width, 3, stride, 1, rng=rng), BatchNorm(width)
        self.conv2, self.bn2 = Conv2d(width, width, 3, 1, 1, rng=rng), BatchNorm(width)
        self.downsample = shortcut(c, width, stride, rng)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1(self.conv1(x), relu=True)
        return self.bn2(self.conv2(y), self.downsample(x), relu=True)


class Bottleneck(Module):
    """relu(x + bn(conv1x1(relu(bn(conv3x3(relu(bn(conv1x1(x)))))))))"""

    expansion = 4

    def __init__(self, c: int, width: int, stride: int, rng: np.random.Generator):
        o = 4 * width
        self.conv1, self.bn1 = Conv2d(c, width, 1, rng=rng), BatchNorm(width)
        self.conv2, self.bn2 = Conv2d(width, width, 3, stride, 1, rng=rng), BatchNorm(width)
        self.conv3, self.bn3 = Conv2d(width, o, 1, rng=rng), BatchNorm(o)
        self.downsample = shortcut(c, o, stride, rng)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1(self.conv1(x), relu=True)
        y = self.bn2(self.conv2(y), relu=True)
        return self.bn3(self.conv3(y), self.downsample(x), relu=True)


class ResNet(Module):
    """A stem, stages of blocks, and the mean over all pixels.

    Images (N, H, W, 3) -> features (N, D); D is the attribute `features`.

    Each stage but the first halves the image and doubles the width.
    blocks: blocks in each stage. stem: the first layers, of STEMS ("cifar" and "small" have no
    max-pool). Random weights are a pure function of `seed`.
    """

    def __init__(
        self, block: type[BasicBlock] | type[Bottleneck], blocks: tuple[int, ...], stem: str,
        width: int, seed: int = 0,
    ):  # fmt: skip
        if stem not in STEMS:
            raise ConfigError(f"unknown stem {stem!r}: use {', '.join(STEMS)}")
        if width < 1:
            raise ConfigError(f"width must be at least 1, not {width}")
        rng = np.random.Generator(np.random.Philox(seed))
        self.stem = stem
        self.conv1 = Conv2d(3, width, *STEMS[stem], rng=rng)
        self.bn1 = BatchNorm(width)
        self.stages, c = len(blocks), width
        for i, depth in enumerate(blocks):
            stage = []
            for j in range(depth):
                stage.append(block(c, width * 2**i, 2 if i > 0 and j == 0 else 1, rng))
                c = width * 2**i * block.expansion
            setattr(self, f"layer{i + 1}", Sequential(*stage))
        self.features = c

    def forward(self, x: Tensor) -> Tensor:
        outside = x.dtype
        x = cast(x, activations.get() or outside)  # bfloat16, if --precision says so
        x = self.bn1(self.conv1(x), relu=True)
        if self.stem == "imagenet":
            x = max_pool(x, 3, 2, 1)
        elif self.stem == "simclr":  # SAME: as little padding as fits, and more of it at the end
            h, w = x.shape[1:3]
            x = max_pool(x, 3, 2, ((h % 2, 1), (w % 2, 1)))
        for i in range(self.stages):
            x = getattr(self, f"layer{i + 1}")(x)
        return global_average_pool(cast(x, outside))  # (N, D)


def resnet10(stem: str = "cifar", width: int = 64, seed: int = 0) -> ResNet:
    return ResNet(BasicBlock, (1, 1, 1, 1), stem, width, seed)


def resnet18(stem: str = "cifar", width: int = 64, seed: int = 0) -> ResNet:
    return ResNet(BasicBlock, (2, 2, 2, 2), stem, width, seed)


def resnet34(stem: str = "cifar", width: int = 64, seed: int = 0) -> ResNet:
    return ResNet(BasicBlock, (3, 4, 6, 3), stem, width, seed)


def resnet50(stem: str = "cifar", width: int = 64, seed: int = 0) -> ResNet:
    return ResNet(Bottleneck, (3, 4, 6, 3), stem, width, seed)


def resnet_small(stem: str = "small", width: int = 32, seed: int = 0) -> ResNet:
    """Three stages of one basic block: learns from 32-px pictures in minutes on a laptop."""
    return ResNet(BasicBlock, (1, 1, 1), stem, width, seed)


ENCODERS = {f.__name__: f for f in (resnet_small, resnet10, resnet18, resnet34, resnet50)}
