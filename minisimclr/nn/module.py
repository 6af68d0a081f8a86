"""Modules: objects that hold parameters, name them as torchvision does, and load and save them.

A module's parameters, buffers and children are its plain attributes, in the order they were
assigned; the path of attribute names is the parameter's name (`layer1.0.conv1.weight`). Weights are
kept as the operations want them, HWIO for convolutions; state dicts use torchvision's layouts,
OIHW (every array of four axes counts as a kernel).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any, Self

import numpy as np

from ..backend import Array, choose_device, to_device, to_host, xp_of
from ..errors import DataError
from ..tensor import Parameter, Tensor, no_grad

_evaluating: ContextVar[bool] = ContextVar("evaluating", default=False)


@contextmanager
def evaluating() -> Iterator[None]:
    """Within the block, and in this thread alone: running statistics, no dropout, no graph."""
    token = _evaluating.set(True)
    try:
        with no_grad():
            yield
    finally:
        _evaluating.reset(token)


class Module:
    """Base of all layers and networks: subclasses assign attributes and define forward."""

    buffers: tuple[str, ...] = ()  # attributes, all arrays, of the state that are not trained

    def forward(self, *inputs: Any, **named: Any) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} has no forward: call its parts")

    def __call__(self, x: Tensor, *others: Any, **named: Any) -> Tensor:
        return self.forward(x, *others, **named)

    def __setattr__(self, name: str, value: Any) -> None:
        """A Parameter gives way to another, or None; a leaf that needs a gradient must be one."""
        leaf = isinstance(value, Tensor) and value.requires_grad and value.creator is None
        to_be = (leaf or isinstance(vars(self).get(name), Parameter)) and value is not None
        if to_be and not isinstance(value, Parameter):
            raise TypeError(f"{name} must be a Parameter to be trained: assign one, or use .data")
        super().__setattr__(name, value)

    def __repr__(self) -> str:
        named = (f"{name} {p.shape}" for name, p in self.named_parameters())
        return "\n  ".join([type(self).__name__, *named])

    @property
    def training(self) -> bool:
        """Whether batch statistics and dropout are used: see `train` and `evaluating`."""
        return vars(self).get("training", True) and not _evaluating.get()

    def children(self) -> Iterator[tuple[str, Module]]:
        """(attribute, module) of each child, in definition order. Raises TypeError for a list,
        dict, function or the like with modules or parameters that no attribute leads to.
        """
        for name, value in vars(self).items():
            if isinstance(value, Module):
                yield name, value
            elif (ids := held(value) - {id(value)}) and ids - self._reached():
                raise TypeError(f"what {name} holds is not found: use Sequential or attributes")

    def _reached(self) -> set[int]:
        """The ids of all modules and parameters that are found through attributes."""
        inner = (v.named_modules() for v in vars(self).values() if isinstance(v, Module))
        modules = [self, *(module for each in inner for _, module in each)]
        return {id(value) for module in modules for value in (module, *vars(module).values())}

    def named_modules(self, prefix: str = "") -> Iterator[tuple[str, Module]]:
        """(prefix of its names, module): this one and all below, in definition order."""
        yield prefix, self
        for name, child in self.children():
            yield from child.named_modules(f"{prefix}{name}.")

    def _members(self) -> Iterator[tuple[str, Module, str, Any]]:
        """(full name, owner, attribute, value) of every parameter and buffer, in definition
        order.
        """
        for path, module in self.named_modules():
            for name, value in list(vars(module).items()):
                if isinstance(value, Parameter) or name in module.buffers:
                    yield path + name, module, name, value

    def named_parameters(self) -> Iterator[tuple[str, Parameter]]:
        """Each parameter once, by its first name, so that a shared one moves once per step."""
        seen: set[int] = set()
        for name, _, _, value in self._members():
            if isinstance(value, Parameter) and id(value) not in seen:
                seen.add(id(value))
                yield name, value

    def train(self, training: bool = True) -> Self:
        """Use batch statistics and dropout from now on (False: running statistics, no dropout)."""
        for _, module in self.named_modules():
            vars(module)["training"] = training  # behind the property of this name
        return self

    def eval(self) -> Self:
        return self.train(False)

    def _arrays(self) -> dict[str, Array]:
        return {n: v.data if isinstance(v, Parameter) else v for n, _, _, v in self._members()}

    def _replace(self, arrays: dict[str, Array]) -> Self:
        """Put arrays in the place of those of the same names."""
        for name, owner, attribute, value in self._members():
            if name in arrays and isinstance(value, Parameter):
                value.data, value.grad = arrays[name], None
            elif name in arrays:
                setattr(owner, attribute, arrays[name])
        return self

    def _convert(self, cast: Callable[[Array], Array]) -> Self:
        return self._replace({n: cast(a) for n, a in self._arrays().items() if a.dtype.kind == "f"})

    def astype(self, dtype: Any) -> Self:
        """Parameters and statistics in float32 or float64, in place; gradients are dropped, and an
        optimizer keeps its momentum as it was: make it afterwards.
        """
        if np.dtype(dtype) not in (np.float32, np.float64):
            raise TypeError(f"a module is float32 or float64, not {np.dtype(dtype)}")
        return self._convert(lambda a: a.astype(dtype))

    def to(self, device: str) -> Self:
        """Parameters and statistics on "cpu", "cuda:N" or "auto"; gradients are dropped, counters
        stay.

        A GPU also becomes this thread's current one. Raises ConfigError if it cannot be used.
        """
        where, _ = choose_device(device)
        return self._convert(lambda a: to_device(to_host(a), where))

    def state_dict(self) -> dict[str, np.ndarray]:
        """Host copies of all parameters and buffers, torchvision's names and layouts."""
        return {name: _to_torch_layout(to_host(a)).copy() for name, a in self._arrays().items()}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of what `state_dict` holds."""
        return {name: _to_torch_layout(array).shape for name, array in self._arrays().items()}

    def check_shapes(self, shapes: dict[str, tuple[int, ...]], origin: Any = "this state") -> None:
        """Raise DataError naming the first differences unless a state dict of `shapes` fits.

        `origin` is what the message calls the state dict. Accepted: a missing num_batches_tracked,
        and what a classifier (`fc.*`) has, if this module has none.
        """
        own, has_fc = self.shapes(), getattr(self, "fc", None) is not None
        differences = {
            "missing": [n for n in own if n not in shapes and not n.endswith("batches_tracked")],
            "unexpected": [n for n in shapes if n not in own and (n[:3] != "fc." or has_fc)],
            "of another shape": [
                f"{n}: shape {shapes[n]} for {s}" for n, s in own.items() if shapes.get(n, s) != s
            ],
        }
        if what := [
            f"{len(names)} {word} ({', '.join(names[:3])}{', ...' if names[3:] else ''})"
            for word, names in differences.items()
            if names
        ]:
            raise DataError(f"{origin} does not fit this model: {' and '.join(what)}")

    def load_state_dict(self, state: dict[str, np.ndarray]) -> None:
        """Load arrays in state_dict's form, cast to this module's dtype; all or nothing. Gradients
        are dropped.

        Strict: raises DataError as `check_shapes` does.
        """
        self.check_shapes({name: np.shape(array) for name, array in state.items()})
        arrays = {}  # all of them, before the first takes its place
        for name, like in self._arrays().items():
            if name in state:
                array = _from_torch_layout(np.asarray(state[name])).astype(like.dtype, order="C")
                arrays[name] = xp_of(like).asarray(array)
        self._replace(arrays)


def held(value: Any) -> set[int]:
    """The ids of the modules and parameters that a value is or, in a list, tuple, set or dict, as a
    partial or a bound method, holds at any depth.
    """
    if isinstance(value, partial):
        value = value.func, value.args, value.keywords
    if isinstance(value, (list, tuple, set, dict)):
        return set().union(*map(held, value.values() if isinstance(value, dict) else value))
    value = getattr(value, "__self__", value)
    return {id(value)} if isinstance(value, (Module, Parameter)) else set()


def _to_torch_layout(array: np.ndarray) -> np.ndarray:
    return array.transpose(3, 2, 0, 1) if array.ndim == 4 else array  # HWIO -> OIHW


def _from_torch_layout(array: np.ndarray) -> np.ndarray:
    return array.transpose(2, 3, 1, 0) if array.ndim == 4 else array  # OIHW -> HWIO


class Sequential(Module):
    """Modules, or functions such as relu, applied one after another. They are named "0", "1", ...;
    the first is also net[0]. What a function calls is not searched for parameters.
    """

    def __init__(self, *steps: Callable[[Tensor], Tensor]):
        for i, step in enumerate(steps):
            setattr(self, str(i), step)

    def __getitem__(self, i: Any) -> Any:
        return [step for name, step in vars(self).items() if name.isdigit()][i]

    def forward(self, x: Tensor) -> Tensor:
        for step in self[:]:
            x = step(x)
        return x
