"""Charts: each comes as SVG with a description for those who cannot see it, and a table behind it.

Matplotlib draws in stand-in colours (#0000xx) that become CSS variables, so that light and dark
pages share one drawing; the same numbers give the same bytes.
"""

import io
import re
import warnings
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from textwrap import wrap
from typing import Any

import numpy as np

from ..errors import ConfigError
from .page import table, text

INK, MUTED, GRID = "#000001", "#000002", "#000003"
SERIES = tuple(f"#0000{k}" for k in range(11, 17))  # CSS variables --k11 ... --k16
MARKERS = "osD^vP"  # a series is told by its marker as well as its colour
DASHES = ("-", "--", "-.", ":")
SHORT, LINE = 16, 44  # letters of a name in a legend of three columns, and of one line there
STYLE: Any = {
    "svg.fonttype": "none", "svg.hashsalt": "minisimclr", "font.family": "sans-serif",
    "font.size": 9.5, "axes.titlesize": 10.5, "axes.titleweight": "bold",
    "axes.titlelocation": "left", "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "axes.axisbelow": True, "grid.color": GRID, "axes.edgecolor": MUTED,
    "text.color": INK, "axes.labelcolor": INK, "xtick.color": MUTED, "ytick.color": MUTED,
    "xtick.labelcolor": INK, "ytick.labelcolor": INK, "axes.facecolor": "none",
    "legend.frameon": False, "legend.fontsize": 9, "figure.facecolor": "none",
}  # fmt: skip
Series = Mapping[str, tuple[Any, Any]]  # name -> x, y
Draw = Callable[[Any], None]


def plain(name: str) -> str:
    """A name that matplotlib draws as it is: it would skip one with a leading _, read $ as math."""
    name = name.encode(errors="replace").decode().replace("$", r"\$")
    return f"\u200b{name}" if name.startswith("_") else name


