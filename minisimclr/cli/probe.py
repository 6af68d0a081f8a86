"""minisimclr probe: what a trained encoder is worth, beside its controls."""

from os.path import isdir
from typing import Any

import click

from ..errors import ConfigError, OutputError
from ..files import require_writable
from .display import Display
from .options import BLOCK, DEVICE, FILE, JSON, VIEW, say, write_json


@click.command()
@click.argument("path", type=FILE, metavar="RUN|WEIGHTS")
@click.option("--data", help="Name or path.  [default: the RUN's; for WEIGHTS stanford-dogs]")
@click.option("--labels", type=int, metavar="N", help="Use only N of the labelled images.")
@click.option("--finetune", is_flag=True, help="Train the whole network of RUN with the labels.")
@click.option("--epochs", type=click.IntRange(1), help="Epochs of --finetune.  [default: 60]")
@VIEW
@click.option(
    "--image-size", type=int, metavar="S",
    help="Stored side, in px, for WEIGHTS.  "
    "[default: 80 for stanford-dogs, 40 for toydogs, else as they need]",
)  # fmt: skip
@BLOCK
@DEVICE
@JSON
def probe(path, data, labels, finetune, epochs, view, image_size, block, device, json_file) -> None:
    """Tell what the features of a RUN or of WEIGHTS are worth.

    A linear classifier is fitted to the frozen features of labelled images and tested once, beside
    others on random features and on pixels.
    """
    from .. import embed

    if epochs and not finetune:
        raise ConfigError("--epochs goes with --finetune")
    if isdir(path):  # noqa: PTH112 - False without permission
        if block or image_size:
            raise ConfigError("--block and --image-size go with a file of weights")
        run = embed.open_trained(path, device)
        return show_probe(run, data, labels, (epochs or 60) if finetune else None, view, json_file)
    if finetune or view:
        raise ConfigError("--finetune and --view go with a run folder")
    from ..probe import table
    from ..weights import network, preprocessing_for, read

    stored = read(path)  # before the data: it may be the misspelt name of a run
    wanted = preprocessing_for(network(stored), stored)
    with Display() as display:
        name = "stanford-dogs" if data is None else data
        dataset = embed.open_pictures(name, wanted, image_size, display.notify)
        result = embed.probe_weights(path, dataset, block, labels, device or "auto", display.notify)
    if not write_json(json_file, result):
        say(*table(result).splitlines())
        if dataset.name.startswith("stanford-dogs"):
            say(embed.SEEN)


def show_probe(
    run: Any, data: str | None = None, labels: int | None = None, epochs: int | None = None,
    view: int | None = None, json_file: str | None = None,
) -> None:  # fmt: skip
    """Probe a run, or fine-tune it for some epochs; print the table (or JSON), and write probe.json
    or finetune.json into its folder unless data, labels or view were chosen.
    """
    from .. import embed, finetune
    from ..probe import table

    name = "probe.json" if epochs is None else "finetune.json"
    ours = data is None and labels is None and view is None
    if ours:
        try:
            require_writable(run.path / name)
        except OutputError as error:
            say(f"note: the figures are not kept: {error}", err=True)
            ours = False
    with Display() as display:
        dataset = embed.open_data(run, data, display.notify)
        if epochs is None:
            result = embed.probe_run(run, dataset, labels, view, display.notify)
        else:
            result = finetune.finetune(run, dataset, labels, epochs, view, notify=display.notify)
    if ours:
        write_json(str(run.path / name), result)
    if not write_json(json_file, result):
        say(*table(result).splitlines())
