"""Runs side by side: what was set differently, how each went, what came out."""

from functools import partial

from ..errors import ConfigError
from .charts import Series, lines
from .facts import Facts
from .page import Missing, document, paragraph, row, table
from .verdict import headline, judge

KEYS = ("loss", "accuracy", "alignment", "uniformity", "effective_rank")
NAMES = ("loss", "contrastive accuracy", "alignment", "uniformity", "effective rank")


def build_comparison(facts: list[Facts]) -> bytes:
    """The page about several runs. Raises ConfigError for fewer than two or one named twice."""
    parts = [each.path.resolve().parts for each in facts]
    if len(set(parts)) < max(2, len(parts)):
        raise ConfigError("a comparison needs two runs or more, each named once")
    depth = 1  # parts at the end of the paths, as few as tell all of them apart
    while len({part[-depth:] for part in parts}) < len(parts):
        depth += 1
    runs = {"/".join(part[-depth:]): each for part, each in zip(parts, facts, strict=True)}
    sections = [partial(section, runs) for section in (results, differences, curves)]
    notes = "".join(paragraph(f"{n}: {said}") for n, each in runs.items() for said in each.missing)
    return document("comparison", f"{len(runs)} runs compared", ", ".join(runs), notes, sections)


def results(runs: dict[str, Facts]) -> str:
    """Results

    Losses at different batch sizes or temperatures are not comparable; the probe's results are, on
    the same data and labels.
    """
    found, figures = [], []
    for name, facts in runs.items():
        last, probe = (facts.epochs or [{}])[-1], facts.files["probe"]
        score = probe and [f"{probe['top1']:.1%}", "{:.1%} – {:.1%}".format(*probe["ci95"])]
        found.append([name, headline(judge(facts))[1], *(score or [None, None])])
        figures.append([name, *(last.get(k) for k in ("step", "chance", *KEYS, "views/s"))])
    outcome = table("What came of it", ("run", "verdict", "probe top-1", "95 % interval"), found)
    head = ("run", "step", "chance", *NAMES, "views/s")
    return outcome + table("At the last epoch", head, figures)


def differences(runs: dict[str, Facts]) -> str:
    """What was set differently"""
    settings = [facts.config.to_dict() for facts in runs.values()]
    rows = [[name, *(s[name] for s in settings)] for name in settings[0]]
    rows = [values for values in rows if len(set(values[1:])) > 1]
    if not rows:
        raise Missing("all settings are equal")
    return table("Settings that differ", ("setting", *runs), rows)


def curves(runs: dict[str, Facts]) -> str:
    """Curves

    Each chart shows all runs that have ended an epoch; loss and accuracy are means of an epoch. At
    the same uniformity, a lower alignment is better.
    """
    ended = {name: facts.epochs for name, facts in runs.items() if facts.epochs}
    if not ended:
        raise Missing("no run has ended an epoch")
    chances = {epochs[-1]["chance"] for epochs in ended.values()}
    drawn = []
    for key, title in zip(KEYS, NAMES, strict=True):
        level = ("chance", min(chances)) if key == "loss" and len(chances) == 1 else None
        series: Series = {
            name: ([e["epoch"] for e in epochs], [e[key] for e in epochs])
            for name, epochs in ended.items()
        }
        drawn.append(lines(title, "epoch", series, level=level))
    return row(*drawn)
