"""Elementwise arithmetic, matrix products, reductions and shapes; operators for Tensor.

Each operation is a Function with forward and backward side by side; arguments broadcast as in
NumPy, and a gradient is summed back over the axes that were stretched.
"""

from typing import Any

import numpy as np

from ..backend import Array, xp_of
from ..tensor import Function, Tensor, memory_of


def as_tensor(value: Any, like: Tensor) -> Tensor:
    """A Tensor unchanged; a number or an array as one, in the dtype and array library of `like`.

    The array is copied: writing into it before backward(), as into a queue, changes no gradient.
    """
    if isinstance(value, Tensor):
        return value
    if value is None:  # NumPy would turn it into NaN
        raise TypeError("an operand is None: a gradient that backward() has not reached?")
    return Tensor(xp_of(like.data).array(value, dtype=like.dtype))


def unbroadcast(gradient: Array, shape: tuple[int, ...]) -> Array:
    """Sum `gradient` over the axes along which an input of `shape` was stretched."""
    extra = tuple(range(gradient.ndim - len(shape)))
    stretched = tuple(i for i, n in enumerate(shape, len(extra)) if n != gradient.shape[i])
    if not extra and not stretched:
        return gradient
    return gradient.sum(axis=extra + stretched, keepdims=True).reshape(shape)


class Add(Function):
    """a + b"""

    def forward(self, a, b):
        return a + b

    def backward(self, gy):
        return tuple(unbroadcast(gy, shape) for shape in self.shapes)


class Multiply(Function):
    """a * b"""

    def forward(self, a, b):
        self.a, self.b = a, b
        return a * b

    def backward(self, gy):
        ga = unbroadcast(gy * self.b, self.a.shape) if self.needs[0] else None
        gb = unbroadcast(gy * self.a, self.b.shape) if self.needs[1] else None
        return ga, gb


class Divide(Function):
    """a / b"""

    def forward(self, a, b):
        self.b, self.y = b, a / b
        return self.y

    def backward(self, gy):
        g = gy / self.b
        gb = unbroadcast(-g * self.y, self.b.shape) if self.needs[1] else None
        return unbroadcast(g, self.shapes[0]), gb


class Power(Function):
    """x ** p for a number p"""

    def __init__(self, p: float):
        if isinstance(p, Tensor) or np.ndim(p):
            raise TypeError(f"x ** p takes one number p, not a {type(p).__name__}")
        self.p = float(p)  # NumPy's number would make x float64

    def forward(self, x):
        self.x = x
        return x**self.p

    def backward(self, gy):
        return gy * (self.p * self.x ** (self.p - 1) if self.p else 0)  # p = 0: right at x = 0, too


class Exp(Function):
    """e ** x"""

    def forward(self, x):
        self.y = xp_of(x).exp(x)
        return self.y

    def backward(self, gy):
        return gy * self.y


class Log(Function):
    """Natural logarithm of x"""

    def forward(self, x):
        self.x = x
        return xp_of(x).log(x)

    def backward(self, gy):
        return gy / self.x


def relu_gradient(gy: Array, y: Array) -> Array:
    """gy where the output y was positive, else 0 (NaN where gy is infinite: a product is fast)"""
    return gy * (y > 0)


class ReLU(Function):
    """max(x, 0); saves its output, which the next layer keeps anyway"""

    def forward(self, x):
        self.y = xp_of(x).maximum(x, 0)
        return self.y

    def backward(self, gy):
        return relu_gradient(gy, self.y)


class MatMul(Function):
    """a @ b for matrices (..., n, k) and (..., k, m); stacks of them broadcast"""

    def forward(self, a, b):
        if a.ndim < 2 or b.ndim < 2:
            raise ValueError(f"matmul needs matrices, not shapes {a.shape} and {b.shape}")
        self.a, self.b = a, b
        return a @ b

    def backward(self, gy):
        a, b = self.a.swapaxes(-1, -2), self.b.swapaxes(-1, -2)
        ga = unbroadcast(gy @ b, self.a.shape) if self.needs[0] else None  # (n, m) @ (m, k)
        gb = unbroadcast(a @ gy, self.b.shape) if self.needs[1] else None  # (k, n) @ (n, m)
        return ga, gb


class Sum(Function):
    """Sum, or mean, over an axis, a tuple of axes, or all of them"""

    def __init__(self, axis: int | tuple[int, ...] | None, keepdims: bool, mean: bool = False):
        self.axis, self.keepdims, self.mean = axis, keepdims, mean

    def forward(self, x):
        y = (x.mean if self.mean else x.sum)(axis=self.axis, keepdims=self.keepdims)
        self.count = x.size // (y.size or 1)
        return y

    def backward(self, gy):
        gy = gy / self.count if self.mean else gy
        if not self.keepdims and self.axis is not None:
            gy = xp_of(gy).expand_dims(gy, self.axis)
        return xp_of(gy).broadcast_to(gy, self.shapes[0])


