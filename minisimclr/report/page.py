"""The page: one self-contained HTML file without script, for screen, phone and paper.

A section is made by a function; the first line of its docstring is the section's title and the rest
its explanation, so readers of the code and readers of the page see the same words.
"""

import base64
import io
from collections.abc import Callable, Iterable, Sequence
from html import escape
from importlib.resources import files
from inspect import getdoc
from typing import Any

import numpy as np
from PIL import Image

from ..errors import ConfigError


class Missing(Exception):
    """What a section needs is not there; the message says what."""


def document(kind: str, title: str, about: str, top: str, sections: Sequence[Callable]) -> bytes:
    """A whole page from functions without arguments (see `told`); `top` is HTML before them."""
    contents, body = "", ""
    for function in sections:
        name, words = told(function)
        key = getattr(function, "func", function).__name__.replace("_", "-")
        try:
            drawn = function()
        except Missing as reason:
            drawn = paragraph(f"Not shown: {reason}.")
        contents += f'<li><a href="#{key}">{escape(name)}</a></li>'
        head = f'<h2 id="{key}-h">{escape(name)}</h2>{paragraph(words)}'
        body += f'<section id="{key}" aria-labelledby="{key}-h">{head}{drawn}</section>\n'
    texts = {"title": escape(title), "kind": kind, "about": escape(about), "top": top}
    own = files(__package__)
    style, page = (own.joinpath(n).read_text("utf-8") for n in ("page.css", "page.html"))
    return page.format(style=style, contents=contents, body=body, **texts).encode(errors="replace")


def told(function: Callable) -> tuple[str, str]:
    """The docstring of a function (or of the one inside a partial): its title, and the rest."""
    if not (said := getdoc(getattr(function, "func", function))):
        raise ConfigError("pages need docstrings: run Python without -OO or PYTHONOPTIMIZE=2")
    title, _, words = said.partition("\n\n")
    return title.rstrip("."), " ".join(words.split())


def text(value: Any) -> str:
    """A value for people: four digits, thousands separated, a dash for nothing."""
    if isinstance(value, float | np.floating):
        value = float(value)
        return f"{value:,.0f}" if 999.5 <= abs(value) < 1e9 else f"{value:.4g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return "–" if value is None else str(value)


def paragraph(words: str) -> str:
    return f'<p class="lead">{escape(words)}</p>' if words else ""


def table(caption: str, head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table that scrolls within itself; the first cell of a row names it."""
    rows = [[text(value) for value in row] for row in rows]
    # Columns of long cells, sentences, run over several lines; the first has its own rule.
    kinds = [" class=words" * any(len(row[i]) > 18 for row in rows if i) for i in range(len(head))]
    cells = "".join(map('<th scope="col"{}>{}</th>'.format, kinds, map(escape, head)))
    body = ""
    for first, *rest in rows:
        values = "".join(map("<td{}>{}</td>".format, kinds[1:], map(escape, rest)))
        body += f'<tr><th scope="row">{escape(first)}</th>{values}</tr>\n'
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption)}"><table>'
        f"<caption>{escape(caption)}</caption><thead><tr>{cells}</tr></thead>"
        f"<tbody>{body}</tbody></table></div>"
    )


def row(*content: str, title: str = "") -> str:
    """Charts, cards or rows side by side where there is room."""
    head = f"<h3>{escape(title)}</h3>" if title else ""
    return f'<div>{head}<div class="row">{"".join(content)}</div></div>'


def code(lines: str, where: str) -> str:
    """Lines of a program, with a caption."""
    return (
        f'<figure><figcaption>{escape(where)}</figcaption><pre tabindex="0" '
        f'role="region" aria-label="{escape(where)}"><code>{escape(lines)}</code></pre></figure>'
    )


def card(pixels: np.ndarray, alt: str, *words: str, mark: str = "") -> str:
    """An image (S, S, 3), uint8 or float in [0, 1], with lines beneath; `mark` is a CSS class.

    It is stored with at most 96 px per side.
    """
    if pixels.dtype != np.uint8:
        pixels = (pixels * 255).round().astype(np.uint8)
    image = Image.fromarray(pixels)
    image.thumbnail((96, 96))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90)
    data = base64.b64encode(buffer.getvalue()).decode()
    lines = "".join(f"<span>{escape(word)}</span>" for word in words)
    source = f'<img src="data:image/jpeg;base64,{data}" alt="{escape(alt)}">'
    return f'<div class="card {mark}">{source}{lines}</div>'
