"""CUDA kernels for what a GPU would do in many passes from Python, and how they are launched.

    norm.cu      batch norm: moments of tiles of rows, merged; one pass to normalise, add and cut;
                 two for the gradients
    optim.cu     SGD and LARS for all parameters: norms in one launch, the step in another
    conv.cu      patches of images and back, which makes a convolution one matrix product
    pool.cu      maxima of windows, and the way back
    augment.cu   both views of a batch in one launch; the blur of large ones is a matrix product

CuPy compiles them with NVRTC on first use and keeps the binaries on disk. All sums run in a fixed
order, so a run repeats to the bit. Matrix products are cuBLAS's; the loss, made of them, stays as
it can be read. CuPy has no product of bfloat16 matrices that stays float32, so cuBLAS is asked for
those directly. Where activations are bfloat16, so are the images that a kernel reads and writes;
the same text is compiled again, its REAL being that type (real.cuh).
"""

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from ..augment import SMALL, Views, apply_views, blur
from ..backend import Array, cupy
from ..ops.conv import conv_input_gradient, conv_output, fold, unfold
from ..ops.norm import gradient_sums, input_gradient, moments, scale_shift
from ..ops.pool import max_pool_input_gradient, max_pool_output, output_size
from ..ops.product import matmul
from ..optim import SGD, square_of_all, update_all
from ..tensor import WEIGHT
from .registry import for_float32

CHANNELS, LANES, THREADS = 32, 8, 256  # of a block: of batch norm, of the others
BLOCKS = 1024  # in a launch over tiles: several for each multiprocessor of a large GPU
SHARES = 64  # blocks that share the numbers of one parameter
REALS = {"bfloat16": "bfloat16", "float64": "double"}  # what REAL is for an array; else float
# The structures of optim.cu and augment.cu.
ROW = np.dtype("u8, u8, u8, i8, f4, f4")  # w, g, v, size, decay, eeta
VIEW = np.dtype("4f4, 4f4, 4i4, i4, i4")  # box, factors, orders, flip, grey

NORM: Any = moments, scale_shift, gradient_sums, input_gradient
IMAGES: Any = unfold, fold, matmul, conv_input_gradient, max_pool_output, max_pool_input_gradient
PASSES: Any = *NORM, *IMAGES, square_of_all, update_all, apply_views


def register(library: Any) -> None:
    """Use cuda_NAME for pass NAME on the arrays of `library`: CuPy, once it is there."""
    for reference in PASSES:
        for_float32(reference, library.ndarray)(globals()[f"cuda_{reference.__name__}"])


@cache
def module(library: Any, file: str, real: str) -> Any:
    code = Path(__file__).with_name(f"{file}.cu").read_text()
    include, header = '#include "real.cuh"', Path(__file__).with_name("real.cuh").read_text()
    if code.startswith(include):  # here, as the compiler at run time sees no files
        code = f"#define REAL {real}\n{header}#line 2\n" + code.removeprefix(f"{include}\n")
    return library.RawModule(code=code)


@cache
def function(library: Any, file: str, kernel: str, real: str) -> Any:
    return module(library, file, real).get_function(kernel)


def is_bfloat16(x: Array) -> bool:
    return x.dtype.name == "bfloat16"


def launch(file: str, kernel: str, grid: tuple, block: tuple, *args: Any) -> None:
    """Run a kernel, of the type of its first array; numbers become what C calls int and float, None
    a null pointer.
    """
    xp = cupy()
    convert: Any = {int: np.int32, float: np.float32, xp.ndarray: xp.ascontiguousarray}
    convert |= {type(None): lambda _: np.intp(0), bool: xp.asarray, np.bool_: xp.asarray}
    given = tuple(convert.get(type(a), lambda a: a)(a) for a in args)
    function(xp, file, kernel, REALS.get(args[0].dtype.name, "float"))(grid, block, given)


