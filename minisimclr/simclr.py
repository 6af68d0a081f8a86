"""SimCLR (Chen et al. 2020, arXiv:2002.05709): Algorithm 1 as one function.

Two random views of every image go through encoder f and projection head g as one batch of 2N; the
loss asks each view to find its partner among the 2N - 1 others.
"""

from functools import cached_property
from math import isfinite, log

from . import augment
from .backend import Array, later, xp_of
from .errors import ConfigError
from .nn import ENCODERS, BatchNorm, Module, ProjectionHead, ResNet, evaluating
from .ops.loss import contrastive_accuracy, nt_xent
from .optim import SGD
from .tensor import Tensor, no_grad


class Model(Module):
    """Encoder f and projection head g. The probe sees h = f(x); the loss sees z = g(h)."""

    def __init__(self, encoder: ResNet, head: ProjectionHead):
        self.encoder, self.head = encoder, head

    @classmethod
    def build(cls, encoder: str, stem: str, width: int, seed: int, d_out: int = 128) -> "Model":
        """A fresh model; for a given NumPy version, the arguments alone determine its weights.

        width 0 means the encoder's own. Raises ConfigError for an unknown encoder or stem.
        """
        if encoder not in ENCODERS:
            raise ConfigError(f"unknown encoder {encoder!r}: use {', '.join(ENCODERS)}")
        size = {"width": width} if width else {}
        f = ENCODERS[encoder](stem=stem, seed=seed, **size)
        return cls(f, ProjectionHead(f.features, f.features, d_out, seed=seed))

    def calibrate(self, x: Array, batch_size: int) -> None:
        """Set the running statistics of both parts to those of the views x (see `calibrate`)."""
        calibrate(self.encoder, x, batch_size)
        calibrate(self.head, self.encode(x, batch_size), batch_size)

    def encode(self, x: Array, batch_size: int = 256) -> Array:
        """h = f(x) with running statistics, for views x (N, H, W, 3) in [0, 1]; no graph."""
        xp = xp_of(x)
        if x.dtype.kind != "f" or x.ndim != 4 or (x.size and not -0.5 < x.min() <= x.max() < 1.5):
            seen = f"{x.shape} {x.dtype}" + (f", {x.min():g} to {x.max():g}" if x.size else "")
            raise TypeError(f"encode takes what center_view makes, in [0, 1], not {seen}")
        with evaluating():
            starts = range(0, max(1, len(x)), batch_size)
            h = [self.encoder(Tensor(x[i : i + batch_size])).data for i in starts]
        return xp.concatenate(h)  # (N, D)

    def project(self, h: Array) -> Array:
        """z = g(h), likewise."""
        with evaluating():
            return self.head(Tensor(h)).data  # (N, d_out)


def chance_loss(n: int) -> float:
    """ln(2N - 1): the loss of a model to which all views look alike."""
    return log(2 * n - 1)


class Step:
    """What a training step saw before it moved the weights. Reading `figures` waits for a GPU."""

    def __init__(self, loss: Array, accuracy: Array, gradient_square: Array):
        # (3,) float64, as accuracy is
        seen = xp_of(loss).stack([loss, accuracy, gradient_square])
        self.ok = xp_of(loss).isfinite(seen).all()
        self._read = later(seen)

    @cached_property
    def figures(self) -> dict[str, float]:
        """loss; accuracy, the share of the views that found their partner; gradient_norm."""
        loss, accuracy, square = self._read()
        return {"loss": loss, "accuracy": accuracy, "gradient_norm": square**0.5}

    @property
    def finite(self) -> bool:
        return all(map(isfinite, self.figures.values()))


def training_step(
    model: Model, optimizer: SGD, images: Array, views: augment.Views, size: int, temperature: float
) -> Step:
    """One step of Algorithm 1 on images (N, H, W, 3) uint8; `views` holds t and t' for each.

    If the loss or a gradient is not finite, the weights stay as they were (not so batch norm's
    running statistics). Nothing here waits for a GPU.
    """
    n = len(images)
    model.train()
    # t(x), t'(x): (2N, size, size, 3)
    x = xp_of(images).concatenate(augment.apply_views(images, views, size))
    h = model.encoder(Tensor(x))  # (2N, D)
    z = model.head(h)  # (2N, d_out)
    loss = nt_xent(z[:n], z[n:], temperature)
    optimizer.zero_grad()
    loss.backward()
    step = Step(loss.data, contrastive_accuracy(z.data), optimizer.gradient_square())
    optimizer.step(step.ok)
    return step


def calibrate(module: Module, x: Array, batch_size: int) -> None:
    """Set a network's running statistics to the mean of those of batches of the views x.

    A last, shorter batch is left out, unless it is the only one; a layer that `forward` does not
    reach keeps its statistics. Statistics kept in training lag behind fast-moving weights; after
    few steps, and with random weights, they still hold the 0 and 1 they began with (Wu & Johnson
    2021, arXiv:2105.07576, "precise" batch norm).
    """
    modes = [(layer, vars(layer).get("training", True)) for _, layer in module.named_modules()]
    norms = {m for _, m in module.named_modules() if isinstance(m, BatchNorm)}
    before = [(m, m.momentum, m.num_batches_tracked) for m in norms]
    statistics = [(a, a.copy()) for m in norms for a in (m.running_mean, m.running_var)]
    module.train()
    try:
        if not module.training:
            raise RuntimeError("calibrate() takes the statistics of batches: not in evaluating()")
        for m in norms:
            m.momentum, m.num_batches_tracked = None, 0 * m.num_batches_tracked
        for start in range(0, max(1, len(x) - batch_size + 1), batch_size):
            with no_grad():
                module(Tensor(x[start : start + batch_size]))
        statistics = []  # the new ones stay
    finally:  # after Ctrl-C, too
        for running, old in statistics:
            running[...] = old
        for m, momentum, count in before:
            m.momentum, m.num_batches_tracked = momentum, count
        for layer, training in modes:
            vars(layer)["training"] = training
