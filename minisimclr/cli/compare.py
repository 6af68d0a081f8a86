"""minisimclr compare: the report's three systems and their controls in one table."""

import click

from .display import Display
from .options import DEVICE, FILE, JSON, VIEW, say, write_json


@click.command()
@click.argument("run", type=FILE)
@click.option("--inception", type=FILE, metavar="FILE", help="InceptionV3 weights, any format.")
@click.option("--simclrv2", type=FILE, metavar="FILE", help="A SimCLRv2 checkpoint.")
@click.option("--data", help="A data set other than the run's: a name or a path.")
@click.option("--trials", type=click.IntRange(1), default=20, help="Trials of the dense search.")
@click.option("--epochs", type=click.IntRange(1), default=60, help="Epochs of fine-tuning.")
@VIEW
@DEVICE
@click.option("--out", type=FILE, default="results", help="Folder of results.json.")
@JSON
def compare(run, inception, simclrv2, data, trials, epochs, view, device, out, json_file) -> None:
    """Put three systems and their controls in one table.

    Frozen InceptionV3, SimCLR (RUN) and SimCLRv2 get the same images and labels. Finished parts are
    kept in results.json and not made again; those without their input are "not run". Fine-tuning
    takes most of the time: minutes for toydogs, an hour or more for Stanford Dogs on two cores.
    """
    from .. import compare as library
    from .. import embed
    from ..files import require_writable

    loaded = embed.open_trained(run, device)
    require_writable(out / "results.json")
    with Display() as display:
        dataset = embed.open_data(loaded, data, display.notify)
        results = library.Comparison(
            loaded, dataset, inception, simclrv2, trials, epochs, view, display.notify
        ).make(out)
    if not write_json(json_file, results):
        say(*library.markdown(results).splitlines())
