"""The cache: all pictures of a data set at one size in one immutable HDF5 file, read by memmap.

    byte 0      one line of JSON: where the pixels start, SHA-256 of the header, fingerprint
    byte 4096   HDF5 header and small arrays: labels, splits, duplicate_of, about (JSON)
    ...         `images`, uint8 (N, S, S, 3), contiguous and last

HDF5 only lays the file out, in memory. Every byte on disk is written by plain file calls, so that a
full disk is an OSError and not a crash in the library; and NumPy reads the rows with neither h5py
nor its lock. The first line, in HDF5's user block, vouches for every other byte of the file. The
fingerprint is the SHA-256 of all the pictures' SHA-256s, computed by the workers that make them.
"""

import errno
import hashlib
import io
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import h5py
import numpy as np

from ..cores import available_cores
from ..errors import ConfigError, DataError, OutputError
from ..files import fits, publish, sha256
from .source import SPLITS, Job, Options, Plan, Progress, choose, command
from .workers import parallel_map

FORMAT = "minisimclr cache 2"
BLOCK = 4096  # bytes of the first line with its padding; the pixels start at a multiple of it
CHUNK = 32  # pictures in a message to a worker, at most
CHUNKS = 50  # messages, at least, if there are that many pictures: progress should show
PER_WORKER = 256  # fewer pictures are not worth starting a process for
MAX_SKIPPED = 0.01  # of all pictures, or one
SAMPLE = 2**32  # the stream that `sample` draws from; lower ones belong to classes


@dataclass(frozen=True, eq=False, repr=False)
class Dataset:
    """N pictures of side S with labels and splits, from `open_dataset`."""

    name: str
    images: np.memmap  # uint8 (N, S, S, 3)
    labels: np.ndarray  # int64 (N,), -1 where unknown
    class_names: tuple[str, ...]
    splits: np.ndarray  # uint8 (N,), indices into SPLITS
    fingerprint: str  # of the pixels, in hex
    path: Path
    file_names: tuple[str, ...]
    duplicate_of: np.ndarray  # int64 (N,), the first row with the same pixels, perhaps its own
    recipe: dict[str, Any]  # all that the pixels and splits depend on
    notes: dict[str, Any]

    def __repr__(self) -> str:
        return f"Dataset({self.name}: {self.images.shape}, {len(self.class_names)} classes)"

    def split(self, name: str) -> np.ndarray:
        """Indices (int64, increasing) of the pictures in pretrain, labelled or test."""
        if name not in SPLITS:
            raise ConfigError(f"split {name!r}: there are {', '.join(SPLITS)}")
        return np.flatnonzero(self.splits == SPLITS.index(name))

    @property
    def identity(self) -> str:
        """What tells it from any other data set to train on: its pixels and splits.

        A run may know only the beginning: runs of earlier versions have the pixels alone.
        """
        return f"{self.fingerprint} {sha256(self.splits.tobytes())}"

    def sample(self, count: int) -> np.ndarray:
        """Up to `count` pictures (n, S, S, 3) of pretrain, random but always the same.

        If pretrain has fewer than two, too few for statistics, they are of labelled, else of test.
        """
        rows = max(map(self.split, SPLITS), key=lambda rows: min(len(rows), 2))
        return self.images[choose(rows, count, stream=SAMPLE)]

    @property
    def options(self) -> Options:
        """What the user chose when the data set was prepared."""
        return Options(**self.recipe["options"])

    def verify(self) -> None:
        """Compare the pixels with their fingerprint. Raises DataError if a bit has changed."""
        if sha256(b"".join(hashlib.sha256(x).digest() for x in self.images)) != self.fingerprint:
            said = f"pixels changed on the disk: delete it, then {command(self.recipe)}"
            raise DataError(f"{self.path}: {said}")


def build(path: Path, name: str, plan: Plan, recipe: dict, progress: Progress | None) -> None:
    """Make every picture of `plan` and publish the cache `path`.

    `recipe` holds all that the pixels depend on; its `size` and `options` are followed. Raises
    DataError for a picture that cannot be decoded (with skip_bad: if they are more than one and
    more than 1 %) and OutputError if the disk is full or cannot be written.
    """
    needed = len(plan.names) * recipe["size"] ** 2 * 3
    try:
        if needed > shutil.disk_usage(path.parent).free:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        with publish(path) as temporary, temporary.open("w+b", 1 << 20) as file:
            while bad := fill(file, name, plan, recipe, progress):
                plan = plan.without(bad)
    except OSError as error:
        why = " (allow more processes: ulimit -u)" if error.errno == errno.EAGAIN else ""
        why = " (Windows cannot replace an open file)" if os.name == "nt" and path.exists() else why
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            free = shutil.disk_usage(path.parent).free
            why = f" (the cache needs {needed:,} bytes, {free:,} are free)"
        raise OutputError(f"{path}: {error.strerror}{why}") from error


