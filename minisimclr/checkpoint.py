"""Checkpoints: all the state a bit-exact resume needs, in one HDF5 file without pickle or times.

HDF5 leaves room before its data. Here that is a line of text with the SHA-256 of the rest, which is
checked first: HDF5 before 2.0 may crash on a damaged file. Files are published whole (files.py).
"""

import hashlib
import io
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from .errors import DataError
from .files import sha256, write_bytes

MARK = b"minisimclr checkpoint 2, SHA-256 "
BLOCK = 512  # bytes of the line
KEEP = 2  # checkpoints of a run that stay on disk


def first_line(digest: str) -> bytes:
    """The line before HDF5's part, whose SHA-256 in hex is `digest`."""
    return (MARK + digest.encode()).ljust(BLOCK - 1) + b"\n"


def save(path: Path, arrays: dict[str, np.ndarray], state: dict[str, Any]) -> None:
    """Publish named arrays and a JSON-able `state` as the checkpoint `path`. Raises OSError."""
    file = io.BytesIO()
    with h5py.File(file, "w", userblock_size=BLOCK) as f:  # old format: no times in groups
        f["state"] = np.frombuffer(json.dumps(state, sort_keys=True).encode(), np.uint8)
        for name, array in arrays.items():
            f.create_dataset(name, data=array)
    with file.getbuffer() as content:
        content[:BLOCK] = first_line(sha256(content[BLOCK:]))
        write_bytes(path, content)


def load(path: str | Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The (arrays, state) of a checkpoint. Raises DataError unless it is whole."""
    arrays: dict[str, np.ndarray] = {}

    def read(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset):
            whole = item.shape is not None and item.nbytes <= Path(path).stat().st_size
            if item.external or item.is_virtual or not whole:
                raise DataError(f"{path}: {name} is not plain data")
            arrays[name] = item[()]

    try:
        with Path(path).open("rb") as file:
            line = file.read(BLOCK)
            if not line.startswith(MARK):
                raise DataError(f"{path}: not a checkpoint of this version")
            if line != first_line(hashlib.file_digest(file, "sha256").hexdigest()):
                raise DataError(f"{path}: damaged checkpoint (its SHA-256 differs)")
        with h5py.File(path, "r", locking=False) as f:  # some network drives have no locks
            f.visititems(read)
        return arrays, json.loads(arrays.pop("state").tobytes())
    except (OSError, KeyError, ValueError, RuntimeError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: not a readable checkpoint ({error})") from error


def listed(folder: Path) -> list[Path]:
    """Checkpoints of a run by name, the newest last."""
    return sorted(folder.glob(f"step-{'[0-9]' * 8}.h5"))


def prune(folder: Path) -> None:
    """Remove all checkpoints but the newest few, and what killed processes have left of others."""
    for path in (*listed(folder)[:-KEEP], *folder.glob(".step-*.tmp")):
        with suppress(PermissionError):  # open elsewhere, on Windows: the next one's turn will come
            path.unlink()


def prefixed(prefix: str, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The arrays as `prefix`/name."""
    return {f"{prefix}/{name}": array for name, array in arrays.items()}


def unprefixed(prefix: str, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The arrays below `prefix`, without it."""
    start = f"{prefix}/"
    return {name.removeprefix(start): a for name, a in arrays.items() if name.startswith(start)}
