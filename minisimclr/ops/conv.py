"""Convolution as matrix products: unfold patches, multiply, fold back (im2col, Chellapilla et al.
2006).

A layer's work is three passes: its output, the gradient of its input, the gradient of its weight.
Each unfolds a few images at a time, so the workspace does not grow with the batch: on a CPU it
stays near the size of a cache. Arrays are NHWC and weights HWIO, (KH, KW, C, O), so that a weight
is already a matrix in memory. Faster versions of these passes run unless
MINISIMCLR_KERNELS=reference.
"""

from collections.abc import Iterable, Iterator
from functools import singledispatch
from math import ceil
from numbers import Integral
from typing import Any

import numpy as np

from ..backend import Array, xp_of
from ..tensor import Function, Tensor
from .basic import cast
from .product import matmul

Pair = tuple[int, int]
# ((top, bottom), (left, right)) in pixels. TensorFlow's SAME may pad more at the end of an axis.
Padding = tuple[Pair, Pair]
WORKSPACE = 1 << 22  # numbers in one block of unfolded patches
GPU_WORKSPACE = 1 << 27  # on a GPU: products large enough to keep all multiprocessors busy


def output_size(x_shape: tuple, w_shape: tuple, stride: Pair, padding: Pair) -> Pair:
    """(OH, OW): how often a kernel fits into a padded image."""
    sizes = zip(x_shape[1:3], w_shape[:2], stride, padding, strict=True)
    height, width = ((n + 2 * p - k) // s + 1 for n, k, s, p in sizes)
    return height, width


def windows(x: Array, kernel: Pair, stride: Pair, size: Pair) -> Iterator[Array]:
    """For each pixel of the kernel, the view of x that holds this pixel of every window."""
    (sh, sw), (oh, ow) = stride, size
    for i in range(kernel[0]):
        for j in range(kernel[1]):
            yield x[:, i : i + sh * oh : sh, j : j + sw * ow : sw]  # (N, OH, OW, C)


def sum_windows(
    parts: Iterable[Array], gy: Array, x_shape: tuple, kernel: Pair, stride: Pair, padding: Padding
) -> Array:
    """The transpose of `windows`: an image of x_shape, each pixel the sum of its copies in `parts`.

    parts: for each pixel of the kernel, an array (N, OH, OW, C); gy has their OH, OW and dtype.
    """
    (n, h, w, c), ((top, bottom), (left, right)) = x_shape, padding
    gx = xp_of(gy).zeros((n, h + top + bottom, w + left + right, c), gy.dtype)
    for window, part in zip(windows(gx, kernel, stride, gy.shape[1:3]), parts, strict=True):
        window += part
    return gx[:, top : top + h, left : left + w]


@singledispatch
def unfold(x: Array, kernel: Pair, stride: Pair, padding: Pair, size: Pair) -> Array:
    """Patches of x (N, H, W, C) as rows: (N*OH*OW, KH*KW*C)."""
    xp = xp_of(x)
    (kh, kw), (sh, sw), (ph, pw), (oh, ow) = kernel, stride, padding, size
    n, _, _, c = x.shape
    if (kh, kw, ph, pw) == (1, 1, 0, 0):
        return xp.ascontiguousarray(x[:, ::sh, ::sw]).reshape(-1, c)  # (N*OH*OW, C)
    x = xp.pad(x, ((0, 0), (ph, ph), (pw, pw), (0, 0)))
    patches = xp.empty((n, oh, ow, kh * kw, c), x.dtype)
    for k, window in enumerate(windows(x, kernel, stride, size)):
        patches[:, :, :, k] = window
    return patches.reshape(n * oh * ow, kh * kw * c)


@singledispatch
def fold(patches: Array, out: Array, kernel: Pair, stride: Pair, padding: Pair, size: Pair):
    """The transpose of `unfold`: each pixel of `out` (N, H, W, C) sums its copies in patches."""
    # (N, OH, OW, KH*KW, C)
    patches = patches.reshape(len(out), *size, kernel[0] * kernel[1], out.shape[3])
    parts, (ph, pw) = patches.transpose(3, 0, 1, 2, 4), padding
    out[...] = sum_windows(parts, patches, out.shape, kernel, stride, ((ph, ph), (pw, pw)))
    return out


def image_blocks(x: Array, each: int) -> list[slice]:
    """Split a batch of images into blocks whose patches, `each` numbers for each image, fit the
    workspace; all of about the same size, since a short one would leave a GPU half idle.
    """
    most = max(1, (WORKSPACE if xp_of(x) is np else GPU_WORKSPACE) // each)
    count = max(1, ceil(len(x) / most))
    step = max(1, ceil(len(x) / count))
    return [slice(i, i + step) for i in range(0, len(x), step)]


@singledispatch
def conv_output(x: Array, w: Array, stride: Pair, padding: Pair) -> Array:
    """x (N, H, W, C) and w (KH, KW, C, O) -> (N, OH, OW, O)"""
    size = output_size(x.shape, w.shape, stride, padding)
    # (KH*KW*C, O); where x is bfloat16, cast here, and not once for each block
    matrix = w.reshape(-1, w.shape[3]).astype(x.dtype, copy=False)
    y = xp_of(x).empty((len(x), *size, w.shape[3]), x.dtype)
    for block in image_blocks(x, size[0] * size[1] * len(matrix)):
        patches = unfold(x[block], w.shape[:2], stride, padding, size)
        matmul(patches, matrix, y[block].reshape(-1, w.shape[3]))  # (n*OH*OW, O)
    return y


@singledispatch
def conv_input_gradient(gy: Array, w: Array, x_shape: tuple, stride: Pair, padding: Pair) -> Array:
    """gy (N, OH, OW, O) -> gradient of x, of shape x_shape (N, H, W, C)"""
    size = gy.shape[1:3]
    matrix = w.reshape(-1, w.shape[3]).astype(gy.dtype, copy=False)  # (KH*KW*C, O)
    gx = xp_of(gy).empty(x_shape, gy.dtype)
    for block in image_blocks(gy, size[0] * size[1] * len(matrix)):
        g = gy[block].reshape(-1, w.shape[3])  # (n*OH*OW, O)
        if (*w.shape[:2], *stride, *padding) == (1, 1, 1, 1, 0, 0):  # patches are pixels
            matmul(g, matrix.T, gx[block].reshape(-1, w.shape[2]))  # (n*H*W, C)
        else:
            # (n*OH*OW, O) @ (O, KH*KW*C)
            patches = matmul(g, matrix.T, xp_of(g).empty((len(g), len(matrix)), g.dtype))
            fold(patches, gx[block], w.shape[:2], stride, padding, size)
    return gx


@singledispatch
def conv_weight_gradient(gy: Array, x: Array, w_shape: tuple, stride: Pair, padding: Pair) -> Array:
    """gy (N, OH, OW, O) and x (N, H, W, C) -> gradient of w, of shape w_shape (KH, KW, C, O)"""
    size = gy.shape[1:3]
    shape = w_shape[0] * w_shape[1] * w_shape[2], w_shape[3]
    gw = xp_of(gy).zeros(shape, np.promote_types(gy.dtype, np.float32))  # float32 of bfloat16, too
    for block in image_blocks(gy, size[0] * size[1] * len(gw)):
        patches = unfold(x[block], w_shape[:2], stride, padding, size)
        g = gy[block].reshape(-1, w_shape[3])  # (n*OH*OW, O)
        gw += matmul(patches.T, g)  # (KH*KW*C, n*OH*OW) @ (n*OH*OW, O)
    return gw.reshape(w_shape)


@singledispatch
def conv_gradients(gy: Array, x: Array, w: Array, stride: Pair, padding: Pair) -> tuple:
    """gy (N, OH, OW, O), x (N, H, W, C) and w (KH, KW, C, O) -> gradients of x and of w; a faster
    version may share work between them.
    """
    gx = conv_input_gradient(gy, w, x.shape, stride, padding)
    return gx, conv_weight_gradient(gy, x, w.shape, stride, padding)


class Conv2d(Function):
    """y[n, i, j, o] = sum over a, b, c of x[n, sh*i + a - ph, sw*j + b - pw, c] * w[a, b, c, o]

    x is not saved if a `source`, the batch norm that made it, can recompute it: see norm.py.
    """

    def __init__(self, stride: Pair, padding: Pair, source: Any = None):
        self.stride, self.padding, self.source = stride, padding, source

    def forward(self, x, w):
        self.x, self.w = None if self.source else x, w
        return conv_output(x, w, self.stride, self.padding)

    def backward(self, gy):
        x = self.source.recompute() if self.source else self.x
        if all(self.needs):
            return conv_gradients(gy, x, self.w, self.stride, self.padding)
        if self.needs[0]:
            return conv_input_gradient(gy, self.w, self.shapes[0], self.stride, self.padding), None
        return None, conv_weight_gradient(gy, x, self.w.shape, self.stride, self.padding)


def pair(value: Any) -> Pair:
    """One number for both axes as a pair; a pair unchanged."""
    return (int(value), int(value)) if isinstance(value, Integral) else value


def conv2d(x: Tensor, weight: Tensor, stride: int | Pair = 1, padding: int | Pair = 0) -> Tensor:
    """Cross-correlate images x (N, H, W, C) with weight (KH, KW, C, O) -> (N, OH, OW, O).

    stride and padding (zeros) in pixels, one number or (rows, columns).
    Raises ValueError for other shapes, if channels differ, the kernel is larger than the padded
    image, a stride is below 1 or a padding below 0.
    """
    stride, padding = pair(stride), pair(padding)
    if min(stride) < 1 or min(padding) < 0:
        raise ValueError(f"conv2d: stride {stride} must be 1 or more, padding {padding} 0 or more")
    fit = x.ndim == weight.ndim == 4 and x.shape[3] == weight.shape[2]
    if not fit or min(output_size(x.shape, weight.shape, stride, padding)) < 1:
        said = f"weight {weight.shape} does not fit images {x.shape} padded {padding}"
        raise ValueError(f"conv2d: {said}: they are (KH, KW, C, O) and (N, H, W, C)")
    if {x.dtype, weight.dtype} == {np.dtype(np.float32), np.dtype(np.float64)}:
        x, weight = cast(x, np.float64), cast(weight, np.float64)
    made_by: Any = getattr(x, "creator", None)  # an array has none: Conv2d will say what it takes
    source = made_by if hasattr(made_by, "can_make") and made_by.can_make(x.data) else None
    return Conv2d(stride, padding, source)(x, weight)
