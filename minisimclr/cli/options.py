"""Options that several commands share."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from ..files import require_writable, write_bytes

# The library reports what it cannot read; click would use the exit code of a wrong option.
FILE = click.Path(path_type=Path, readable=False)

VIEW = click.option(
    "--view", type=click.IntRange(8), metavar="S", help="Side of RUN's views, px; else as trained."
)

BLOCK = click.option("--block", help="Block of InceptionV3 WEIGHTS to use, such as mixed8.")


class Setting(click.Option):
    """An option whose errors name the variable that a bad value came from."""

    def get_error_hint(self, ctx: click.Context | None) -> str:
        source = ctx and ctx.get_parameter_source(self.name or "")
        return f"'{self.envvar if source is ParameterSource.ENVIRONMENT else self.opts[0]}'"


def setting_option(name: str, **look: Any) -> Any:
    """The option of a setting, also read from MINISIMCLR_<NAME>: for `train`, and for all commands
    if it is of the machine.
    """
    variable = f"MINISIMCLR_{name.upper()}"
    return click.option(f"--{name.replace('_', '-')}", cls=Setting, envvar=variable, **look)


DEVICE = setting_option("device", help="auto, cpu, cuda:0, cuda:1, ...  [default: the RUN's, auto]")


class Duration(click.ParamType):
    """Seconds from 90, 90s, 10m, 2h or 1h30m."""

    name = "duration"

    def convert(self, value: Any, param: Any, ctx: Any) -> float:
        said = value + "s" * value.isdecimal()
        match = re.fullmatch(r"(?:(\d{1,9})h)?(?:(\d{1,9})m)?(?:(\d{1,9})s)?", said)
        if not match or not any(match.groups()):
            self.fail(f"{value!r} is not a duration such as 90s, 10m or 1h30m", param, ctx)
        hours, minutes, seconds = (int(g or 0) for g in match.groups())
        return float(3600 * hours + 60 * minutes + seconds)


class Named(click.Path):
    """A file to write, whose name must end in one of the suffixes: `--json PICTURE` must not
    overwrite one. Unless it `replaces` another, it must be new.
    """

    def __init__(self, *suffixes: str, replaces: bool = False, **options: Any):
        super().__init__(dir_okay=False, **options)
        self.suffixes, self.replaces = suffixes, replaces

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        if not (str(value).lower().endswith(self.suffixes) or (self.allow_dash and value == "-")):
            self.fail(f"{str(value)!r} must end in {' or '.join(self.suffixes)}", param, ctx)
        if value != "-":
            require_writable(Path(value))  # before long work, not after it
            if not self.replaces and Path(value).exists():
                self.fail(f"{str(value)!r} exists: choose another name", param, ctx)
        return super().convert(value, param, ctx)


# Before `*.png` a shell would have it write over the first picture.
SHEET = Named(".png", path_type=Path)

JSON = click.option(
    "--json", "json_file", is_flag=False, flag_value="-", metavar="[FILE]",
    type=Named(".json", replaces=True, allow_dash=True),
    help="Print the figures as JSON, or write them to FILE, which ends in .json.",
)  # fmt: skip


def shown(text: str) -> str:
    """One line that no terminal obeys: the names of files and classes may hold any character."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def say(*lines: str, err: bool = False) -> None:
    """Print lines, as `shown`."""
    click.echo("\n".join(map(shown, lines)), err=err)


def write_json(json_file: str | None, values: Any) -> bool:
    """Do what --json asks for; return True if standard output is then for the JSON alone."""
    if json_file is None:
        return False
    text = json.dumps(values, indent=1) + "\n"
    if json_file == "-":
        sys.stdout.write(text)
        return True
    try:
        write_bytes(Path(json_file), text.encode())
    except OSError:  # perhaps of long work: at least they are seen
        sys.stdout.write(text)
        raise
    return False
