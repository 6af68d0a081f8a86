"""Max pooling for NumPy: no boolean masks, which NumPy applies twenty times slower than it
multiplies.
"""

import numpy as np

from ..backend import Array, parallel
from ..ops.conv import Pair
from ..ops.pool import Padding, max_pool_input_gradient, max_pool_output, output_size, windows
from .registry import for_float32


@for_float32(max_pool_output)
def _max_pool_output(x: Array, kernel: Pair, stride: Pair, padding: Padding) -> tuple[Array, Array]:
    count = kernel[0] * kernel[1]
    size = output_size(x.shape, kernel, stride, padding)
    y = np.empty((len(x), *size, x.shape[3]), x.dtype)
    argmax = np.empty(y.shape, np.uint8)

    def work(start: int, stop: int) -> None:
        for i in range(start, stop):
            image = np.pad(x[i : i + 1], ((0, 0), *padding, (0, 0)), constant_values=-np.inf)
            views = list(windows(image, kernel, stride, size))  # count times (1, OH, OW, C)
            best = y[i : i + 1]
            np.copyto(best, views[0])
            for view in views[1:]:
                np.maximum(best, view, out=best)
            # The first window pixel that equals the maximum is the one of highest rank.
            rank = np.zeros(best.shape, np.uint8)
            for k, view in enumerate(views):
                equal = (view == best).view(np.uint8)
                equal *= np.uint8(count - k)
                np.maximum(rank, equal, out=rank)
            np.subtract(np.uint8(count), rank, out=argmax[i : i + 1])

    parallel(work, len(x))
    return y, argmax


@for_float32(max_pool_input_gradient)
def _max_pool_input_gradient(
    gy: Array, argmax: Array, x_shape: tuple, kernel: Pair, stride: Pair, padding: Padding
) -> Array:
    _, h, w, c = x_shape
    (top, bottom), (left, right) = padding
    gx = np.empty(x_shape, gy.dtype)

    def work(start: int, stop: int) -> None:
        for i in range(start, stop):
            padded = np.zeros((1, h + top + bottom, w + left + right, c), gy.dtype)
            for k, view in enumerate(windows(padded, kernel, stride, gy.shape[1:3])):
                view += gy[i] * (argmax[i] == k)
            gx[i] = padded[0, top : top + h, left : left + w]

    parallel(work, len(gy))
    return gx