def chart(alt: str, data: str, draw: Draw, width: float = 4.8, height: float = 2.7) -> str:
    """What `draw(axes)` draws, size in inches, with its description and the HTML `data` behind it.

    Raises ConfigError where matplotlib is not installed.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("pages are drawn with matplotlib: pip install matplotlib") from error
    buffer = io.StringIO()
    with rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # browsers have more fonts
        figure = Figure((width, height), layout="constrained")
        draw(figure.add_subplot())
        FigureCanvasSVG(figure).print_svg(buffer)
    svg = buffer.getvalue().partition("<svg ")[2].partition(">")[2]  # what is inside its first tag
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r"#0000(0[123]|1[1-6])\b", r"var(--k\1)", svg)
    own = f"c{zlib.crc32(svg.encode()):x}-"  # ids must not clash with those of another chart
    svg = re.sub(r'\b(id="|href="#|url\(#)', rf"\g<1>{own}", svg)
    svg = re.sub(r"font: ([^;\"]*?)px [^;\"]*", r"font: \1px var(--font)", svg)
    size = f'viewBox="0 0 {72 * width:g} {72 * figure.get_figheight():g}"'
    svg = f'<svg {size} role="img" aria-label="{escape(alt)}">{svg}'
    named = f'aria-label="The numbers: {escape(alt.partition(":")[0])}"'
    numbers = f"<details><summary {named}>The numbers</summary>{data}</details>"
    return f'<div class="chart" style="width:{width:g}in">{svg}{numbers}</div>'


def legend(axes: Any, **look: Any) -> None:
    """What the marks mean, below the chart, where it covers none; the figure grows with it."""
    figure, (marks, names) = axes.figure, axes.get_legend_handles_labels()
    names = ["\n".join(wrap(name, LINE, break_on_hyphens=False)) for name in names]
    look |= {"labels": names, "fontsize": 8.5}
    for columns in (3, 2, 1):
        drawn = figure.legend(handles=marks, loc="outside lower center", ncols=columns, **look)
        box = drawn.get_window_extent()
        if columns == 1 or box.width <= figure.bbox.width:
            break
        drawn.remove()
    figure.set_figheight(figure.get_figheight() + max(0, box.height / figure.dpi - 0.8))


def lines(
    title: str, x: str, series: Series, *, y: str = "", level: tuple[str, float] | None = None,
    fill: bool = False, width: float = 4.8, height: float = 2.7, **axis: Any,
) -> str:  # fmt: skip
    """Named curves. level: name, height of a dashed line; fill: histograms; axis: its looks."""

    def draw(axes: Any) -> None:
        for k, (name, (xs, ys)) in enumerate(series.items()):
            look: dict[str, Any] = {"color": SERIES[k % 6], "ls": DASHES[k // 6 % 4]}
            if fill:
                edges = np.append(xs, 2 * xs[-1] - xs[-2]) - (xs[1] - xs[0]) / 2
                axes.stairs(ys, edges, fill=True, color=SERIES[k], alpha=0.35, lw=0)
                axes.stairs(ys, edges, label=plain(name), color=SERIES[k], ls=DASHES[k])
                continue
            if len(xs) <= 12 or len(series) > 1:
                look |= {"marker": MARKERS[k % 6], "ms": 4, "markevery": max(1, len(xs) // 20)}
            axes.plot(xs, ys, label=plain(name), **look)
        if level:
            axes.axhline(level[1], color=MUTED, ls=(0, (5, 3)), lw=1.4, label=level[0])
        if isinstance(xs[0], str):
            axes.tick_params(axis="x", rotation=90)
        else:
            axes.xaxis.get_major_locator().set_params(integer=isinstance(xs[0], int), nbins=6)
        axes.set(title=title, xlabel=x, ylabel=y, **axis)
        axes.margins(x=0.02)
        if len(series) > 1 or level:
            legend(axes)

    ends = (f"{name} from {text(ys[0])} to {text(ys[-1])}" for name, (_, ys) in series.items())
    means = (f"{n} {np.average(v[0], weights=v[1]):.2f}" for n, v in series.items() if sum(v[1]))
    said = f"means: {', '.join(means)}" if fill else "; ".join(ends)
    alt = f"{y or title} by {x}: {said}" + (f"; {level[0]} {text(level[1])}" if level else "")
    return chart(alt, points(title, x, y, series), draw, width, height)


def points(title: str, x: str, y: str, series: Series) -> str:
    """The table of named (x, y): side by side where they share x, else one below the other."""
    xs = [list(v[0]) for v in series.values()]
    if all(each == xs[0] for each in xs):
        rows: Iterable = zip(xs[0], *(v[1] for v in series.values()), strict=True)
        return table(title, (x, *series), rows)
    rows = ((name, *point) for name, v in series.items() for point in zip(*v, strict=True))
    return table(title, ("name", x, y or title), rows)


def bars(title: str, x: str, values: dict[str, float], ranges: Any = None) -> str:
    """Horizontal bars, the first on top. ranges: (low, high) of each, drawn as error bars."""
    names, lengths = list(map(plain, values)), list(values.values())

    def draw(axes: Any) -> None:
        errors = None if ranges is None else abs(np.array(ranges).T - lengths)  # (2, bars)
        axes.barh(names, lengths, 0.62, color=SERIES[0], xerr=errors, ecolor=INK, capsize=3)
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        axes.set(title=title, xlabel=x)

    alt = f"{title}, {x}: " + ", ".join(f"{n} {text(v)}" for n, v in values.items())
    data = table(title, ("name", x), values.items())
    return chart(alt, data, draw, height=0.8 + 0.25 * len(names))


def scatter(
    title: str, x: str, y: str, groups: Series, *, scale: str = "linear", roof: Any = None,
    sizes: Mapping[str, Any] | None = None, height: float = 3.2,
) -> str:  # fmt: skip
    """Named groups of points. roof: (x, y) of a dashed line; sizes: of the marks of each group."""
    shorter = [name if len(name) <= SHORT else f"{name[: SHORT - 1]}…" for name in groups]
    names = shorter if len({*shorter}) == len(groups) else list(groups)

    def draw(axes: Any) -> None:
        for k, (name, (xs, ys)) in enumerate(groups.items()):
            look = {"color": SERIES[k % 6], "marker": MARKERS[(k + k // 6) % 6], "lw": 0}
            look["label"] = plain(names[k])
            axes.scatter(xs, ys, sizes[name] if sizes else 12, alpha=0.75, **look)
        if roof:
            axes.plot(*roof, color=MUTED, ls=(0, (5, 3)), lw=1.4)
        axes.set(title=title, xlabel=x, ylabel=y, xscale=scale, yscale=scale)
        legend(axes, markerscale=0.7 if sizes else 1.3)

    alt = f"Points of {', '.join(groups)}: {title}, {x} and {y}"
    return chart(alt, points(title, x, y, groups), draw, height=height)


def matrix(title: str, values: np.ndarray, names: Sequence[str], outlined: np.ndarray) -> str:
    """A heat map (V, V), rows and columns named, cell (i, outlined[i]) of each row outlined."""
    V = len(values)

    def draw(axes: Any) -> None:
        shown = axes.imshow(values, cmap="cividis")
        for colour, lw in (("#111111", 2.2 + 16 / V), ("white", 0.8 + 5 / V)):  # seen on any colour
            axes.scatter(range(V), outlined, (165 / V) ** 2, marker="s", lw=lw,
                         facecolors="none", edgecolors=colour)  # fmt: skip
        some = range(0, V, -(-V // 8))
        axes.set_xticks(some, [names[i] for i in some])
        axes.set_yticks(some, [names[i] for i in some])
        axes.grid(visible=False)
        axes.set_title(title)
        axes.figure.colorbar(shown, shrink=0.8)

    alt = f"{title} of {V} views: partners {values[np.arange(V), outlined].mean():.2f} on average"
    rows = ((names[i], *(f"{v:.2f}" for v in values[i])) for i in range(V))
    return chart(alt, table(title, ("view", *names), rows), draw, 4.8, 4)
