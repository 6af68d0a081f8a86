"""Winograd's minimal filtering for 3x3 convolutions (Lavin & Gray 2015, arXiv:1509.09308).

m outputs of a 3-tap filter need not 3m products but only f = m + 2: evaluate signal and filter as
polynomials at f points, multiply there, interpolate. Along both axes that makes, of a tile of x,

    y = A' [ (G w G') * (B' x B) ] A        f f instead of 9 m m products a tile

and the elementwise product, summed over channels, is f f matrix products (tiles, C) @ (C, O). For
m = 4 that is a quarter of the arithmetic. All three passes use the same linear maps or their
transposes, with M = A y A' standing for a tile of y's gradient:

    output   y = A'(V @ U)     V = B'x, U = G w      (tiles, C) @ (C, O)
    input    gx = B(M @ U')    M = A gy              (tiles, O) @ (O, C)
    weight   gw = G'(V' @ M)                         (C, tiles) @ (tiles, O)

A stride of 2 splits a filter into its even taps (two, at stride 1) and its odd one (one product an
output), which just stand side by side in the same matrices: f = 2m + 1 instead of 3m.

Small maps along one axis are matrix products, too: (f, a) @ (a, row), on rows that lie in memory
one after the other, so no tile is gathered along the height at all.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.lib.stride_tricks import as_strided

from ..backend import parallel

# Where polynomials are evaluated, besides at infinity. All are exact in binary; found by trying:
# the usual 0, 1, -1, 2, -2 round twice as much (1.3e-6 of the result's norm at 64 channels; these
# 0.6e-6, a plain sum of products 0.2e-6).
POINTS: dict[int, tuple[float, ...]] = {
    2: (0, 1),
    3: (0, 1, -1),
    4: (0, 0.75, -0.75, 2),
    5: (0, 0.625, -0.625, 1.625, -1.625),
}


def minimal_filter(m: int, r: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Toom-Cook: (B', G, A') in float64 for m outputs of r taps at stride 1; f = m + r - 1."""
    if r == 1:
        return np.eye(m), np.ones((m, 1)), np.eye(m)
    f = m + r - 1
    points = np.array(POINTS[f - 1], float)

    def evaluate(n: int) -> np.ndarray:  # a polynomial of n coefficients, at the f points
        infinity = np.eye(n)[-1:]
        return np.concatenate([points[:, None] ** np.arange(n), infinity])  # (f, n)

    scale = np.array([np.prod([p - q for q in points if q != p]) for p in points] + [1.0])[:, None]
    return np.linalg.inv(evaluate(f)).T * scale, evaluate(r) / scale, evaluate(m).T


