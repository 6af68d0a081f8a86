"""Stanford Dogs: 20,580 photos of 120 breeds, from its archives in the official layout.

    images.tar       Images/n02085620-Chihuahua/n02085620_10074.jpg ...
    lists.tar        train_list.mat (12,000 files) and test_list.mat (8,580) with labels from 1
    annotation.tar   Annotation/n02085620-Chihuahua/n02085620_10074: boxes, needed for --crop boxes

A folder may hold the archives or what they unpack to.
Splits: the official train list is `pretrain`. A fifth of the test list (1,716) is `labelled`,
shared among the breeds by largest remainder and drawn with seed 0; the rest (6,864) is `test`.
Source: Khosla et al., "Novel dataset for fine-grained image categorization", 2011.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ConfigError, DataError
from ..files import file_sha256, sha256
from . import matlab
from .archives import members
from .images import SUFFIXES, Box, decode
from .source import LABELLED, PRETRAIN, TEST, Job, Options, Plan, Progress, Source, by_label, choose

URL = "http://vision.stanford.edu/aditya86/ImageNetDogs/"
# Bytes and SHA-256 of the official archives; over plain http nothing else vouches for them.
OFFICIAL = {
    "images": (793_579_520, "a443fc2f9a851aa1a7b8e4fa4af94b8459fce2c9f5a2f4dd4669cf9673a4ec58"),
    "lists": (481_280, "34b47cacd9a98b5d150e084f24d29391c084c55272295ec65c85651bc35f4d6c"),
    "annotation": (21_852_160, "662ed36f707be6b195c2fda392d8e153e83af28cedc8e2134a649f198def30fd"),
}

# What each unpacks to.
UNPACKED = {"images": "Images/*/*", "lists": "*_list.mat", "annotation": "Annotation/*/*"}

Archives = dict[str, Path]  # by their names in OFFICIAL; of what is unpacked, the folder it is in


def source(
    name: str, archives: Archives, options: Options, identity: Any, verified: bool
) -> Source:
    """Stanford Dogs, or any data set in its layout; `verified` goes into the notes."""

    def plan() -> Plan:
        files, labels, class_names, is_test = read_lists(archives["lists"])
        splits = split(labels, is_test, class_names, options.labels_per_class)
        boxes = {}
        if options.crop == "boxes":
            if "annotation" not in archives:
                raise DataError(f"{name}: cropping to boxes needs annotation.tar, or Annotation")
            boxes = read_boxes(archives["annotation"], files)

        def jobs(size: int) -> Iterator[Job]:
            rows = {file: row for row, file in enumerate(files)}
            for file, content in pictures(archives["images"], files):
                yield rows[file], decode, (content, size, boxes.get(file))

        return Plan(files, labels, class_names, splits, jobs, {"verified": verified})

    return Source(name, identity, plan)


def official(
    given: Archives, options: Options, folder: Path, url: str = URL,
    allow_unverified: bool = False, progress: Progress | None = None,
) -> Source:  # fmt: skip
    """Stanford Dogs from `given` archives; those missing are downloaded to `folder` from `url`.

    Raises DataError for an archive that is not the official one, unless `allow_unverified`.
    """
    from .download import download  # seldom needed, and it loads all of http and ssl

    archives, hashes = dict(given), {}
    for name, (size, right) in OFFICIAL.items():
        if name == "annotation" and options.crop != "boxes":
            continue
        if name not in archives:
            archives[name] = folder / sha256(url.encode())[:8] / f"{name}.tar"
            address = f"{url.rstrip('/')}/{name}.tar"
            download(address, archives[name], size, None if allow_unverified else right, progress)
        try:
            hashes[name] = file_sha256(archives[name])
        except OSError as error:
            raise DataError(f"{archives[name]}: cannot be read ({error.strerror})") from error
        if hashes[name] != right and not allow_unverified:
            raise DataError(
                f"{archives[name]}: is not the official {name}.tar (SHA-256 {hashes[name]}): take "
                "an official copy, or trust this one with --allow-unverified"
            )
    verified = all(OFFICIAL[name][1] == found for name, found in hashes.items())
    return source("stanford-dogs", archives, options, hashes, verified)


def in_folder(root: Path) -> Archives:
    """The archives that a folder holds, such as images.tar.gz, or the folder itself for those that
    were unpacked there; empty if it is another kind of folder.

    Raises DataError if one of the two needed is missing or the choice would be a guess.
    """
    archives = {}
    for name, pattern in UNPACKED.items():
        found = root.glob(f"{name}*.tar*")
        paths = sorted(p for p in found if p.suffix in (".tar", ".gz", ".bz2", ".xz"))
        if len(paths) > 1:
            raise DataError(f"{root} has both {paths[0].name} and {paths[1].name}: keep one")
        if paths or any(root.glob(pattern)):
            archives[name] = paths[0] if paths else root
    needed = [archives[name] for name in ("images", "lists") if name in archives]
    if len(needed) == 1 and needed != [root]:  # else it may be a class that is called Images
        raise DataError(f"{root} needs both images.tar and lists.tar, or Images and *_list.mat")
    return archives if len(needed) == 2 else {}


def unpacked(folder: Path, name: str) -> list[Path]:
    """The files that the archive `name` was unpacked to, except hidden ones."""
    found = (f for f in folder.glob(UNPACKED[name]) if f.is_file())
    return sorted(f for f in found if not is_hidden(f.relative_to(folder).as_posix()))


def is_hidden(name: str) -> bool:
    return any(part[0] == "." for part in name.split("/"))


def fingerprint(archives: Archives) -> str:
    """What changes whenever one of the files may have changed."""
    listing = []
    for name, path in archives.items():
        for file in unpacked(path, name) if path.is_dir() else [path]:
            place = file.name if file == path else file.relative_to(path).as_posix()
            try:
                stat = file.stat()
            except OSError as error:  # a broken link, or gone since it was listed
                raise DataError(f"{file}: cannot be read ({error.strerror})") from error
            listing.append((place, stat.st_size, stat.st_mtime_ns))
    return sha256(repr(listing).encode())


def contents(path: Path, name: str) -> Iterator[tuple[str, bytes]]:
    """(name, content) of the files in the archive `name`, or in the folder it was unpacked to."""
    if not path.is_dir():
        yield from members(path)
        return
    for file in unpacked(path, name):
        try:
            yield file.relative_to(path).as_posix(), file.read_bytes()
        except OSError as error:
            raise DataError(f"{file}: cannot be read ({error.strerror})") from error


def read_lists(path: Path) -> tuple[list[str], np.ndarray, list[str], np.ndarray]:
    """Files ("breed/picture", sorted), labels from 0, class names, and which files are for testing.

    Raises DataError unless the lists are readable and disjoint and agree with the folders' names.
    """
    lists = {name.rpartition("/")[2]: content for name, content in contents(path, "lists")}
    parts = []
    for name in ("train_list.mat", "test_list.mat"):
        if name not in lists:
            raise DataError(f"{path}: has no {name}")
        try:
            parts.append(read_list(lists[name]))
        except DataError as error:
            raise DataError(f"{path}: {name} {error}") from error
    train, test = parts
    if both := sorted(train.keys() & test.keys()):
        raise DataError(f"{path}: pictures in both lists: {len(both)}, for example {both[0]!r}")
    labels = train | test
    breeds: dict[int, str] = {}
    for file, label in labels.items():
        breed = file.partition("/")[0]
        if breeds.setdefault(label, breed) != breed:
            raise DataError(f"{path}: label {label} stands for {breeds[label]!r} and {breed!r}")
    if sorted(breeds) != list(range(1, len(set(breeds.values())) + 1)):
        raise DataError(f"{path}: the labels do not number the breeds from 1")
    files = sorted(labels)
    whole = [breeds[k] for k in sorted(breeds)]
    short = [name.partition("-")[2] or name for name in whole]
    class_names = short if len(set(short)) == len(short) else whole
    is_test = np.array([file in test for file in files])
    return files, np.array([labels[file] - 1 for file in files], np.int64), class_names, is_test


def read_list(content: bytes) -> dict[str, int]:
    """{file: label from 1} of one official list. Raises DataError."""
    variables = matlab.load(content, ("file_list", "labels"))
    names, labels = variables.get("file_list"), variables.get("labels")
    if not (isinstance(names, list) and isinstance(labels, np.ndarray)):
        raise DataError("lacks file_list or labels")
    if len(names) != len(labels):
        raise DataError(f"has {len(names)} files, but {len(labels)} labels")
    for name in names:
        if not isinstance(name, str) or not re.fullmatch(r"[^/\0]+/[^/\0]+", name):
            raise DataError(f"lists {str(name)[:80]!r}, which is not breed/picture")
    if not np.all((labels >= 1) & (labels % 1 == 0)):  # nor infinite or NaN
        raise DataError("has labels that are no whole numbers from 1")
    if len(set(names)) < len(names):
        raise DataError("lists a picture twice")
    return dict(zip(names, map(int, labels), strict=True))


def split(
    labels: np.ndarray, is_test: np.ndarray, class_names: list[str], labels_per_class: int | None
) -> np.ndarray:
    """Split codes (N,) uint8 as described above, or with `labels_per_class` labelled per breed."""
    splits = np.where(is_test, TEST, PRETRAIN).astype(np.uint8)
    counts = np.bincount(labels[is_test], minlength=len(class_names))
    if labels_per_class is None:
        quotas, remainders = counts // 5, counts % 5  # a fifth, in exact whole numbers
        most = np.argsort(-remainders, kind="stable")[: round(counts.sum() / 5) - quotas.sum()]
        quotas[most] += 1
    else:
        quotas = np.full(len(counts), labels_per_class)
        if labels_per_class >= counts.min():
            raise ConfigError(
                f"labels per class is {labels_per_class}, but {class_names[counts.argmin()]!r} "
                f"has {counts.min()} in the test list, which must keep one"
            )
    for label, rows in enumerate(by_label(labels, is_test, len(quotas))):
        splits[choose(rows, quotas[label], stream=label)] = LABELLED
    return splits


def pictures(path: Path, files: list[str]) -> Iterator[tuple[str, bytes]]:
    """("breed/picture", content) of all `files`. Raises DataError unless it holds just these."""
    missing, extra = set(files), []
    for name, content in contents(path, "images"):
        file = "/".join(name.split("/")[-2:])
        if file in missing:
            missing.remove(file)
            yield file, content
        elif name.lower().endswith(SUFFIXES) and not is_hidden(name):
            extra.append(file)
    if missing or extra:
        some = ", ".join(map(repr, [*sorted(missing)[:2], *extra[:2]]))
        raise DataError(
            f"{path}: listed pictures that are missing: {len(missing)} of {len(files)}; "
            f"pictures on no list: {len(extra)}: {some}"
        )


def read_boxes(path: Path, files: list[str]) -> dict[str, Box]:
    """The largest annotated box in each of `files`. Raises DataError if one has none."""
    # A pattern and not an XML parser: entities in hostile XML can blow up.
    number = re.compile(rb"<(width|height|xmin|ymin|xmax|ymax)>\s*(\d{1,6})\s*<")
    wanted = {file.rpartition(".")[0]: file for file in files}
    boxes: dict[str, Box] = {}
    for name, content in contents(path, "annotation"):
        if file := wanted.get("/".join(name.split("/")[-2:])):
            values: dict[bytes, list[int]] = {}
            for key, value in number.findall(content):
                values.setdefault(key, []).append(int(value))
            corners = (values.get(key, []) for key in (b"xmin", b"ymin", b"xmax", b"ymax"))
            whole = [b for b in zip(*corners, strict=False) if b[0] < b[2] and b[1] < b[3]]
            if whole and values.keys() >= {b"width", b"height"}:
                x0, y0, x1, y1 = max(whole, key=lambda b: (b[2] - b[0]) * (b[3] - b[1]))
                boxes[file] = x0, y0, x1, y1, values[b"width"][0], values[b"height"][0]
    if missing := sorted(set(files) - boxes.keys()):
        raise DataError(f"{path}: pictures without a box: {len(missing)}, such as {missing[0]!r}")
    return boxes
