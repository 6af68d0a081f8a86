"""What a data set is before it is cached: names, labels, splits, and how to make each picture.

Every data set has three disjoint splits: `pretrain` (labels unused), `labelled` (trains probes) and
`test` (scores them). Which picture goes where depends only on seed 0 and their order, through raw
numbers of a Philox generator, which NumPy promises never to change.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from operator import index
from typing import Any

import numpy as np

from ..errors import ConfigError

SPLITS = ("pretrain", "labelled", "test")
PRETRAIN, LABELLED, TEST = range(3)

Progress = Callable[[int, int], None]  # done, total; 0: unknown
# A row of the cache, a picklable function and its arguments; the call returns uint8 (S, S, 3).
Job = tuple[int, Callable[..., np.ndarray], tuple]


@dataclass(frozen=True)
class Options:
    """What the user may choose when a data set is prepared; kept in the cache."""

    crop: str = "centre"  # or "boxes": around the annotated animal
    skip_bad: bool = False  # leave out what cannot be decoded, up to 1 % or one
    labels_per_class: int | None = None  # None: a fifth of each class

    def __post_init__(self):
        if self.crop not in ("centre", "boxes"):
            raise ConfigError(f"crop is {self.crop!r}: choose centre or boxes")
        if self.labels_per_class is not None:
            object.__setattr__(self, "labels_per_class", index(self.labels_per_class))
            if self.labels_per_class < 1:
                raise ConfigError(f"labels per class is {self.labels_per_class}: choose 1 or more")

    def flags(self) -> str:
        """What chooses them, to be typed after `data prepare NAME`, with a space before each."""
        each = f" --labels-per-class {self.labels_per_class}" * (self.labels_per_class is not None)
        crop = f" --crop {self.crop}" * (self.crop != Options.crop)
        return crop + " --skip-bad" * self.skip_bad + each


def command(recipe: dict, **options: Any) -> str:
    """What to type to prepare a data set by its recipe, with other `options`."""
    if recipe.get("source") == "arrays":
        return "`data.from_arrays` makes it"
    flags = Options(**recipe["options"] | options).flags()
    return f"`minisimclr data prepare NAME --image-size {recipe['size']}{flags}`"


@dataclass(frozen=True)
class Plan:
    """N pictures in row order; `jobs(S)` yields the work for each row once, in any order."""

    names: Sequence[str]
    labels: np.ndarray  # (N,) int64, -1 where unknown
    class_names: Sequence[str]
    splits: np.ndarray  # (N,) uint8, indices into SPLITS
    jobs: Callable[[int], Iterator[Job]]
    notes: dict[str, Any] = field(default_factory=dict)  # what `data info` should show

    def without(self, bad: dict[int, str]) -> "Plan":
        """The plan without the rows `bad` (row: reason), which its notes list."""
        kept = [row for row in range(len(self.names)) if row not in bad]
        new_rows = {old: new for new, old in enumerate(kept)}

        def jobs(size: int) -> Iterator[Job]:
            for row, function, arguments in self.jobs(size):
                if row in new_rows:
                    yield new_rows[row], function, arguments

        names = [self.names[row] for row in kept]
        skipped = {self.names[row]: why for row, why in bad.items()}
        notes = {**self.notes, "skipped": self.notes.get("skipped", {}) | skipped}
        return Plan(names, self.labels[kept], self.class_names, self.splits[kept], jobs, notes)


@dataclass(frozen=True)
class Source:
    """Where pictures come from. `identity` (JSON, cheap) changes whenever they may have changed."""

    name: str
    identity: Any
    plan: Callable[[], Plan]


def by_label(labels: np.ndarray, among: np.ndarray, count: int) -> list[np.ndarray]:
    """For each label from 0 to `count` - 1 its rows, in order, of those marked in `among` (N,)."""
    rows = np.flatnonzero(among)
    rows = rows[np.argsort(labels[rows], kind="stable")]
    return np.split(rows, np.searchsorted(labels[rows], range(count)))[1:]  # the first part has -1


def choose(rows: np.ndarray, count: int, stream: int) -> np.ndarray:
    """`count` of `rows`, drawn with seed 0; a smaller count draws a subset of these."""
    return rows[permutation(0, stream, len(rows), use=2)[:count]]


def permutation(seed: int, stream: int, n: int, use: int = 0) -> np.ndarray:
    """A random order of range(n) that depends on nothing but the arguments."""
    # Drawing counts up from the first word, so the stream goes into one that it cannot reach.
    keys = np.random.Philox(key=[seed, use], counter=[0, 0, stream, 0]).random_raw(n)
    return np.argsort(keys, kind="stable")
