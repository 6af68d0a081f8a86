"""Batch normalisation (Ioffe & Szegedy 2015), with the addition and ReLU that follow it in a
ResNet.

Forward and backward are two passes over memory each, and between the two stand a few numbers per
channel:

    moments -> scale_shift                gradient_sums -> input_gradient

x is (..., C), normalised per channel over all M = x.size / C rows:

    x^ = (x - mean) / sqrt(variance + eps)        y = relu(gamma x^ + beta + residual)
    g  = gy where y > 0                           gx = gamma / std (g - mean(g) - x^ mean(g x^))
"""

from functools import singledispatch

import numpy as np

from ..backend import Array, xp_of
from ..tensor import Function, Tensor
from .basic import relu_gradient

ROWS = 4096  # rows in one block of the reference passes: what they make in between stays in cache


def rows(x: Array) -> Array:
    return x.reshape(-1, x.shape[-1])  # (M, C)


def merge_moments(a: tuple, b: tuple) -> tuple:
    """Moments (count, mean, m2) of two samples put together (Chan, Golub & LeVeque 1979).

    Sums of squares never meet a squared mean, so nothing cancels however large the mean is.
    """
    (n_a, mean_a, m2_a), (n_b, mean_b, m2_b) = a, b
    n, delta = n_a + n_b, mean_b - mean_a
    return n, mean_a + delta * (n_b / n), m2_a + m2_b + delta * delta * (n_a * n_b / n)


@singledispatch
def moments(x: Array) -> tuple[Array, Array]:
    """Mean and sum of squared deviations of x (..., C), each (C,)."""
    x = rows(x)
    total = None
    for i in range(0, len(x), ROWS):
        block = x[i : i + ROWS]  # (m, C)
        mean = block.mean(axis=0)
        part = len(block), mean, ((block - mean) ** 2).sum(axis=0)
        total = part if total is None else merge_moments(total, part)
    assert total is not None
    return total[1], total[2]


@singledispatch
def scale_shift(
    x: Array, mean: Array, scale: Array, shift: Array, residual: Array | None, relu: bool
) -> Array:
    """y = (x - mean) * scale + shift [+ residual] [max 0], per channel; shapes (..., C) and (C,)"""
    y = (x - mean) * scale + shift
    if residual is not None:
        y += residual
    return xp_of(y).maximum(y, 0) if relu else y


@singledispatch
def gradient_sums(
    gy: Array, x: Array, mean: Array, inv_std: Array, y: Array | None
) -> tuple[Array, Array, Array]:
    """Sums of g and of g x^ over the rows, each (C,), and g: gy itself, or, if y is given, an array
    of its own that is gy where y > 0 and else 0.
    """
    g = gy if y is None else relu_gradient(gy, y)
    xp, g_rows, x_rows = xp_of(g), rows(g), rows(x)
    sum_g, sum_gx = xp.zeros((2, g.shape[-1]), g.dtype)
    for i in range(0, len(g_rows), ROWS):
        part = g_rows[i : i + ROWS]  # (m, C)
        sum_g += part.sum(axis=0)
        sum_gx += (part * (x_rows[i : i + ROWS] - mean)).sum(axis=0)
    return sum_g, sum_gx * inv_std, g


@singledispatch
def input_gradient(
    g: Array, x: Array, mean: Array, scale: Array, a: Array, b: Array, out: Array | None = None
) -> Array:
    """gx = scale * g + a + b * (x - mean); vectors are (C,). Into `out` if given, which lies in one
    piece and may be g.
    """
    return xp_of(g).add(scale * g, a + b * (x - mean), out=out)


class BatchNorm(Function):
    """Inputs x (..., C), gamma (C,), beta (C,) and perhaps a residual like x; see the top of this
    file.

    In training the statistics are those of x, afterwards in self.mean and self.variance (biased);
    else they are the constants given. Saved: x, which the convolution made, rather than x^, and y
    where `again` could not make it, or not cheaply.
    """

    def __init__(
        self, relu: bool, eps: float, mean: Array | None = None, variance: Array | None = None
    ):
        self.relu, self.eps = relu, eps
        self.mean: Array = mean
        self.variance: Array = variance
        self.training = mean is None

    def forward(self, x, gamma, beta, residual=None):
        if self.training:
            self.mean, m2 = moments(x)
            self.variance = m2 / (x.size // x.shape[-1])
        self.inv_std = 1 / xp_of(x).sqrt(self.variance + self.eps)
        self.scale = gamma * self.inv_std
        y = scale_shift(x, self.mean, self.scale, beta, residual, self.relu)
        if any(self.needs):
            self.x, self.beta = x, beta
            # On a GPU memory is short and a pass is cheap: there y goes, if it can be had again.
            self.y = y if residual is not None or (self.relu and xp_of(y) is np) else None
        return y

    def again(self) -> Array:
        """y, in the backward pass: saved, or made anew (Chen et al. 2016, arXiv:1604.06174)."""
        if self.y is None:
            self.y = scale_shift(self.x, self.mean, self.scale, self.beta, None, self.relu)
        return self.y

    def backward(self, gy):
        y = self.again() if self.relu else None
        sum_g, sum_gx, g = gradient_sums(gy, self.x, self.mean, self.inv_std, y)
        gx = None
        if self.needs[0]:
            count = gy.size // gy.shape[-1]  # M
            # In evaluation the statistics are constants: x does not reach y through them.
            of_mean = self.scale / -count if self.training else 0 * self.scale
            a, b = of_mean * sum_g, of_mean * sum_gx * self.inv_std
            # Behind ReLU g is ours to write over, unless it is the gradient of a residual as well.
            out = g if self.relu and len(self.needs) == 3 else None
            gx = input_gradient(g, self.x, self.mean, self.scale, a, b, out)
        return (gx, sum_gx, sum_g, g)[: len(self.needs)]


def batch_norm(
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    running: tuple[Array, Array],
    training: bool,
    momentum: float = 0.1,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    relu: bool = False,
) -> Tensor:
    """relu(normalised x * gamma + beta + residual), the last two as asked for; all (..., C), gamma
    (C,).

    running: (mean, variance), used in evaluation; in training moved towards the batch's own in
    place, new = (1 - momentum) old + momentum batch, the variance unbiased (divided by M - 1), as
    torch does.
    """
    inputs = (x, gamma, beta) if residual is None else (x, gamma, beta, residual)
    if not training:
        return BatchNorm(relu, eps, *running)(*inputs)
    count = x.data.size // x.shape[-1]
    if count < 2:
        raise ValueError(f"batch norm needs at least two rows to train on, not shape {x.shape}")
    function = BatchNorm(relu, eps)
    y = function(*inputs)
    mean, variance = running
    mean += momentum * (function.mean - mean)
    variance += momentum * (function.variance * (count / (count - 1)) - variance)
    return y
