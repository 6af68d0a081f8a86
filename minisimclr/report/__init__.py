"""See it learn: the report of a run, the comparison of runs, the walkthrough of Algorithm 1.

    a, b = read(Path("runs/a")), read(Path("runs/b"))
    build_report(a), build_comparison([a, b]), build_walkthrough(open_dataset("toydogs"))
    headline(judge(a))                                    # level, and verdict in one sentence

A page is the bytes of one HTML file that has no script and asks the network for nothing.
"""

import re
from functools import partial
from html import escape
from pathlib import Path

from .compare import build_comparison
from .facts import Facts, read
from .page import document, paragraph
from .panels import PANELS, trust
from .verdict import Finding, headline, judge
from .walkthrough import build_walkthrough

__all__ = ["build_comparison", "build_report", "build_walkthrough", "headline", "judge", "read"]

MARKS = {"good": "✓", "warning": "!", "fault": "✗"}


def build_report(facts: Facts) -> bytes:
    """The page about one run."""
    c = facts.config
    about = f"{c.encoder} on {Path(c.data).name}, {c.image_size} px, batches of {c.batch_size}, "
    about += f"{c.epochs} epoch{'s' * (c.epochs > 1)}, {c.optimizer}, temperature {c.temperature:g}"
    top = verdict_box(judge(facts), facts.missing) + tiles(facts)
    sections = [partial(p, facts) for p in PANELS if p is not trust or c.optimizer == "lars"]
    return document("report", facts.name, about, top, sections)


def verdict_box(findings: list[Finding], missing: list[str]) -> str:
    """A headline, what it rests on, what to do, and what is missing."""
    level, words = headline(findings)
    items = ""
    for f in findings:
        items += f'<li class="{f.level}"><b>{MARKS[f.level]} {escape(f.title)}.</b> '
        said = escape(f"{f.evidence} {f.advice}")
        items += re.sub(r"--[\w-]+", r'<span class="flag">\g<0></span>', said) + "</li>"
    return (
        f'<div class="verdict {level}" role="region" aria-labelledby="verdict">'
        f'<h2 id="verdict">{escape(words)}</h2><ul>{items}</ul>'
        f"{''.join(map(paragraph, missing))}</div>"
    )


def tiles(facts: Facts) -> str:
    """The figures most asked for."""
    values = {f"steps of {facts.total:,}" if facts.total else "steps": f"{facts.done:,}"}
    if facts.epochs:
        last = facts.epochs[-1]
        values[f"loss (chance {last['chance']:.2f})"] = f"{last['loss']:.2f}"
        values["contrastive accuracy"] = f"{last['accuracy']:.0%}"
        values["effective rank"] = f"{last['effective_rank']:.1f}"
        if last["views/s"]:
            values["views per second"] = f"{last['views/s']:,.0f}"
    if probe := facts.files["probe"]:
        values[f"probe top-1 (chance {probe['controls']['chance']:.1%})"] = f"{probe['top1']:.1%}"
    inner = "".join(f"<div><b>{v}</b><span>{escape(k)}</span></div>" for k, v in values.items())
    return f'<div class="tiles">{inner}</div>'
