"""Data sets: anything with pictures becomes a cache file once, then uint8 arrays and batches.

dataset = open_dataset("toydogs")        # or "stanford-dogs", or the path of a folder
dataset.images[:16], dataset.labels, dataset.class_names
for step, images, rows in batches(dataset.images, dataset.split("pretrain"), 128, seed=0):
    ...
"""

import os
import re
import warnings
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from stat import S_ISREG
from typing import Any

import numpy as np
import PIL

from ..errors import ConfigError, DataError, OutputError
from ..files import locked, sha256
from . import cache, folder, stanford_dogs, toydogs
from .cache import Dataset
from .images import FILTER
from .loader import batches
from .source import Options, Plan, Progress, Source

__all__ = [
    "Dataset", "Options", "batches", "cache_path", "from_arrays", "open_dataset", "prepare",
    "prepared",
]  # fmt: skip

BUILT_IN = "toydogs", "stanford-dogs"  # every other name is a path
DEFAULT_SIZE = 80
SIZES = range(8, 1025)
MANY = 50_000  # classes that may have no pictures
DEFAULTS = Options()
DECODER = {"filter": FILTER, "pillow": PIL.__version__}  # what turns files into pixels


def open_dataset(
    name_or_path: str | Path, image_size: int | None = None, progress: Progress | None = None
) -> Dataset:
    """A data set with pictures of side `image_size`: toydogs, stanford-dogs, or the one at a path.

    A path may name a folder in the layout of Stanford Dogs (images.tar*, lists.tar*, or unpacked),
    a folder of class folders (perhaps inside train and test), a folder of pictures, or a cache
    file, which keeps its own size. The first call builds the cache; later ones reuse it while its
    source is unchanged. Options are those it was last prepared with; a new size takes those of the
    size made last. Only stanford-dogs must be prepared beforehand. `progress(done, total)` is
    called while a cache is built and, with a total of 0, while files are listed. Raises
    ConfigError, DataError, OutputError, OSError.
    """
    path, size = cache_path(name_or_path, image_size)
    if path == Path(name_or_path):
        cached = cache.load(path)
        if image_size and (side := cached.images.shape[1]) < size * 4 // 5:  # the views' size
            said = f"{path} has pictures of {side} px where {size} are wanted: they are enlarged"
            warnings.warn(said, stacklevel=2)
        return cached
    made = load_if_valid(path)
    sizes = [] if made else [other for other in other_sizes(path) if other != path]
    known = made, *map(load_if_valid, sizes[::-1])
    options = next((each.options for each in known if each), DEFAULTS)
    if str(name_or_path) != "stanford-dogs":
        if not made and path.exists():
            said = f"{path} cannot be used; it is made anew with"
            warnings.warn(f"{said}{options.flags() or ' the usual options'}", stacklevel=2)
        del made, known  # Windows replaces no file that is open
        return prepare(name_or_path, image_size, options, progress)
    if made is None or not current(made):
        there = " and this Pillow" if made else f", only as {sizes[-1].name}" if sizes else ""
        hint = "" if made or sizes else " (with --crop boxes for the dogs alone)"
        raise DataError(
            f"stanford-dogs is not prepared with {size} px{there}: run "
            f"`minisimclr data prepare stanford-dogs --image-size {size}{options.flags()}`{hint}"
        )
    return made


