"""Faster versions of passes in `tensor`, `ops`, `optim` and `augment`, each for an array type.

Importing this package registers the versions for NumPy; those for CuPy follow as soon as a GPU is
used (cuda.py). No pass refers to this package; all but bfloat16 works without it.
MINISIMCLR_KERNELS=reference in the environment leaves the readable versions in place.
"""

import os
import sys
from importlib import import_module

chosen = os.environ.get("MINISIMCLR_KERNELS", "fast")
if chosen not in ("fast", "reference"):  # no command is running yet that could report it
    print(f"error: MINISIMCLR_KERNELS is {chosen!r}: use fast or reference", file=sys.stderr)
    raise SystemExit(2)
if chosen == "fast":
    from ..backend import on_cupy
    from ..cores import reuse_memory
    from . import augment, conv, norm, optim, pool  # noqa: F401

    reuse_memory()
    on_cupy.append(lambda library: import_module(".cuda", __name__).register(library))
