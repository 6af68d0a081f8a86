"""Layers: convolution, dense, batch normalisation, dropout; and their initial weights."""

import numpy as np

from ..ops.conv import Pair, conv2d, pair
from ..ops.norm import batch_norm
from ..ops.product import linear
from ..tensor import Parameter, Tensor
from .module import Module


class Conv2d(Module):
    """Convolution without bias of images (N, H, W, C); weight (KH, KW, C, O).

    Weights start normal with variance 2 / (KH KW O), which keeps the size of gradients through ReLU
    (He et al. 2015, "fan out", as in torchvision's ResNets).
    """

    def __init__(
        self, c: int, o: int, kernel: int | Pair, stride: int | Pair = 1, padding: int | Pair = 0,
        *, rng: np.random.Generator,
    ):  # fmt: skip
        self.stride, self.padding = pair(stride), pair(padding)
        shape = (*pair(kernel), c, o)
        std = np.sqrt(2 / (shape[0] * shape[1] * o))
        self.weight = Parameter(rng.standard_normal(shape, np.float32) * np.float32(std))

    def forward(self, x: Tensor) -> Tensor:
        return conv2d(x, self.weight, self.stride, self.padding)


class Linear(Module):
    """Dense layer (N, C) -> (N, O); weight (O, C), perhaps a bias (O,).

    Weights start normal with standard deviation `std` (default sqrt(2 / C), He et al. 2015), the
    bias 0.
    """

    def __init__(
        self, c: int, o: int, bias: bool = True, std: float | None = None,
        *, rng: np.random.Generator,
    ):  # fmt: skip
        std = np.sqrt(2 / c) if std is None else std
        self.weight = Parameter(rng.standard_normal((o, c), np.float32) * np.float32(std))
        self.bias = Parameter(np.zeros(o, np.float32), adapt=False) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class BatchNorm(Module):
    """Batch normalisation of (..., C) with running statistics, in torch's names and conventions.

    With a residual and relu=True, it computes the end of a ResNet block in the same two passes.
    beta=False leaves out the shift, as the last layer of SimCLR's projection head does.
    momentum=None: running statistics are the mean of those of all batches so far.
    """

    buffers = ("running_mean", "running_var", "num_batches_tracked")

    def __init__(self, c: int, eps: float = 1e-5, momentum: float | None = 0.1, beta: bool = True):
        self.eps, self.momentum = eps, momentum
        self.weight = Parameter(np.ones(c, np.float32), adapt=False)
        self.bias = Parameter(np.zeros(c, np.float32), adapt=False) if beta else None
        self.running_mean = np.zeros(c, np.float32)
        self.running_var = np.ones(c, np.float32)
        self.num_batches_tracked = np.zeros((), np.int64)

    def forward(self, x: Tensor, residual: Tensor | None = None, relu: bool = False) -> Tensor:
        if self.training:
            self.num_batches_tracked = self.num_batches_tracked + 1
        beta = Tensor(0 * self.weight.data) if self.bias is None else self.bias
        mean_of_all = 1 / max(1, int(self.num_batches_tracked))
        momentum = mean_of_all if self.momentum is None else self.momentum
        given = (self.running_mean, self.running_var), self.training, momentum, self.eps, residual
        return batch_norm(x, self.weight, beta, *given, relu)


class Dropout(Module):
    """While training, zero each number with probability p, scale the others by 1 / (1 - p).

    This "inverted" dropout leaves nothing to do in evaluation (Srivastava et al. 2014).
    """

    def __init__(self, p: float, *, rng: np.random.Generator):
        if not 0 <= p < 1:
            raise ValueError(f"Dropout: p must be at least 0 and less than 1, not {p}")
        self.p, self.rng = p, rng

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        keep = self.rng.random(x.shape, np.float32) >= self.p
        return x * (keep / (1 - self.p))
