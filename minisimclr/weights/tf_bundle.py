"""TensorFlow's checkpoints, read without TensorFlow: NAME.index and NAME.data-00000-of-00001.

The index is a LevelDB table (github.com/google/leveldb, doc/table_format.md): blocks of sorted
names that share their beginnings, a CRC-32C after each block, and 48 bytes at the end that say
where to find the block that lists the others. A name's value is a small protocol buffer,
BundleEntryProto in TensorFlow's tensor_bundle.proto: dtype, shape, and place in a data file.
"""

from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from .stored import NAME_LIMIT, TENSORFLOW, Spec, Stored, checked, decode

MAGIC = 0xDB4775248B80FB57.to_bytes(8, "little")  # the last eight bytes of an index
DTYPES = {1: "float32", 2: "float64", 3: "int32", 9: "int64", 14: "bfloat16", 19: "float16"}


def read(path: Path) -> Stored:
    """Raises ValueError, LookupError or TypeError for what is not an index of whole tensors."""
    index = path.read_bytes()
    footer = BytesIO(index[-48:])
    for _ in ("offset", "size"):  # of a block that TensorFlow leaves empty
        varint(footer)
    entries: dict[str, dict[int, Any]] = {}
    for _, place in block(index, footer):
        for key, value in block(index, BytesIO(place)):
            entries[key.decode()] = dict(fields(value))
    header = entries.pop("")  # BundleHeaderProto: 1 number of data files, 2 byte order
    if header.get(2):
        raise ValueError("numbers are not little-endian")
    specs = {name: spec(entry) for name, entry in entries.items()}

    def fetch(name: str) -> np.ndarray:
        entry = {3: 0, 4: 0} | entries[name]  # 3 file, 4 offset, 5 size, 6 CRC, 7 slices
        file = path.with_name(f"{path.stem}.data-{entry[3]:05d}-of-{header[1]:05d}")
        raw = np.fromfile(file, np.uint8, specs[name].nbytes, offset=entry[4]).tobytes()
        if 7 in entry or len(raw) != entry[5] or masked_crc32c(raw) != entry[6]:
            raise ValueError(f"{name}: in slices, or its size or CRC-32C differs")
        return decode(raw, specs[name])

    return Stored(path, TENSORFLOW, specs, fetch, {"pixels": "unit"})


def spec(entry: dict[int, Any]) -> Spec:
    """Field 1 is the dtype, field 2 the shape: a TensorShapeProto with a field 2 for each axis."""
    axes = [dict(fields(axis)) for key, axis in fields(entry.get(2, b"")) if key == 2]
    return Spec(checked([axis.get(1, 0) for axis in axes]), DTYPES.get(entry[1], "other"))


def varint(f: BytesIO) -> int:
    """Seven bits a byte, lowest first; the eighth says that more follow."""
    byte = f.read(1)[0]
    return byte if byte < 128 else byte - 128 + (varint(f) << 7)


def block(index: bytes, place: BytesIO) -> Iterator[tuple[bytes, bytes]]:
    """Keys and values of the block at a place (offset, size); its kind and CRC follow it."""
    offset, size = varint(place), varint(place)
    data, crc = index[offset : offset + size + 1], index[offset + size + 1 :][:4]
    if masked_crc32c(data) != int.from_bytes(crc, "little") or data[-1]:
        raise ValueError(f"the block at byte {offset} is compressed or its CRC-32C differs")
    # Every few entries a key is stored whole; the block ends with a list of these, and its length.
    restarts = int.from_bytes(data[-5:-1], "little")
    f, key = BytesIO(data), b""
    while f.tell() < size - 4 * (restarts + 1):
        shared, rest, length = varint(f), varint(f), varint(f)
        key = key[:shared] + f.read(rest)
        if len(key) > NAME_LIMIT:
            raise ValueError("a name that is too long")
        yield key, f.read(length)


def fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """Numbers and values (integers or bytes) of the fields of a protocol buffer."""
    f = BytesIO(message)
    while f.tell() < len(message):
        number, kind = divmod(varint(f), 8)
        if kind not in (0, 2, 5):
            raise ValueError(f"a protocol buffer with fields of type {kind}")
        value = int.from_bytes(f.read(4), "little") if kind == 5 else varint(f)
        yield number, f.read(value) if kind == 2 else value


def masked_crc32c(data: bytes) -> int:
    """CRC-32 with Castagnoli's polynomial, then masked: CRCs of data that holds CRCs are weak."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = TABLE[(crc ^ byte) & 0xFF] ^ crc >> 8
    crc ^= 0xFFFFFFFF
    return (crc >> 15 | crc << 17) + 0xA282EAD8 & 0xFFFFFFFF


TABLE = list(range(256))  # what a byte does to an empty register
for _ in range(8):
    TABLE = [entry >> 1 ^ (entry & 1) * 0x82F63B78 for entry in TABLE]