class Reshape(Function):
    """The same numbers, in the same order, in another shape"""

    def __init__(self, shape: tuple[int, ...]):
        self.shape = shape

    def forward(self, x):
        return x.reshape(self.shape)

    def backward(self, gy):
        return gy.reshape(self.shapes[0])


class Transpose(Function):
    """Axes in a new order (default: reversed); negative ones count from the end"""

    def __init__(self, axes: tuple[int, ...] | None):
        self.axes = axes

    def forward(self, x):
        return x.transpose(self.axes)

    def backward(self, gy):
        order = [i % gy.ndim for i in self.axes or reversed(range(gy.ndim))]
        return gy.transpose([order.index(i) for i in range(gy.ndim)])


class GetItem(Function):
    """x[key] for slices, integers, masks and index arrays, which are copied as operands are"""

    def __init__(self, key: Any):
        keys = key if isinstance(key, tuple) else (key,)
        self.key = tuple(k.copy() if hasattr(k, "copy") else k for k in keys)

    def forward(self, x):
        return x[self.key]

    def backward(self, gy):
        gx = xp_of(gy).zeros(self.shapes[0], gy.dtype)
        if memory_of(gx[self.key]) == memory_of(gx):  # slices pick every element at most once
            gx[self.key] = gy
        else:  # index arrays may pick one several times: its gradients add up
            xp_of(gy).add.at(gx, self.key, gy)
        return gx


class Concatenate(Function):
    """Join along one axis"""

    def __init__(self, axis: int):
        self.axis = axis

    def forward(self, *xs):
        return xp_of(xs[0]).concatenate(xs, axis=self.axis)

    def backward(self, gy):
        ends = np.cumsum([shape[self.axis] for shape in self.shapes])[:-1].tolist()
        return tuple(xp_of(gy).split(gy, ends, axis=self.axis))


class Cast(Function):
    """The same numbers in another floating type"""

    def __init__(self, dtype: Any):
        self.dtype = dtype

    def forward(self, x):
        self.before = x.dtype
        return x.astype(self.dtype)

    def backward(self, gy):
        return gy.astype(self.before, order="C")


def relu(x: Tensor) -> Tensor:
    """max(x, 0)"""
    return ReLU()(x)


def cast(x: Tensor, dtype: Any) -> Tensor:
    """x in another floating type; x itself if it already has that type"""
    return x if x.dtype == dtype else Cast(dtype)(x)


def concatenate(tensors: list[Tensor] | tuple[Tensor, ...], axis: int = 0) -> Tensor:
    """Tensors joined along one axis; their other axes agree."""
    return Concatenate(axis)(*tensors)


def _listed(numbers: tuple) -> tuple:
    """Numbers given one by one, or as one tuple or list."""
    return tuple(numbers[0]) if numbers and isinstance(numbers[0], (tuple, list)) else numbers


# Operators. `other` may be a Tensor, an array or a number.
for _name, _method in {
    "__add__": lambda self, other: Add()(self, as_tensor(other, self)),
    "__radd__": lambda self, other: Add()(as_tensor(other, self), self),
    "__mul__": lambda self, other: Multiply()(self, as_tensor(other, self)),
    "__rmul__": lambda self, other: Multiply()(as_tensor(other, self), self),
    "__neg__": lambda self: self * -1.0,
    "__sub__": lambda self, other: self + -as_tensor(other, self),
    "__rsub__": lambda self, other: as_tensor(other, self) + -self,
    "__truediv__": lambda self, other: Divide()(self, as_tensor(other, self)),
    "__rtruediv__": lambda self, other: Divide()(as_tensor(other, self), self),
    "__pow__": lambda self, p: Power(p)(self),
    "__matmul__": lambda self, other: MatMul()(self, as_tensor(other, self)),
    "__rmatmul__": lambda self, other: MatMul()(as_tensor(other, self), self),
    "__getitem__": lambda self, key: GetItem(key)(self),
    "sum": lambda self, axis=None, keepdims=False: Sum(axis, keepdims)(self),
    "mean": lambda self, axis=None, keepdims=False: Sum(axis, keepdims, mean=True)(self),
    "reshape": lambda self, *shape: Reshape(_listed(shape))(self),
    "transpose": lambda self, *axes: Transpose(_listed(axes) or None)(self),
    "exp": lambda self: Exp()(self),
    "log": lambda self: Log()(self),
    "relu": lambda self: relu(self),
}.items():
    _method.__name__, _method.__qualname__ = _name, f"Tensor.{_name}"  # for errors and help()
    setattr(Tensor, _name, _method)
for _name in ("__lt__", "__le__", "__gt__", "__ge__"):
    setattr(Tensor, _name, Tensor.__eq__)  # which explains why not
