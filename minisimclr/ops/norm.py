"""Batch normalisation (Ioffe & Szegedy 2015), with the addition and ReLU that follow it in a
ResNet.

Forward and backward each take two passes over memory. The first gives the second a few numbers per
channel, in arrays (C,); in the backward pass also g, an array like x:

    moments -> scale_shift                gradient_sums -> input_gradient

x is (..., C), normalised per channel over all M = x.size / C rows:

    x^ = (x - mean) / std,  std = sqrt(variance + eps)      y = relu(gamma x^ + beta + residual)
    g = gy where y > 0      gx = (gamma / std) (g - mean(g) - x^ mean(g x^)),  x^ being one name

Faster versions of these passes run unless MINISIMCLR_KERNELS=reference.
"""

from functools import reduce, singledispatch
from math import prod
from weakref import ref

import numpy as np

from ..backend import Array, xp_of
from ..tensor import Function, Tensor
from .basic import relu_gradient

ROWS = 4096  # rows per block: float32 sums of more lose digits, and a block stays in cache


def rows(x: Array) -> Array:
    return x.reshape(-1, x.shape[-1])  # (M, C)


def merge_moments(a: tuple, b: tuple) -> tuple:
    """Moments (count, mean, m2) of two samples combined (Chan, Golub & LeVeque 1979).

    No squared mean is subtracted from a sum of squares, so nothing cancels, however large the mean.
    """
    (n_a, mean_a, m2_a), (n_b, mean_b, m2_b) = a, b
    n, delta = n_a + n_b, mean_b - mean_a
    return n, mean_a + delta * (n_b / n), m2_a + m2_b + delta * delta * (n_a * n_b / n)


@singledispatch
def moments(x: Array) -> tuple[Array, Array]:
    """Mean and variance (divided by M) of x (..., C)."""
    x, parts = rows(x), []
    for i in range(0, len(x), ROWS):
        block = x[i : i + ROWS]  # (m, C)
        mean = block.mean(axis=0)
        parts.append((len(block), mean, ((block - mean) ** 2).sum(axis=0)))
    count, mean, m2 = reduce(merge_moments, parts)
    return mean, m2 / count


def inverse_std(variance: Array, eps: float) -> Array:
    return 1 / xp_of(variance).sqrt(variance + eps)


@singledispatch
def scale_shift(
    x: Array, mean: Array, variance: Array, eps: float, gamma: Array, beta: Array,
    residual: Array | None, relu: bool,
) -> Array:  # fmt: skip
    """y = gamma x^ + beta [+ residual] [max 0]"""
    y = (x - mean) * (gamma * inverse_std(variance, eps)) + beta
    if residual is not None:
        y += residual
    return xp_of(y).maximum(y, 0) if relu else y


@singledispatch
def gradient_sums(
    gy: Array, x: Array, mean: Array, variance: Array, eps: float, y: Array | None
) -> tuple[Array, Array, Array]:
    """Sums of g and of g x^ over the rows, and g: gy itself or, if y is given, a new array that is
    gy where y > 0 and 0 elsewhere.
    """
    g = gy if y is None else relu_gradient(gy, y)
    xp, g_rows, x_rows = xp_of(g), rows(g), rows(x)
    sum_g, sum_gxhat = xp.zeros((2, g.shape[-1]), g.dtype)
    for i in range(0, len(g_rows), ROWS):
        part = g_rows[i : i + ROWS]  # (m, C)
        sum_g += part.sum(axis=0)
        sum_gxhat += (part * (x_rows[i : i + ROWS] - mean)).sum(axis=0)
    return sum_g, sum_gxhat * inverse_std(variance, eps), g


@singledispatch
def input_gradient(
    g: Array, x: Array, mean: Array, variance: Array, eps: float, gamma: Array,
    sum_g: Array, sum_gxhat: Array, count: float, out: Array | None = None,
) -> Array:  # fmt: skip
    """gx from the sums over `count` rows that gradient_sums made; written into `out`, if given,
    which is contiguous and may be g itself.
    """
    inv_std = inverse_std(variance, eps)
    scale = gamma * inv_std
    a, b = scale / -count * sum_g, scale / -count * sum_gxhat * inv_std  # minus both means
    return xp_of(g).add(scale * g, a + b * (x - mean), out=out)


