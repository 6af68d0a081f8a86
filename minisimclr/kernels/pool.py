"""Max pooling for NumPy, without boolean masks: applying one takes NumPy twenty times as long as
multiplying.
"""

from math import prod

import numpy as np

from ..ops.conv import sum_windows, windows
from ..ops.pool import max_pool_input_gradient, max_pool_output, pooled_size
from .registry import for_float32, in_blocks

BLOCK = 1 << 16  # maxima of a block of images: 256 KiB, and their windows stay in cache


@for_float32(max_pool_output)
def _max_pool_output(x, kernel, stride, padding):
    count = prod(kernel)
    size = pooled_size(x.shape, kernel, stride, padding)
    y = np.empty((len(x), *size, x.shape[3]), x.dtype)
    argmax = np.empty(y.shape, np.uint8)

    def work(some: slice) -> None:
        padded = np.pad(x[some], ((0, 0), *padding, (0, 0)), constant_values=-np.inf)
        views = list(windows(padded, kernel, stride, size))  # count times (n, OH, OW, C)
        best = y[some]
        np.copyto(best, views[0])
        for view in views[1:]:
            np.maximum(best, view, out=best)
        # The first window pixel that equals the maximum has the highest rank; where none does,
        # because the maximum is NaN, it is the last.
        rank, equal = np.ones(best.shape, np.uint8), np.empty(best.shape, bool)
        for k, view in enumerate(views):
            np.equal(view, best, out=equal)
            ranked = equal.view(np.uint8)
            ranked *= np.uint8(count - k)
            np.maximum(rank, ranked, out=rank)
        np.subtract(np.uint8(count), rank, out=argmax[some])

    in_blocks(work, len(x), BLOCK // prod(y.shape[1:]))
    return y, argmax


@for_float32(max_pool_input_gradient)
def _max_pool_input_gradient(gy, argmax, x_shape, kernel, stride, padding):
    gx = np.empty(x_shape, gy.dtype)

    def work(some: slice) -> None:
        g, winner = gy[some], argmax[some]
        mask, part = np.empty(g.shape, bool), np.empty_like(g)
        won = (np.equal(winner, k, out=mask) for k in range(prod(kernel)))
        parts = (np.multiply(g, here, out=part) for here in won)
        gx[some] = sum_windows(parts, g, gx[some].shape, kernel, stride, padding)

    in_blocks(work, len(gy), BLOCK // prod(gy.shape[1:]))
    return gx
