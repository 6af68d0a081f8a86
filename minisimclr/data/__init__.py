"""Data sets: anything with pictures becomes a cache file once, then uint8 arrays and batches.

dataset = open_dataset("toydogs")        # or "stanford-dogs", or the path of a folder
dataset.images[:16], dataset.labels, dataset.class_names
for step, images, rows in batches(dataset.images, dataset.split("pretrain"), 128, seed=0):
    ...
"""

import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import numpy as np
import PIL

from ..errors import ConfigError, DataError
from ..files import locked
from . import cache, folder, stanford_dogs, toydogs
from .cache import Dataset, Progress
from .images import FILTER
from .loader import batches
from .source import SPLITS, Job, Options, Plan, Source

__all__ = ["Dataset", "Options", "batches", "cache_folder", "cache_path", "open_dataset", "prepare"]

DEFAULT_SIZE = 80
SIZES = range(8, 1025)
DEFAULTS = Options()


def open_dataset(
    name_or_path: str | Path, image_size: int | None = None, progress: Progress | None = None
) -> Dataset:
    """A data set with pictures of side `image_size`: toydogs, stanford-dogs, or the one at a path.

    A path may name a folder in the layout of Stanford Dogs (images.tar*, lists.tar*), a folder of
    class folders, a folder of pictures, or a cache file. The first call builds the cache; later
    ones reuse it while its source stays as it is, with the options it was last prepared with.
    `progress(done, total)` is called while it is built. Raises ConfigError, DataError, OSError.
    """
    path = cache_path(name_or_path, image_size)
    prepared = None
    if path.exists():
        with suppress(DataError):  # a damaged cache is as good as none
            prepared = cache.load(path)
    if str(name_or_path) == "stanford-dogs":
        if prepared is None:
            size = path.stem.rpartition("-")[2]
            raise DataError(
                f"stanford-dogs is not prepared at {size}: run "
                f"`minisimclr data prepare stanford-dogs --image-size {size.removesuffix('px')}`"
            )
        return prepared
    return prepare(name_or_path, image_size, prepared.options if prepared else DEFAULTS, progress)


def prepare(
    name_or_path: str | Path,
    image_size: int | None = None,
    options: Options = DEFAULTS,
    progress: Progress | None = None,
    source: Source | None = None,
) -> Dataset:
    """Open a data set with these options, building the cache if the one there is not just so.

    `source` replaces what the name or path stands for. Raises ConfigError, DataError, OSError.
    """
    path = cache_path(name_or_path, image_size)
    if path == Path(name_or_path):
        return cache.load(path)
    source = source or find(name_or_path, options)
    recipe = {
        "source": source.identity,
        "size": int(path.stem.rpartition("-")[2].removesuffix("px")),
        "filter": FILTER,
        "pillow": PIL.__version__,
        "options": asdict(options),
    }

    def reusable() -> Dataset | None:
        with suppress(DataError):
            dataset = cache.load(path)
            if dataset.recipe == recipe:
                return dataset
        return None

    if dataset := reusable():
        return dataset
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(path):
        if dataset := reusable():  # built by whoever held the lock before
            return dataset
        cache.build(path, source.name, source.plan(), recipe, progress)
        return cache.load(path)


def find(name_or_path: str | Path, options: Options) -> Source:
    """The source that a name or path stands for. Raises DataError if there is none."""
    if str(name_or_path) == "toydogs":
        if options != DEFAULTS:
            raise ConfigError("toydogs has neither boxes, bad pictures nor other splits")
        return Source("toydogs", toydogs.VERSION, plan_toydogs)
    root = Path(name_or_path)
    if not root.is_dir():
        raise DataError(f"{root}: no such folder, nor a data set (toydogs, stanford-dogs)")
    if archives := stanford_dogs.in_folder(root):
        stats = [(path.name, path.stat()) for path in archives.values()]
        identity = [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]
        return stanford_dogs.source(root.resolve().name, archives, options, identity, False)
    return folder.source(root, options)


def plan_toydogs() -> Plan:
    sizes = toydogs.SPLIT_SIZES
    total = sum(sizes.values())
    labels = np.array([toydogs.label(index) for index in range(total)], np.int64)
    splits = np.repeat(np.array([SPLITS.index(s) for s in sizes], np.uint8), list(sizes.values()))

    def jobs(size: int) -> Iterator[Job]:
        return ((index, toydogs.draw, (index, size)) for index in range(total))

    names = [f"toydog {index}" for index in range(total)]
    return Plan(names, labels, toydogs.CLASS_NAMES, splits, jobs)


def cache_folder() -> Path:
    """$XDG_CACHE_HOME/minisimclr, else ~/.cache/minisimclr."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "minisimclr"


def cache_path(name_or_path: str | Path, image_size: int | None = None) -> Path:
    """Where the cache of a data set lies or would lie; a cache file itself is its own place."""
    path = Path(name_or_path)
    if str(name_or_path) in ("toydogs", "stanford-dogs"):
        stem = str(name_or_path)
    elif path.is_file():
        return path
    else:
        place = os.fsencode(path.resolve())
        stem = re.sub(r"[^\w.-]+", "-", path.resolve().name, flags=re.ASCII)[:40]
        stem += "-" + hashlib.sha256(place).hexdigest()[:8]
    size = image_size or (toydogs.IMAGE_SIZE if stem == "toydogs" else DEFAULT_SIZE)
    if size not in SIZES:
        raise ConfigError(f"image size is {size}: choose {SIZES[0]} to {SIZES[-1]}")
    return cache_folder() / f"{stem}-{size}px.h5"
