"""Algorithm 1 of SimCLR, line by line, with real numbers and the library's lines that make them.

The network is a real one with random weights; but its head ends in two dimensions instead of 128,
so that the unit sphere is a circle and its picture is exact.
"""

import inspect
from dataclasses import dataclass
from functools import partial
from textwrap import dedent
from typing import Any

import numpy as np

from .. import augment, tensor
from ..data import Dataset
from ..errors import DataError
from ..nn import ProjectionHead
from ..ops.loss import NTXent, log_softmax, normalize, nt_xent, partners, similarities
from ..ops.product import Linear
from ..optim import LARS, momentum_update, trust_ratio
from ..simclr import Model, training_step
from ..tensor import Function, Tensor, no_grad
from .charts import MARKERS, MUTED, SERIES, chart, matrix
from .page import code, document, paragraph, table
from .panels import view_cards

SIZE, TEMPERATURE, RATE = 32, 0.5, 0.1


@dataclass
class Walk:
    """Every number of one training step on N pictures, V = 2N views, as the library made it."""

    images: np.ndarray  # uint8 (N, S, S, 3)
    drawn: augment.Views
    views: tuple[np.ndarray, np.ndarray]  # two (N, SIZE, SIZE, 3)
    seen: dict[str, np.ndarray]  # h (V, D); z, u, dz (V, 2); length (V, 1)
    loss: float
    weights: dict[str, dict[str, float]]  # name -> norms of w, g and the step, trust ratio
    u_after: np.ndarray  # (V, 2): the same views after the update
    loss_after: float

    @property
    def names(self) -> list[str]:
        """1a, 2a, ..., 1b, 2b, ...: picture and view."""
        return [f"{i + 1}{view}" for view in "ab" for i in range(len(self.images))]

    @property
    def partner(self) -> np.ndarray:
        """j(i), (V,)"""
        return partners(len(self.seen["z"]), np)

    @property
    def s(self) -> np.ndarray:
        """Cosines over temperature (V, V), -inf on the diagonal."""
        return np.concatenate([s for _, _, s in similarities(self.seen["u"], TEMPERATURE)])

    @property
    def p(self) -> np.ndarray:
        """The softmax of each row of s, (V, V)"""
        return np.exp(log_softmax(self.s))

    @property
    def force(self) -> np.ndarray:
        """G + G.T (V, V): how hard each pair is pushed apart (+) or pulled together (-)."""
        g = self.p
        g[np.arange(len(g)), self.partner] -= 1
        return (g + g.T) / (len(g) * TEMPERATURE)


def walk(images: np.ndarray, seed: int = 0) -> Walk:
    """Take one step of Algorithm 1 on images (N, S, S, 3) uint8 and note what passes by."""
    n, height, width, _ = images.shape
    drawn = augment.draw_views(seed, 0, n, height, width)
    model = Model.build("resnet_small", "small", 0, seed, d_out=2)
    model.astype(np.float64)  # for which the readable passes run
    optimizer = LARS(model.named_parameters(), RATE)
    before = {name: p.data.copy() for name, p in model.named_parameters()}
    seen: dict[str, np.ndarray] = {}

    def observe(function: Function, direction: str, run: Any, arrays: tuple) -> Any:
        result = run(*arrays)
        if isinstance(function, NTXent) and direction == "forward":
            seen.update(z=arrays[0], u=function.u, length=function.length)
        elif isinstance(function, NTXent):
            seen["dz"] = result
        elif isinstance(function, Linear) and direction == "forward":
            seen.setdefault("h", arrays[0])  # the first of them is the head's
        return result

    tensor.observer = observe
    try:
        step = training_step(model, optimizer, images, drawn, SIZE, TEMPERATURE)
    finally:
        tensor.observer = None
    weights = {}
    for name, ratio in optimizer.trust.items():
        p = optimizer.parameters[name]
        norms = {"w": before[name], "g": p.grad, "step": p.data - before[name]}
        weights[name] = {k: float(np.linalg.norm(a)) for k, a in norms.items()}
        weights[name]["trust"] = float(ratio)
    views = augment.apply_views(images, drawn, SIZE)
    with no_grad():
        z = model.head(model.encoder(Tensor(np.concatenate(views))))  # (V, 2)
        after = float(nt_xent(z[:n], z[n:], TEMPERATURE))
    u_after = normalize(z.data)[0]
    return Walk(images, drawn, views, seen, step.figures["loss"], weights, u_after, after)


