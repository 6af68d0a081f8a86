"""Convolution on a GPU: matrix products of patches, or of Winograd's tiles where these cost less.

In float32, tiles pay for a 3x3 convolution of stride 1: a quarter of the multiplications, and half
as much to write and to read as with patches (winograd.py explains the method, winograd.cu has its
maps). Rounding hurts them too much for bfloat16; they stay float32 whatever `precision` says.
"""

import numpy as np

from ..backend import Array, cupy
from ..ops import conv as ops
from ..ops.conv import Pair, image_blocks, output_size
from .cuda_launch import THREADS, for_each_row, is_bfloat16, launch

FF = 36  # numbers in a transformed tile, and so matrix products in a convolution
SCALARS = np.array([0, 1], np.float32)  # where cuBLAS finds the factors of its sums
ZERO, ONE = SCALARS.ctypes.data, SCALARS.ctypes.data + SCALARS.itemsize


def cuda_unfold(x, kernel, stride, padding, size):
    if kernel == (1, 1):  # a view, or one copy
        return ops.unfold.dispatch(object)(x, kernel, stride, padding, size)
    (kh, kw), (oh, ow), (n, _, _, c) = kernel, size, x.shape
    given = cupy().ascontiguousarray(x), cupy().empty((n * oh * ow, kh * kw * c), x.dtype)
    if (c * x.itemsize | given[0].data.ptr) % 8 == 0:  # they are only copied: two or four at once
        given = tuple(a.view(np.float64) for a in given)
    geometry = given[0].shape[1:], kernel, stride, padding, size
    return for_each_row("conv", "unfold", *given, geometry=geometry).view(x.dtype)


def cuda_fold(patches, out, *geometry):
    return for_each_row("conv", "fold", patches, out, geometry=(out.shape[1:], *geometry))


def cuda_conv_input_gradient(gy, w, x_shape, stride, padding):
    (kh, kw), (ph, pw) = w.shape[:2], padding
    if stride != (1, 1) or (kh, kw) == (1, 1) or ph >= kh or pw >= kw:
        return ops.conv_input_gradient.dispatch(object)(gy, w, x_shape, stride, padding)
    # Copying patches costs less than adding them up: gx is gy convolved with the kernel turned.
    turned = w[::-1, ::-1].swapaxes(2, 3)  # (KH, KW, O, C)
    return ops.conv_output(gy, turned, stride, (kh - 1 - ph, kw - 1 - pw))


