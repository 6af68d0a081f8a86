"""How a version of a pass for one type of array is registered, and how its work is cut up."""

from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any

import numpy as np

from ..cores import parallel


def for_float32(reference: Any, kind: Any = np.ndarray) -> Callable[[Callable], Callable]:
    """Register the decorated function for arrays of a `kind`, of float32 alone; CuPy's also of
    bfloat16.

    Where any array of another floating type comes in, the pass runs as it is written in `ops`.
    """
    floating = "fV" if kind is np.ndarray else "f"  # of bfloat16 NumPy's own `kind` is "V"

    def register(version: Callable) -> Callable:
        @wraps(version)
        def choose(*args: Any, **named: Any) -> Any:
            arrays = (a for a in (*args, *named.values()) if isinstance(a, kind))
            plain = all(a.dtype == np.float32 for a in arrays if a.dtype.kind in floating)
            return (version if plain else reference.dispatch(object))(*args, **named)

        return reference.register(kind)(choose)

    return register


def blocks(start: int, stop: int, size: int) -> Iterator[slice]:
    """Slices of `size`, and at least of 1, that lead from start to stop."""
    size = max(1, size)
    return (slice(i, min(i + size, stop)) for i in range(start, stop, size))


def in_blocks(work: Callable[[slice], Any], n: int, size: int) -> None:
    """Call work(slice) on all blocks of range(n), on all threads."""
    parallel(lambda start, stop: [work(some) for some in blocks(start, stop, size)], n)
