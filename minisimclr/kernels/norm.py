"""The passes of batch normalisation and ReLU for NumPy: once over memory each, in blocks that stay
in cache.

Three things cost more than the arithmetic. Arrays made in between: every block reuses the same
small buffers. Short rows: NumPy walks (M, C) row by row, so several rows, `WIDE` numbers, are taken
as one long row, with the vectors of C numbers repeated to match. Sums over rows: a matrix product
with ones reads 30 GB/s where `sum(axis=0)` reads 5.
"""

from collections.abc import Iterator

import numpy as np

from ..backend import parallel
from ..ops.basic import relu_gradient
from ..ops.norm import gradient_sums, input_gradient, moments, scale_shift

WIDE = 8192  # numbers in one long row
SMALL = 1 << 16  # numbers not worth a second thread
BLOCK = (
    8  # long rows in a block: 256 KiB, so that a block of each array fits the second-level cache
)


def is_plain(*arrays: np.ndarray | None) -> bool:
    return all(a is None or a.dtype == np.float32 for a in arrays)


def long_rows(x: np.ndarray, *others: np.ndarray | None) -> tuple[int, list]:
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


def over_rows(work, rows: np.ndarray) -> list:
    """work(start, stop) on parts of the long rows; a small array is not worth a second thread."""
    if rows.size < SMALL:
        return [work(0, len(rows))]
    return parallel(work, len(rows), BLOCK)


def masked(gy: np.ndarray, y: np.ndarray | None, mask: np.ndarray, out: np.ndarray) -> np.ndarray:
    """gy where y > 0, in `out`; gy itself without y."""
    if y is None:
        return gy
    np.greater(y, 0, out=mask[: len(y)])
    return np.multiply(gy, mask[: len(y)], out=out[: len(y)])


@moments.register(np.ndarray)
def _moments(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if not is_plain(x):
        return moments.dispatch(object)(x)
    k, (rows,) = long_rows(x)
    c = x.shape[-1]
    # Deviations are taken from the mean of a few rows, near enough to the true one that nothing
    # cancels when sums are shifted to it at the end.
    near = rows[0].reshape(k, c).mean(axis=0)
    near_k = np.tile(near, k)

    def work(start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        d, ones = np.empty((BLOCK, k * c), x.dtype), np.ones((1, BLOCK), x.dtype)
        total, squares = np.zeros((2, k * c), x.dtype)
        for block in each_block(start, stop):
            part = np.subtract(rows[block], near_k, out=d[: block.stop - block.start])
            total += (ones[:, : len(part)] @ part)[0]  # (1, BLOCK) @ (BLOCK, k*C)
            squares += np.einsum("rc,rc->c", part, part)
        return total, squares

    total, squares = (
        sum(part).reshape(k, c).sum(axis=0) for part in zip(*over_rows(work, rows), strict=True)
    )
    m = x.size // c
    return near + total / m, squares - total * (total / m)


@scale_shift.register(np.ndarray)
def _scale_shift(
    x: np.ndarray,
    mean: np.ndarray,
    scale: np.ndarray,
    shift: np.ndarray,
    residual: np.ndarray | None,
    relu: bool,
) -> np.ndarray:
    if not is_plain(x, residual):
        return scale_shift.dispatch(object)(x, mean, scale, shift, residual, relu)
    k, (rows, residuals) = long_rows(x, residual)
    mean, scale, shift = np.tile(mean, k), np.tile(scale, k), np.tile(shift, k)
    # The maximum with a row of zeros is three times as fast as with the number 0.
    zero = np.zeros_like(shift)
    y = np.empty_like(rows)

    def work(start: int, stop: int) -> None:
        for block in each_block(start, stop):
            part = np.subtract(rows[block], mean, out=y[block])
            part *= scale
            part += shift
            if residuals is not None:
                part += residuals[block]
            if relu:
                np.maximum(part, zero, out=part)

    over_rows(work, rows)
    return y.reshape(x.shape)


@gradient_sums.register(np.ndarray)
def _gradient_sums(
    gy: np.ndarray, x: np.ndarray, mean: np.ndarray, inv_std: np.ndarray, y: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    if not is_plain(gy, x, y):
        return gradient_sums.dispatch(object)(gy, x, mean, inv_std, y)
    k, (gs, xs, ys) = long_rows(gy, x, y)
    c = gy.shape[-1]
    mean = np.tile(mean, k)

    def work(start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        g, d = np.empty((2, BLOCK, k * c), gy.dtype)
        mask, ones = np.empty((BLOCK, k * c), bool), np.ones((1, BLOCK), gy.dtype)
        sum_g, sum_gd = np.zeros((2, k * c), gy.dtype)
        for block in each_block(start, stop):
            part = masked(gs[block], None if ys is None else ys[block], mask, g)
            sum_g += (ones[:, : len(part)] @ part)[0]  # (1, BLOCK) @ (BLOCK, k*C)
            sum_gd += np.einsum("rc,rc->c", part, np.subtract(xs[block], mean, out=d[: len(part)]))
        return sum_g, sum_gd

    sum_g, sum_gd = (
        sum(part).reshape(k, c).sum(axis=0) for part in zip(*over_rows(work, gs), strict=True)
    )
    return sum_g, sum_gd * inv_std


@input_gradient.register(np.ndarray)
def _input_gradient(
    gy: np.ndarray,
    x: np.ndarray,
    mean: np.ndarray,
    scale: np.ndarray,
    a: np.ndarray,
    b: np.ndarray,
    y: np.ndarray | None,
) -> np.ndarray:
    if not is_plain(gy, x, y):
        return input_gradient.dispatch(object)(gy, x, mean, scale, a, b, y)
    k, (gs, xs, ys) = long_rows(gy, x, y)
    mean, scale, a, b = (np.tile(v, k) for v in (mean, scale, a, b))
    gx = np.empty_like(gs)

    def work(start: int, stop: int) -> None:
        d, mask = np.empty((BLOCK, len(a)), gy.dtype), np.empty((BLOCK, len(a)), bool)
        for block in each_block(start, stop):
            part = gx[block]
            g = masked(gs[block], None if ys is None else ys[block], mask, part)
            np.multiply(g, scale, out=part)
            deviation = np.subtract(xs[block], mean, out=d[: len(part)])
            deviation *= b
            deviation += a
            part -= deviation

    over_rows(work, gs)
    return gx.reshape(gy.shape)


@relu_gradient.register(np.ndarray)
def _relu_gradient(gy: np.ndarray, y: np.ndarray) -> np.ndarray:
    if not is_plain(gy, y):
        return relu_gradient.dispatch(object)(gy, y)
    _, (gs, ys) = long_rows(gy, y)
    g = np.empty_like(gs)

    def work(start: int, stop: int) -> None:
        mask = np.empty((BLOCK, gs.shape[1]), bool)
        for block in each_block(start, stop):
            masked(gs[block], ys[block], mask, g[block])

    over_rows(work, gs)
    return g.reshape(gy.shape)
