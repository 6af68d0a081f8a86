"""Batch normalisation and ReLU for NumPy: each pass goes through memory once, in blocks that stay
in cache.

Three things cost more than the arithmetic. Intermediate arrays: every block reuses the same small
buffer. Short rows: NumPy walks (M, C) row by row, so several rows, `WIDE` numbers, are treated as
one long row, with the vectors of C numbers repeated to match. Sums over rows: a matrix product with
ones reads 40 GB/s where `sum(axis=0)` reads 16 to 25.

A fourth comes with a second thread: after each call into NumPy a thread needs the interpreter lock
back. The more calls and the shorter they are, the more often it finds the lock taken and is put to
sleep. Hence large blocks and few calls.
"""

from collections.abc import Callable

import numpy as np

from ..backend import Array
from ..cores import parallel
from ..ops.norm import gradient_sums, input_gradient, inverse_std, moments, scale_shift
from .registry import SMALL, blocks, for_float32

WIDE = 8192  # numbers in one long row
BLOCK = 1 << 18  # numbers in a block: 1 MiB


def long_rows(x: Array, *others: Array | None) -> tuple[int, list]:
    """k; then x (..., C) and arrays like it (or None) as contiguous long rows (M / k, k*C)."""
    m, c = x.size // x.shape[-1], x.shape[-1]
    k = 1
    while m % (2 * k) == 0 and 2 * k * c <= WIDE:
        k *= 2
    return k, [
        None if a is None else np.ascontiguousarray(a).reshape(-1, k * c) for a in (x, *others)
    ]


def over_blocks(work: Callable, c: int, first: Array, *others: Array | None) -> Array:
    """Call work(buffer, sums, *blocks) on every block of the arrays of long rows, on all threads.

    `work` may use `buffer`, which is shaped like a block, and leaves two rows in sums (2, 1, k*C).
    Returns their totals over all blocks, per channel: (2, C).
    """
    rows, width = first.shape
    step = max(1, BLOCK // width)

    def part(start: int, stop: int) -> Array:
        buffer = np.empty((step, width), np.float32)
        total, sums = np.zeros((2, 2, 1, width), np.float32)
        for some in blocks(start, stop, step):
            x = first[some]
            rest = (None if a is None else a[some] for a in others)
            work(buffer[: len(x)], sums, x, *rest)
            total += sums
        return total

    parts = parallel(part, rows) if first.size >= SMALL else [part(0, rows)]
    return np.sum(parts, axis=0).reshape(2, -1, c).sum(axis=1)


def sum_rows(rows: Array, out: Array) -> None:
    np.matmul(np.ones((1, len(rows)), rows.dtype), rows, out=out)  # (1, r) @ (r, k*C)


@for_float32(moments)
def _moments(x):
    k, (rows,) = long_rows(x)
    m, c = x.size // x.shape[-1], x.shape[-1]

    def sums_about(near: Array | None) -> Array:
        """Sums of x - near and of its square, per channel."""

        def work(buffer: Array, sums: Array, x: Array) -> None:
            d = x if near is None else np.subtract(x, near, out=buffer)
            sum_rows(d, sums[0])
            sum_rows(np.multiply(d, d, out=buffer), sums[1])

        return over_blocks(work, c, rows)

    total, squares = sums_about(None)
    mean = total / m
    m2 = squares - total * mean
    # Where the mean is far larger than the spread, m2 is a small difference of large sums. At ten
    # times, m2 has lost two or three of its seven digits. From there on, sum squares of deviations
    # from this mean, which despite rounding is near enough to the true one.
    if (m2 < 1e-2 * squares).any():
        total, squares = sums_about(np.tile(mean, k))
        return mean + total / m, (squares - total * (total / m)).clip(0) / m
    return mean, m2 / m


@for_float32(scale_shift)
def _scale_shift(x, mean, variance, eps, gamma, beta, residual, relu):
    k, (rows, residuals) = long_rows(x, residual)
    scale = gamma * inverse_std(variance, eps)
    scale, shift = np.tile(scale, k), np.tile(beta - mean * scale, k)
    # The maximum with a row of zeros is three times as fast as with the number 0.
    zero = np.zeros_like(shift)
    y = np.empty_like(rows)

    def work(_buffer: Array, _sums: Array, x: Array, y: Array, residual: Array | None) -> None:
        np.multiply(x, scale, out=y)
        y += shift
        if residual is not None:
            y += residual
        if relu:
            np.maximum(y, zero, out=y)

    over_blocks(work, len(mean), rows, y, residuals)
    return y.reshape(x.shape)


@for_float32(gradient_sums)
def _gradient_sums(gy, x, mean, variance, eps, y):
    k, (gs, xs, ys) = long_rows(gy, x, y)
    out, inv_std = gs if ys is None else np.empty_like(gs), inverse_std(variance, eps)
    # Unless the mean is far from 0, it costs sums of g x a digit or two at most; else take it off.
    far = (np.abs(mean) * inv_std > 8).any()
    near = np.tile(mean, k)

    def work(buffer: Array, sums: Array, gy: Array, x: Array, y: Array | None, g: Array) -> None:
        if y is not None:
            mask = buffer.view(bool)[:, : g.shape[1]]
            np.multiply(gy, np.greater(y, 0, out=mask), out=g)
        if far:
            x = np.subtract(x, near, out=buffer)
        sum_rows(g, sums[0])
        sum_rows(np.multiply(x, g, out=buffer), sums[1])

    sum_g, sum_gd = over_blocks(work, len(mean), gs, xs, ys, out)
    sum_gd = sum_gd if far else sum_gd - mean * sum_g
    return sum_g, sum_gd * inv_std, out.reshape(gy.shape)


@for_float32(input_gradient)
def _input_gradient(g, x, mean, variance, eps, gamma, sum_g, sum_gxhat, count, out=None):
    k, (gs, xs, gx) = long_rows(g, x, out)
    inv_std = inverse_std(variance, eps)
    scale = gamma * inv_std
    a, b = scale / -count * sum_g, scale / -count * sum_gxhat * inv_std
    # gx = scale g + a + b (x - mean), arranged so that two rows of constants fewer are read
    scale, b, rest = np.tile(scale, k), np.tile(b, k), np.tile(a - b * mean, k)
    gx = np.empty_like(gs) if gx is None else gx

    def work(buffer: Array, _sums: Array, g: Array, x: Array, gx: Array) -> None:
        np.multiply(g, scale, out=gx)
        gx += np.multiply(x, b, out=buffer)
        gx += rest

    over_blocks(work, len(mean), gs, xs, gx)
    return gx.reshape(g.shape)
