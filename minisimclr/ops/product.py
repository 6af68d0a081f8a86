"""The matrix product in which convolutions and linear layers spend their time."""

from functools import singledispatch

from ..backend import Array, xp_of


@singledispatch
def matmul(a: Array, b: Array, out: Array | None = None) -> Array:
    """a @ b for matrices (n, k) and (k, m), into `out` if given."""
    return xp_of(a).matmul(a, b, out=out)
