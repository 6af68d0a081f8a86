"""What a user can get wrong, each with the exit code that the command line returns for it.

Every message is one line: what happened, to which file or value and, unless that is plain, what to
do about it.
"""

import os
import shlex
from subprocess import list2cmdline
from typing import Any


def typed(*words: str) -> str:
    """Words of a command as one types them, in quotes where needed, for what to do about it."""
    return list2cmdline(words) if os.name == "nt" else shlex.join(words)


class MinisimclrError(Exception):
    """Base of all errors a user can cause; never raised itself."""

    exit_code = 1


class ConfigError(MinisimclrError, ValueError):
    """A bad option, value or configuration file."""

    exit_code = 2


class DataError(MinisimclrError):
    """Data, a run or weights are missing, empty or cannot be decoded."""

    exit_code = 3


class OutputError(MinisimclrError):
    """Output cannot be made or written: no space, no permission, a path in the way."""

    exit_code = 4


class DivergedError(MinisimclrError):
    """Training produced a loss or gradient that is not a finite number."""

    exit_code = 5


class Interrupted(KeyboardInterrupt):
    """A signal ended training, and its state is saved; `run` is the Run, as `pretrain` returns."""

    def __init__(self, run: Any):
        super().__init__(run)
        self.run = run

    def __str__(self) -> str:
        return f"{self.run.stopped}: saved at step {self.run.step} of {self.run.path}"
