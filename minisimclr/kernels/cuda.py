"""CUDA kernels for what would take a GPU many passes from Python.

    norm.cu      batch norm: moments of tiles of rows, merged; one pass to normalise, add and apply
                 ReLU; two for the gradients; running statistics
    optim.cu     SGD and LARS for all parameters: norms in one launch, the step in another
    conv.cu      patches of images and back, so that a convolution is one matrix product
    winograd.cu  tiles of images and back, for 3x3 convolutions in float32
    pool.cu      maxima of windows, and the way back
    augment.cu   both views of a batch in one launch; the blur of large views is a matrix product

CuPy compiles them with NVRTC on first use and keeps the binaries on disk. All sums run in a fixed
order, so a run repeats bit for bit. Matrix products are cuBLAS's; the loss, made of them, keeps its
readable version. CuPy cannot multiply bfloat16 matrices into float32, so cuBLAS is called directly
for that. Where activations are bfloat16, so are the images that a kernel reads and writes; the same
source is compiled again, with REAL as that type (real.cuh).
"""

from typing import Any

import numpy as np

from ..augment import SMALL, apply_views, batch_shape, blur
from ..backend import Array, cupy
from ..ops.conv import conv_input_gradient, conv_output, conv_weight_gradient, fold, unfold
from ..ops.norm import gradient_sums, input_gradient, moments, scale_shift, update_running
from ..ops.pool import max_pool_input_gradient, max_pool_output, pooled_size
from ..ops.product import matmul
from ..optim import LARS, SGD, square_of_all, update_all
from . import cuda_conv
from .cuda_launch import CHANNELS, LANES, THREADS, for_each_row, launch
from .registry import for_float32

BLOCKS = 768  # in a launch over tiles: few enough to run at once on 132 multiprocessors, 6 on each
SHARES = 64  # blocks that share the numbers of one parameter
# The structures of optim.cu and augment.cu.
ROW = np.dtype("u8, u8, u8, i8, f4, f4")  # w, g, v, size, decay, eeta
VIEW = np.dtype("4f4, 4f4, 4i4, i4, i4")  # box, factors, orders, flip, grey

NORM: Any = moments, scale_shift, gradient_sums, input_gradient, update_running
CONV: Any = conv_output, conv_input_gradient, conv_weight_gradient, unfold, fold, matmul
POOL: Any = max_pool_output, max_pool_input_gradient
PASSES: Any = *NORM, *CONV, *POOL, square_of_all, update_all, apply_views


def register(library: Any) -> None:
    """Use cuda_NAME for pass NAME on the arrays of `library`: CuPy, once it is there."""
    versions = vars(cuda_conv) | globals()
    for reference in PASSES:
        for_float32(reference, library.ndarray)(versions[f"cuda_{reference.__name__}"])


