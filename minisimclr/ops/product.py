"""The matrix product in which convolutions and linear layers spend their time; linear layers."""

from functools import singledispatch

from ..backend import Array, xp_of
from ..tensor import Function, Tensor


@singledispatch
def matmul(a: Array, b: Array, out: Array | None = None) -> Array:
    """a @ b for matrices (n, k) and (k, m), into `out` if given."""
    return xp_of(a).matmul(a, b, out=out)


class Linear(Function):
    """x W.T + b for x (N, C), W (O, C), b (O,) or absent"""

    def forward(self, x, w, b=None):
        self.x, self.w = x, w
        y = matmul(x, w.T)  # (N, C) @ (C, O)
        if b is not None:
            y += b
        return y

    def backward(self, gy):
        gx = matmul(gy, self.w) if self.needs[0] else None  # (N, O) @ (O, C)
        gw = matmul(gy.T, self.x) if self.needs[1] else None  # (O, N) @ (N, C)
        return (gx, gw, gy.sum(axis=0)) if len(self.needs) == 3 else (gx, gw)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W.T + b: x (N, C), weight (O, C), bias (O,) -> (N, O). ValueError for other shapes."""
    if x.ndim != 2 or x.shape[1:] != weight.shape[1:]:
        raise ValueError(f"linear: x (N, C) and weight (O, C), not {x.shape} and {weight.shape}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"linear: bias (O,) for weight {weight.shape}, not {bias.shape}")
    return Linear()(x, weight) if bias is None else Linear()(x, weight, bias)