def prepare(
    name_or_path: str | Path, image_size: int | None = None, options: Options = DEFAULTS,
    progress: Progress | None = None, archives: stanford_dogs.Archives | None = None,
    url: str | None = None, allow_unverified: bool = False,
) -> Dataset:  # fmt: skip
    """Build the cache of a data set with these options, unless it is there already; open it.

    The last three are for stanford-dogs: `archives` (images, lists, annotation) that need no
    download, another address to download from, and whether unofficial archives will do. Raises
    ConfigError, DataError, OutputError, OSError.
    """
    path, size = cache_path(name_or_path, image_size)
    if path == Path(name_or_path):
        if options != DEFAULTS or image_size or archives or url or allow_unverified:
            raise ConfigError(f"{path} is a finished cache: prepare its source with other options")
        return cache.load(path)
    if str(name_or_path) == "stanford-dogs":
        made = load_if_valid(path)
        if made and current(made) and made.options == options and not (archives or url):
            return made
        downloads = cache_folder() / "downloads"
        source = stanford_dogs.official(
            archives or {}, options, downloads, url or stanford_dogs.URL, allow_unverified, progress
        )
    elif archives or url or allow_unverified:
        raise ConfigError(f"{name_or_path}: archives and addresses are for stanford-dogs only")
    else:
        source = find(name_or_path, options, progress)
    recipe = {"source": source.identity, "size": size, **DECODER, "options": asdict(options)}
    if made := load_if_valid(path, recipe):
        return made
    make_folder(path.parent, ": name another folder in XDG_CACHE_HOME")
    with locked(path):
        if not load_if_valid(path, recipe):  # else another process has just built it
            cache.build(path, source.name, source.plan(), recipe, progress)
        return cache.load(path)


def make_folder(path: Path, way_out: str = "") -> None:
    """Make a folder unless it is there. Raises OutputError, whose message ends with a way out."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{path} cannot be made ({error.strerror}){way_out}") from error


def from_arrays(
    path: str | Path, images: Any, labels: Any = None, class_names: Sequence[str] | None = None,
    testing: Any = None, labels_per_class: int | None = None,
) -> Dataset:  # fmt: skip
    """Publish pictures (N, S, S, 3) uint8 as the cache file `path`, which can be named as a data
    set from then on; open it. A data set that is there is replaced, another file is not.

    labels (N,): positions in class_names (None: the numbers), -1 where unknown. testing (N,) bool:
    those for testing (None: a fifth of each class); the rest is split as in a folder. Raises
    ConfigError, OutputError, OSError.
    """
    path, images = Path(path), np.asarray(images)
    n, side = images.shape[:2] if images.ndim == 4 else (0, 0)
    if images.dtype != np.uint8 or images.shape != (n, side, side, 3) or side not in SIZES or not n:
        raise ConfigError(
            f"pictures are (N, S, S, 3) uint8 with S from {SIZES[0]} to {SIZES[-1]}, "
            f"not {images.shape} {images.dtype}"
        )
    labels = np.full(n, -1) if labels is None else np.asarray(labels)
    chosen = np.zeros(n, bool) if testing is None else np.asarray(testing)
    whole = labels.dtype.kind in "iu" and chosen.dtype == bool
    way_out = "class_names, labels = np.unique(labels, return_inverse=True)"
    if not (whole and labels.shape == chosen.shape == (n,)):
        given = f"{labels.shape} {labels.dtype} and {chosen.shape} {chosen.dtype}; names: {way_out}"
        raise ConfigError(f"labels are ({n},) integers and testing is ({n},) bool, not {given}")
    low, high = int(labels.min()), int(labels.max())
    if class_names is None and high >= max(n, MANY):
        raise ConfigError(f"labels are positions from 0, not numbers such as {high}: {way_out}")
    # A set or dict, which may have another order than the labels, has no parts: an error.
    called = range(high + 1) if class_names is None else class_names[:]
    names = [os.fsdecode(name) if isinstance(name, bytes) else str(name) for name in called]
    if len(set(names)) < len(names):
        raise ConfigError(f"several classes are called {Counter(names).most_common(1)[0][0]!r}")
    if not -1 <= low <= high < len(names):
        said = f"{low} to {high}, and there are {len(names)} class names"
        raise ConfigError(f"labels are from -1 to the number of classes less 1, not {said}")
    labels = labels.astype(np.int64)
    options = Options(labels_per_class=labels_per_class)
    each = options.labels_per_class
    splits = folder.split_classes(labels, None if testing is None else chosen, names, each)
    plan = Plan(
        [f"picture {row}" for row in range(n)], labels, names, splits,
        lambda size: ((row, np.asarray, (image,)) for row, image in enumerate(images)),
    )  # fmt: skip
    make_folder(path.parent)
    if path.exists() and not load_if_valid(path):
        raise ConfigError(f"{path} is there, and no sound data set: choose another, or delete it")
    recipe = {"source": "arrays", "size": side, "options": asdict(options)}
    with locked(path):
        cache.build(path, path.stem, plan, recipe, None)
        return cache.load(path)


def prepared(name_or_path: str | Path, image_size: int | None = None) -> Dataset:
    """The data set as it was prepared (last, if no size is given); builds nothing. Raises DataError
    if it is not there, ConfigError for a size with a cache file.
    """
    path, _ = cache_path(name_or_path, image_size)
    if path == Path(name_or_path):
        if image_size:
            raise ConfigError(f"{path} is a finished cache and has a size of its own")
        return cache.load(path)
    if str(name_or_path) not in BUILT_IN and not Path(name_or_path).exists():
        raise DataError(f"{name_or_path}: no such folder or file")
    if image_size is None and (sizes := other_sizes(path)):
        path = sizes[-1]
    if not path.exists():
        size = f" --image-size {image_size}" if image_size else ""
        raise DataError(f"{path} is not there: `minisimclr data prepare NAME{size}` makes it")
    return cache.load(path)


def other_sizes(path: Path) -> list[Path]:
    """Caches of the same data set as that at `path`, in any size, the newest last."""
    stem = re.escape(path.name.rpartition("-")[0])
    found = (p for p in cache_folder().glob("*.h5") if re.fullmatch(rf"{stem}-\d+px\.h5", p.name))
    return sorted(found, key=lambda each: each.stat().st_mtime_ns)


def load_if_valid(path: Path, recipe: dict | None = None) -> Dataset | None:
    """The cache at `path`; None if it is missing or damaged or does not follow `recipe`."""
    try:
        made = cache.load(path)
    except DataError:
        return None
    return made if recipe in (None, made.recipe) else None


def current(made: Dataset) -> bool:
    """Whether a cache has the pixels that would be made now."""
    return made.recipe | DECODER == made.recipe


def find(name_or_path: str | Path, options: Options, progress: Progress | None) -> Source:
    """The source that a name or path stands for. Raises DataError if there is none."""
    root = Path(name_or_path)
    if str(name_or_path) == "toydogs":
        return toydogs.source(options)
    if not root.is_dir():
        raise DataError(f"{root}: no such folder, nor one of the data sets {', '.join(BUILT_IN)}")
    if archives := stanford_dogs.in_folder(root):
        identity = stanford_dogs.fingerprint(archives)
        return stanford_dogs.source(root.resolve().name, archives, options, identity, False)
    return folder.source(root, options, progress)


def cache_folder() -> Path:
    """$XDG_CACHE_HOME/minisimclr, else ~/.cache/minisimclr."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "minisimclr"


