"""minisimclr: SimCLR from scratch on NumPy and CuPy."""

from . import nn, ops, optim, schedule
from .config import TrainConfig
from .ops.loss import nt_xent
from .tensor import Function, Parameter, Tensor, gradcheck, no_grad

__version__ = "0.1.0"
