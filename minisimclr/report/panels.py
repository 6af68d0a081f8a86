"""The panels of a run's report, in their order. Each docstring is its title and its explanation."""

from dataclasses import fields

import numpy as np

from ..augment import SMALL, Views
from ..config import TrainConfig
from ..embed import extractor, nearest
from ..errors import typed
from ..ops.loss import partners
from ..probe import LogisticRegression, standardize, unit
from ..profile import table as profile_table
from .charts import Series, bars, lines, matrix, scatter
from .facts import ENDED, Facts, Rows
from .page import Missing, card, code, paragraph, row, table


def three(rows: Rows, key: str) -> Rows:
    """The first, the middle and the last epoch that have logged `key`."""
    if not (some := [r for r in rows if isinstance(r.get(key), dict | list) and r[key]]):
        raise Missing(f"its log has no {key}" if rows else ENDED)
    return [some[i] for i in sorted({0, (len(some) - 1) // 2, len(some) - 1})]


def training(facts: Facts) -> str:
    """Training

    The loss may start above its chance line, as a new network finds the wrong views alike; it
    should fall below it early and flatten late. Contrastive accuracy is the share of views whose
    most similar view in the batch is their partner. Each point is the mean of a stretch of steps.
    """
    steps = facts.need("metrics")
    stretches = np.array_split(np.arange(len(steps)), min(len(steps), 150))

    def curve(key: str, title: str, level: tuple[str, float] | None = None) -> str:
        y = [float(np.mean([steps[i][key] for i in part])) for part in stretches]
        return lines(title, "step", {title: ([int(p[-1]) + 1 for p in stretches], y)}, level=level)

    return row(
        curve("loss", "loss", ("chance, ln(2N-1)", steps[-1]["chance"])),
        curve("accuracy", "contrastive accuracy"),
        curve("gradient_norm", "gradient norm"),
        curve("lr", "learning rate"),
    )


def similarities(facts: Facts) -> str:
    """Same picture, different picture

    Cosines of the embeddings of two views, as shares of the pairs of that kind. Learning moves the
    two histograms apart; under collapse both sit at 1.
    """
    drawn, middles = [], np.linspace(-0.95, 0.95, 20).round(2).tolist()
    ends = three(facts.epochs, "positives")
    shares = [[np.array(e[k]) / (sum(e[k]) or 1) for k in ("positives", "negatives")] for e in ends]
    top = 1.4 * float(np.max(shares) or 1)
    for epoch, (same, other) in zip(ends, shares, strict=True):
        pairs: Series = {"same picture": (middles, same), "different": (middles, other)}
        title = f"epoch {epoch['epoch']}"
        drawn.append(lines(title, "cosine", pairs, fill=True, width=3.15, ylim=(0, top)))
    return row(*drawn)


def sphere(facts: Facts) -> str:
    """Alignment and uniformity

    Alignment is the mean squared distance between the embeddings of two views of a picture;
    uniformity tells how evenly embeddings fill the sphere: 0 when all are equal, about -4 when well
    spread. The loss wants both low (Wang and Isola 2020). Effective rank tells how many directions
    the features use.
    """
    keys = ("epoch", "uniformity", "alignment", "effective_rank")
    number, x, y, rank = ([e[key] for e in facts.need("epochs")] for key in keys)
    path: Series = {f"epochs 1 to {number[-1]}": (x, y), "last": (x[-1:], y[-1:])}
    return row(
        lines("lower left is better", "uniformity", path, y="alignment"),
        lines("effective rank", "epoch", {"effective rank": (number, rank)}),
    )


def spectrum(facts: Facts) -> str:
    """Spectrum of the features

    Singular values of the test pictures' features, divided by the largest (mostly their mean).
    If the others fall off at once, few directions are used: dimensional collapse. To fall off
    slowly, as random features do, is no merit by itself.
    """
    series = {}
    for name, h in zip(("trained", "random encoder"), facts.test_h, strict=True):
        s = np.linalg.svd(h, compute_uv=False)
        series[name] = range(1, len(s) + 1), (s / (s[0] or 1)).clip(1e-6).tolist()
    return lines("singular values", "number", series, yscale="log")


def described(views: Views, k: int, i: int, side: int) -> list[str]:
    """What was done to view k of picture i, `side` px large, in words."""
    left, top, width, height = views.boxes[k, i]
    words = [f"crop {width:.0f}×{height:.0f} at {left:.0f},{top:.0f}"]
    brightness, contrast, saturation, hue = views.factors[k, i]
    if (brightness, contrast, saturation, hue) != (1, 1, 1, 0):
        words += [f"brightness ×{brightness:.2f}", f"contrast ×{contrast:.2f}"]
        words += [f"saturation ×{saturation:.2f}", f"hue {360 * hue:+.0f}°"]
    words += ["mirrored"] * bool(views.flips[k, i]) + ["grey"] * bool(views.greys[k, i])
    sigma = views.sigmas[k, i] if side > SMALL else 0
    return words + ([f"blur {sigma:.1f} px"] if sigma else [])


def view_cards(images: np.ndarray, drawn: Views, pair: tuple[np.ndarray, np.ndarray]) -> str:
    """Pictures, the first of a batch, each with its two views and what was drawn for them."""
    groups = []
    for i, image in enumerate(images):
        cards = [card(image, f"Picture {i + 1}", f"picture {i + 1}", mark="large")]
        for k, x in enumerate(pair):
            name, words = f"{i + 1}{'ab'[k]}", described(drawn, k, i, x.shape[1])
            cards.append(card(x[i], f"View {name}: {', '.join(words)}", name, *words, mark="large"))
        groups.append(row(*cards))
    return row(*groups)


def augmentation(facts: Facts) -> str:
    """Views of the first step

    Pictures of step 1 and their views, drawn again. The network has to learn that views a and b
    belong together and to nothing else.
    """
    images, drawn, pair = facts.first_views
    return view_cards(images[:6], drawn, pair)


def one_batch(facts: Facts) -> str:
    """Similarities of one batch

    Cosines of the embeddings of up to 16 pictures in two views. Partners are outlined: they should
    be bright, all others dark. The diagonal is each view with itself, which the loss leaves out.
    """
    model, x = facts.need("run").model, np.concatenate([x[:16] for x in facts.first_views[2]])
    z = unit(model.project(model.encode(x)))  # (V, d_out)
    names = [f"{i + 1}{view}" for view in "ab" for i in range(len(z) // 2)]
    return matrix("cosine", z @ z.T, names, partners(len(z), np))


def neighbours(facts: Facts) -> str:
    """Nearest neighbours

    The pictures whose features are most similar to a query's, for the trained encoder and for one
    with random weights: at most 1,200 test pictures or, if there are none, training pictures.
    """
    data, rows = facts.need("dataset"), facts.test_rows
    labels, names = data.labels[rows], (*data.class_names, "no label")
    found = {}
    for system, h in zip(("trained", "random encoder"), facts.test_h, strict=True):
        near, _ = nearest(h, h, 6)  # perhaps the query itself among them
        found[system] = np.array([some[some != i][:5] for i, some in enumerate(near)])
    firsts, labelled = np.unique(labels, return_index=True)[1], bool((labels >= 0).any())
    drawn = ""
    for q in firsts[:: -(-len(firsts) // 6)] if len(firsts) > 1 else range(min(6, len(rows))):
        name = names[labels[q]]
        groups = [row(card(data.images[rows[q]], f"Query: {name}", name), title="query")]
        for system, near in found.items():
            cards = []
            for i, k in zip(near[q], labels[near[q]], strict=True):
                same = k == labels[q]
                words = ["✓ same" if same else "✗ other"] if labelled else []
                cards.append(card(data.images[rows[i]], f"{system}: {names[k]}", *words, names[k],
                                  mark="yes" if same and labelled else ""))  # fmt: skip
            groups.append(row(*cards, title=system))
        drawn += row(*groups)
    shares = (f"{s} {(labels[n] == labels[:, None]).mean():.0%}" for s, n in found.items())
    said = f"Of the same class, over all these pictures: {', '.join(shares)}."
    return drawn + (paragraph(said) if labelled else "")


def feature_map(facts: Facts) -> str:
    """Map of the test pictures

    Features on their two main axes. Classes that overlap here may still be apart in the other
    dimensions; up to 12 classes are shown.
    """
    data, X = facts.need("dataset"), standardize(facts.test_h[0])[0]
    labels = data.labels[facts.test_rows]
    _, s, axes = np.linalg.svd(X, full_matrices=False)
    flat = (X @ axes[:2].T).round(2)  # (n, D) @ (D, 2)
    groups = {}
    for k in np.unique(labels)[:12]:
        name = data.class_names[k] if k >= 0 else "no label"
        groups[name] = flat[labels == k, 0].tolist(), flat[labels == k, 1].tolist()
    title = f"{(s[:2] ** 2).sum() / ((s**2).sum() or 1):.0%} of the variance"
    return scatter(title, "first axis", "second axis", groups, height=5)


def probe(facts: Facts) -> str:
    """What the features are worth

    A linear classifier on frozen features beside its controls, each tested once, with 95 %
    intervals. Chance: always naming the commonest class. kNN: a vote of the most similar labelled
    pictures. C: the penalty, chosen by cross-validation; a larger C is a weaker one.
    """
    found = facts.need("probe")
    values = {name: 100 * r["top1"] for name, r in found["rows"].items()}
    ranges = [[100 * v for v in r["ci95"]] for r in found["rows"].values()]
    chance = 100 * found["controls"]["chance"]
    cells = [
        (name, f"{r['top1']:.1%}", "{:.1%} – {:.1%}".format(*r["ci95"]), f"{r['top5']:.1%}",
         f"{r['knn']:.1%}", r["C"], r["warning"]) for name, r in found["rows"].items()
    ]  # fmt: skip
    title = f"{found['labels']:,} labels, {found['test']:,} tests, {found['classes']} classes"
    head = ("system", "top-1", "95 % interval", "top-5", "kNN", "C", "warning")
    drawn = bars("top-1", "%", values | {"chance": chance}, [*ranges, [chance] * 2])
    return row(drawn, table(title, head, cells))


def confusions(facts: Facts) -> str:
    """Most confused classes

    Up to three test pictures that the linear probe takes for another class, and two of that class.
    """
    data, found, run = facts.need("dataset"), facts.need("probe"), facts.need("run")
    rows, truth = data.split("labelled"), data.labels[facts.test_rows]
    rows = rows[data.labels[rows] >= 0]
    h = extractor(run, run.model, data, notify=facts.notify)(rows)
    X, test_X = standardize(h, facts.test_h[0])
    said = LogisticRegression(found["C"]).fit(X, data.labels[rows]).predict(test_X)
    K = len(data.class_names)
    counts = np.bincount(truth * K + said, minlength=K * K).reshape(K, K)
    wrong = counts * (1 - np.eye(K, dtype=int))
    pairs = [divmod(int(i), K) for i in np.argsort(-wrong, None, "stable")[:20] if wrong.flat[i]]
    groups, cells = [], []
    for k, (a, b) in enumerate(pairs):
        A, B = data.class_names[a], data.class_names[b]
        cells.append((f"{A} taken for {B}", int(wrong[a, b]), int(counts[a].sum())))
        if k < 6:
            mistaken = facts.test_rows[(truth == a) & (said == b)]
            typical = facts.test_rows[truth == b][np.argsort(said[truth == b] != b, kind="stable")]
            cards = [card(data.images[i], f"{A}, taken for {B}", A) for i in mistaken[:3]]
            cards += [card(data.images[i], B, B) for i in typical[:2]]
            groups.append(row(*cards, title=f"\u2068{A}\u2069 → \u2068{B}\u2069"))  # in any script
    return row(*groups) + table(f"Mistakes, {len(said):,} tests", ("mistake", "times", "of"), cells)


def trust(facts: Facts) -> str:
    """Trust ratios of LARS

    LARS scales the learning rate of each weight by 0.001 |w| / |g|: however large its gradient, a
    layer moves by the same share of its own length.
    """
    epochs = three(facts.epochs, "trust")
    names = [n.removeprefix("encoder.").removesuffix(".weight") for n in epochs[-1]["trust"]]
    series = {f"epoch {e['epoch']}": (names, list(e["trust"].values())) for e in epochs}
    return lines("trust ratio", "weight", series, yscale="log", height=3.8)


def hot_spots(facts: Facts) -> str:
    """Hot spots

    Where a step, without its views and its update, spends time; a larger mark took more of it. The
    dashed line is the most that this machine can do. A mark above it found its data in cache, or
    multiplies less than is counted, as Winograd's convolution does.
    """
    found = facts.profile
    ops, roof = found["ops"], found["roofline"]
    step, x = sum(op["seconds"] for op in ops), np.geomspace(0.05, 500, 60)
    groups, sizes = {}, {}
    for way in ("forward", "backward"):
        some = [op for op in ops if op["direction"] == way and op["flops"] and op["bytes"]]
        per_byte = [op["flops"] / op["bytes"] for op in some]
        groups[way] = per_byte, [op["flops"] / op["seconds"] / 1e9 for op in some]
        sizes[way] = [8 + 250 * op["seconds"] / step for op in some]
    most = x, np.minimum(roof["flops_per_second"], roof["bytes_per_second"] * x) / 1e9
    shares = {f"{op['name']} {op['direction']}": 100 * op["seconds"] / step for op in ops[:10]}
    drawn = row(
        bars("where time goes", "% of a step", shares),
        scatter("roofline", "operations per byte", "GFLOP/s", groups, scale="log", sizes=sizes,
                roof=most),
    )  # fmt: skip
    return drawn + code(profile_table(found), f"A step of {found['batch_size']} pictures")


def repeat(facts: Facts) -> str:
    """How to repeat this run

    The same settings, data, versions, machine and number of threads, which stand below, give the
    same weights, bit for bit.
    """
    words = ["minisimclr", "train"]
    for f in fields(TrainConfig):
        if (value := getattr(facts.config, f.name)) != f.default:
            words += [f"--{f.name.replace('_', '-')}", str(value)]
    settings = [(n, str(e["value"]), e["origin"]) for n, e in (facts.files["config"] or {}).items()]
    return (
        code(typed(*words), "command")
        + table("Settings", ("setting", "value", "origin"), settings)
        + table("Where it ran", ("name", "value"), (facts.files["env"] or {}).items())
    )


PANELS = (
    training, similarities, sphere, spectrum, augmentation, one_batch, neighbours, feature_map,
    probe, confusions, trust, hot_spots, repeat,
)  # fmt: skip
