"""The .safetensors format: eight bytes of length, a JSON header, then plain little-endian arrays.

Reader and writer keep the format's own rules (github.com/huggingface/safetensors): the arrays fill
the rest of the file without holes or overlaps. The format has no checksum, so the writer puts a
SHA-256 of the arrays into the metadata, and the reader checks it if there is one.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from ..files import sha256, write_bytes
from .stored import Spec, Stored, checked, decode

DTYPES = {
    "BOOL": "bool", "BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64",
    "I8": "int8", "I16": "int16", "I32": "int32", "I64": "int64", "C64": "complex64",
    "U8": "uint8", "U16": "uint16", "U32": "uint32", "U64": "uint64",
}  # fmt: skip


def read(path: Path) -> Stored:
    """Raises ValueError, LookupError, TypeError or RecursionError if a rule is broken."""
    with path.open("rb") as f:
        end = 8 + int.from_bytes(f.read(8), "little")
        if end > (size := path.stat().st_size):
            raise ValueError(f"a header of {end - 8} bytes in a file of {size}")
        # int raises on NaN.
        header = json.loads(f.read(end - 8).decode(), object_pairs_hook=unique, parse_constant=int)
        metadata = {"sha256": "", **(header.pop("__metadata__", None) or {})}
        digest = metadata["sha256"] and hashlib.file_digest(f, "sha256").hexdigest()
    if digest != metadata["sha256"] or not all(type(text) is str for text in metadata.values()):
        raise ValueError("metadata that is not text, or the SHA-256 of the arrays differs")
    specs, begins, start = {}, {}, end
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        specs[name] = Spec(checked(entry["shape"]), DTYPES[entry["dtype"]])
        begins[name], following = (start + n for n in checked(entry["data_offsets"]))
        if begins[name] != end or following - end != specs[name].nbytes:
            raise ValueError(f"{name!a}: overlap, hole or wrong size at byte {end}")
        end = following
    if end != size:
        raise ValueError(f"arrays end at byte {end} of {size}")

    def fetch(name: str) -> np.ndarray:
        raw = np.fromfile(path, np.uint8, specs[name].nbytes, offset=begins[name])
        return decode(raw, specs[name])

    return Stored(path, "safetensors", specs, fetch, metadata)


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object as a dictionary; of equal names, Python alone would keep only the last."""
    if len(dict(pairs)) != len(pairs):
        raise ValueError("a name stands in the header twice")
    return dict(pairs)


def write(path: Path, arrays: dict[str, np.ndarray], metadata: dict[str, str]) -> None:
    """Publish arrays as `path`, with the SHA-256 of their bytes in the metadata. Raises OSError."""
    header: dict[str, Any] = {}
    data, end = [], 0
    for name, array in arrays.items():
        data.append(array.astype(array.dtype.newbyteorder("<")).tobytes())
        place = (end, end := end + array.nbytes)
        code = next(code for code, kind in DTYPES.items() if kind == array.dtype.name)
        header[name] = {"dtype": code, "shape": array.shape, "data_offsets": place}
    header["__metadata__"] = {**metadata, "sha256": sha256(b"".join(data))}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # arrays must start at a multiple of eight
    write_bytes(path, b"".join([len(text).to_bytes(8, "little"), text, *data]))