@singledispatch
def update_running(
    mean: Array, variance: Array, batch: tuple[Array, Array], momentum: float, count: int
) -> None:
    """running <- (1 - momentum) running + momentum batch; the batch variance divided by M - 1"""
    for running, new in (mean, batch[0]), (variance, batch[1] * (count / (count - 1))):
        # At 1, not even a rounding error of the old ones stays.
        running[...] = new if momentum == 1 else running + momentum * (new - running)


class BatchNorm(Function):
    """Inputs x (..., C), gamma (C,), beta (C,) and perhaps a residual like x; see the top of this
    file.

    In training the statistics are those of x, kept in self.mean and self.variance (biased);
    otherwise they are the given constants. Saved: x, the convolution's output, rather than x^; and
    y, where `recompute` cannot make it again, or not cheaply.
    """

    def __init__(self, relu: bool, eps: float, mean: Array = None, variance: Array = None):
        self.relu, self.eps = relu, eps
        self.mean, self.variance, self.training = mean, variance, mean is None

    def forward(self, x, gamma, beta, residual=None):
        if self.training:
            self.mean, self.variance = moments(x)
        self.x, self.gamma, self.beta, self.y = x, gamma, beta, None
        y = self.recompute(residual)
        # On a GPU memory is short and a pass is cheap: y is dropped if it can be recomputed.
        self.y = y if residual is not None or (self.relu and xp_of(y) is np) else None
        self.output = ref(y)
        return y

    def can_make(self, y: Array) -> bool:
        """Whether `recompute` gives y: not if its Tensor got other data, nor after backward."""
        return not self.used_up and self.output() is y

    def recompute(self, residual: Array | None = None) -> Array:
        """y; in the backward pass, saved or recomputed (Chen et al. 2016, arXiv:1604.06174)."""
        if self.y is None:
            given = self.mean, self.variance, self.eps, self.gamma, self.beta
            self.y = scale_shift(self.x, *given, residual, self.relu)
        return self.y

    def backward(self, gy):
        y = self.recompute() if self.relu else None
        given = self.x, self.mean, self.variance, self.eps
        sum_g, sum_gxhat, g = gradient_sums(gy, *given, y)
        gx = None
        if self.needs[0]:
            # In evaluation the statistics are constants, as those of infinitely many rows would be.
            count = gy.size // gy.shape[-1] if self.training else np.inf
            # After ReLU, g is ours to overwrite, unless it is also the gradient of a residual.
            out = g if self.relu and len(self.needs) == 3 else None
            gx = input_gradient(g, *given, self.gamma, sum_g, sum_gxhat, count, out)
        return (gx, sum_gxhat, sum_g, g)[: len(self.needs)]  # of x, gamma, beta and the residual


def batch_norm(
    x: Tensor, gamma: Tensor, beta: Tensor, running: tuple[Array, Array], training: bool,
    momentum: float = 0.1, eps: float = 1e-5, residual: Tensor | None = None, relu: bool = False,
) -> Tensor:  # fmt: skip
    """relu(normalised x * gamma + beta + residual), relu and residual optional; all (..., C) except
    gamma and beta (C,).

    running: (mean, variance), used in evaluation; in training updated in place,
    new = (1 - momentum) old + momentum batch, with the unbiased variance (divided by M - 1), as
    in torch. Raises ValueError for other shapes of the rest, or to train on fewer than two rows.
    """
    if not x.shape[-1:] == gamma.shape == beta.shape:
        raise ValueError(f"batch norm of {gamma.shape} channels does not fit {x.shape}")
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"batch norm: the residual is {residual.shape}, but x is {x.shape}")
    inputs = (x, gamma, beta) if residual is None else (x, gamma, beta, residual)
    if not training:
        constants = (each.copy() for each in running)  # the next training step changes them
        return BatchNorm(relu, eps, *constants)(*inputs)
    count = prod(x.shape[:-1])
    if count < 2:
        raise ValueError(f"batch norm needs at least two rows to train on, not shape {x.shape}")
    function = BatchNorm(relu, eps)
    y = function(*inputs)
    update_running(*running, (function.mean, function.variance), momentum, count)
    return y
