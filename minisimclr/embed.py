"""Use the encoder of a run: features of any pictures, and which pictures are most alike."""

from pathlib import Path

import numpy as np

from . import checkpoint
from .data import Dataset, open_dataset
from .errors import ConfigError, DataError
from .files import publish
from .probe import features, unit
from .run import Run, open_run

SUFFIXES = (".npy", ".h5")


def open_trained(path: Path) -> Run:
    """The run at `path`. Raises DataError unless it has a checkpoint."""
    run, _ = open_run(path)
    if not run.step:
        raise DataError(f"{path} has no checkpoint yet: train it first")
    return run


def opened(run: Run, data: str | None) -> Dataset:
    """The run's own data set, or another (a name or a folder), with pictures of the same side."""
    return open_dataset(data or run.config.data, run.config.image_size * 5 // 4)


def embed(run: Run, dataset: Dataset, rows: np.ndarray | None = None) -> np.ndarray:
    """Features h (n, D) float32 of the pictures (or of these rows), each in its centre view."""
    rows = np.arange(len(dataset.images)) if rows is None else rows
    return features(run.model.encode, dataset.images, rows, run.config.image_size)


def nearest(queries: np.ndarray, h: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """For each of the queries (Q, D) the k most similar rows of h (n, D), the nearest first.

    Returns indices and cosines, (Q, k) each.
    """
    s = unit(queries) @ unit(h).T  # (Q, D) @ (D, n)
    order = np.argsort(-s, axis=1, kind="stable")[:, :k]
    return order, np.take_along_axis(s, order, axis=1)


def save(path: Path, h: np.ndarray, dataset: Dataset, run: Run) -> None:
    """Publish features as .npy, or as .h5 with the labels and file names that belong to the rows.

    Raises ConfigError for another suffix, OSError where it cannot be written.
    """
    if path.suffix == ".npy":
        with publish(path) as temporary, temporary.open("wb") as file:
            np.save(file, h)
    elif path.suffix == ".h5":
        names = [name.encode(errors="surrogateescape") for name in dataset.file_names]
        arrays = {"features": h, "labels": dataset.labels, "file_names": np.array(names)}
        about = {"data": dataset.fingerprint, "class_names": dataset.class_names}
        checkpoint.save(path, arrays, about | {"run": run.path.name, "step": run.step})
    else:
        raise ConfigError(f"{path}: name a file that ends in {' or '.join(SUFFIXES)}")