def tile_grid(x: Array, w_shape: tuple, size: Pair, stride: Pair) -> Pair | None:
    """Rows and columns of tiles in an image of `size` outputs; None where they do not pay. They
    must halve the multiplications, FF a tile for 9 a pixel, and hold fewer numbers than patches
    where they are whole.
    """
    (kh, kw, c, o), grid = w_shape, (-(-size[0] // 4), -(-size[1] // 4))
    pays = 2 * FF * grid[0] * grid[1] <= 9 * size[0] * size[1] and o < 3 * c
    return grid if pays and (kh, kw, *stride) == (3, 3, 1, 1) and x.dtype == np.float32 else None


def take(x: Array, side: int, grid: Pair, padding: Pair = (0, 0)) -> Array:
    """Every tile of images x (n, H, W, C), transformed: (FF, tiles, C)"""
    n, h, w, c = x.shape
    out = cupy().empty((FF, n * grid[0] * grid[1], c), np.float32)
    numbers = out.size // FF
    given = x, out, side, numbers, h, w, c, *grid, *padding
    launch("winograd", "take", (-(-numbers // THREADS),), (THREADS,), *given)
    return out


def put(tiles: Array, side: int, grid: Pair, out: Array) -> Array:
    """The way back: fill images `out` (n, H, W, C)."""
    numbers = tiles.size // FF
    given = tiles, out, side, numbers, *out.shape[1:], *grid
    launch("winograd", "put", (-(-numbers // THREADS),), (THREADS,), *given)
    return out


def products(a: Array, b: Array, out: Array, turned: bool = False, add: bool = False) -> Array:
    """out <- a @ b, or `add` that to out: (FF, n, k) @ (FF, k, m). If `turned`, a is (FF, k, n) and
    is transposed first, for which CuPy's own product would copy it.
    """
    xp, (_, n, m), k = cupy(), out.shape, b.shape[1]
    xp.cuda.cublas.sgemmStridedBatched(  # by columns, as in cuda_matmul
        xp.cuda.get_cublas_handle(), 0, int(turned), m, n, k,
        ONE, b.data.ptr, m, k * m, a.data.ptr, a.shape[2], n * k,
        ONE if add else ZERO, out.data.ptr, m, n * m, FF,
    )  # fmt: skip
    return out


def cuda_conv_output(x, w, stride, padding):
    size, (*_, c, o) = output_size(x.shape, w.shape, stride, padding), w.shape
    if not (grid := tile_grid(x, w.shape, size, stride)):
        return ops.conv_output.dispatch(object)(x, w, stride, padding)
    y = cupy().empty((len(x), *size, o), np.float32)
    u = take(w.reshape(1, 3, 3, c * o), 3, (1, 1)).reshape(FF, c, o)
    for block in image_blocks(x, FF * grid[0] * grid[1] * (c + o)):
        v = take(x[block], 6, grid, padding)  # (FF, tiles, C)
        m = products(v, u, cupy().empty((*v.shape[:2], o), np.float32))  # (FF, tiles, O)
        put(m, 4, grid, y[block])
    return y


def cuda_conv_weight_gradient(gy, x, w_shape, stride, padding):
    *_, c, o = w_shape
    if not (grid := tile_grid(x, w_shape, gy.shape[1:3], stride)):
        return ops.conv_weight_gradient.dispatch(object)(gy, x, w_shape, stride, padding)
    gu = cupy().empty((FF, c, o), np.float32)
    for block in image_blocks(x, FF * grid[0] * grid[1] * (c + o)):
        v, m = take(x[block], 6, grid, padding), take(gy[block], 4, grid)
        # (FF, C, tiles) @ (FF, tiles, O), added to what earlier images gave
        products(v, m, gu, turned=True, add=block.start > 0)
    gw = cupy().empty((1, 3, 3, c * o), np.float32)
    return put(gu, 3, (1, 1), gw).reshape(w_shape)


def by_rows(a: Array) -> tuple[Array, bool]:
    """A matrix as contiguous rows, and whether it was transposed for that."""
    turned = not a.flags.c_contiguous and a.flags.f_contiguous
    return cupy().ascontiguousarray(a.T if turned else a), turned


def cuda_matmul(a, b, out=None):
    xp, (n, k), m = cupy(), a.shape, b.shape[1]
    if not is_bfloat16(a):
        return xp.matmul(a, b, out=out)
    out = xp.empty((n, m), np.float32) if out is None else out
    (a, a_turned), (b, b_turned) = by_rows(a), by_rows(b.astype(a.dtype, copy=False))
    blas, bf16, f32 = xp.cuda.cublas, xp.cuda.runtime.CUDA_R_16BF, xp.cuda.runtime.CUDA_R_32F
    # cuBLAS stores matrices by columns: a matrix here is its transpose there, and C' = B' A'.
    blas.gemmEx(
        xp.cuda.get_cublas_handle(), int(b_turned), int(a_turned), m, n, k,
        ONE, b.data.ptr, bf16, b.shape[1], a.data.ptr, bf16, a.shape[1],
        ZERO, out.data.ptr, bf16 if is_bfloat16(out) else f32, m,
        blas.CUBLAS_COMPUTE_32F, blas.CUBLAS_GEMM_DEFAULT_TENSOR_OP,
    )  # fmt: skip
    return out
