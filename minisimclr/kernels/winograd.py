"""Winograd's minimal filtering for 3x3 convolutions of stride 1 (Lavin & Gray 2015,
arXiv:1509.09308).

m outputs of a 3-tap filter need only f = m + 2 products, not 3m: evaluate signal and filter as
polynomials at f points, multiply there, interpolate. Along both axes, a tile of x then gives

    y = A' [ (G w G') * (B' x B) ] A        f f instead of 9 m m products a tile

and the elementwise product, summed over channels, is f f matrix products (tiles, C) @ (C, O). For
m = 4 that is a quarter of the arithmetic. The gradient of the input is such a convolution, too: gy
with the kernel turned round. That of the weight slides x over gy as if x were the filter. So both
need the same tiles of gy:

    output     y  = A'(V @ U)      V = B'x,  U = G w                (tiles, C) @ (C, O)
    gradients  gx = A'(V @ U)      V = B'gy, U = G w turned         (tiles, O) @ (O, C)
               gw = G'(M' @ V) turned,       M = A x                (C, tiles) @ (tiles, O)

Maps along one axis are matrix products as well: (f, a) @ (a, row). Rows follow one another in
memory, so tiles are gathered along the width only.
"""

from dataclasses import dataclass
from functools import cache
from math import gcd

import numpy as np

from ..backend import Array
from ..cores import parallel
from ..ops.conv import Pair
from .registry import blocks, in_blocks

# Where polynomials are evaluated, besides at infinity, for tiles of m = 2, 3, 4. All are exact in
# binary and were found by trial: the usual 0, 1, -1, 2, -2 make twice the rounding error (1.3e-6 of
# the result's norm at 64 channels; these make 0.6e-6, a plain sum of products 0.2e-6).
POINTS: dict[int, tuple[float, ...]] = {
    2: (0, 1, -1),
    3: (0, 0.75, -0.75, 2),
    4: (0, 0.625, -0.625, 1.625, -1.625),
}


@cache
def matrices(m: int) -> tuple[Array, Array, Array]:
    """(B' (f, f), G (f, 3), A' (m, f)) in float32, by Toom and Cook's construction."""
    points = np.array(POINTS[m], float)

    def evaluate(n: int) -> Array:  # a polynomial of n coefficients, at the f points
        return np.concatenate([points[:, None] ** np.arange(n), np.eye(n)[-1:]])  # (f, n)

    scale = np.array([np.prod([p - q for q in points if q != p]) for p in points] + [1.0])[:, None]
    parts = np.linalg.inv(evaluate(m + 2)).T * scale, evaluate(3) / scale, evaluate(m).T
    b, g, a = (np.ascontiguousarray(p, np.float32) for p in parts)
    return b, g, a


@dataclass(frozen=True, eq=False)
class Grid:
    """Tiles over images: one every `step` pixels, the first starting `pad` before the image.

    matrix (f, a) transforms a tile of a x a pixels.
    """

    matrix: np.ndarray
    rows: int
    columns: int
    step: int
    pad: int

    @property
    def tiles(self) -> int:
        return self.rows * self.columns

    @property
    def f(self) -> int:
        return len(self.matrix)


def take_tiles(x: Array, grid: Grid, out: Array | None = None) -> Array:
    """matrix X matrix' for every tile X of x (n, H, W, C), as (f f, tiles, C)."""
    n, h, w, c = x.shape
    f, a = grid.matrix.shape
    height, row = grid.step * (grid.rows - 1) + a, grid.columns * c
    if out is None:
        out = np.empty((f * f, n, grid.rows * row), x.dtype)
    frame = n, height, grid.step * (grid.columns - 1) + a, c
    if x.shape == frame:
        padded = np.ascontiguousarray(x)
    else:
        padded = np.zeros(frame, x.dtype)
        padded[:, grid.pad : grid.pad + h, grid.pad : grid.pad + w] = x
    image, line, pixel, _ = padded.strides
    piece = np.dtype(f"V{pixel}")  # copying a pixel is faster than copying its numbers
    strides = image, pixel, line, grid.step * pixel
    tiles = np.ndarray((n, a, height, grid.columns), piece, padded, 0, strides)
    tiles = np.ascontiguousarray(tiles).view(x.dtype)
    wide = grid.matrix @ tiles.reshape(n, a, -1)  # (f, a) @ (a, height*row)
    s = row * wide.itemsize
    # Rows of tiles overlap in memory as they do in the image.
    steps = f * height * s, height * s, grid.step * s, s, wide.itemsize
    slabs = np.ndarray((n, f, grid.rows, a, row), x.dtype, wide, 0, steps)
    cells = out.reshape(f, f, n, grid.rows, row).transpose(2, 1, 3, 0, 4)  # (n, f, rows, f, row)
    np.matmul(grid.matrix, slabs, out=cells)  # (f, a) @ (a, row)
    return out.reshape(f * f, -1, c) if out.flags.c_contiguous else out


