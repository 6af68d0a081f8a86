"""A folder of pictures: one folder per class (of any depth inside), or pictures without labels.

Splits: a fifth of each class (rounded, at least one) is `test`, another fifth `labelled`, the rest
`pretrain`. Classes of fewer than three pictures and pictures without labels are all `pretrain`.
"""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from stat import S_ISREG

import numpy as np

from ..errors import ConfigError, DataError
from .images import SUFFIXES, decode_file
from .source import LABELLED, TEST, Job, Options, Plan, Source, choose

SPLIT_NAMES = ("train", "training", "val", "valid", "validation", "test", "testing")  # of others


def source(root: Path, options: Options) -> Source:
    """The pictures below `root`, but for hidden ones. Raises DataError if there are none."""
    if options.crop == "boxes":
        raise ConfigError(f"{root} has no annotation to crop by: only Stanford Dogs has boxes")
    found = {path.relative_to(root): stat for path, stat in files(root)}
    # By parts: Windows would sort paths without regard to case.
    pictures = sorted((p for p in found if p.suffix.lower() in SUFFIXES), key=lambda p: p.parts)
    if not pictures:
        raise DataError(f"{root} holds no pictures ({', '.join(SUFFIXES)})")
    classes = sorted({path.parts[0] for path in pictures if len(path.parts) > 1})
    loose = [path for path in pictures if len(path.parts) == 1]
    if classes and all(name.lower() in SPLIT_NAMES for name in classes):
        said = " and ".join(classes)
        raise DataError(f"{root} holds {said}: splits, not classes; name one of these folders")
    if classes and loose:
        raise DataError(f"{root} holds folders, but {loose[0].name!r} and maybe others are in none")

    def plan() -> Plan:
        numbers = {name: number for number, name in enumerate(classes)}
        labels = np.array([numbers.get(path.parts[0], -1) for path in pictures], np.int64)

        def jobs(size: int) -> Iterator[Job]:
            return ((i, decode_file, (root / path, size)) for i, path in enumerate(pictures))

        names = [path.as_posix() for path in pictures]
        notes = {"ignored_files": len(found) - len(pictures)}
        splits = split_classes(labels, classes, options.labels_per_class)
        return Plan(names, labels, classes, splits, jobs, notes)

    listing = [(str(p), found[p].st_size, found[p].st_mtime_ns) for p in pictures]
    identity = hashlib.sha256(repr(listing).encode()).hexdigest()
    return Source(root.resolve().name, identity, plan)


def files(root: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """Files below `root` that are not hidden; links to folders count at the top level only."""

    def fail(error: OSError) -> None:
        raise error

    try:
        for top in (path for path in root.iterdir() if path.name[0] != "."):
            if not top.is_dir():
                yield from regular(top)
            for folder, inner, names in os.walk(top, onerror=fail) if top.is_dir() else ():
                inner[:] = [name for name in inner if name[0] != "."]
                for path in (Path(folder, name) for name in names if name[0] != "."):
                    yield from regular(path)
    except OSError as error:
        raise DataError(f"{error.filename}: cannot be read ({error.strerror})") from error


def regular(path: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """`path` and its stat, if it is a file. Raises OSError for a picture that links to nothing."""
    try:
        stat = path.stat()
    except FileNotFoundError:
        if path.suffix.lower() in SUFFIXES:
            raise
        return
    if S_ISREG(stat.st_mode):
        yield path, stat


def split_classes(
    labels: np.ndarray, class_names: list[str], labels_per_class: int | None
) -> np.ndarray:
    """Split codes (N,) uint8 by the rule above; `labels_per_class` replaces the labelled fifth."""
    splits = np.zeros(len(labels), np.uint8)
    for number, name in enumerate(class_names):
        rows = np.flatnonzero(labels == number)
        test = max(1, round(len(rows) / 5)) if len(rows) >= 3 else 0
        labelled = test if labels_per_class is None or not test else labels_per_class
        if test + labelled > len(rows):
            raise ConfigError(
                f"labels per class is {labelled}, but {name!r} has only {len(rows) - test} "
                "pictures that are not for testing"
            )
        chosen = choose(rows, test + labelled, stream=number)
        splits[chosen[:test]] = TEST
        splits[chosen[test:]] = LABELLED
    return splits