@cache
def matrices(m: int, stride: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(B' (f, a), G (f, 3), A' (m, f)) in float32: a tile of a inputs makes m outputs."""
    a = stride * (m - 1) + 3
    b_rows, g_rows, a_columns = [], [], []
    for phase in range(stride):
        taps = np.arange(phase, 3, stride)
        b, g, at = minimal_filter(m, len(taps))
        b_rows.append(np.zeros((len(b), a)))
        b_rows[-1][:, phase : phase + stride * b.shape[1] : stride] = b
        g_rows.append(np.zeros((len(b), 3)))
        g_rows[-1][:, taps] = g
        a_columns.append(at)
    parts = (np.concatenate(b_rows), np.concatenate(g_rows), np.concatenate(a_columns, axis=1))
    return tuple(np.ascontiguousarray(p, np.float32) for p in parts)


@dataclass(frozen=True)
class Grid:
    """Tiles over images: a pixels a side, one every `step`, the first starting `pad` before the
    image.
    """

    rows: int
    columns: int
    a: int
    step: int
    pad: int

    def spans(self, width: int):
        """For each column j of a tile: the tiles (from, to) that have it within the image."""
        for j in range(self.a):
            start = max(0, -(-(self.pad - j) // self.step))
            stop = min(self.columns, -(-(width + self.pad - j) // self.step))
            first = self.step * start + j - self.pad  # its first column in the image
            yield j, slice(start, stop), slice(first, first + self.step * (stop - start), self.step)


def take_tiles(x: np.ndarray, matrix: np.ndarray, grid: Grid, out: np.ndarray) -> None:
    """out (f, f, n*rows*columns, C) = matrix X matrix' for every tile X of x (n, H, W, C)."""
    n, h, w, c = x.shape
    f, a = matrix.shape
    height = grid.step * (grid.rows - 1) + a
    h = min(h, height - grid.pad)
    inside = slice(grid.pad, grid.pad + h)
    tiles = np.empty((n, a, height, grid.columns, c), x.dtype)
    tiles[:, :, : grid.pad] = 0
    tiles[:, :, grid.pad + h :] = 0
    for j, span, columns in grid.spans(w):
        tiles[:, j, inside, : span.start] = 0
        tiles[:, j, inside, span] = x[:, :h, columns]
        tiles[:, j, inside, span.stop :] = 0
    row = grid.columns * c
    wide = matrix @ tiles.reshape(n, a, -1)  # (f, a) @ (n, a, height*row)
    s = row * wide.itemsize
    slabs = as_strided(  # rows of tiles overlap in memory as they do in the image
        wide,
        (n, f, grid.rows, a, row),
        (f * height * s, height * s, grid.step * s, s, wide.itemsize),
    )
    out = out.reshape(f, f, n, grid.rows, row).transpose(2, 1, 3, 0, 4)  # (n, f, rows, f, row)
    np.matmul(matrix, slabs, out=out)  # (f, a) @ (a, row)


def put_tiles(tiles: np.ndarray, matrix: np.ndarray, grid: Grid, out: np.ndarray) -> None:
    """The transpose of take_tiles: out (n, H, W, C) sums matrix' T matrix of every tile T."""
    n, h, w, c = out.shape
    f, a = matrix.shape
    step, row = grid.step, grid.columns * c
    height = step * (grid.rows - 1) + a
    h = min(h, height - grid.pad)
    tiles = tiles.reshape(f, f, n, grid.rows, row).transpose(2, 1, 3, 0, 4)
    tall = np.empty((n, f, height, row), out.dtype)
    whole = tall[:, :, : grid.rows * step]
    np.matmul(matrix.T[:step], tiles, out=whole.reshape(n, f, grid.rows, step, row))
    if a > step:  # (a - step, f) @ (f, row): what a tile adds to the next one's rows
        tall[:, :, grid.rows * step :] = 0
        extra = matrix.T[step:] @ tiles  # (n, f, rows, a - step, row)
        for i in range(step, a):
            tall[:, :, i::step] += extra[:, :, :, i - step]
    wide = (matrix.T @ tall.reshape(n, f, -1)).reshape(n, a, height, grid.columns, c)
    out[:, h:] = 0
    out[:, :, step * grid.columns - grid.pad :] = 0
    for j, span, columns in grid.spans(w):
        part = wide[:, j, grid.pad : grid.pad + h, span]
        if j < step:
            out[:, :h, columns] = part
        else:
            out[:, :h, columns] += part


@dataclass(frozen=True)
class Plan:
    """A convolution in tiles of m x m outputs: `x` and `y` say where tiles lie in either image."""

    m: int
    stride: int
    x: Grid
    y: Grid

    @classmethod
    def of(cls, m: int, stride: int, padding: int, size: tuple[int, int]) -> "Plan":
        grid = -(-size[0] // m), -(-size[1] // m)
        x = Grid(*grid, a=stride * (m - 1) + 3, step=stride * m, pad=padding)
        return cls(m, stride, x, Grid(*grid, a=m, step=m, pad=0))

    @property
    def tiles(self) -> int:
        return self.x.rows * self.x.columns


def tile(
    n: int, w_shape: tuple, size: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int]
) -> int:
    """Side m of the tiles of outputs that cost least for n images, 0 if no tile pays."""
    if w_shape[:2] != (3, 3) or stride not in ((1, 1), (2, 2)) or padding not in ((0, 0), (1, 1)):
        return 0
    c, o = w_shape[2:]
    best, best_cost = 0, 9 * n * size[0] * size[1] * (c * o + COPY * c)
    for m in (2, 3, 4):
        f = len(matrices(m, stride[0])[0])
        tiles = n * -(-size[0] // m) * -(-size[1] // m)
        cost = f * f * (tiles * (c * o + TRANSFORM * (c + o)) + SPECTRUM * c * o)
        if cost < best_cost:
            best, best_cost = m, cost
    return best


# What moving one number costs, in multiply-adds of a matrix product.
COPY, TRANSFORM, SPECTRUM = 20, 25, 20


def spectrum(w: np.ndarray, plan: Plan) -> np.ndarray:
    """U = G w G': (3, 3, C, O) -> (f f, C, O)"""
    _, g, _ = matrices(plan.m, plan.stride)
    return (np.kron(g, g) @ w.reshape(9, -1)).reshape(-1, *w.shape[2:])  # (f f, 9) @ (9, C*O)


def product(x, w, plan: Plan, source, target, out) -> None:
    """out = put(take(x) @ spectrum(w)); source and target are (matrix, Grid) pairs."""
    if w.shape[2] * w.shape[3] <= SMALL:
        by_images(x, w, plan, source, target, out)
    else:
        by_frequencies(x, w, plan, source, target, out)


SMALL = 128 * 128  # channels in times channels out up to which U stays in a core's cache
BLOCK = 600_000  # numbers in one block of transformed tiles, in and out


def by_images(x, w, plan, source, target, out) -> None:
    u = spectrum(w, plan)
    ff, c, o = u.shape
    block = max(1, BLOCK // (plan.tiles * ff * (c + o)))

    def work(start: int, stop: int) -> None:
        v = np.empty((ff, block * plan.tiles * c), x.dtype)
        m = np.empty((ff, block * plan.tiles * o), x.dtype)
        for i in range(start, stop, block):
            n = min(block, stop - i)
            if n < block:
                v = np.empty((ff, n * plan.tiles * c), x.dtype)
                m = np.empty((ff, n * plan.tiles * o), x.dtype)
            take_tiles(x[i : i + n], *source, v)
            np.matmul(v.reshape(ff, -1, c), u, out=m.reshape(ff, -1, o))
            put_tiles(m, *target, out[i : i + n])

    parallel(work, len(x), 1)


def by_frequencies(x, w, plan, source, target, out) -> None:
    f = source[0].shape[0]
    ff = f * f
    c, o = w.shape[2:]
    g = matrices(plan.m, plan.stride)[1]
    gg = np.kron(g, g)
    n = len(x)
    v = np.empty((f * f, n * plan.tiles, c), x.dtype)
    m = np.empty((f * f, n * plan.tiles, o), x.dtype)
    vi = v.reshape(f * f, n, plan.tiles * c)
    mi = m.reshape(f * f, n, plan.tiles * o)

    def take(start, stop):
        for i in range(start, stop, 8):
            k = min(i + 8, stop)
            take_tiles(x[i:k], *source, vi[:, i:k])

    def multiply(start, stop):
        for i in range(start, stop, 6):
            k = min(i + 6, stop)
            u = (gg[i:k] @ w.reshape(9, -1)).reshape(-1, c, o)
            np.matmul(v[i:k], u, out=m[i:k])

    def put(start, stop):
        for i in range(start, stop, 8):
            k = min(i + 8, stop)
            put_tiles(mi[:, i:k], *target, out[i:k])

    parallel(take, n)
    parallel(multiply, ff)
    parallel(put, n)


def output(x, w, stride: int, padding: int, size, m) -> np.ndarray:
    plan = Plan.of(m, stride, padding, size)
    b, _, a = matrices(m, stride)
    y = np.empty((len(x), *size, w.shape[3]), x.dtype)
    product(x, w, plan, (b, plan.x), (a.T, plan.y), y)
    return y


def input_gradient(gy, w, x_shape, stride: int, padding: int, m) -> np.ndarray:
    if stride == 1:
        flipped = np.ascontiguousarray(w[::-1, ::-1].transpose(0, 1, 3, 2))
        return output(gy, flipped, 1, 2 - padding, x_shape[1:3], m)
    plan = Plan.of(m, stride, padding, gy.shape[1:3])
    b, _, a = matrices(m, stride)
    gx = np.empty(x_shape, gy.dtype)
    wt = np.ascontiguousarray(w.transpose(0, 1, 3, 2))
    product(gy, wt, plan, (a.T, plan.y), (b, plan.x), gx)
    return gx


def weight_gradient(gy, x, w_shape, stride: int, padding: int, m) -> np.ndarray:
    plan = Plan.of(m, stride, padding, gy.shape[1:3])
    b, g, a = matrices(m, stride)
    f = len(b)
    ff = f * f
    c, o = w_shape[2:]
    n = len(x)
    gu = np.empty((ff, c, o), x.dtype)
    if c * o <= SMALL:
        block = max(1, (2 if c * o > 4096 else 1) * BLOCK // (plan.tiles * ff * (c + o)))

        def work(start, stop):
            total = np.zeros((ff, c, o), x.dtype)
            some = np.empty_like(total)
            for i in range(start, stop, block):
                k = min(block, stop - i)
                v = np.empty((ff, k * plan.tiles, c), x.dtype)
                m = np.empty((ff, k * plan.tiles, o), x.dtype)
                take_tiles(x[i : i + k], b, plan.x, v)
                take_tiles(gy[i : i + k], a.T, plan.y, m)
                np.matmul(v.transpose(0, 2, 1), m, out=some)
                total += some
            return total

        gu = sum(parallel(work, n))
    else:
        v = np.empty((ff, n * plan.tiles, c), x.dtype)
        m = np.empty((ff, n * plan.tiles, o), x.dtype)
        vi = v.reshape(f * f, n, plan.tiles * c)
        mi = m.reshape(f * f, n, plan.tiles * o)

        def take(start, stop):
            for i in range(start, stop, 8):
                k = min(i + 8, stop)
                take_tiles(x[i:k], b, plan.x, vi[:, i:k])
                take_tiles(gy[i:k], a.T, plan.y, mi[:, i:k])

        parallel(take, n)
        parallel(lambda i, k: np.matmul(v[i:k].transpose(0, 2, 1), m[i:k], out=gu[i:k]), ff)
    gg = np.kron(g, g).T
    return (gg @ gu.reshape(ff, -1)).reshape(w_shape)
