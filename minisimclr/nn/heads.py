"""The projection head g of SimCLR: trained with the encoder; the linear probe does without it."""

import numpy as np

from ..tensor import Tensor
from .layers import BatchNorm, Linear
from .module import Module


class ProjectionHead(Module):
    """z = g(h): dense layers without bias, each with batch norm, and ReLU between them.

    As in the authors' projection_head (google-research/simclr), the last batch norm only scales.
    d_in and d_hidden are the encoder's D, d_out 128; `layers` is 2 in SimCLR, 3 in SimCLRv2.
    """

    def __init__(self, d_in: int, d_hidden: int, d_out: int, layers: int = 2, seed: int = 0):
        rng = np.random.Generator(np.random.Philox(key=[seed, 1]))
        self.layers = layers
        for i in range(layers):
            last = i == layers - 1
            c, o = d_in if i == 0 else d_hidden, d_out if last else d_hidden
            setattr(self, f"linear{i + 1}", Linear(c, o, bias=False, rng=rng))
            setattr(self, f"bn{i + 1}", BatchNorm(o, beta=not last))

    def layer(self, i: int, h: Tensor) -> Tensor:
        """Layer i = 1, 2, ... alone: SimCLRv2 keeps the first to fine-tune with few labels."""
        h = getattr(self, f"linear{i}")(h)
        return getattr(self, f"bn{i}")(h, relu=i < self.layers)

    def forward(self, h: Tensor) -> Tensor:
        for i in range(1, self.layers + 1):
            h = self.layer(i, h)
        return h  # (N, d_out)
