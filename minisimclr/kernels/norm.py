"""The passes of batch normalisation and ReLU for NumPy: once over memory each, in blocks that stay
in cache.

Three things cost more than the arithmetic. Arrays made in between: every block reuses the same
small buffers. Short rows: NumPy walks (M, C) row by row, so several rows, `WIDE` numbers, are taken
as one long row, with the vectors of C numbers repeated to match. Sums over rows: a matrix product
with ones reads 30 GB/s where `sum(axis=0)` reads 5.
"""

from collections.abc import Iterator

import numpy as np

from ..backend import Array, parallel
from ..ops.norm import gradient_sums, input_gradient, moments, scale_shift
from .registry import for_float32

WIDE = 8192  # numbers in one long row
SMALL = 1 << 16  # numbers not worth a second thread
BLOCK = (
    8  # long rows in a block: 256 KiB, so that a block of each array fits the second-level cache
)


def long_rows(x: Array, *others: Array | None) -> tuple[int, list]:
    """k, and x (..., C) and arrays like it, or None, as contiguous long rows (M / k, k*C)."""
    m, c = x.size // x.shape[-1], x.shape[-1]
    k = 1
    while m % (2 * k) == 0 and 2 * k * c <= WIDE:
        k *= 2
    return k, [
        None if a is None else np.ascontiguousarray(a).reshape(-1, k * c) for a in (x, *others)
    ]


def each_block(start: int, stop: int) -> Iterator[slice]:
    return (slice(i, min(i + BLOCK, stop)) for i in range(start, stop, BLOCK))


def over_rows(work, rows: Array) -> list:
    """work(start, stop) on parts of the long rows; a small array is not worth a second thread."""
    if rows.size < SMALL:
        return [work(0, len(rows))]
    return parallel(work, len(rows), BLOCK)


def row_sum(rows: Array) -> Array:
    return (np.ones((1, len(rows)), rows.dtype) @ rows)[0]  # (1, r) @ (r, k*C)


def per_channel(parts: list[Array], c: int) -> Array:
    """Every thread's sums (2, k*C) added up to (2, C)."""
    return np.sum(parts, axis=0).reshape(2, -1, c).sum(axis=1)


@for_float32(moments)
def _moments(x: Array) -> tuple[Array, Array]:
    k, (rows,) = long_rows(x)
    m, c = x.size // x.shape[-1], x.shape[-1]

    def sums(near: Array | None) -> Array:
        """Sums of x - near and of its square, per channel."""

        def work(start: int, stop: int) -> Array:
            buffer, total = np.empty((BLOCK, k * c), x.dtype), np.zeros((2, k * c), x.dtype)
            for block in each_block(start, stop):
                part, d = rows[block], buffer[: block.stop - block.start]
                if near is not None:
                    part = np.subtract(part, near, out=d)
                total[0] += row_sum(part)
                total[1] += row_sum(np.multiply(part, part, out=d))
            return total

        return per_channel(over_rows(work, rows), c)

    total, squares = sums(None)
    m2 = squares - total * (total / m)
    # Where the mean is far larger than the spread, next to nothing is left of the squares: take
    # them of deviations from the mean of a few rows, which is near enough to the true one.
    if (m2 < 1e-2 * squares).any():
        near = rows[0].reshape(k, c).mean(axis=0)
        total, squares = sums(np.tile(near, k))
        return near + total / m, squares - total * (total / m)
    return total / m, m2


@for_float32(scale_shift)
def _scale_shift(
    x: Array, mean: Array, scale: Array, shift: Array, residual: Array | None, relu: bool
) -> Array:
    k, (rows, residuals) = long_rows(x, residual)
    scale, shift = np.tile(scale, k), np.tile(shift - mean * scale, k)
    # The maximum with a row of zeros is three times as fast as with the number 0.
    zero = np.zeros_like(shift)
    y = np.empty_like(rows)

    def work(start: int, stop: int) -> None:
        for block in each_block(start, stop):
            part = np.multiply(rows[block], scale, out=y[block])
            part += shift
            if residuals is not None:
                part += residuals[block]
            if relu:
                np.maximum(part, zero, out=part)

    over_rows(work, rows)
    return y.reshape(x.shape)


@for_float32(gradient_sums)
def _gradient_sums(
    gy: Array, x: Array, mean: Array, inv_std: Array, y: Array | None
) -> tuple[Array, Array, Array]:
    k, (gs, xs, ys) = long_rows(gy, x, y)
    c = gy.shape[-1]
    mean = np.tile(mean, k)
    out = gs if ys is None else np.empty_like(gs)

    def work(start: int, stop: int) -> Array:
        buffer, mask = np.empty((BLOCK, k * c), gy.dtype), np.empty((BLOCK, k * c), bool)
        total = np.zeros((2, k * c), gy.dtype)
        for block in each_block(start, stop):
            g, n = out[block], len(gs[block])
            if ys is not None:
                np.multiply(gs[block], np.greater(ys[block], 0, out=mask[:n]), out=g)
            product = np.subtract(xs[block], mean, out=buffer[:n])
            product *= g
            total[0] += row_sum(g)
            total[1] += row_sum(product)
        return total

    sum_g, sum_gd = per_channel(over_rows(work, gs), c)
    return sum_g, sum_gd * inv_std, out.reshape(gy.shape)


@for_float32(input_gradient)
def _input_gradient(g: Array, x: Array, mean: Array, scale: Array, a: Array, b: Array) -> Array:
    k, (gs, xs) = long_rows(g, x)
    # gx = scale g - b x - (a - b mean): two rows of constants fewer to go through
    scale, b, rest = np.tile(scale, k), np.tile(b, k), np.tile(a - b * mean, k)
    gx = np.empty_like(gs)

    def work(start: int, stop: int) -> None:
        buffer = np.empty((BLOCK, len(b)), g.dtype)
        for block in each_block(start, stop):
            part = np.multiply(gs[block], scale, out=gx[block])
            part -= np.multiply(xs[block], b, out=buffer[: len(part)])
            part -= rest

    over_rows(work, gs)
    return gx.reshape(g.shape)
