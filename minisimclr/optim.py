"""SGD with momentum; and LARS, which also scales each layer's rate by its |weight| / |gradient|.

Only weights are decayed, and only their rates are scaled: biases and the parameters of batch norm
are not. Each parameter knows which it is (`adapt`), whatever its name. Unless
MINISIMCLR_KERNELS=reference, a faster momentum_update runs or, on a GPU, a faster update_all, which
does without momentum_update and trust_ratio.
"""

from collections.abc import Iterable
from functools import singledispatch
from typing import Any

import numpy as np

from .backend import Array, to_host, xp_of
from .tensor import Parameter


@singledispatch
def momentum_update(w: Array, g: Array, v: Array, lr: float, momentum: float, decay: float) -> None:
    """v <- momentum v + lr (g + decay w);  w <- w - v, both in place"""
    v *= momentum
    v += lr * (g + decay * w)
    w[...] -= v


def trust_ratio(w: Array, g: Array, decay: float, eeta: float) -> Array:
    """eeta |w| / |g + decay w|, or 1 if either norm is zero; eeta: eta, as the authors spell it"""
    xp = xp_of(w)
    w_norm = xp.linalg.norm(w.ravel())
    g_norm = xp.linalg.norm((g + decay * w).ravel())
    return xp.where((w_norm > 0) & (g_norm > 0), eeta * w_norm / (g_norm + (g_norm == 0)), 1.0)


@singledispatch
def update_all(w: Array, optimizer: "SGD", ok: Any) -> None:
    """One step of every parameter that has a gradient, if `ok`; w is one of them."""
    if ok:
        for name, p in optimizer.moving():
            v, lr = optimizer.velocity[name], optimizer.rate_of(name, p)
            momentum_update(p.data, p.grad, v, lr, optimizer.momentum, optimizer.decay_of(p))


@singledispatch
def square_of_all(w: Array, optimizer: "SGD") -> Array:
    """Sum of the squares of all gradients; w is one of the parameters."""
    gradients: list[Array] = [p.grad for _, p in optimizer.moving()]
    return sum(g.ravel() @ g.ravel() for g in gradients)


class SGD:
    """Stochastic gradient descent with momentum and weight decay:

    v <- momentum v + lr (g + weight_decay w);  w <- w - v

    The rate is inside the buffer v, so a changing `lr` acts on new gradients only.
    """

    def __init__(
        self, named_parameters: Iterable[tuple[str, Parameter]], lr: float, momentum: float = 0.9,
        weight_decay: float = 0.0,
    ):  # fmt: skip
        self.parameters: dict[str, Parameter] = {}
        names: dict[int, str] = {}
        for pair in named_parameters:
            match pair:
                case (str(name), Parameter()) if name in self.parameters:
                    raise ValueError(f"two parameters are called {name!r}: put a prefix before it")
                case (str(name), Parameter() as p):
                    if (first := names.setdefault(id(p), name)) != name:
                        raise ValueError(f"{first!r} and {name!r} are one parameter: give it once")
                    self.parameters[name] = p
                case _:
                    raise TypeError("an optimizer takes named_parameters(): names and Parameters")
        if not self.parameters:
            raise ValueError("no parameters to move: was named_parameters() used up before?")
        if not all(value >= 0 for value in (lr, momentum, weight_decay)):
            raise ValueError(f"{lr=}, {momentum=}, {weight_decay=}: they must be 0 or more")
        self.lr, self.momentum, self.weight_decay = lr, momentum, weight_decay
        self.velocity = {n: xp_of(p.data).zeros_like(p.data) for n, p in self.parameters.items()}

    def step(self, ok: Any = True) -> None:
        """Move every parameter that has a gradient, if `ok` (which may be on the device)."""
        if moving := self.moving():
            update_all(moving[0][1].data, self, ok)

    def moving(self) -> list[tuple[str, Parameter]]:
        """The parameters that have a gradient, with their names. ValueError for another's shape."""
        found = [(name, p) for name, p in self.parameters.items() if p.grad is not None]
        for name, p in found:
            p.data = xp_of(p.data).asarray(p.data)  # of a scalar, NumPy's functions make a number
            if p.shape != (shape := getattr(p.grad, "shape", None)):
                raise ValueError(f"{name} has shape {p.shape}, and its gradient {shape}")
        return found

    def decay_of(self, p: Parameter) -> float:
        """Its weight decay: none for biases and batch norm."""
        return self.weight_decay if p.adapt else 0.0

    def rate_of(self, name: str, p: Parameter) -> Any:
        """Its rate, a number on the host or on its device; subclasses may have their own."""
        return self.lr

    def gradient_square(self) -> Array:
        """Squared length of all gradients as one vector, on their device; not finite if any number
        in them is not, and 0 without any.
        """
        moving = self.moving()
        return square_of_all(moving[0][1].data, self) if moving else np.zeros((), np.float32)

    def zero_grad(self) -> None:
        for p in self.parameters.values():
            p.grad = None

    def state_dict(self) -> dict[str, np.ndarray]:
        """Host copies of the momentum buffers, in the parameters' own layout."""
        return {name: to_host(v).copy() for name, v in self.velocity.items()}

    def load_state_dict(self, state: dict[str, np.ndarray]) -> None:
        """Raises ValueError unless the state is of parameters of the same names and shapes."""
        if {n: v.shape for n, v in self.velocity.items()} != {n: v.shape for n, v in state.items()}:
            raise ValueError("this state is of parameters of other names or shapes")
        for name, v in self.velocity.items():
            v[...] = xp_of(v).asarray(state[name])


class LARS(SGD):
    """Layer-wise adaptive rate scaling (You et al. 2017, arXiv:1708.03888), as in SimCLR's code:

    g <- g + weight_decay w;  trust = eeta |w| / |g|;  v <- momentum v + lr trust g;  w <- w - v

    |g| includes the decay; trust is 1 if a norm is 0, and for every parameter that is not a weight
    (google-research/simclr, lars_optimizer, classic momentum).
    """

    def __init__(
        self, named_parameters: Iterable[tuple[str, Parameter]], lr: float, momentum: float = 0.9,
        weight_decay: float = 1e-6, eeta: float = 0.001,
    ):  # fmt: skip
        super().__init__(named_parameters, lr, momentum, weight_decay)
        if not eeta > 0:
            raise ValueError(f"eeta must be positive, not {eeta}")
        self.eeta = eeta
        self.trust: dict[str, Array] = {}  # last ratio of each weight, for inspection

    def rate_of(self, name: str, p: Parameter) -> Any:
        if not p.adapt:
            return self.lr
        self.trust[name] = trust_ratio(p.data, p.grad, self.decay_of(p), self.eeta)
        return self.lr * self.trust[name]
