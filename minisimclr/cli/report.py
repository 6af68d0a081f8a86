"""minisimclr report and walkthrough: pages to look at, each one self-contained HTML file."""

from pathlib import Path

import click

from ..files import require_writable, write_bytes
from .display import Display
from .options import FILE, JSON, Named, say, write_json

PAGE = Named(".html", replaces=True, path_type=Path)  # not a run's log, nor a program


@click.command(epilog="A page needs no network and no script; open it in any browser.")
@click.argument("runs", nargs=-1, required=True, metavar="RUN...", type=FILE)
@click.option("--out", type=PAGE, help="Page to write.  [default: RUN/report.html]")
@JSON
def report(runs, out, json_file) -> None:
    """Show what a run has learned and what is wrong with it.

    Several runs are compared on one page: comparison.html, unless --out says otherwise.
    """
    from .. import report as pages

    out = out or (runs[0] / "report.html" if len(runs) == 1 else Path("comparison.html"))
    with Display() as display:
        facts = [pages.read(path, display.notify) for path in runs]
        require_writable(out)
        page = pages.build_report(facts[0]) if len(runs) == 1 else pages.build_comparison(facts)
    write_bytes(out, page)
    values = {}
    for each in facts:
        findings = pages.judge(each)
        shown = [finding._asdict() for finding in findings]
        values[str(each.path)] = {"verdict": pages.headline(findings)[1], "findings": shown}
        for said in each.missing:
            say(f"note: {each.path}: {said}", err=True)
    if not write_json(json_file, values):
        for path, value in values.items():
            say(f"{path}: {value['verdict']}")
        say(f"{out} ({len(page) / 1e6:.1f} MB)")


@click.command()
@click.option("--data", default="toydogs", help="Data set, or folder of pictures.")
@click.option("--images", default=4, type=click.IntRange(2, 6), help="Pictures in the batch.")
@click.option("--seed", default=1, type=click.IntRange(0, 2**63 - 1), help="Seed of all draws.")
@click.option("--out", default="walkthrough.html", type=PAGE, help="Page to write.")
def walkthrough(data, images, seed, out) -> None:
    """Show one step of SimCLR line by line, with its numbers.

    The page shows the code, and what each line of it makes of a batch of pictures.
    """
    from ..data import open_dataset
    from ..report import build_walkthrough

    with Display() as display:
        dataset = open_dataset(data, 40, display.on_prepare)
    page = build_walkthrough(dataset, images, seed)
    write_bytes(out, page)
    say(f"{out} ({len(page) / 1e6:.1f} MB)")