def tiles(x: Array) -> tuple[tuple[int, int], tuple]:
    """Grid of tiles for x (..., C), and the rows, channels and rows of a tile that go with it."""
    rows, c = x.size // x.shape[-1], x.shape[-1]
    wide = -(-c // CHANNELS)
    tile = max(LANES**2, -(-rows * wide // BLOCKS))
    return (wide, -(-rows // tile)), (np.int64(rows), c, tile)


def tile_sums(x: Array, *args: Any) -> Array:
    grid, shape = tiles(x)
    part = cupy().empty((grid[1], 2, x.shape[-1]), np.float32)
    launch("norm", "tile_sums", grid, (CHANNELS, LANES), x, *args, part, *shape)
    return part


def apply(x: Array, *args: Any, out: Array | None = None) -> Array:
    grid, shape = tiles(x)
    out = cupy().empty(x.shape, x.dtype) if out is None else out
    launch("norm", "apply", grid, (CHANNELS, LANES), x, *args, out, *shape)
    return out


def cuda_moments(x):
    (wide, _), shape = tiles(x)
    part, (mean, m2) = tile_sums(x, *[None] * 4), cupy().empty((2, shape[1]), np.float32)
    launch("norm", "merge_moments", (wide,), (CHANNELS, LANES), part, mean, m2, *shape)
    return mean, m2


def cuda_scale_shift(x, mean, scale, shift, residual, relu):
    return apply(x, mean, scale, shift, residual, None, int(relu))


def cuda_gradient_sums(gy, x, mean, inv_std, y):
    g = gy if y is None else cupy().empty(gy.shape, gy.dtype)
    sum_g, sum_gd = tile_sums(x, gy, y, None if y is None else g, mean).sum(axis=0)
    return sum_g, sum_gd * inv_std, g


def cuda_input_gradient(g, x, mean, scale, a, b, out=None):
    return apply(x, mean, b, a, g, scale, 0, out=out)


def for_each_row(file: str, kernel: str, x: Array, *others: Array, geometry: tuple) -> Array:
    """Fill the last array, (..., K), a row of K numbers at a time."""
    rows = others[-1].size // others[-1].shape[-1]
    given = x, *others, rows, *sum(geometry, ())
    launch(file, kernel, (-(-rows // LANES),), (CHANNELS, LANES), *given)
    return others[-1]


def cuda_unfold(x, kernel, stride, padding, size):
    if kernel == (1, 1):  # a view, or one copy
        return unfold.dispatch(object)(x, kernel, stride, padding, size)
    (kh, kw), (oh, ow), (n, _, _, c) = kernel, size, x.shape
    given = cupy().ascontiguousarray(x), cupy().empty((n * oh * ow, kh * kw * c), x.dtype)
    if (c * x.itemsize | given[0].data.ptr) % 8 == 0:  # only copied: so two or four at once
        given = tuple(a.view(np.float64) for a in given)
    geometry = given[0].shape[1:], kernel, stride, padding, size
    return for_each_row("conv", "unfold", *given, geometry=geometry).view(x.dtype)


def cuda_fold(patches, out, *geometry):
    return for_each_row("conv", "fold", patches, out, geometry=(out.shape[1:], *geometry))


def cuda_conv_input_gradient(gy, w, x_shape, stride, padding):
    (kh, kw), (ph, pw) = w.shape[:2], padding
    if stride != (1, 1) or (kh, kw) == (1, 1) or ph >= kh or pw >= kw:
        return conv_input_gradient.dispatch(object)(gy, w, x_shape, stride, padding)
    # Copying patches costs less than adding them up: gx is gy convolved with the kernel turned.
    turned = w[::-1, ::-1].swapaxes(2, 3)  # (KH, KW, O, C)
    return conv_output(gy, turned, stride, (kh - 1 - ph, kw - 1 - pw))


def cuda_max_pool_output(x, kernel, stride, padding):
    size, (before, _) = output_size(x.shape, kernel, stride, padding), zip(*padding, strict=True)
    y, argmax = (cupy().empty((len(x), *size, x.shape[3]), t) for t in (x.dtype, np.uint8))
    geometry = x.shape[1:], kernel, stride, before, size
    return for_each_row("pool", "max_pool", x, argmax, y, geometry=geometry), argmax


def cuda_max_pool_input_gradient(gy, argmax, x_shape, kernel, stride, padding):
    gx, (before, _) = cupy().empty(x_shape, gy.dtype), zip(*padding, strict=True)
    geometry = x_shape[1:], kernel, stride, before, gy.shape[1:3]
    return for_each_row("pool", "max_pool_gradient", gy, argmax, gx, geometry=geometry)


def by_rows(a: Array) -> tuple[Array, bool]:
    """A matrix in one piece, and whether it was turned for that."""
    turned = not a.flags.c_contiguous and a.flags.f_contiguous
    return cupy().ascontiguousarray(a.T if turned else a), turned


def cuda_matmul(a, b, out=None):
    xp, (n, k), m = cupy(), a.shape, b.shape[1]
    if not is_bfloat16(a):
        return xp.matmul(a, b, out=out)
    out = xp.empty((n, m), np.float32) if out is None else out
    (a, a_turned), (b, b_turned) = by_rows(a), by_rows(b.astype(a.dtype, copy=False))
    one, zero = np.ones(1, np.float32), np.zeros(1, np.float32)
    blas, bf16, f32 = xp.cuda.cublas, xp.cuda.runtime.CUDA_R_16BF, xp.cuda.runtime.CUDA_R_32F
    # cuBLAS counts down columns: what is a matrix here is its transpose there, and C' = B' A'.
    blas.gemmEx(
        xp.cuda.get_cublas_handle(), int(b_turned), int(a_turned), m, n, k,
        one.ctypes.data, b.data.ptr, bf16, b.shape[1], a.data.ptr, bf16, a.shape[1],
        zero.ctypes.data, out.data.ptr, bf16 if is_bfloat16(out) else f32, m,
        blas.CUBLAS_COMPUTE_32F, blas.CUBLAS_GEMM_DEFAULT_TENSOR_OP,
    )  # fmt: skip
    return out


def table_of(optimizer: SGD, plain: bool = False) -> tuple[Array, list[Array]]:
    """The rows that optim.cu reads, without rates if `plain`, and the gradients they point to."""
    rows, gradients = [], []
    for name, p in optimizer.moving():
        g = cupy().ascontiguousarray(p.grad)
        arrays = p.data, g, optimizer.velocity[name]
        if any(a.dtype != np.float32 or not a.flags.c_contiguous for a in arrays):
            raise ValueError(f"{name}: not in one piece of float32, like the first parameter")
        eeta = getattr(optimizer, "eeta", 0.0) if p.kind == WEIGHT else 0.0
        rates = (0.0, 0.0) if plain else (optimizer.decay_of(p), eeta)
        rows.append((*(a.data.ptr for a in arrays), g.size, *rates))
        gradients.append(g)
    return cupy().asarray(np.array(rows, ROW).view(np.uint8)), gradients


def squares(rows: Array, count: int) -> Array:
    part = cupy().empty((count, SHARES, 2), np.float32)
    launch("optim", "squares", (SHARES, count), (THREADS,), rows, part)
    return part


def cuda_square_of_all(w, optimizer):
    rows, gradients = table_of(optimizer, plain=True)
    return squares(rows, len(gradients))[:, :, 1].sum()


def cuda_update_all(w, optimizer, ok):
    rows, gradients = table_of(optimizer)
    count, trust = len(gradients), cupy().empty(len(gradients), np.float32)
    part = squares(rows, count) if hasattr(optimizer, "eeta") else None
    given = part, None if ok is True else ok, trust, float(optimizer.lr), float(optimizer.momentum)
    launch("optim", "update", (SHARES, count), (THREADS,), rows, *given)
    if part is not None:
        of_all = zip(optimizer.moving(), trust, strict=True)
        optimizer.trust = {name: ratio for (name, p), ratio in of_all if p.kind == WEIGHT}


def cuda_apply_views(images: Array, views: Views, size: int) -> tuple[Array, Array]:
    xp, (n, height, width, _) = cupy(), images.shape
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
