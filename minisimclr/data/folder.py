"""A folder of pictures: one folder per class (nested to any depth), or pictures without labels.

Splits: a fifth of each class (rounded, at least one) is `test`, another fifth `labelled`, the rest
`pretrain`. Classes of fewer than three pictures, one class alone, and pictures without labels are
all `pretrain`.
Class folders inside `train` and `test` (or `val`) are split already: the pictures in `test` are for
testing, all others are shared out as above without a fifth for testing, and those in `unlabeled`
beside them have no label.
"""

import os
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from stat import S_ISREG

import numpy as np

from ..errors import ConfigError, DataError
from ..files import sha256
from .images import SUFFIXES, decode_file
from .source import LABELLED, PRETRAIN, TEST, Job, Options, Plan, Progress, Source, by_label, choose

TRAINS, TESTS, LOOSE = ("train", "training"), ("test", "testing"), ("unlabeled", "unlabelled")
LISTED = 1000  # files from one call of `progress` to the next: about 10 ms
CHECKS = ("val", "valid", "validation", "dev")  # for testing if nothing else is


def source(root: Path, options: Options, progress: Progress | None = None) -> Source:
    """The pictures below `root`, except hidden ones. Raises DataError if there are none.

    `progress(files so far, 0)` is called while they are listed.
    """
    if options.crop == "boxes":
        raise ConfigError(f"{root} has no annotation to crop by: only Stanford Dogs has boxes")
    found = {}
    for parts, stat in files(root):
        found[parts] = stat
        if progress and len(found) % LISTED == 0:
            progress(len(found), 0)
    pictures = sorted(parts for parts in found if parts[-1].lower().endswith(SUFFIXES))
    if not pictures:
        raise DataError(f"{root} holds no pictures ({', '.join(SUFFIXES)})")
    tests = for_testing(root, pictures)
    # From the class folders on.
    inner = [() if tests and split_name(p) in LOOSE else p[bool(tests) :] for p in pictures]
    classes = sorted({parts[0] for parts in inner if len(parts) > 1})
    loose = [p for p, parts in zip(pictures, inner, strict=True) if len(parts) == 1]
    if classes and loose:
        said = f"{root} has class folders, but {str(Path(*loose[0]))!r} and maybe more"
        raise DataError(f"{said} are in none: move them")

    def plan() -> Plan:
        inside = {split_name(parts[1:]) for parts in inner}
        if len(classes) == 1 and not tests and all(len(parts) > 2 for parts in inner):
            said = f"{root} has one class, {classes[0]!r}: if the folders in it are the classes"
            deepest = os.path.commonpath([root.joinpath(*parts[:-2]) for parts in inner])
            warnings.warn(f"{said}, name {deepest}", stacklevel=2)
        elif not tests and inside & {*TRAINS} and inside & {*TESTS, *CHECKS}:
            warnings.warn(f"{root}: splits in classes do not count: move them up", stacklevel=2)
        numbers = {name: number for number, name in enumerate(classes)}
        labels = np.array([numbers.get("".join(parts[:1]), -1) for parts in inner], np.int64)
        testing = np.array([split_name(parts) in tests for parts in pictures]) if tests else None

        def jobs(size: int) -> Iterator[Job]:
            return ((i, decode_file, (root.joinpath(*p), size)) for i, p in enumerate(pictures))

        names, ignored = ["/".join(parts) for parts in pictures], len(found) - len(pictures)
        splits = split_classes(labels, testing, classes, options.labels_per_class)
        return Plan(names, labels, classes, splits, jobs, {"ignored_files": ignored})

    listing = [(os.sep.join(parts), *found[parts]) for parts in pictures]  # noqa: PTH118
    return Source(root.resolve().name, sha256(repr(listing).encode()), plan)


def split_name(parts: tuple[str, ...]) -> str:
    """The top folder of a picture, spelt as a split would be: Train_Set as train."""
    return re.sub("(?<=.)[ _-]?set$", "", parts[0].lower()) if len(parts) > 1 else ""


