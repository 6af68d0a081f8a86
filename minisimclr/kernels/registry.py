"""How a version of a pass for one type of array is registered."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import numpy as np


def for_float32(reference: Any, kind: Any = np.ndarray) -> Callable[[Callable], Callable]:
    """Register the decorated function for arrays of a `kind`, of float32 alone.

    Where any array of another floating type comes in, the pass runs as it is written in `ops`.
    """

    def register(version: Callable) -> Callable:
        @wraps(version)
        def choose(*args: Any) -> Any:
            arrays = (a for a in args if isinstance(a, kind))
            plain = all(a.dtype == np.float32 for a in arrays if a.dtype.kind == "f")
            return (version if plain else reference.dispatch(object))(*args)

        return reference.register(kind)(choose)

    return register