def excerpt(function: Any, first: str = "", last: str = "") -> str:
    """Source lines of a function, from the one that holds `first` to the one that holds `last`."""
    function = inspect.unwrap(function)
    lines, number = inspect.getsourcelines(function)
    start = next(i for i, line in enumerate(lines) if first in line)
    stop = next(i for i in range(start, len(lines)) if last in lines[i]) if last else len(lines)
    shown = dedent("".join(lines[start : stop + 1])).rstrip()
    path = f"{function.__module__.replace('.', '/')}.py"
    return code(shown, f"{path}, line {number + start}: {function.__qualname__}")


def build_walkthrough(dataset: Dataset, count: int = 4, seed: int = 0) -> bytes:
    """The page about one step on `count` pictures, of different classes if there are enough.

    Raises DataError for a data set of one picture: it has nothing to be told apart from.
    """
    rows = dataset.split("pretrain")
    if len(rows) < 2:
        raise DataError(f"{dataset.name}: two pictures to train on are needed, not {len(rows)}")
    _, first = np.unique(dataset.labels[rows], return_index=True)
    chosen = np.append(np.sort(first), np.setdiff1d(np.arange(len(rows)), first))[:count]
    w = walk(np.asarray(dataset.images[rows[chosen]]), seed)
    about = f"Algorithm 1 (Chen et al. 2020) on {len(chosen)} pictures of {dataset.name}"
    top = paragraph(
        "Beside the numbers stand the lines that make them. The network is new, its weights are "
        "random. Its head ends in 2 dimensions instead of 128, so the sphere is a circle, which "
        f"can be drawn exactly. Temperature {TEMPERATURE}, strength 0.5, LARS, seed {seed}; some "
        "settings of minisimclr train are others, such as SGD and a temperature of 0.2."
    )
    sections = [partial(step, w) for step in STEPS]
    return document("walkthrough", "One step of SimCLR", about, top, sections)


def views(w: Walk) -> str:
    """1. Draw t and t′, look at each picture twice

    t and t′ are random crops and changes of colour; what was drawn is written below each view.
    Views a and b of a picture are partners. Nobody tells the network what they show.
    """
    cards = view_cards(w.images, w.drawn, w.views)
    return excerpt(training_step, "# t(x)", "x = ") + cards


def vectors(w: Walk, key: str) -> str:
    """A table of h or z of every view, its first columns."""
    shown = w.seen[key][:, :6]
    rows = ([name, *map(float, v)] for name, v in zip(w.names, shown, strict=True))
    head = ("view", *(f"{key}[{k}]" for k in range(shown.shape[1])))
    return table(f"{key}, {w.seen[key].shape}", head, rows)


def encoder(w: Walk) -> str:
    """2. h = f(x)

    The encoder turns all views, in one batch, into features; the first six are shown. After
    training, features are what is used; the head that follows is left out.
    """
    return excerpt(training_step, "h = ", "h = ") + vectors(w, "h")


def head(w: Walk) -> str:
    """3. z = g(h)

    The projection head. Only the loss sees z; batch norm gives its columns a mean of 0.
    """
    lines = excerpt(training_step, "z = ", "z = ") + excerpt(ProjectionHead.forward)
    return lines + vectors(w, "z")


def similarity(w: Walk) -> str:
    """4. s[i, k] = cosine of z[i] and z[k], over the temperature

    Partners are outlined: the loss wants them bright and all else dark. The diagonal is empty: a
    view is not compared with itself.
    """
    lengths = zip(w.names, w.seen["length"][:, 0], *w.seen["u"].T, strict=True)
    units = table("u: z scaled to length 1", ("view", "|z|", "u[0]", "u[1]"), lengths)
    return excerpt(normalize) + units + excerpt(similarities) + matrix("s", w.s, w.names, w.partner)