def fill(
    file: BinaryIO, name: str, plan: Plan, recipe: dict, progress: Progress | None
) -> dict[int, str]:
    """Write the whole cache; or, if pictures are bad but may be skipped, return {row: reason}."""
    size, total = recipe["size"], len(plan.names)
    if not total:
        raise DataError(f"{name}: no picture is left")
    start = BLOCK + len(lay_out(name, plan, recipe, np.arange(total)))
    file.truncate(start + total * size * size * 3)
    digests, bad, done = [b""] * total, {}, 0
    before = len(plan.notes.get("skipped", ()))  # as they may be readable one time only
    work = partial(make, Path(file.name), start)
    workers = min(available_cores(), total // PER_WORKER)
    for made, failed in parallel_map(work, chunks(plan.jobs(size), total), workers):
        for row, digest in made:
            digests[row] = digest
        for row, reason in failed:
            bad[row] = reason
            what = f"{name}: {plan.names[row]!r} {reason}"
            if not recipe["options"]["skip_bad"]:
                way_out = command(recipe, skip_bad=True)
                raise DataError(f"{what}: repair or remove it, or try {way_out}")
            if before + len(bad) > max(1, (before + total) * MAX_SKIPPED):
                raise DataError(f"{what}, and with it more than 1 % of all pictures are bad")
        done += len(made) + len(failed)
        if progress:
            progress(done, total)
    if bad:
        return bad
    first: dict[bytes, int] = {}
    duplicate_of = np.array([first.setdefault(d, row) for row, d in enumerate(digests)])
    header = lay_out(name, plan, recipe, duplicate_of)
    file.seek(0)
    file.write(first_line(start, header, sha256(b"".join(digests))) + header)
    return {}


def chunks(jobs: Iterator[Job], total: int) -> Iterator[list[Job]]:
    """`total` jobs in lists, each for one message."""
    while chunk := list(islice(jobs, max(1, min(CHUNK, total // CHUNKS)))):
        yield chunk


def make(
    path: Path, start: int, jobs: list[Job]
) -> tuple[list[tuple[int, bytes]], list[tuple[int, str]]]:
    """In a worker: write each picture to its row of the cache; return (row, digest) of the good and
    (row, reason) of the bad.
    """
    made, failed, places = [], [], []
    with path.open("r+b", 1 << 20) as file:
        for row, function, arguments in jobs:
            try:
                pixels = function(*arguments).tobytes()
            except DataError as error:
                failed.append((row, str(error)))
                continue
            places.append(start + row * len(pixels))
            if file.tell() != places[-1]:
                file.seek(places[-1])  # this also writes what is in the buffer
            file.write(pixels)
            made.append((row, hashlib.sha256(pixels).digest()))
        file.flush()
        if places and hasattr(os, "posix_fadvise"):
            # On Linux, start writing these pages to disk now; else all would wait at the end.
            begin, end = min(places), max(places) + len(pixels)
            os.posix_fadvise(file.fileno(), begin, end - begin, os.POSIX_FADV_DONTNEED)
    return made, failed


def lay_out(name: str, plan: Plan, recipe: dict, duplicate_of: np.ndarray) -> bytes:
    """What lies between first line and pixels; its length is the same for any `duplicate_of`."""
    about = {"name": name, "recipe": recipe, "notes": plan.notes}
    about |= {"class_names": list(plan.class_names), "file_names": list(plan.names)}
    size, memory = recipe["size"], io.BytesIO()
    with h5py.File(
        memory, "w", userblock_size=BLOCK, alignment_threshold=BLOCK, alignment_interval=BLOCK
    ) as tree:
        tree["labels"] = plan.labels
        tree["splits"] = plan.splits
        tree["duplicate_of"] = duplicate_of
        tree["about"] = np.frombuffer(json.dumps(about).encode(), np.uint8)
        # The pixels get their place at once but are never written: it lies after `memory`.
        layout = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        layout.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
        layout.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
        layout.set_obj_track_times(False)  # the same pictures make the same file
        space = h5py.h5s.create_simple((len(plan.names), size, size, 3))
        images = h5py.h5d.create(tree.id, b"images", h5py.h5t.STD_U8LE, space, layout)
        start = images.get_offset()
    header = memory.getvalue()[BLOCK:]
    assert len(header) <= start - BLOCK, "HDF5 has put something behind the pixels"
    return header.ljust(start - BLOCK, b"\0")


def first_line(start: int, header: bytes, fingerprint: str) -> bytes:
    """The first BLOCK bytes; their `header` hash vouches for the fingerprint, too."""
    header_hash = sha256(header + fingerprint.encode())
    line = {"format": FORMAT, "start": start, "header": header_hash, "pixels": fingerprint}
    return json.dumps(line).encode().ljust(BLOCK - 1) + b"\n"


def load(path: Path) -> Dataset:
    """Open a cache. Raises DataError unless it is one and every byte but the pixels is intact.

    The file may come from anywhere: no link is followed out of it, and nothing larger than the file
    is read. What another process publishes at `path` later does not change an open data set.
    """
    try:
        with path.open("rb") as file:
            block = file.read(BLOCK)
            line = json.loads(block)
            start = line["start"]
            if line["format"] != FORMAT:
                raise DataError(f"{path}: is {line['format']!r}, not {FORMAT!r}: prepare it again")
            if block != first_line(start, file.read(start - BLOCK), line["pixels"]):
                raise DataError(f"{path}: its header changed on the disk: delete it, prepare again")
            with h5py.File(file, "r") as tree:
                end = os.fstat(file.fileno()).st_size
                images = plain(tree, "images", end)
                shape = images.shape
                small = ("labels", "splits", "duplicate_of", "about")
                arrays = {name: plain(tree, name, start)[:] for name in small}
                place = images.dtype, images.id.get_offset(), start + images.nbytes
                if place != (np.uint8, start, end):
                    raise DataError(f"{path}: its pixels are not where they should be")
            pixels = np.memmap(file, np.uint8, "r", start, shape)
        about = json.loads(arrays.pop("about").tobytes())
        about |= {name: tuple(about[name]) for name in ("class_names", "file_names")}
        dataset = Dataset(path=path, images=pixels, fingerprint=line["pixels"], **arrays, **about)
        if not consistent(dataset):
            raise DataError(f"{path}: its images, labels, splits and names do not fit together")
        return dataset
    except FileNotFoundError as error:
        raise DataError(f"{path} is not there: `minisimclr data prepare NAME` makes it") from error
    except DataError:
        raise
    except Exception as error:  # whatever JSON, h5py and NumPy stumble over
        unread = isinstance(error, OSError) and error.strerror
        reason = f"cannot be read ({unread})" if unread else "no cache, or damaged"
        raise DataError(f"{path}: {reason}; for pictures, name a folder") from error


def consistent(dataset: Dataset) -> bool:
    """Whether the parts of a data set have lengths and values that agree."""
    n, side = len(dataset.images), dataset.recipe["size"]
    rows = dataset.labels, dataset.splits, dataset.duplicate_of
    return (
        dataset.images.shape == (n, side, side, 3)
        and all(row.shape == (n,) for row in rows)
        and len(dataset.file_names) == n
        and -1 <= dataset.labels.min() <= dataset.labels.max() < len(dataset.class_names)
        and 0 <= dataset.splits.min() <= dataset.splits.max() < len(SPLITS)
        and 0 <= dataset.duplicate_of.min() <= dataset.duplicate_of.max() < n
        and fits([dataset.name, *dataset.class_names, *dataset.file_names], [str])
        and isinstance(dataset.notes, dict)
        and isinstance(dataset.options, Options)  # else a TypeError: one that is not known here
    )


def plain(tree: h5py.File, name: str, limit: int) -> h5py.Dataset:
    """An array of integers stored in this file, in one piece of at most `limit` bytes."""
    data = tree[name] if isinstance(tree.get(name, getlink=True), h5py.HardLink) else None
    if (
        not isinstance(data, h5py.Dataset)
        or data.external
        or data.chunks
        or data.dtype.kind not in "iu"
        or data.id.get_storage_size() != data.nbytes  # it is 0 for a virtual one
        or data.nbytes > limit
    ):
        raise DataError(f"{name} is not stored as one array in the file")
    return data
