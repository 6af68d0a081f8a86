"""The command line: one group, its commands imported when they are run; errors become exit codes.

0 done; 2 usage or configuration; 3 data, run or weights missing or unreadable; 4 output cannot be
written; 5 diverged; 129, 130 and 143 after SIGHUP, SIGINT and SIGTERM.
"""

import errno
import os
import sys
import warnings
from contextlib import suppress
from difflib import get_close_matches
from glob import glob
from importlib import import_module
from typing import Any

import click

from ..errors import MinisimclrError
from ..files import nothing_unfinished
from .options import say

COMMANDS = (
    "train", "probe", "report", "walkthrough", "neighbors", "embed", "data", "profile", "weights",
    "baseline", "compare", "doctor",
)  # fmt: skip
HOMES = {"walkthrough": "report", "neighbors": "embed"}  # modules with another name


class Commands(click.Group):
    """A group whose commands live in modules of this package, most by their names."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            if near := get_close_matches(name, COMMANDS, 1):
                ctx.fail(f"no command {name!r}: did you mean {near[0]!r}?")
            return None
        return getattr(import_module(f".{HOMES.get(name, name)}", __package__), name)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError as error:  # which click would call a failure
            return explain(error)


@click.group(
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"], "show_default": True},
    epilog="Errors are one line; put --debug anywhere to see where they come from.",
)
@click.version_option(package_name="minisimclr")
def group() -> None:
    """SimCLR from scratch on NumPy and CuPy.

    \b
    minisimclr train              learn from cartoon dogs, minutes without a GPU
    minisimclr train --data DIR   the same on a folder of your own pictures
    """


# What Python says where the system refuses something, and what to do.
REFUSED = {
    "Could not determine home directory.": "set HOME or XDG_CACHE_HOME",
    "can't start new thread": "allow more processes or memory (ulimit -u, -v)",
}


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit with the right code."""
    with warnings.catch_warnings():  # a notebook goes on after this, with warnings of its own
        warnings.showwarning = lambda text, *_: tell("warning", str(text))
        sys.exit(run(arguments))


def tell(kind: str, text: str) -> None:
    with suppress(OSError):  # there may be no one to read it
        say(f"{kind}: {text}", err=True)


def run(arguments: list[str] | None) -> int:
    """Run the command line; returns the exit code."""
    if arguments is None:
        arguments = [name for word in sys.argv[1:] for name in expanded(word)]
    debug = "--debug" in arguments
    arguments = [a for a in arguments if a != "--debug"]
    while (spare := os.open(os.devnull, os.O_RDWR)) < 3:  # else a file of ours gets what goes to 2
        pass
    os.close(spare)
    for name in ("stdout", "stderr"):  # closed, as by `>&-`: nobody reads
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", errors="replace"))  # noqa: PTH123, SIM115
    if hasattr(sys.stdout, "reconfigure"):  # no name of a file or class is too odd to be printed
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        with nothing_unfinished():
            code = group.main(arguments, prog_name="minisimclr", standalone_mode=False) or 0
        sys.stdout.flush()
    except (MinisimclrError, OSError, MemoryError, click.ClickException) as error:
        if debug:
            raise
        code = explain(error)
    except (KeyboardInterrupt, click.Abort):
        code = explain("interrupted", 130)
    except RuntimeError as error:
        what = REFUSED.get(str(error))
        if type(error).__module__.startswith("cupy"):
            what = "the GPU failed, perhaps for lack of memory"
        if debug or what is None:
            raise
        code = explain(f"{what}: {error}", 2)
    return code


def expanded(word: str) -> list[str]:
    """The names of files that a word such as `*.jpg` stands for; on Windows, shells leave that to
    programs.
    """
    if os.name != "nt" or os.path.lexists(word):
        return [word]
    return sorted(glob(word)) or [word]  # noqa: PTH207 - relative ones stay so


def explain(error: Exception | str, code: int = 1) -> int:
    """Say what went wrong in one line on standard error; return the exit code for it."""
    text = str(error)
    match error:
        case click.ClickException() if error.format_message().startswith("Usage"):
            click.echo(error.format_message(), err=True)  # no command was given
            return error.exit_code
        case click.ClickException():
            text, code = error.format_message(), error.exit_code
        case OSError() if nobody_reads(error):
            close_output()
            return 0
        case MinisimclrError():
            code = error.exit_code
        case MemoryError():  # NumPy's and CuPy's as well
            advice = "lower --batch-size, --image-size, --view or --width, where there are such"
            text, code = f"out of memory: {advice} ({error})", 2
        case OSError():
            try:
                sys.stdout.flush()
            except OSError:  # Python would fail with it once more, at exit
                close_output()
            text, code = f"{error.filename or 'output'}: {error.strerror or error}", 4
    tell("error", " ".join(text.split()))
    return code


def nobody_reads(error: OSError) -> bool:
    """Whether the reader of standard output, such as `head`, has seen enough."""
    windows = os.name == "nt" and error.errno == errno.EINVAL and error.filename is None
    return windows or isinstance(error, BrokenPipeError)


def close_output() -> None:
    """Let what is still to be written to standard output go nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