def for_testing(root: Path, pictures: list[tuple[str, ...]]) -> set[str]:
    """Which splits in `root` hold pictures to test with; none if its folders are classes.

    Raises DataError if they are splits that do not suffice, or if only some of them are splits.
    """
    names = set(map(split_name, pictures))
    trains, tests = names & {*TRAINS}, names & {*TESTS} or names & {*CHECKS}
    others = names - {*TRAINS, *CHECKS, *TESTS, *LOOSE}
    said = " and ".join(sorted({parts[0] for parts in pictures}))
    if trains and tests and others - {""}:
        raise DataError(
            f"{root} holds {said}: name one of its folders, or move away what is not a split"
        )
    if not others and not (trains and tests):
        raise DataError(f"{root} holds {said}, not train and test: name one of its folders")
    return set() if others else tests


def files(root: Path) -> Iterator[tuple[tuple[str, ...], tuple[int, int]]]:
    """Files below `root` that are not hidden: parts of the path; size and time.

    Links to folders are followed only at the top and inside train, test and the like.
    """

    def fail(error: OSError) -> None:
        raise error

    try:
        for top in tops(root):
            if not top.is_dir():
                yield from regular(top.relative_to(root).parts, str(top))
                continue
            for folder, inner, names in os.walk(top, onerror=fail):
                inner[:] = [name for name in inner if name[0] != "."]
                above = Path(folder).relative_to(root).parts
                for name in (name for name in names if name[0] != "."):
                    yield from regular((*above, name), os.path.join(folder, name))  # noqa: PTH118
    except OSError as error:
        raise DataError(f"{error.filename}: cannot be read ({error.strerror})") from error


def tops(root: Path) -> Iterator[Path]:
    """Files and folders in `root`, of its folders named as splits those inside; none hidden."""
    for path in visible(root):
        split = split_name((path.name, "")) in {*TRAINS, *TESTS, *CHECKS, *LOOSE}
        yield from visible(path) if split and path.is_dir() else (path,)


def visible(folder: Path) -> Iterator[Path]:
    return (path for path in folder.iterdir() if path.name[0] != ".")


def regular(parts: tuple[str, ...], path: str) -> Iterator[tuple[tuple[str, ...], tuple[int, int]]]:
    """`parts`, size and time of `path`, if it is a file. Raises OSError for a picture that is a
    broken link.
    """
    try:
        stat = os.stat(path)  # noqa: PTH116 - a Path for each of many files would take long
    except OSError:
        if parts[-1].lower().endswith(SUFFIXES) or Path(path).exists():  # not links in a ring
            raise
        return
    if S_ISREG(stat.st_mode):
        yield parts, (stat.st_size, stat.st_mtime_ns)


def split_classes(
    labels: np.ndarray, testing: np.ndarray | None, class_names: list[str],
    labels_per_class: int | None,
) -> np.ndarray:  # fmt: skip
    """Split codes (N,) uint8 by the rule above; `labels_per_class` replaces the labelled fifth.

    testing (N,): which pictures are for testing; None: a fifth of each class.
    """
    presplit = testing is not None
    testing = np.zeros(len(labels), bool) if testing is None else testing
    splits = np.where(testing, TEST, PRETRAIN).astype(np.uint8)
    for number, rows in enumerate(by_label(labels, ~testing, len(class_names))):
        fifth = round(len(rows) / 5) if len(rows) >= 3 and (presplit or len(class_names) > 1) else 0
        test = 0 if presplit else fifth
        labelled = fifth if labels_per_class is None or not fifth else labels_per_class
        if test + labelled > len(rows):
            raise ConfigError(
                f"labels per class is {labelled}, but {class_names[number]!r} has only "
                f"{len(rows) - test} besides its pictures for testing"
            )
        chosen = choose(rows, test + labelled, stream=number)
        splits[chosen[:test]] = TEST
        splits[chosen[test:]] = LABELLED
    return splits
