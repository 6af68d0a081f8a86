"""Read text, numbers and cell arrays of them from MATLAB v5 files, such as the official lists.

Format: MathWorks, "MAT-File Format", version 5. A file is a 128-byte header and elements: a tag
(type, bytes), data, padding to 8 bytes. An array is an element made of elements, often deflated.
"""

import math
import struct
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from ..errors import DataError

MAX_BYTES = 64 << 20  # of one inflated variable; the official ones have 1.2 MB at most
# By the type of an element; 14 is an array, 15 a deflated element. NumPy's letters: b is int8, Q
# uint64.
NUMBERS = dict(zip((1, 2, 3, 4, 5, 6, 7, 9, 12, 13), "bBhHiIfdqQ", strict=True))
TEXT = {1: "latin-1", 2: "latin-1", 4: "utf-16-le", 16: "utf-8", 17: "utf-16-le"}
MATRIX, DEFLATED = 14, 15
CELL, CHAR = 1, 4  # classes of arrays


def load(content: bytes, names: tuple[str, ...]) -> dict[str, Any]:
    """Variables by name: a cell array as a flat list, numbers as an array, text as str; those not
    in `names` are None and take no time.

    Raises DataError for anything else, for damage, and for a variable of more than MAX_BYTES.
    """
    if content[126:128] != b"IM":
        raise DataError("is no little-endian MATLAB v5 file")
    try:
        return dict(array(data, names) for kind, data in elements(content[128:]) if kind == MATRIX)
    except Exception as error:  # damage can lead anywhere
        why = str(error) or type(error).__name__
        raise DataError(f"is a damaged MATLAB file ({why})") from error


def elements(data: bytes) -> Iterator[tuple[int, bytes]]:
    """(type, bytes) of each element in `data`, inflated."""
    position = 0
    while position < len(data):
        kind, length = struct.unpack_from("<II", data, position)
        begin = position + 8
        if kind >> 16:  # a small element: length, type and up to 4 bytes in one tag
            kind, length, begin = kind & 0xFFFF, kind >> 16, position + 4
        if begin + length > len(data):
            raise ValueError("an element ends behind the file")
        body = data[begin : begin + length]
        position = begin + length
        if kind == DEFLATED:
            inflater = zlib.decompressobj()
            body = inflater.decompress(body, MAX_BYTES)
            if not inflater.eof:
                raise ValueError(f"a variable is cut off or has more than {MAX_BYTES >> 20} MiB")
            yield from elements(body)
        else:
            position += -position % 8  # relative to a start that is a multiple of 8 itself
            yield kind, body


def array(data: bytes, names: tuple[str, ...] = ()) -> tuple[str, Any]:
    """Name and value of an array element: flags, dimensions, name, then cells, text or numbers. The
    value is None if there are `names` and this is not one of them.
    """
    parts = elements(data)
    flags, shape, label = (body for _, body in (next(parts), next(parts), next(parts)))
    name = label.decode("ascii")
    if names and name not in names:
        return name, None
    if flags[0] == CELL:
        value: Any = [array(body)[1] for _, body in parts]
    else:
        kind, body = next(parts)
        if flags[0] == CHAR:
            return name, body.decode(TEXT[kind])
        value = np.frombuffer(body, "<" + NUMBERS[kind])
    if len(value) != math.prod(n for (n,) in struct.iter_unpack("<i", shape)):
        raise ValueError(f"{name} has {len(value)} values, but claims another number")
    return name, value