def tiles(x: Array) -> tuple[tuple[int, int], tuple]:
    """Grid of tiles for x (..., C); then the rows, the channels and the rows in a tile."""
    rows, c = x.size // x.shape[-1], x.shape[-1]
    wide = -(-c // CHANNELS)
    tile = max(LANES**2, -(-rows * wide // BLOCKS))
    return (wide, -(-rows // tile)), (np.int64(rows), c, tile)


def tile_sums(x: Array, *args: Any) -> Array:
    """Of each tile of x (..., C): mean and M2 or, given gy, the sums of g and of g (x - mean).

    args: gy, y, g and the mean, or None, as norm.cu's kernel takes them. Returns (tiles, 2, C).
    """
    grid, shape = tiles(x)
    part = cupy().empty((grid[1], 2, x.shape[-1]), np.float32)
    launch("norm", "tile_sums", grid, (CHANNELS, LANES), x, *args, part, *shape)
    return part


def merged(x: Array, part: Array, variance: Array | None, eps: float) -> tuple[Array, Array]:
    """Mean and variance (C,) of all of x or, given the variance, the sums of g and g x^."""
    (wide, _), shape = tiles(x)
    first, second = (cupy().empty(x.shape[-1], np.float32) for _ in range(2))
    given = part, variance, eps, first, second, *shape
    launch("norm", "merge_tiles", (wide,), (CHANNELS, 4 * LANES), *given)
    return first, second


def apply(kernel: str, x: Array, *args: Any, out: Array | None = None) -> Array:
    """Run a kernel of norm.cu that makes one number of each in x (..., C), in `out` if given."""
    grid, shape = tiles(x)
    out = cupy().empty(x.shape, x.dtype) if out is None else out
    launch("norm", kernel, grid, (CHANNELS, LANES), x, *args, out, *shape)
    return out


def cuda_moments(x):
    return merged(x, tile_sums(x, *[None] * 4), None, 0.0)


def cuda_scale_shift(x, mean, variance, eps, gamma, beta, residual, relu):
    if residual is not None:  # perhaps of a layer that knows nothing of bfloat16
        residual = residual.astype(x.dtype, copy=False)
    return apply("scale_shift", x, mean, variance, eps, gamma, beta, residual, int(relu))


def cuda_gradient_sums(gy, x, mean, variance, eps, y):
    g = gy if y is None else cupy().empty(gy.shape, gy.dtype)
    part = tile_sums(x, gy, y, None if y is None else g, mean)
    return *merged(x, part, variance, eps), g


def cuda_input_gradient(g, x, mean, variance, eps, gamma, sum_g, sum_gxhat, count, out=None):
    given = x, mean, variance, eps, gamma, sum_g, sum_gxhat, float(count)
    return apply("input_gradient", g, *given, out=out)


def cuda_update_running(mean, variance, batch, momentum, count):
    given = mean, variance, *batch, mean.size, float(momentum), count / (count - 1)
    launch("norm", "update_running", (-(-mean.size // THREADS),), (THREADS,), *given)


def cuda_max_pool_output(x, kernel, stride, padding):
    size, (before, _) = pooled_size(x.shape, kernel, stride, padding), zip(*padding, strict=True)
    y, argmax = (cupy().empty((len(x), *size, x.shape[3]), t) for t in (x.dtype, np.uint8))
    geometry = x.shape[1:], kernel, stride, before, size
    return for_each_row("pool", "max_pool", x, argmax, y, geometry=geometry), argmax


def cuda_max_pool_input_gradient(gy, argmax, x_shape, kernel, stride, padding):
    gx, (before, _) = cupy().empty(x_shape, gy.dtype), zip(*padding, strict=True)
    geometry = x_shape[1:], kernel, stride, before, gy.shape[1:3]
    return for_each_row("pool", "max_pool_gradient", gy, argmax, gx, geometry=geometry)


def table_of(optimizer: SGD, plain: bool = False) -> tuple[Array, list[Array]]:
    """The rows that optim.cu reads, without rates if `plain`, and the gradients they point to."""
    rows, gradients = [], []
    for name, p in optimizer.moving():
        g = cupy().ascontiguousarray(p.grad)
        arrays = p.data, g, optimizer.velocity[name]
        if any(a.dtype != np.float32 or not a.flags.c_contiguous for a in arrays):
            raise ValueError(f"{name}: not in one piece of float32, like the first parameter")
        eeta = getattr(optimizer, "eeta", 0.0) if p.adapt else 0.0
        rates = (0.0, 0.0) if plain else (optimizer.decay_of(p), eeta)
        rows.append((*(a.data.ptr for a in arrays), g.size, *rates))
        gradients.append(g)
    return cupy().asarray(np.array(rows, ROW).view(np.uint8)), gradients


def squares(rows: Array, count: int) -> Array:
    """Shares of |w|^2 and |g + decay w|^2 of `count` parameters: (count, SHARES, 2)."""
    part = cupy().empty((count, SHARES, 2), np.float32)
    launch("optim", "squares", (SHARES, count), (THREADS,), rows, part)
    return part


def cuda_square_of_all(w, optimizer):
    rows, gradients = table_of(optimizer, plain=True)
    return squares(rows, len(gradients))[:, :, 1].sum()


def cuda_update_all(w, optimizer, ok):
    if type(optimizer).rate_of not in (SGD.rate_of, LARS.rate_of):  # a subclass has its own
        return update_all.dispatch(object)(w, optimizer, ok)
    rows, gradients = table_of(optimizer)
    count, trust = len(gradients), cupy().empty(len(gradients), np.float32)
    part = squares(rows, count) if hasattr(optimizer, "eeta") else None
    given = part, None if ok is True else ok, trust, float(optimizer.lr), float(optimizer.momentum)
    launch("optim", "update", (SHARES, count), (THREADS,), rows, *given)
    if part is not None:
        of_all = zip(optimizer.moving(), trust, strict=True)
        optimizer.trust = {name: ratio for (name, p), ratio in of_all if p.adapt}


def cuda_apply_views(images, views, size):
    xp, (n, height, width) = cupy(), batch_shape(images, views.boxes)
    table = np.empty((2, n), VIEW)
    drawn = views.boxes, views.factors, views.orders, views.flips, views.greys
    for field, values in zip(VIEW.names or (), drawn, strict=True):
        table[field] = values
    out = xp.empty((2, n, size, size, 3), np.float32)
    given = images, xp.asarray(table.view(np.uint8)), out, n, height, width, size
    launch("augment", "two_views", (2 * n,), (THREADS,), *given)
    if size > SMALL:
        return blur(out[0], views.sigmas[0]).clip(0, 1), blur(out[1], views.sigmas[1]).clip(0, 1)
    return out[0], out[1]
