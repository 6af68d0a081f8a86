"""Checkpoints: all the state a bit-exact resume needs, in one HDF5 file without pickle or clock.

The file is built in memory and published whole (see files.py); a SHA-256 over every array and
attribute is stored with it and verified on reading.
"""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from .errors import DataError
from .files import write_bytes

FORMAT = 1
KEEP = 2  # checkpoints of a run that stay on disk


def _digest(arrays: dict[str, np.ndarray], state: str) -> str:
    digest = hashlib.sha256(state.encode())
    for name in sorted(arrays):
        array = arrays[name]
        digest.update(f"{name} {array.dtype.str} {array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def save(path: Path, arrays: dict[str, np.ndarray], state: dict[str, Any]) -> None:
    """Publish named arrays and a JSON-able `state` as the checkpoint `path`. Raises OSError."""
    text = json.dumps(state, sort_keys=True)
    with h5py.File(path.name, "w", driver="core", backing_store=False, libver="v110") as f:
        f.attrs.update(format=FORMAT, state=text, sha256=_digest(arrays, text))
        for name, array in arrays.items():
            f.create_dataset(name, data=array)
        f.flush()
        image = f.id.get_file_image()
    write_bytes(path, image)


def load(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The (arrays, state) of a checkpoint. Raises DataError unless it is whole."""
    arrays: dict[str, np.ndarray] = {}

    def read(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset):
            if item.external or item.is_virtual or item.nbytes > path.stat().st_size:
                raise DataError(f"{path}: {name} is not plain data")
            arrays[name] = item[()]

    try:
        with h5py.File(path, "r") as f:
            if f.attrs.get("format") != FORMAT:
                raise DataError(f"{path}: not a checkpoint of format {FORMAT}")
            text, digest = f.attrs["state"], f.attrs["sha256"]
            f.visititems(read)
    except (OSError, KeyError, ValueError, RuntimeError, TypeError) as error:
        raise DataError(f"{path}: not a readable checkpoint ({error})") from error
    if digest != _digest(arrays, text):
        raise DataError(f"{path}: damaged checkpoint (its SHA-256 differs)")
    return arrays, json.loads(text)


def path_of(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}.h5"


def listed(folder: Path) -> list[Path]:
    """Checkpoints of a run by name, the newest last."""
    names = folder.glob("step-*.h5")
    return sorted(p for p in names if re.fullmatch(r"step-\d{8}\.h5", p.name))


def prune(folder: Path) -> None:
    """Remove all checkpoints but the newest few."""
    for path in listed(folder)[:-KEEP]:
        path.unlink()


def prefixed(prefix: str, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {f"{prefix}/{name}": array for name, array in arrays.items()}


def unprefixed(prefix: str, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The arrays below `prefix`, without it."""
    cut = len(prefix) + 1
    return {name[cut:]: a for name, a in arrays.items() if name.startswith(f"{prefix}/")}
