"""minisimclr: SimCLR from scratch on NumPy and CuPy.

    import minisimclr as ms
    run = ms.pretrain(ms.TrainConfig(epochs=5))     # on cartoon dogs
    h = run.model.encode(views)                     # (N, S, S, 3) in [0, 1] -> (N, D)

Read in this order: tensor, ops, nn, optim, schedule, augment, simclr, train, probe.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import augment, kernels, nn, ops, optim, schedule
from .config import TrainConfig
from .ops.loss import nt_xent
from .tensor import Function, Parameter, Tensor, gradcheck, no_grad

if TYPE_CHECKING:
    from . import baseline, compare, data, embed, finetune, probe, report, simclr, train, weights
    from .train import pretrain

__version__ = "0.1.0"

__all__ = [
    "Function", "Parameter", "Tensor", "TrainConfig", "augment", "baseline", "compare", "data",
    "embed", "finetune", "gradcheck", "kernels", "nn", "no_grad", "nt_xent", "ops", "optim",
    "pretrain", "probe", "report", "schedule", "simclr", "train", "weights",
]  # fmt: skip


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    """Import what needs HDF5 or Pillow on first use, so that `minisimclr --help` stays quick."""
    if name == "pretrain":
        return import_module(".train", __name__).pretrain
    if name in __all__:
        return import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
