"""What every reader returns: names, shapes and dtypes in a file, and a way to read one array.

Most readers look only at headers; the bytes of an array are read when it is asked for, which
happens once its shape has proved to be the right one. Our own files are read at once, to check
their checksum.
"""

import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..errors import DataError

NUMBERED = KERAS, TENSORFLOW = "Keras HDF5", "TensorFlow checkpoint"  # formats that number layers
NAME_LIMIT = 1000  # characters; one long piece shared by many names would fill the memory

# What libraries raise, or warn of, on damaged input.
DAMAGE: tuple = (
    ValueError, LookupError, TypeError, ArithmeticError, RuntimeError, OSError, EOFError, Warning,
    zipfile.BadZipFile,
)  # fmt: skip


class Spec(NamedTuple):
    """Shape and dtype of a stored array; the dtype by NumPy's name, or bfloat16."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * (2 if self.dtype == "bfloat16" else np.dtype(self.dtype).itemsize)


class Stored(NamedTuple):
    """A file of weights. `fetch(name)` reads one array, in the file's own layout."""

    path: Path
    format: str
    specs: dict[str, Spec]
    fetch: Callable[[str], np.ndarray]
    metadata: dict[str, str] = {}  # noqa: RUF012


@contextmanager
def damage_reported(path: Path) -> Iterator[None]:
    """Turn whatever a library says about a bad file into one DataError."""
    try:
        with warnings.catch_warnings(action="error"):
            yield
    except DAMAGE as error:
        kind = "" if type(error) is ValueError else f"{type(error).__name__}: "
        reason = getattr(error, "strerror", None) or f"{kind}{error}"
        other = str(getattr(error, "filename", None) or path)
        named = f"{Path(other).name}: " * (other != str(path))  # TensorFlow's arrays are in another
        raise DataError(f"{path}: cannot be read: {named}{reason[:300]}") from error


def decode(raw: bytes | np.ndarray, spec: Spec) -> np.ndarray:
    """Little-endian bytes as an array; bfloat16, the upper half of a float32, becomes float32."""
    if spec.dtype == "bfloat16":
        return (np.frombuffer(raw, "<u2").astype("<u4") << 16).view("<f4").reshape(spec.shape)
    return np.frombuffer(raw, np.dtype(spec.dtype).newbyteorder("<")).reshape(spec.shape)


def checked(shape: Any) -> tuple[int, ...]:
    """`shape` if it is one: at most 64 natural numbers (NumPy's limit), each below 2^63."""
    if len(shape) > 64 or not all(type(n) is int and 0 <= n < 1 << 63 for n in shape):
        raise ValueError("impossible shape or place")
    return tuple(shape)
