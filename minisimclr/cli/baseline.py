"""minisimclr baseline: the tuned dense classifier on frozen InceptionV3 features."""

from pathlib import Path
from typing import Any

import click

from ..errors import ConfigError
from .display import Display
from .options import json_option, write_json


class Progress(Display):
    def on_features(self, done: int, total: int) -> None:
        self.advance(done, total, "InceptionV3 features")

    def on_trial(self, done: int, total: int, row: dict[str, Any]) -> None:
        self.advance(done, total, "trials", f"validation {row['validation']:.1%}")


@click.command()
@click.option("--weights", type=click.Path(path_type=Path), help="InceptionV3 weights, any format.")
@click.option("--random", is_flag=True, help="The control: random weights instead.")
@click.option("--data", default="stanford-dogs", help="Data set: a name or a path.")
@click.option("--image-size", type=int, metavar="S", help="Stored side, in px, before enlarging.")
@click.option("--block", default="mixed8", help="Whose output the classifier sees.")
@click.option("--trials", type=click.IntRange(1), default=20, help="Settings to try.")
@click.option("--epochs", type=click.IntRange(1), default=100, help="At most, in a trial.")
@click.option("--seed", default=0, help="Of the search.")
@click.option("--device", default="auto", help="auto, cpu, or cuda:0, cuda:1, ... for InceptionV3.")
@json_option
def baseline(
    weights: Path | None, random: bool, data: str, image_size: int | None, block: str, trials: int,
    epochs: int, seed: int, device: str, json_file: str | None,
) -> None:  # fmt: skip
    """Dense layers with dropout, tuned by random search, on pictures enlarged to 299 px."""
    from .. import baseline as dense
    from ..backend import choose_device
    from ..data import open_dataset

    if (weights is None) != random:
        raise ConfigError("give --weights FILE, or --random for the control")
    with Progress() as progress:
        notify = progress.notify
        dataset = open_dataset(data, image_size, progress.on_prepare)
        place, _ = choose_device(device)

        def features(rows: Any) -> Any:
            return dense.features(rows, dataset, weights, block, place, notify)

        result = dense.baseline(dataset, features, trials, epochs, seed, notify)
    side = dataset.images.shape[1]
    result["features"] = f"InceptionV3 {block}, {side} px enlarged to 299 px (bilinear)"
    result["imagenet_weights"] = not random
    if not write_json(json_file, result):
        show(result)


def show(result: dict[str, Any]) -> None:
    """The table of trials, the best first, and what the best did on the test images."""
    click.echo(f"{'lr':>8}{'widths':>14}{'dropout':>9}{'epochs':>8}{'validation':>12}")
    for row in sorted(result["trials"], key=lambda row: -row["validation"]):
        widths = f"{row['width1']}, {row['width2']}"
        click.echo(
            f"{row['lr']:8.4f}{widths:>14}{row['dropout']:9.2f}{row['epochs']:8}"
            f"{row['validation']:12.1%}"
        )
    low, high = result["ci95"]
    click.echo(
        f"\n{result['features']}{', random weights' if not result['imagenet_weights'] else ''}\n"
        f"{result['labels']:,} labelled images, {result['test']:,} to test, "
        f"{result['classes']} classes\n"
        f"top-1 {result['top1']:.1%} (95 % interval {low:.1%} - {high:.1%}), "
        f"top-5 {result['top5']:.1%}, chance {result['controls']['chance']:.1%}"
    )
    if result["imagenet_weights"]:
        click.echo("ImageNet weights may have seen the test photos: Stanford Dogs is made of them.")
