"""Fine-tuning: the whole network trained with the labels, from a run's weights and from scratch.

As in SimCLRv2 (Chen et al. 2020, arXiv:2006.10029, and its code) for few labels: a linear layer
that starts at zero after the first layer of the projection head, LARS without weight decay at a
rate of 0.005 sqrt(B), random crops and flips. That rate suits weights that know something already,
so it is multiplied by a factor. Shorter trainings on four fifths of the labelled images try a few
factors; the one that gets most of the last fifth right wins. The control from scratch needs another
factor and gets the same choice.
"""

from copy import deepcopy
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from .augment import batch_shape, center_view, crop_resize, draw_views
from .backend import choose_device, to_device, to_host, xp_of
from .data import Dataset, Progress, batches
from .data.source import choose
from .errors import DivergedError
from .nn import Linear, Module
from .ops.loss import cross_entropy
from .optim import LARS
from .probe import best_of, features, holdout, labelled_and_test, majority_share, scores
from .run import Run, new_run
from .schedule import scaled_rate, warmup_cosine
from .simclr import Model, calibrate
from .tensor import Tensor, no_grad
from .train import MONITORED, Notify, quiet

BATCH = 64  # images in a step
FACTORS = (1 / 16, 1 / 4, 1, 4, 16, 64)  # times the authors' rate
TUNED, SCRATCH = "SimCLR, fine-tuned", "supervised from scratch"
SHORTER = 3  # the trainings that choose the factor are this many times shorter
ENOUGH = 100  # images to choose by: with fewer, luck decides between similar rates
STREAM = 3  # of random views; pre-training and monitoring have 1 and 2


class Classifier(Module):
    """Views (N, S, S, 3) -> logits (N, classes): encoder, first layer of the head, linear layer."""

    def __init__(self, model: Model, classes: int):
        self.encoder, self.head = model.encoder, model.head
        self.output = Linear(model.encoder.features, classes, std=0, rng=np.random.default_rng(0))
        self.output.weight.adapt = False  # LARS would keep what starts at zero close to zero

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.head.layer(1, self.encoder(x)))


class Recipe(NamedTuple):
    """How to train: passes over the images, side of the views in training and in testing (px),
    device, and the factor of the authors' rate.
    """

    epochs: int
    size: int
    view: int
    device: str
    factor: float = 1


def fit(
    model: Model, dataset: Dataset, rows: np.ndarray, recipe: Recipe, seed: int, progress: Progress
) -> Classifier | None:
    """Train a copy of the model on the labelled images at `rows`; None if that diverges."""
    classifier = Classifier(deepcopy(model), len(dataset.class_names)).to(recipe.device).train()
    n = min(BATCH, len(rows))
    peak = recipe.factor * scaled_rate(0.005, n, "sqrt")
    optimizer = LARS(classifier.named_parameters(), peak, weight_decay=0.0)
    total, sound = recipe.epochs * (len(rows) // n), True
    for step, batch, chosen in islice(batches(dataset.images, rows, n, seed), total):
        views = draw_views(seed, step, *batch_shape(batch), stream=STREAM)
        images = to_device(batch, recipe.device)  # (n, S, S, 3) uint8
        x = crop_resize(images, views.boxes[0], views.flips[0], recipe.size).clip(0, 1)
        loss = cross_entropy(classifier(Tensor(x)), dataset.labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.lr = warmup_cosine(step, peak, 0, total)
        seen = loss.data + optimizer.gradient_square()
        ok = xp_of(seen).isfinite(seen)
        optimizer.step(ok)
        sound = ok & sound  # read only once an epoch, so a GPU is not kept waiting
        if (step + 1) % (len(rows) // n) == 0 and not sound:
            return None
        progress(step + 1, total)
    some = dataset.images[choose(rows, MONITORED, stream=0)]
    calibrate(classifier, to_device(center_view(some, recipe.size), recipe.device), BATCH)
    return classifier.eval()


def ranked(
    classifier: Classifier, dataset: Dataset, rows: np.ndarray, recipe: Recipe
) -> np.ndarray:
    """The classes of images[rows] in their centre views, the likeliest first: (n, classes)."""

    def logits(views: np.ndarray) -> np.ndarray:
        with no_grad():
            return to_host(classifier(Tensor(to_device(views, recipe.device))).data)

    return np.argsort(-features(logits, dataset.images, rows, recipe.view), axis=1, kind="stable")


def tuned(
    name: str, model: Model, dataset: Dataset, split: tuple[np.ndarray, np.ndarray],
    recipe: Recipe, seed: int, notify: Notify,
) -> dict[str, Any]:  # fmt: skip
    """Choose the factor, train with all labelled images of `split` (train, test), test once.

    Returns top1, top5, ci95, factor, trials, warning. Raises DataError if no image is left to
    choose by, DivergedError if the best factor leads to numbers that are not finite.
    """
    y, (train, test) = dataset.labels, split
    inside, outside = (train[part] for part in holdout(y[train], seed))

    def fitted(rows: np.ndarray, recipe: Recipe) -> Classifier | None:
        def progress(done: int, total: int) -> None:
            label = f"{name}, rate x {recipe.factor}"
            notify("progress", {"done": done, "total": total, "label": label})

        return fit(model, dataset, rows, recipe, seed, progress)

    trials = []
    for factor in FACTORS:
        trial = recipe._replace(factor=factor, epochs=-(-recipe.epochs // SHORTER))
        score = 0.0  # of a rate at which training diverges
        if classifier := fitted(inside, trial):
            score = float((ranked(classifier, dataset, outside, trial)[:, 0] == y[outside]).mean())
        trials.append({"factor": factor, "validation": score})
    best, warning = best_of("factor", FACTORS, [row["validation"] for row in trials])
    trial = recipe._replace(factor=best)
    if not (classifier := fitted(train, trial)):
        raise DivergedError(f"{name}: training diverged at {best} times the authors' rate")
    few = f"the rate was chosen by few images: {len(outside)}" if len(outside) < ENOUGH else ""
    said = "; ".join(filter(None, (warning, few)))
    found = {"factor": best, "trials": trials, "warning": said}
    return scores(ranked(classifier, dataset, test, trial), y[test]) | found


def finetune(
    run: Run, dataset: Dataset, labels: int | None = None, epochs: int = 60,
    view: int | None = None, seed: int = 0, notify: Notify = quiet,
) -> dict[str, Any]:  # fmt: skip
    """Accuracy of a run's network trained further with labels, and of the same one from scratch.

    In the form of probe.probe's result. view: side of the test views in px (None: as in training).
    Raises as labelled_and_test does, and DivergedError.
    """
    device, _ = choose_device(run.config.device)
    train, test = labelled_and_test(dataset, labels, seed)
    size = run.config.image_size
    recipe = Recipe(epochs, size, view or size, device)
    systems = {TUNED: run.model, SCRATCH: new_run(run.path, run.config).model}
    rows = {
        name: tuned(name, model, dataset, (train, test), recipe, seed, notify)
        for name, model in systems.items()
    }
    chance = majority_share(dataset.labels[test])
    counts = {"labels": len(train), "test": len(test), "classes": len(dataset.class_names)}
    controls = {"chance": chance, "scratch": rows[SCRATCH]["top1"]}
    return {**rows[TUNED], **counts, "step": run.step, "controls": controls, "rows": rows}
