"""minisimclr data: prepare a data set once, check that it is intact, look at what is in it."""

from collections import Counter
from dataclasses import asdict
from typing import Any

import click

from ..errors import ConfigError
from ..files import write_bytes
from .display import Display
from .options import FILE, JSON, SHEET, say, write_json

NAME = click.argument("name", metavar="NAME|PATH")
SPLITS = ("pretrain", "labelled", "test")
MOST = 20  # lines of a list


def size_option(usual: str) -> Any:
    said = f"Stored side, px: 5/4 of a view's.  [default: {usual}]"
    return click.option("--image-size", type=int, metavar="S", help=said)


@click.group()
def data() -> None:
    """Prepare, check and show data sets.

    Data sets are toydogs, stanford-dogs, folders of pictures, and cache files.
    """


@data.command()
@NAME
@size_option("80, toydogs 40")
@click.option("--crop", type=click.Choice(["centre", "boxes"]), default="centre", help="Part kept.")
@click.option("--skip-bad", is_flag=True, help="Leave out bad pictures: 1 % at most, or one.")
@click.option("--labels-per-class", type=int, metavar="N", help="Label N per class, not a fifth.")
@click.option("--images-tar", type=FILE, help="stanford-dogs: use this, do not download it.")
@click.option("--lists-tar", type=FILE, help="The same for the lists.")
@click.option("--annotation-tar", type=FILE, help="The same for the boxes.")
@click.option("--url", help="stanford-dogs: download its archives from here.")
@click.option("--allow-unverified", is_flag=True, help="Accept unofficial archives.")
@JSON
def prepare(
    name, image_size, crop, skip_bad, labels_per_class, url, allow_unverified, json_file, **tars
) -> None:
    """Build the cache of a data set, downloading what is needed."""
    from .. import data as datasets

    options = datasets.Options(crop, skip_bad, labels_per_class)
    archives = {key.removesuffix("_tar"): path for key, path in tars.items() if path}
    if "annotation" in archives and crop != "boxes":
        raise ConfigError("--annotation-tar goes with --crop boxes")
    with Display() as display:
        dataset = datasets.prepare(
            name, image_size, options, display.on_prepare, archives, url, allow_unverified
        )
        if not dataset.notes.get("verified", True):
            display.on_warning("not the official archives: most damage to a JPEG goes unnoticed")
    show(facts(dataset), json_file)


@data.command()
@NAME
@size_option("that made last")
@JSON
def verify(name, image_size, json_file) -> None:
    """Check every byte of a prepared cache.

    The exit code is 0 if it is intact, 3 if it is damaged or missing.
    """
    from .. import data as datasets

    dataset = datasets.prepared(name, image_size)
    dataset.verify()
    show({"path": str(dataset.path), "sha256": dataset.fingerprint, "valid": True}, json_file)


@data.command()
@NAME
@size_option("that made last")
@click.option("--sheet", type=SHEET, metavar="FILE.png", help="Draw samples of up to 12 classes.")
@JSON
def info(name, image_size, sheet, json_file) -> None:
    """Show what a prepared data set holds and where it is."""
    from .. import data as datasets
    from ..data.images import contact_sheet

    dataset = datasets.prepared(name, image_size)
    if sheet:
        write_bytes(sheet, contact_sheet(samples(dataset)))
    show(facts(dataset) | {"classes": class_counts(dataset)}, json_file)


def facts(dataset: Any) -> dict[str, Any]:
    """The figures of a data set, for people and for JSON."""
    names, splits, same = dataset.file_names, dataset.splits, dataset.duplicate_of
    duplicates = [(i, j) for i, j in enumerate(same.tolist()) if i != j]
    across = [  # each with the first that is equal and in another split
        [names[i], names[k]]
        for i, j in duplicates
        for k in ((same == j) & (splits != splits[i])).nonzero()[0][:1]
    ]
    return {
        "name": dataset.name,
        "path": str(dataset.path),
        "images": len(dataset.images),
        "image_size": dataset.images.shape[1],
        "bytes": dataset.path.stat().st_size,
        **{split: len(dataset.split(split)) for split in SPLITS},
        "class_count": len(dataset.class_names),
        **asdict(dataset.options),
        **dataset.notes,
        "duplicates": len(duplicates),
        "duplicates_across_splits": across,
        "sha256": dataset.fingerprint,
    }


def class_counts(dataset: Any) -> dict[str, dict[str, int]]:
    """Pictures of each class in each split."""
    counts = {s: Counter(dataset.labels[dataset.split(s)].tolist()) for s in SPLITS}
    return {name: {s: counts[s][k] for s in SPLITS} for k, name in enumerate(dataset.class_names)}


def samples(dataset: Any) -> list[tuple[str, Any]]:
    """Rows of a contact sheet: up to 12 classes, or 12 rows of pictures without labels."""
    rows, columns = 12, 10
    classes = range(0, len(dataset.class_names), -(-len(dataset.class_names) // rows) or 1)
    members = {k: (dataset.labels == k).nonzero()[0][:columns] for k in classes}
    found = [(dataset.class_names[k], dataset.images[m]) for k, m in members.items() if len(m)]
    if not found:
        starts = range(0, min(len(dataset.images), rows * columns), columns)
        return [(f"from {i}", dataset.images[i : i + columns]) for i in starts]
    return found


def show(values: dict[str, Any], json_file: str | None) -> None:
    """Print one figure per line, tables and the start of lists one entry per line, or do what
    --json says.
    """
    if write_json(json_file, values):
        return
    for key, value in values.items():
        many = isinstance(value, (dict, list))
        say(f"{key.replace('_', ' '):>24}  {len(value) if many else value}")
        if not many:
            continue
        rows = value.items() if isinstance(value, dict) else value[:MOST]
        for first, second in rows:
            if isinstance(second, dict):
                second = "  ".join(f"{k} {v:>5}" for k, v in second.items())
            say(f"{'':>24}  {first}  {second}")
        if len(rows) < len(value):
            say(f"{'':>24}  and {len(value) - len(rows):,} more, which --json shows")
