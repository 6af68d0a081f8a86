"""The baseline: dense layers with dropout on frozen InceptionV3 features, tuned by random search.

Every trial draws a learning rate, two widths and a dropout rate, and trains on four fifths of the
labelled images until its score on the last fifth stops rising. A classifier with the best trial's
settings is then trained on all labelled images, for as many epochs, and tested once.
"""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .backend import Array, to_host
from .data import Dataset
from .embed import calibrated, check_block, published
from .errors import DivergedError
from .nn import Dropout, Linear, Module, evaluating, inception_v3
from .ops.basic import relu
from .ops.loss import cross_entropy
from .optim import SGD
from .probe import Extract, holdout, labelled_and_test, majority_share, scores, standardize
from .tensor import Tensor
from .train import Notify
from .weights import Preprocessing, load

BATCH = 32  # images in a step of the classifier
PREPROCESSING = Preprocessing(299, "symmetric")  # of InceptionV3
PATIENCE = 10  # epochs without a better validation score before a trial ends


class Trial(NamedTuple):
    """What the search draws."""

    lr: float
    width1: int
    width2: int
    dropout: float

    @classmethod
    def draw(cls, seed: int, index: int) -> "Trial":
        """Trial `index`: lr log-uniform in 0.001 ... 0.3, widths of 64, 128, ... 1,024, dropout
        uniform in 0 ... 0.7.
        """
        raw = np.random.Philox(key=[seed, 2], counter=[index, 0, 0, 0]).random_raw(4)
        u, v, w, x = (raw >> np.uint64(11)) * 2.0**-53  # uniform in [0, 1)
        return cls(float(0.001 * 300**u), 64 << int(5 * v), 64 << int(5 * w), float(0.7 * x))


class DenseClassifier(Module):
    """Features (N, D) -> logits (N, classes): two dense layers with ReLU and dropout, and a third.

    The softmax is in the loss.
    """

    def __init__(self, d: int, classes: int, trial: Trial, seed: int = 0):
        rng = np.random.Generator(np.random.Philox(key=[seed, 3]))
        self.dense1 = Linear(d, trial.width1, rng=rng)
        self.dense2 = Linear(trial.width1, trial.width2, rng=rng)
        self.output = Linear(trial.width2, classes, std=0.01, rng=rng)
        self.dropout = Dropout(trial.dropout, rng=rng)

    def forward(self, x: Tensor) -> Tensor:
        x = self.dropout(relu(self.dense1(x)))
        return self.output(self.dropout(relu(self.dense2(x))))

    def ranked(self, X: Array) -> np.ndarray:
        """The classes of each row of X (N, D), the likeliest first: (N, classes)."""
        with evaluating(), np.errstate(over="ignore", invalid="ignore"):
            return np.argsort(-to_host(self(Tensor(X)).data), axis=1, kind="stable")


def epochs_of(model: Module, X: Array, y: np.ndarray, lr: float, seed: int) -> Iterator[float]:
    """Each item is the last loss of one more epoch of training by SGD with momentum."""
    optimizer = SGD(model.named_parameters(), lr, weight_decay=1e-4)
    rng = np.random.Generator(np.random.Philox(key=[seed, 4]))
    while True:
        for rows in np.array_split(rng.permutation(len(X)), len(X) // BATCH + 1):
            with np.errstate(over="ignore", invalid="ignore"):  # a rate may be drawn too high
                loss = cross_entropy(model(Tensor(X[rows])), y[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        yield float(loss)


def search(
    X: np.ndarray, y: np.ndarray, classes: int, trials: int, epochs: int, seed: int, notify: Notify
) -> list[dict[str, Any]]:
    """Try random settings on features X (N, D): rows of a Trial, its epochs and validation score.

    Raises DataError if no image is left to validate with, as each is the only one of its class.
    """
    inside, outside = holdout(y, seed)
    fit_X, held_X = standardize(X[inside], X[outside])
    rows: list[dict[str, Any]] = []
    for index in range(trials):
        trial, best, best_epoch = Trial.draw(seed, index), 0.0, 1
        model = DenseClassifier(X.shape[1], classes, trial, seed)
        losses = islice(epochs_of(model, fit_X, y[inside], trial.lr, seed), epochs)
        for epoch, loss in enumerate(losses, 1):
            if not np.isfinite(loss):
                break
            score = float((model.ranked(held_X)[:, 0] == y[outside]).mean())
            if score > best:
                best, best_epoch = score, epoch
            if epoch - best_epoch >= PATIENCE:
                break
        rows.append({**trial._asdict(), "epochs": best_epoch, "validation": best})
        done = {"done": index + 1, "total": trials, "label": "trials"}
        notify("progress", done | {"item": f"validation {best:.1%}"})
    return rows


def inception(
    dataset: Dataset, file: Path | None, block: str, device: str, notify: Notify
) -> Extract:
    """Features of rows of a data set by a block of InceptionV3: its output, averaged.

    file: its weights; None for random ones with batch norm statistics of the data. Raises
    ConfigError for a block that it lacks.
    """
    net, preprocessing = inception_v3(), PREPROCESSING
    check_block(net, block)
    if file:
        preprocessing = load(net, file, until=block)
    else:
        calibrated(net, preprocessing, dataset)
    return published(net, preprocessing, dataset, block, device, notify)


def baseline(
    dataset: Dataset, extract: Extract, trials: int, epochs: int, seed: int, notify: Notify
) -> dict[str, Any]:
    """Tune on the labelled images, test once: top1, top5, ci95, labels, test, classes, controls,
    best and trials. Raises DataError without two labelled classes or images to test with,
    DivergedError if the best trial's settings lead to numbers that are not finite.
    """
    y, classes = dataset.labels, len(dataset.class_names)
    train, test = labelled_and_test(dataset)
    X, test_X = extract(train), extract(test)
    rows = search(X, y[train], classes, trials, epochs, seed, notify)
    best = max(rows, key=lambda row: row["validation"])
    trial = Trial(*(best[name] for name in Trial._fields))
    fit_X, rest_X = standardize(X, test_X)
    model = DenseClassifier(X.shape[1], classes, trial, seed)
    losses = list(islice(epochs_of(model, fit_X, y[train], trial.lr, seed), best["epochs"]))
    if not np.isfinite(losses[-1]):
        raise DivergedError(f"training diverged even at the best rate tried, {trial.lr:g}")
    result = scores(model.ranked(rest_X), y[test])
    result |= {"labels": len(train), "test": len(test), "classes": classes}
    return result | {"controls": {"chance": majority_share(y[test])}, "best": best, "trials": rows}


def table(trials: list[dict[str, Any]]) -> str:
    """The trials, the best first, for the terminal."""
    lines = [f"{'lr':>8}{'widths':>14}{'dropout':>9}{'epochs':>8}{'validation':>12}"]
    for row in sorted(trials, key=lambda row: -row["validation"]):
        widths = f"{row['width1']}, {row['width2']}"
        lines.append(
            f"{row['lr']:8.4f}{widths:>14}{row['dropout']:9.2f}{row['epochs']:8}"
            f"{row['validation']:12.1%}"
        )
    return "\n".join(lines)