def terms(w: Walk) -> str:
    """5. l(i) = -log (exp s[i, j] / sum over k ≠ i of exp s[i, k]), with j the partner of i

    The loss is the mean of l. p[i, j] is the probability that the network gives to the partner,
    among all other views.
    """
    s, i = w.s, np.arange(len(w.names))
    own, among = s[i, w.partner], np.log(np.exp(s).sum(axis=1))
    partner_names = [w.names[j] for j in w.partner]
    columns = (w.names, partner_names, own, among, among - own, w.p[i, w.partner])
    head = ("i", "j", "s[i, j]", "log Σ exp s[i, k]", "l(i)", "p[i, j]")
    said = f"Loss: {w.loss:.4f}. A network to which all views look alike has "
    said += f"ln {len(i) - 1} = {np.log(len(i) - 1):.4f}."
    lines = excerpt(log_softmax) + excerpt(NTXent.forward)
    return lines + table("Terms of the loss", head, zip(*columns, strict=True)) + paragraph(said)


def forces(w: Walk) -> str:
    """6. The gradient: who is pulled, who is pushed

    Both views of a picture share a colour and a marker. Arrows show the way downhill: to the
    partner and away from the others, most of all from those that are near. They lie along the
    circle, as length does not matter to the loss. Outlined, with a grey name: where the view is
    after the update below. That moves weights, which all views share, so a view may not end up
    where its arrow points.
    """
    u, n, names = w.seen["u"], len(w.images), w.names
    ways = -w.seen["dz"] * w.seen["length"]  # (V, 2): -dL/du along the circle
    arrows = ways * (0.5 / (abs(ways).max() or 1))

    def draw(axes: Any) -> None:
        turn = np.linspace(0, 2 * np.pi, 181)
        axes.plot(np.cos(turn), np.sin(turn), color=MUTED, lw=1)
        for i, name in enumerate(names):
            k = i % n
            look = {"color": SERIES[k % 6], "marker": MARKERS[(k + k // 6) % 6], "ls": ""}
            axes.plot(*u[i], ms=8, **look)
            axes.plot(*w.u_after[i], ms=11, mfc="none", mew=1.4, **look)
            arrow = {"arrowstyle": "->", "color": look["color"], "lw": 2}
            axes.annotate("", u[i] + arrows[i], u[i], arrowprops=arrow)
            axes.annotate(name, 0.82 * u[i], ha="center", va="center")
            axes.annotate(name, 1.2 * w.u_after[i], ha="center", va="center", color=MUTED)
        axes.set(aspect="equal", xlim=(-1.5, 1.5), ylim=(-1.5, 1.5), xlabel="u[0]", ylabel="u[1]")

    cells = []
    for i, name in enumerate(names):
        hardest = int(w.force[i].argmax())
        angles = [float(np.degrees(np.arctan2(v[i, 1], v[i, 0]))) for v in (u, w.u_after)]
        cells.append((name, names[w.partner[i]], -w.force[i, w.partner[i]], names[hardest],
                      w.force[i, hardest], float(np.linalg.norm(ways[i])), *angles))  # fmt: skip
    head = "view", "pulled to", "pull", "pushed most by", "push", "|dL/dz| |z|", "degrees", "after"
    data = table("Forces, and the place on the circle before and after", head, cells)
    alt = "The views on a circle with arrows towards their partners and away from others"
    return excerpt(NTXent.backward) + chart(alt, data, draw, 4.8, 4.6)


def update(w: Walk) -> str:
    """7. Update f and g

    LARS: in this first step each weight moves by rate × 0.001 of its own length, whatever the
    length of its gradient. Later the momentum, 0.9, carries it up to ten times as far. Batch norm's
    own parameters, not in the table, have no trust ratio: they move by rate × gradient, which is
    far more here, so it is mostly they that move the views.
    """
    cells = [[n, v["w"], v["g"], v["trust"], v["step"]] for n, v in w.weights.items()]
    said = f"The same views through the new weights: the loss was {w.loss:.4f} and is now "
    said += f"{w.loss_after:.4f}."
    said += " A step this long may also raise it." if w.loss_after > w.loss else ""
    lines = excerpt(trust_ratio) + excerpt(LARS.rate_of) + excerpt(momentum_update)
    head = ("weight", "|w|", "|g|", "trust ratio", "|step|")
    return lines + table(f"Rate {RATE}", head, cells) + paragraph(said)


STEPS = (views, encoder, head, similarity, terms, forces, update)
