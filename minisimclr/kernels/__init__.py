"""Faster versions of the passes in `ops` and `optim`, registered for an array type.

Importing this package registers them; nothing else refers to it, and everything works without.
MINISIMCLR_KERNELS=reference in the environment leaves the readable versions in place.
"""

import os

from ..errors import ConfigError

_choice = os.environ.get("MINISIMCLR_KERNELS", "fast")
if _choice not in ("fast", "reference"):
    raise ConfigError(f"MINISIMCLR_KERNELS is {_choice!r}: use fast or reference")
if _choice == "fast":
    from ..backend import reuse_memory
    from . import augment, conv, norm, optim, pool  # noqa: F401

    reuse_memory()
