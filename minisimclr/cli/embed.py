"""minisimclr embed and neighbors: use a trained encoder on your own pictures."""

from pathlib import Path
from typing import Any

import click

from ..errors import DataError
from ..files import write_bytes
from .display import Display
from .options import BLOCK, DEVICE, FILE, JSON, SHEET, Named, say, write_json

ENCODER = click.argument("encoder", type=FILE, metavar="RUN|WEIGHTS")


@click.command()
@ENCODER
@click.argument("path", required=False)
@click.option(
    "--out", type=Named(".npy", ".h5", path_type=Path), required=True, metavar="FILE.npy|FILE.h5",
    help="New file.",
)  # fmt: skip
@BLOCK
@DEVICE
def embed(encoder, path, out, block, device) -> None:
    """Write the features that a RUN or WEIGHTS give to pictures.

    PATH is a folder or the name of a data set; WEIGHTS need it, a RUN has data of its own. A .npy
    file holds the features (n, D) alone, in the order of the data set; an .h5 file also file_names,
    labels and class_names. Features are h, which the probe sees, and not z, which the loss sees.
    """
    from .. import embed as library

    with Display() as display:
        trained = library.open_encoder(encoder, path, block, device, display.notify)
        h = trained.embed()
    library.save(out, h, trained.dataset, trained.about)
    say(f"{out}: features {h.shape} of {trained.dataset.name}")


@click.command()
@ENCODER
@click.argument("images", nargs=-1, required=True, metavar="IMAGE...", type=FILE)
@click.option("--data", help="Name or folder to search; WEIGHTS need it.  [default: the RUN's]")
@click.option("--count", default=5, type=click.IntRange(1), help="Neighbours of each image.")
@click.option("--sheet", type=SHEET, metavar="FILE.png", help="Draw them, too, in a new file.")
@BLOCK
@DEVICE
@JSON
def neighbors(encoder, images, data, count, sheet, block, device, json_file) -> None:
    """Find the pictures that a RUN or WEIGHTS find most like IMAGE."""
    import numpy as np

    from .. import embed as library
    from ..backend import to_host
    from ..data.images import contact_sheet, decode_file

    queries = []
    with Display() as display:
        trained = library.open_encoder(encoder, data, block, device, display.notify)
        dataset = trained.dataset
        for path in images:
            try:
                queries.append(decode_file(path, dataset.images.shape[1]))
            except DataError as error:
                raise DataError(f"{path}: {error}") from error
        parts = (queries[i : i + library.BATCH] for i in range(0, len(queries), library.BATCH))
        h = np.concatenate([to_host(trained.see(np.stack(part))) for part in parts])
        order, cosines = library.nearest(h, trained.embed(), count)
    if sheet:
        rows = [
            (path.name[:24], np.concatenate([query[None], dataset.images[near]]))
            for path, query, near in zip(images, queries, order, strict=True)
        ]
        write_bytes(sheet, contact_sheet(rows))
    names = (*dataset.class_names, "")  # -1: no label
    found: dict[str, list[dict[str, Any]]] = {}
    for path, near, cosine in zip(images, order, cosines, strict=True):
        found[str(path)] = [
            {"file": dataset.file_names[i], "class": names[dataset.labels[i]], "cosine": float(c)}
            for i, c in zip(near, cosine, strict=True)
        ]
    if not write_json(json_file, found):
        for name, rows_of in found.items():
            say(name)
            for row in rows_of:
                say(f"{row['cosine']:8.3f}  {row['class']:24}  {row['file']}")
