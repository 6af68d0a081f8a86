"""Small archives in the layout of Stanford Dogs, made of noise, with any fault a test asks for."""

import io
import struct
import tarfile
import zlib
from collections.abc import Iterable
from itertools import chain
from pathlib import Path

import numpy as np
from PIL import Image

BREEDS = ("n01-Alpha", "n02-flat-coated_beta", "n03-Gamma")
TRAIN, TEST = 4, (5, 6, 8)  # pictures per breed


def picture(seed: int, size: tuple[int, int] = (40, 30), kind: str = "JPEG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1] // 5, size[0] // 5, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize(size).save(buffer, kind, quality=90)
    return buffer.getvalue()


def files() -> tuple[list[str], list[str]]:
    """Names of the training and the test pictures."""
    train, test = [], []
    for breed, tests in zip(BREEDS, TEST, strict=True):
        names = [f"{breed}/{breed[:3]}_{i}.jpg" for i in range(TRAIN + tests)]
        train += names[:TRAIN]
        test += names[TRAIN:]
    return train, test


def element(kind: int, content: bytes) -> bytes:
    return struct.pack("<II", kind, len(content)) + content + bytes(-len(content) % 8)


def matrix(kind: int, shape: tuple[int, int], body: bytes, name: str = "") -> bytes:
    head = element(6, struct.pack("<II", kind, 0)) + element(5, struct.pack("<ii", *shape))
    return element(14, head + element(1, name.encode()) + body)


def text(value: str) -> bytes:
    return matrix(4, (1, len(value)), element(4, value.encode("utf-16-le")))


def mat(names: Iterable[str], labels: np.ndarray, code: int = 2, deflate: bool = True) -> bytes:
    """A MATLAB v5 list; `code` is the number type of `labels` (2 uint8, 9 double)."""
    names = list(names)
    variables = [
        matrix(1, (len(names), 1), b"".join(map(text, names)), "file_list"),
        matrix(9, (len(labels), 1), element(code, labels.tobytes()), "labels"),
    ]
    if deflate:
        packed = [zlib.compress(v) for v in variables]
        variables = [struct.pack("<II", 15, len(v)) + v for v in packed]
    return b"MATLAB 5.0 MAT-file".ljust(124) + struct.pack("<H", 256) + b"IM" + b"".join(variables)


def numbered(names: list[str]) -> np.ndarray:
    return np.array([BREEDS.index(name.split("/")[0]) + 1 for name in names], np.uint8)


def tar(path: Path, contents: Iterable[tuple[str | tarfile.TarInfo, bytes]], mode="w") -> Path:
    with tarfile.open(path, mode) as archive:
        for member, content in contents:
            if isinstance(member, str):
                member = tarfile.TarInfo(member)
                member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def image_members() -> list[tuple[str, bytes]]:
    return [(f"Images/{name}", picture(i)) for i, name in enumerate(sorted(chain(*files())))]


def annotation(width=40, height=30, boxes=((5, 5, 25, 20),)) -> bytes:
    objects = "".join(
        f"<object><bndbox><xmin>{a}</xmin><ymin>{b}</ymin><xmax>{c}</xmax><ymax>{d}</ymax></bndbox></object>"
        for a, b, c, d in boxes
    )
    size = f"<size><width>{width}</width><height>{height}</height><depth>3</depth></size>"
    return f"<annotation>{size}{objects}</annotation>".encode()


def list_members() -> list[tuple[str, bytes]]:
    train, test = files()
    return [
        ("train_list.mat", mat(train, numbered(train))),
        ("test_list.mat", mat(test, numbered(test))),
    ]


def write_archives(root: Path, images=None, lists=None) -> Path:
    """images.tar, lists.tar and annotation.tar in `root`."""
    root.mkdir(parents=True, exist_ok=True)
    tar(root / "images.tar", images or image_members())
    tar(root / "lists.tar", lists or list_members())
    boxes = [(f"Annotation/{name[:-4]}", annotation()) for name in chain(*files())]
    tar(root / "annotation.tar", boxes)
    return root
