"""Reverse-mode automatic differentiation on arrays: Tensor, Function, backward, no_grad, gradcheck.

A Function is one applied operation: `forward` maps arrays to an array and keeps, in plain
attributes, what its `backward` will need. Edges link operations, not tensors, so an array lives on
only if some operation saved it. `backward` visits operations in reverse topological order and frees
each right after use: a graph serves one backward. Saved arrays are no copies, and some are computed
again: change `.data` after all backward passes through it. Gradients have no gradients themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import singledispatch
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np

from .backend import Array, to_host, xp_of

_recording: ContextVar[bool] = ContextVar("recording", default=True)
_adding = Lock()  # to the gradient of a leaf, which threads may share

# A profiler's: observer(function, "forward" or "backward", run, arrays) returns run(*arrays).
observer: Callable[[Function, str, Callable, tuple], Any] | None = None


@contextmanager
def no_grad() -> Iterator[None]:
    """Record no graph in the block, in this thread: results need no gradient, nothing is saved."""
    token = _recording.set(False)
    try:
        yield
    finally:
        _recording.reset(token)


class Tensor:
    """An array that remembers the operation that made it.

    data: numpy or cupy array; float32, float64 and bfloat16 are kept, anything else (numbers and
        lists of them too) becomes float32. Bytes, as images have, raise TypeError.
    grad: None, or an array like `data` once `backward` has reached this leaf.
    """

    __array_ufunc__ = None  # ndarray * Tensor defers to Tensor.__rmul__
    creator: Function | None = None
    grad: Array | None = None

    if TYPE_CHECKING:  # added by ops/basic.py

        def __add__(self, other: Any) -> Tensor: ...
        def sum(self, *args: Any, **named: Any) -> Tensor: ...

        __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = __add__
        __pow__ = __matmul__ = __rmatmul__ = __getitem__ = __add__
        __neg__ = mean = reshape = transpose = exp = log = relu = sum

    def __init__(self, data: Any, requires_grad: bool = False):
        if isinstance(data, (int, float, list, tuple)) and not isinstance(data, np.generic):
            # Python's numbers imply no precision; what is made of bytes is refused below.
            data = np.asarray(data, "u1" if np.asarray(data).dtype == np.uint8 else "f4")
        xp_of(data)  # raises TypeError for what is no array
        if data.dtype == np.uint8:
            raise TypeError("bytes of images are not in [0, 1]: divide them by 255")
        if data.dtype not in (np.float32, np.float64) and data.dtype.name != "bfloat16":
            data = data.astype(np.float32)
        self.data: Array = np.asarray(data) if xp_of(data) is np else data
        self.requires_grad = requires_grad

    @property
    def shape(self) -> tuple[int, ...]:
        return self.data.shape

    @property
    def dtype(self) -> np.dtype:
        return self.data.dtype

    def numpy(self) -> np.ndarray:
        """The values on the host."""
        return to_host(self.data)

    def detach(self) -> Tensor:
        """The same values without their history."""
        return Tensor(self.data)

    if not TYPE_CHECKING:  # else checkers would take an array times a Tensor for an array

        def __array__(self, *_: Any, **__: Any) -> np.ndarray:
            raise TypeError("NumPy's functions record no graph: give them a Tensor's .data")

    def __isub__(self, other: Any) -> Any:
        """`x -= y` makes x a new Tensor, like x = x - y. That would lose a leaf: TypeError."""
        if self.requires_grad and self.creator is None:
            raise TypeError("a leaf is not changed in place: change its .data")
        return NotImplemented

    __iadd__ = __imul__ = __itruediv__ = __ipow__ = __imatmul__ = __isub__

    def __eq__(self, other: object) -> bool:
        raise TypeError("comparing records no graph: compare a Tensor's .data")

    __hash__ = object.__hash__

    def __len__(self) -> int:
        return len(self.data)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[i] for i in range(len(self)))  # a scalar has no length: TypeError

    def __bool__(self) -> bool:
        return bool(self.data)

    def __float__(self) -> float:
        return float(self.data.item())

    item = __float__
    ndim = property(lambda self: self.data.ndim)
    T = property(lambda self: self.transpose())  # all axes reversed, as NumPy does

    def __format__(self, spec: str) -> str:
        return format(self.numpy(), spec) if spec else repr(self)

    def __repr__(self) -> str:
        history = f", by {type(self.creator).__name__}" if self.creator else ""
        return f"{type(self).__name__}({self.data}{history})"

    def backward(self, gradient: Array | None = None) -> None:
        """Add d(self)/d(leaf) times `gradient` (default 1, for a scalar) to every leaf's `.grad`.

        Raises ValueError for a non-scalar without a `gradient` of its shape, RuntimeError if no
        input has requires_grad, or an earlier backward used the graph up.
        """
        if self.creator is None:
            raise RuntimeError("backward(): no graph leads here: did any input require a gradient?")
        if gradient is None and self.data.size == 1:
            gradient = xp_of(self.data).ones_like(self.data)
        if isinstance(gradient, Tensor) or getattr(gradient, "shape", None) != self.shape:
            raise ValueError(f"backward() needs a gradient array of shape {self.shape}")
        _backpropagate(self.creator, xp_of(gradient).asarray(gradient, self.dtype))


class Parameter(Tensor):
    """A leaf; optimizers write into its `data`. With adapt=False, as biases and batch norm have it,
    it is not decayed, nor is its rate scaled by LARS.
    """

    def __init__(self, data: Array, *, adapt: bool = True):
        super().__init__(data, requires_grad=True)
        self.adapt = adapt


class Function:
    """One applied operation; a subclass has forward(self, *arrays) and backward(self, gy).

    `backward` returns the gradient of each input (a tuple, or one array for one input), and may say
    None where `self.needs[i]` is false; `self.shapes[i]` is its shape. Both may write only into
    arrays they have allocated themselves: inputs, `gy` and saved arrays are shared with others.
    """

    # For each input: the Function that made it; itself, if a leaf; None if it needs no gradient.
    parents: tuple[Function | Tensor | None, ...] = ()
    needs: tuple[bool, ...] = ()
    shapes: tuple[tuple[int, ...], ...] = ()
    y_dtype: Any = None  # type of the output, and so of gy
    used_up = False

    def forward(self, *arrays: Any, **_: Any) -> Array:
        raise NotImplementedError(f"{type(self).__name__} has no forward")

    def backward(self, gy: Array) -> Any:
        raise NotImplementedError(f"{type(self).__name__} has no backward")

    def __call__(self, *inputs: Tensor) -> Tensor:
        if self.parents or self.used_up:
            raise RuntimeError(f"{type(self).__name__} was applied before: make one for each use")
        for x in inputs:
            if not isinstance(x, Tensor):
                raise TypeError(f"{type(self).__name__} takes Tensors, not {type(x)}")
        arrays = tuple(xp_of(x.data) and x.data for x in inputs)  # TypeError for a Tensor as .data
        self.needs = tuple(x.requires_grad and _recording.get() for x in inputs)
        run = self.forward
        y = run(*arrays) if observer is None else observer(self, "forward", run, arrays)
        if not hasattr(y, "dtype"):
            raise TypeError(f"{type(self).__name__}.forward gave {type(y)}, not an array")
        out = Tensor(y)
        if any(self.needs):
            out.requires_grad, out.creator = True, self
            each = zip(inputs, self.needs, strict=True)
            self.parents = tuple((x.creator or x) if need else None for x, need in each)
            self.shapes, self.y_dtype = tuple(a.shape for a in arrays), out.dtype
        return out

    def __reduce__(self) -> Any:
        raise TypeError("a graph is not copied: copy the Tensor's .detach()")


@singledispatch
def added(a: Array, b: Array) -> Array:
    """a + b, both of the same shape, in a new array; dispatched, as `kernels` has a faster one"""
    return a + b


def memory_of(a: Array) -> int:
    """A number that all views of the same memory share."""
    return id(a if a.base is None else a.base)


def _backpropagate(root: Function, gradient: Array) -> None:
    gradients = {root: gradient}
    owned: set[Function] = set()  # their gradient is a sum made here: safe to add to in place
    waiting = _count_children(root)
    ready = [root]
    while ready:
        function = ready.pop()
        gy = gradients.pop(function)
        run = function.backward
        gxs = run(gy) if observer is None else observer(function, "backward", run, (gy,))
        del gy  # its memory is free as soon as nothing else refers to it
        gxs = tuple(gxs) if isinstance(gxs, (tuple, list)) else (gxs,)
        who = type(function).__name__
        assert len(gxs) == (n := len(function.shapes)), f"{who}: {len(gxs)} of {n} gradients"
        for parent, gx, shape in zip(function.parents, gxs, function.shapes, strict=True):
            if parent is None:
                continue
            assert (seen := getattr(gx, "shape", gx)) == shape, f"{who}: gradient {seen} of {shape}"
            if isinstance(parent, Tensor):  # a leaf: its gradient must be its own, to write into
                gx = gx.astype(parent.dtype)  # a copy
                with _adding:
                    parent.grad = xp_of(gx).asarray(gx if parent.grad is None else parent.grad + gx)
                continue
            gx = gx.astype(parent.y_dtype, copy=False)
            if parent in owned:
                gradients[parent] += gx
            elif parent in gradients:
                gradients[parent] = added(gradients[parent], gx)
                owned.add(parent)
            else:
                gradients[parent] = gx
            waiting[parent] -= 1
            if waiting[parent] == 0:
                ready.append(parent)
        del gxs, gx
        function.__dict__.clear()  # every saved array, and the edges
        function.used_up = True


def _count_children(root: Function) -> dict[Function, int]:
    """For every operation below `root`, how many gradients it will be sent."""
    children, stack = {root: 0}, [root]
    while stack:  # no recursion: graphs get deeper than Python's stack
        function = stack.pop()
        if function.used_up:
            raise RuntimeError("an earlier backward() used this graph up: run the forward again")
        for parent in function.parents:
            if isinstance(parent, Function):
                if parent not in children:
                    children[parent] = 0
                    stack.append(parent)
                children[parent] += 1
    return children


def gradcheck(
    fn: Callable, *arrays: np.ndarray, eps: float = 1e-5, rtol: float = 1e-7, seed: int = 0
) -> None:
    """Check fn's gradients against finite differences in float64, one random direction per input.

    fn maps Tensors to a Tensor, J is its matrix of derivatives, and backward applies J's transpose:
    for random u and v, u . (J v), which takes two forwards, must equal (J.T u) . v. Inputs and u
    are read-only meanwhile; parameters in fn get gradients, too. Raises AssertionError naming the
    input: for wrong gradients or, rarely, right ones of a function that has a kink, as ReLU has
    at 0, or bends sharply within `eps` of the point; then another seed or `eps` may pass.
    """
    rng = np.random.default_rng(seed)
    points = [np.array(a, np.float64) for a in arrays]
    tensors = [Tensor(p, requires_grad=True) for p in points]
    for point in points:
        point.flags.writeable = False
    y = fn(*tensors)
    u = rng.standard_normal(y.shape)
    u.flags.writeable = False
    y.backward(u)
    for i, (tensor, point) in enumerate(zip(tensors, points, strict=True)):
        v = rng.standard_normal(point.shape) * min(1, abs(point).max(initial=0) or 1)
        ahead, behind = (
            fn(*(Tensor(p + sign * eps * v) if p is point else Tensor(p) for p in points)).data
            for sign in (1, -1)
        )
        terms = u * (ahead - behind) / (2 * eps)
        numeric = float(terms.sum())  # u . (J v)
        assert tensor.grad is not None, f"gradcheck: input {i} got no gradient"
        analytic = float(np.sum(tensor.grad * v))  # (J.T u) . v
        # Terms may cancel: their sum is only as exact as their sizes and fn's rounding allow.
        rounding = np.finfo(np.float64).eps / eps * float(abs(u * ahead).sum())
        if not abs(numeric - analytic) <= rtol * (1e-6 + float(abs(terms).sum())) + rounding:
            said = f"backward says {analytic:.10g}, finite differences say {numeric:.10g}"
            raise AssertionError(f"gradcheck: input {i} of shape {point.shape}: {said}")