def put_tiles(tiles: Array, grid: Grid, out: Array) -> None:
    """The transpose of take_tiles, for tiles that do not overlap: fill out (n, H, W, C)."""
    n, h, w, c = out.shape
    f, m = grid.matrix.shape
    row = grid.columns * c
    cells = tiles.reshape(f, f, n, grid.rows, row).transpose(2, 1, 3, 0, 4)  # (n, f, rows, f, row)
    tall = grid.matrix.T @ cells  # (m, f) @ (f, row)
    wide = grid.matrix.T @ tall.reshape(n, f, -1)  # (m, f) @ (f, rows*m*row)
    wide = wide.reshape(n, m, -1, grid.columns, c)[:, :, :h].transpose(0, 2, 3, 1, 4)
    if grid.columns * m == w:
        out.reshape(wide.shape)[...] = wide  # (n, h, columns, m, c)
    else:
        out[...] = wide.reshape(n, h, -1, c)[:, :, :w]


def tile(n: int, w_shape: tuple, size: Pair, stride: Pair, padding: Pair) -> int:
    """Side m of the output tiles that cost least for n images; 0 if no tile pays."""
    if w_shape[:2] != (3, 3) or stride != (1, 1) or padding not in ((0, 0), (1, 1), (2, 2)):
        return 0
    c, o = w_shape[2:]
    best, best_cost = 0, 9 * n * size[0] * size[1] * (c * o + COPY * c)
    for m in POINTS:
        tiles = n * -(-size[0] // m) * -(-size[1] // m)
        cost = (m + 2) ** 2 * (tiles * (c * o + TRANSFORM * (c + o)) + SPECTRUM * c * o)
        if cost < best_cost:
            best, best_cost = m, cost
    return best


# The cost of making one number of a patch, of a transformed tile and of U, in multiply-adds of a
# matrix product.
COPY, TRANSFORM, SPECTRUM = 20, 25, 20
SMALL = 128 * 128  # channels in times channels out up to which U stays in a core's cache
BLOCK = 600_000  # numbers in one block of transformed tiles, in and out: they stay in cache, too
SPECTRUM_BLOCK = 1 << 19  # numbers of U made at a time if U is large
IMAGES = 8  # in one block, where the tiles of the whole batch are kept


def grids(m: int, padding: int, size: Pair) -> tuple[Grid, Grid]:
    """Where the tiles for m x m outputs lie: in the input, and in the output."""
    b, _, a = matrices(m)
    grid = -(-size[0] // m), -(-size[1] // m)
    return Grid(b, *grid, m, padding), Grid(a.T, *grid, m, 0)


def spectrum(w: Array, m: int, some: slice = slice(None)) -> Array:
    """U = G w G', or some of its f f matrices: (3, 3, C, O) -> (f f, C, O)"""
    _, g, _ = matrices(m)
    g = np.kron(g, g)[some]  # (f f, 9)
    _, _, c, o = w.shape
    k = gcd(c, max(1, 4096 // o))  # rows at a time, so that a block stays in cache
    u = np.empty((len(g), c, o), w.dtype)
    cells = u.reshape(len(g), c // k, k * o).transpose(1, 0, 2)  # (C/k, f f, k*O)
    np.matmul(g, w.reshape(9, c // k, k * o).transpose(1, 0, 2), out=cells)  # (f f, 9) @ (9, k*O)
    return u


def output(x: Array, w: Array, padding: int, size: Pair, m: int) -> Array:
    """y (N, OH, OW, O) of x (N, H, W, C) and w (3, 3, C, O), in tiles of m x m outputs.

    With few channels, each thread takes a block of images at a time. With many, U is too large for
    every thread to read: they share out the transforms of all images, then the f f products.
    """
    source, target = grids(m, padding, size)
    c, o = w.shape[2:]
    y = np.empty((len(x), *size, o), x.dtype)
    if c * o > SMALL:
        return put_all(multiply_all(take_all(x, source), w, m), target, y)
    u = spectrum(w, m)

    def work(some: slice) -> None:
        put_tiles(take_tiles(x[some], source) @ u, target, y[some])  # (tiles, C) @ (C, O)

    in_blocks(work, len(x), BLOCK // (source.tiles * source.f**2 * (c + o)))
    return y


def gradients(gy: Array, x: Array, w: Array, padding: int, m: int) -> tuple[Array, Array]:
    """gx (N, H, W, C) and gw (3, 3, C, O) of gy (N, OH, OW, O), likewise."""
    source, target = grids(m, 2 - padding, x.shape[1:3])
    c, o = w.shape[2:]
    ff = source.f**2
    gx = np.empty(x.shape, x.dtype)

    def product(tiles: Array, v: Array, out: Array) -> Array:
        return np.matmul(tiles.transpose(0, 2, 1), v, out=out)  # (C, tiles) @ (tiles, O)

    if c * o > SMALL:
        v = take_all(gy, source)
        put_all(multiply_all(v, turned(w), m), target, gx)
        gu, tiles = np.empty((ff, c, o), x.dtype), take_all(x, target)
        parallel(lambda i, k: product(tiles[i:k], v[i:k], gu[i:k]), ff)
    else:
        u = spectrum(turned(w), m)
        # Each block ends with an addition of (f f, C, O) numbers, so it should not be too small.
        size = max(BLOCK, 6 * ff * c * o) // (source.tiles * ff * (c + o))

        def work(start: int, stop: int) -> Array:
            total, part = np.empty((2, ff, c, o), x.dtype)
            for block in blocks(start, stop, size):
                v, tiles = take_tiles(gy[block], source), take_tiles(x[block], target)
                put_tiles(v @ u, target, gx[block])  # (tiles, O) @ (O, C)
                if block.start == start:
                    product(tiles, v, total)
                else:
                    total += product(tiles, v, part)
            return total

        gu, *others = parallel(work, len(x))
        for total in others:
            gu += total
    _, g, _ = matrices(m)
    gw = np.kron(g, g).T[::-1] @ gu.reshape(ff, -1)  # turned: (9, f f) @ (f f, C*O)
    return gx, gw.reshape(w.shape)


def take_all(x: Array, grid: Grid) -> Array:
    """Transformed tiles of all images: (f f, tiles, C)"""
    v = np.empty((grid.f**2, len(x), grid.tiles * x.shape[3]), x.dtype)
    in_blocks(lambda some: take_tiles(x[some], grid, v[:, some]), len(x), IMAGES)
    return v.reshape(len(v), -1, x.shape[3])


def multiply_all(v: Array, w: Array, m: int) -> Array:
    """V @ U of all tiles (f f, tiles, C): (f f, tiles, O)"""
    c, o = w.shape[2:]
    out = np.empty((*v.shape[:2], o), v.dtype)

    def multiply(some: slice) -> None:
        np.matmul(v[some], spectrum(w, m, some), out=out[some])  # (tiles, C) @ (C, O)

    in_blocks(multiply, len(v), SPECTRUM_BLOCK // (c * o))
    return out


def put_all(tiles: Array, grid: Grid, out: Array) -> Array:
    """Fill out (N, H, W, O) with transformed tiles (f f, tiles, O)."""
    tiles = tiles.reshape(len(tiles), len(out), -1)  # (f f, N, tiles*O)
    in_blocks(lambda some: put_tiles(tiles[:, some], grid, out[some]), len(out), IMAGES)
    return out


def turned(w: Array) -> Array:
    """The kernel as gy meets it: (3, 3, C, O) turned round and transposed, (3, 3, O, C).

    Copied, since products with a transposed view of U are slower.
    """
    out, w = np.empty((3, 3, w.shape[3], w.shape[2]), w.dtype), w[::-1, ::-1]
    parallel(lambda i, k: np.copyto(out[:, :, i:k], w[..., i:k].swapaxes(2, 3)), w.shape[3], 64)
    return out
