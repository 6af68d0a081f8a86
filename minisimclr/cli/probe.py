"""minisimclr probe: what a trained encoder is worth, beside its controls."""

from pathlib import Path
from typing import Any

import click

from ..errors import DataError
from .display import Display
from .options import json_option, write_json


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--labels", type=int, metavar="N", help="Use only N of the labelled images.")
@json_option
def probe(run: Path, labels: int | None, json_file: str | None) -> None:
    """Fit a linear classifier to the frozen features of RUN and test it once."""
    from ..run import open_run

    loaded, _ = open_run(run)
    if not loaded.step:
        raise DataError(f"{run} has no checkpoint yet: train it first")
    show_probe(loaded, labels, json_file)


def show_probe(run: Any, labels: int | None = None, json_file: str | None = None) -> None:
    """Probe a run, print the table (or JSON), and write probe.json unless labels were left out."""
    from ..probe import table
    from ..train import probe_run

    with Display() as display:
        result = probe_run(run, labels, display.notify)
    if labels is None:
        write_json(str(run.path / "probe.json"), result)
    if not write_json(json_file, result):
        click.echo(table(result))
