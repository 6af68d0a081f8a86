"""minisimclr profile: where a training step spends its time."""

import click

from ..files import require_writable
from .display import Display
from .options import FILE, JSON, setting_option, write_json
from .train import SETTINGS

CHOICE = {name: click.Choice(SETTINGS[name].metadata["choices"]) for name in ("encoder", "stem")}


@click.command()
@click.option("--encoder", type=CHOICE["encoder"], default="resnet18", help="Network.")
@click.option("--stem", type=CHOICE["stem"], default="auto", help="First layers.")
@click.option("--width", default=0, help="Channels of the first stage; 0: the encoder's own.")
@click.option("--image-size", default=32, help="Side of the views, in px.")
@click.option("--batch-size", default=64, help="Images in a step; each has two views.")
@click.option("--steps", default=5, help="Steps to time, after two that are not.")
@setting_option("device", default="auto", help="auto, cpu, or cuda:0, cuda:1, ...")
@setting_option("threads", default=0, help="CPU threads; 0: one for each core it may use.")
@click.option("--trace", type=FILE, help="Write a Chrome/Perfetto trace.")
@JSON
def profile(trace, json_file, threads, **settings) -> None:
    """Time a training step and each of its operations.

    The times are compared with this machine's roofline: the least time that its arithmetic and
    memory allow. An operation may be faster if it finds its data in cache, or multiplies less than
    is counted, as Winograd's does.
    """
    from .. import profile as profiling

    if trace:
        require_writable(trace)
    with Display() as display:
        result = profiling.profile(**settings, thread_count=threads, notify=display.notify)
    if trace:
        profiling.write_trace(result, trace)
    result.pop("events")
    if not write_json(json_file, result):
        click.echo(profiling.table(result))
