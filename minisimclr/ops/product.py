"""The matrix product in which convolutions and linear layers spend their time."""

from functools import singledispatch

from ..backend import Array, rounding, xp_of


@singledispatch
def matmul(a: Array, b: Array, out: Array | None = None) -> Array:
    """a @ b for matrices (n, k) and (k, m), into `out` if given; float32 in the `precision` in
    force.
    """
    if rounding.get() == "bf16" and a.dtype == b.dtype == "float32":
        a, b = bfloat16(a), bfloat16(b)
    return xp_of(a).matmul(a, b, out=out)


def bfloat16(x: Array) -> Array:
    """float32 numbers rounded to the first 16 of their 32 bits: to the nearest, ties to even."""
    xp = xp_of(x)
    bits = xp.ascontiguousarray(x).view(xp.uint32)
    nearest = (bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000
    return xp.where(xp.isnan(x), x, nearest.view(xp.float32))