def cache_path(name_or_path: str | Path, image_size: int | None = None) -> tuple[Path, int]:
    """Where the cache of a data set belongs, and its side S; a cache file stays where it is."""
    path, stem = Path(name_or_path), str(name_or_path)
    if not stem:
        raise ConfigError("a data set has a name or a path, and this is empty")
    default = toydogs.IMAGE_SIZE if stem == "toydogs" else DEFAULT_SIZE
    size = default if image_size is None else image_size
    if size not in SIZES:
        said = f"pictures cannot be stored with {size} px: choose {SIZES[0]} to {SIZES[-1]}"
        raise ConfigError(f"{said} (training views have 4/5 of that)")
    if stem not in BUILT_IN:
        try:
            with suppress(FileNotFoundError, NotADirectoryError):
                if S_ISREG(path.stat().st_mode):  # is_file() hides errors since Python 3.14
                    return path, size
            place = path.resolve()
        except (OSError, ValueError) as error:  # an unreadable folder, an odd name
            reason = getattr(error, "strerror", None) or error
            raise DataError(f"{stem!r} cannot be read: {reason}") from error
        stem = re.sub(r"[^A-Za-z0-9_.-]+", "-", place.name)[:40]
        stem += "-" + sha256(os.fsencode(place))[:8]
    size = int(size)  # perhaps one of NumPy's, which JSON refuses
    return cache_folder() / f"{stem}-{size}px.h5", size
