"""Max, average and global pooling of images (N, H, W, C).

Faster versions of the passes of max-pooling run unless MINISIMCLR_KERNELS=reference.
"""

from functools import singledispatch
from itertools import repeat
from math import prod

from ..backend import Array, xp_of
from ..tensor import Function, Tensor
from .conv import Padding, Pair, pair, sum_windows, windows


def pads(padding: int | Pair | Padding) -> Padding:
    """((top, bottom), (left, right)) of one number, of (rows, columns), or of all four."""
    rows, columns = pair(padding)
    return pair(rows), pair(columns)


def pooled_size(x_shape: tuple, kernel: Pair, stride: Pair, padding: Padding) -> Pair:
    """(OH, OW): how often a window fits into a padded image (N, H, W, C). Raises ValueError."""
    if min(stride) < 1 or any(k <= max(p) for k, p in zip(kernel, padding, strict=True)):
        given = f"kernel {kernel}, padding {padding}, stride {stride}"
        raise ValueError(f"pooling: {given}: kernel must exceed padding, stride must be at least 1")
    sizes = zip(x_shape[1:3], kernel, stride, padding, strict=True)
    height, width = ((n + sum(p) - k) // s + 1 for n, k, s, p in sizes)
    if min(height, width) < 1:
        raise ValueError(f"pooling: kernel {kernel} exceeds images {x_shape} padded {padding}")
    return height, width


@singledispatch
def max_pool_output(x: Array, kernel: Pair, stride: Pair, padding: Padding) -> tuple[Array, Array]:
    """Largest value of each window, and (uint8) the index of its pixel, the first among equals."""
    xp = xp_of(x)
    size = pooled_size(x.shape, kernel, stride, padding)
    x = xp.pad(x, ((0, 0), *padding, (0, 0)), constant_values=-xp.inf)
    y = xp.full((len(x), *size, x.shape[3]), -xp.inf, x.dtype)
    argmax = xp.zeros(y.shape, xp.uint8)
    for k, window in enumerate(windows(x, kernel, stride, size)):
        larger = (window > y) | xp.isnan(window)  # NaN is passed on
        y = xp.where(larger, window, y)
        argmax = xp.where(larger, xp.uint8(k), argmax)
    return y, argmax


@singledispatch
def max_pool_input_gradient(
    gy: Array, argmax: Array, x_shape: tuple, kernel: Pair, stride: Pair, padding: Padding
) -> Array:
    """Each window's gradient goes to the pixel that was its maximum."""
    parts = (gy * (argmax == k) for k in range(prod(kernel)))
    return sum_windows(parts, gy, x_shape, kernel, stride, padding)


class Pool(Function):
    """Windows of `kernel` pixels, one every `stride` pixels, over padded images"""

    def __init__(self, kernel: Pair, stride: Pair, padding: Padding):
        self.geometry = kernel, stride, padding


class MaxPool(Pool):
    """Largest value of each window"""

    def forward(self, x):
        y, self.argmax = max_pool_output(x, *self.geometry)
        return y

    def backward(self, gy):
        return max_pool_input_gradient(gy, self.argmax, self.shapes[0], *self.geometry)


class AveragePool(Pool):
    """Mean of each window; padding counts neither in the sum nor in the number of pixels."""

    def forward(self, x):
        xp, (kernel, stride, padding) = xp_of(x), self.geometry
        size, around = pooled_size(x.shape, *self.geometry), ((0, 0), *padding, (0, 0))
        inside = xp.pad(xp.ones((1, *x.shape[1:3], 1), x.dtype), around)
        self.count = sum(windows(inside, kernel, stride, size))  # (1, OH, OW, 1)
        return sum(windows(xp.pad(x, around), kernel, stride, size)) / self.count

    def backward(self, gy):
        parts = repeat(gy / self.count, prod(self.geometry[0]))
        return sum_windows(parts, gy, self.shapes[0], *self.geometry)


def max_pool(
    x: Tensor, kernel: int | Pair, stride: int | Pair, padding: int | Pair | Padding = 0
) -> Tensor:
    """Maximum of each window of x (N, H, W, C); padding is never the maximum.

    Raises ValueError for windows of more than 255 pixels (the fast version counts them from 1, in
    a byte), of padding alone, or larger than the padded image, and for strides below 1.
    """
    if (pixels := prod(pair(kernel))) > 255:
        raise ValueError(f"max_pool: a kernel of {pixels} pixels is too large: 255 are the most")
    return MaxPool(pair(kernel), pair(stride), pads(padding))(x)


def average_pool(
    x: Tensor, kernel: int | Pair, stride: int | Pair, padding: int | Pair | Padding = 0
) -> Tensor:
    """Mean of the pixels of each window of x (N, H, W, C) that are not padding.

    Raises ValueError for windows of padding alone, or larger than the padded image, and for strides
    below 1.
    """
    return AveragePool(pair(kernel), pair(stride), pads(padding))(x)


def global_average_pool(x: Tensor) -> Tensor:
    """Mean over the pixels: (N, H, W, C) -> (N, C)"""
    return x.mean(axis=(1, 2))
