"""How the version of a pass for one array type is registered, and how its work is divided."""

from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any

import numpy as np

from ..cores import parallel

SMALL = 1 << 16  # numbers not worth a second thread


def for_float32(reference: Any, kind: Any = np.ndarray) -> Callable[[Callable], Callable]:
    """Register the decorated function for float32 arrays of a `kind`; for CuPy's, also bfloat16.

    If any argument is an array of another floating type, the readable version runs.
    """
    floating = "fV" if kind is np.ndarray else "f"  # bfloat16 has the `kind` "V" in NumPy

    def register(version: Callable) -> Callable:
        @wraps(version)
        def choose(*args: Any, **named: Any) -> Any:
            for a in (*args, *named.values()):
                if isinstance(a, kind) and a.dtype.kind in floating and a.dtype != np.float32:
                    return reference.dispatch(object)(*args, **named)
            return version(*args, **named)

        return reference.register(kind)(choose)

    return register


def blocks(start: int, stop: int, size: int) -> Iterator[slice]:
    """Slices of length `size`, at least 1, from start to stop."""
    size = max(1, size)
    return (slice(i, min(i + size, stop)) for i in range(start, stop, size))


def in_blocks(work: Callable[[slice], Any], n: int, size: int) -> None:
    """Call work(slice) on all blocks of range(n), on all threads."""
    parallel(lambda start, stop: [work(some) for some in blocks(start, stop, size)], n)
