"""Keras' .h5 files of weights, whole models (`model.save("x.h5")`) included.

Arrays are at `layer/.../kernel:0`. Only what the file itself holds as plain data is read: no links,
no other files, no filters that unpack. The configuration, which may hold code, is never looked at.
"""

from pathlib import Path
from typing import Any

import h5py
import numpy as np

from .stored import KERAS, Spec, Stored


def read(path: Path) -> Stored:
    """Arrays as "layer/kernel". Raises ValueError and what h5py raises."""
    specs, places = {}, {}

    def visit(place: str, item: Any) -> None:  # h5py gets here by hard links alone
        if isinstance(item, h5py.Dataset) and not place.startswith("optimizer_weights/"):
            name = "/".join(place.split(":")[0].split("/")[-2:])
            plain = item.chunks is None and not item.external and not item.is_virtual
            if not plain or item.shape is None or name in specs:
                said = f"{place!a} is not a plain array, or two are called {name!a}"
                raise ValueError(f"{said}: write it by model.save('NEW.h5')")
            specs[name], places[name] = Spec(item.shape, item.dtype.name), place

    with h5py.File(path, "r", locking=False) as f:  # some network drives have no locks
        f.visititems(visit)

    def fetch(name: str) -> np.ndarray:
        with h5py.File(path, "r", locking=False) as f:
            return f[places[name]][()]

    return Stored(path, KERAS, specs, fetch)
