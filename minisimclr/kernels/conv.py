"""The passes of a convolution for NumPy, each by the method that costs least for its shape.

    1x1                       a matrix product on the pixels as they lie in memory
    3x3, stride 1             Winograd, where its tiles cost less (winograd.py): the output, or the
                              two gradients together
    anything else             im2col in blocks that stay in cache

Each thread has its own part of the work, and single-threaded BLAS. That is faster than one thread
with threaded BLAS, since copies and small products then run side by side as well.
"""

import numpy as np

from ..backend import Array
from ..cores import parallel
from ..ops import conv as ops
from ..ops.conv import Pair, fold, output_size
from . import winograd
from .registry import blocks, for_float32, in_blocks

WORKSPACE = 1 << 18  # numbers in one block of patches: 1 MiB, a core's second-level cache


def is_pointwise(w_shape: tuple, padding: Pair) -> bool:
    return w_shape[:2] == (1, 1) and padding == (0, 0)


@for_float32(ops.conv_output)
def output(x, w, stride, padding):
    size = output_size(x.shape, w.shape, stride, padding)
    if m := winograd.tile(len(x), w.shape, size, stride, padding):
        return winograd.output(x, w, padding[0], size, m)
    y = np.empty((len(x), *size, w.shape[3]), x.dtype)
    matrix = w.reshape(-1, w.shape[3])  # (KH*KW*C, O)

    def work(some: slice) -> None:
        rows = patches(x[some], w.shape, stride, padding, size)
        np.matmul(rows, matrix, out=y[some].reshape(-1, w.shape[3]))  # (n*OH*OW, O)

    in_blocks(work, len(x), WORKSPACE // (size[0] * size[1] * len(matrix)))
    return y


@for_float32(ops.conv_input_gradient)
def input_gradient(gy, w, x_shape, stride, padding):
    size = gy.shape[1:3]
    gx = np.empty(x_shape, gy.dtype)
    c, o = w.shape[2:]
    matrix = w.reshape(-1, o)  # (KH*KW*C, O)
    if is_pointwise(w.shape, padding):
        g = np.ascontiguousarray(gy).reshape(-1, o)  # (N*OH*OW, O)
        part = gx if stride == (1, 1) else np.empty((*gy.shape[:3], c), gy.dtype)
        flat = part.reshape(-1, c)
        parallel(lambda i, k: np.matmul(g[i:k], matrix.T, out=flat[i:k]), len(g))
        if part is not gx:
            gx[...] = 0
            gx[:, :: stride[0], :: stride[1]] = part
        return gx

    def work(some: slice) -> None:
        rows = gy[some].reshape(-1, o) @ matrix.T  # (n*OH*OW, KH*KW*C)
        fold(rows, gx[some], w.shape[:2], stride, padding, size)

    in_blocks(work, len(gy), WORKSPACE // (size[0] * size[1] * len(matrix)))
    return gx


@for_float32(ops.conv_weight_gradient)
def weight_gradient(gy, x, w_shape, stride, padding):
    size = gy.shape[1:3]
    kh, kw, c, o = w_shape
    if is_pointwise(w_shape, padding):
        x = np.ascontiguousarray(x[:, :: stride[0], :: stride[1]]).reshape(-1, c)  # (N*OH*OW, C)
        g = np.ascontiguousarray(gy).reshape(-1, o)  # (N*OH*OW, O)
        gw = np.empty((c, o), gy.dtype)
        parallel(lambda i, k: np.matmul(x[:, i:k].T, g, out=gw[i:k]), c)
        return gw.reshape(w_shape)

    def work(start: int, stop: int) -> Array:
        gw = np.zeros((kh * kw * c, o), gy.dtype)
        for block in blocks(start, stop, WORKSPACE // (size[0] * size[1] * len(gw))):
            rows = patches(x[block], w_shape, stride, padding, size)
            gw += rows.T @ gy[block].reshape(-1, o)  # (KH*KW*C, n*OH*OW) @ (n*OH*OW, O)
        return gw

    return sum(parallel(work, len(x))).reshape(w_shape)


@for_float32(ops.conv_gradients)
def gradients(gy, x, w, stride, padding):
    if m := winograd.tile(len(x), w.shape, x.shape[1:3], stride, padding):
        return winograd.gradients(gy, x, w, padding[0], m)
    gx = input_gradient(gy, w, x.shape, stride, padding)
    return gx, weight_gradient(gy, x, w.shape, stride, padding)


def patches(x: Array, w_shape: tuple, stride: Pair, padding: Pair, size: Pair) -> Array:
    """Patches of x (n, H, W, C) as rows (n*OH*OW, KH*KW*C).

    One row of a patch is contiguous in the padded image, so one copy of overlapping views does it
    all. As untyped bytes, pieces of few numbers are copied twice as fast.
    """
    n, h, w, c = x.shape
    (kh, kw), (sh, sw), (ph, pw), (oh, ow) = w_shape[:2], stride, padding, size
    if is_pointwise(w_shape, padding):
        return np.ascontiguousarray(x[:, ::sh, ::sw]).reshape(-1, c)  # a view for a stride of 1
    if ph or pw:
        padded = np.zeros((n, h + 2 * ph, w + 2 * pw, c), x.dtype)
        padded[:, ph : ph + h, pw : pw + w] = x
        x = padded
    x = np.ascontiguousarray(x)
    # Bytes from one to the next; not x.strides, which may be anything for an axis of length 1.
    pixel, row = (np.prod(x.shape[k:]) * x.itemsize for k in (3, 2))
    piece = np.dtype(f"V{kw * pixel}")
    views = np.ndarray((n, oh, ow, kh), piece, x, 0, (x.shape[1] * row, sh * row, sw * pixel, row))
    return np.ascontiguousarray(views).view(x.dtype).reshape(n * oh * ow, kh * kw * c)
