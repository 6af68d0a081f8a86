"""minisimclr baseline: the tuned dense classifier on frozen InceptionV3 features."""

import click

from ..errors import ConfigError
from .display import Display
from .options import FILE, JSON, setting_option, write_json


@click.command()
@click.option("--weights", type=FILE, help="InceptionV3 weights, any format.")
@click.option("--random", is_flag=True, help="The control: random weights instead.")
@click.option("--data", default="stanford-dogs", help="Data set: a name or a path.")
@click.option(
    "--image-size", type=int, metavar="S",
    help="Stored side, in px.  [default: 80 for stanford-dogs, 40 for toydogs, 299 for a path]",
)  # fmt: skip
@click.option("--block", default="mixed8", help="Block whose output is classified.")
@click.option("--trials", type=click.IntRange(1), default=20, help="Settings to try.")
@click.option("--epochs", type=click.IntRange(1), default=100, help="Epochs of a trial, at most.")
@click.option("--seed", default=0, type=click.IntRange(0, 2**63 - 1), help="Seed of the search.")
@setting_option("device", default="auto", help="auto, cpu, or cuda:0, cuda:1, ... for InceptionV3.")
@JSON
def baseline(
    weights, random, data, image_size, block, trials, epochs, seed, device, json_file
) -> None:
    """Tune dense layers on frozen InceptionV3 features.

    The layers have dropout, the search is random, and the network sees pictures at 299 px.
    """
    from .. import baseline as dense
    from ..embed import SEEN, open_pictures

    if (weights is None) != random:
        raise ConfigError("give either --weights FILE or, for the control, --random")
    with Display() as progress:
        dataset = open_pictures(data, dense.PREPROCESSING, image_size, progress.notify)
        extract = dense.inception(dataset, weights, block, device, progress.notify)
        result = dense.baseline(dataset, extract, trials, epochs, seed, progress.notify)
    side = dataset.images.shape[1]
    result["features"] = f"InceptionV3 {block}, {side} px as 299 (bilinear)"
    result["imagenet_weights"] = not random
    if write_json(json_file, result):
        return
    low, high = result["ci95"]
    weighted = ", random weights" if random else ""
    click.echo(
        f"{dense.table(result['trials'])}\n\n{result['features']}{weighted}\n"
        f"{result['labels']:,} labelled images, {result['test']:,} to test, "
        f"{result['classes']} classes\n"
        f"top-1 {result['top1']:.1%} (95 % interval {low:.1%} - {high:.1%}), "
        f"top-5 {result['top5']:.1%}, chance {result['controls']['chance']:.1%}"
    )
    if not random and dataset.name.startswith("stanford-dogs"):
        click.echo(SEEN)
