"""What did an encoder learn? Freeze it, fit a linear classifier to its features, and compare.

The protocol follows the SimCLR paper's for transfer (Chen et al. 2020, appendix B.8): features of
one fixed view per image, L2-regularised multinomial logistic regression by L-BFGS. Unlike there,
features are standardised, and the penalty is chosen by cross-validation. Test images are used once,
and the result stands beside its controls: chance, raw pixels, a random encoder. Last come three
statistics for monitoring training.
"""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..augment import center_view
from ..backend import Array, to_host, xp_of
from ..errors import ConfigError, DataError
from ..ops.loss import normalize
from .logistic import LogisticRegression, Problem, finite, labels_of

Encode = Callable[[Array], Array]  # views (N, S, S, 3) float32 in [0, 1] -> features (N, D)
Extract = Callable[[Array], Array]  # rows (n,) of a data set -> features (n, D)
Notify = Callable[[str, dict[str, Any]], None]  # an event and its values
# From one data set to another, the best C for published SimCLR features differs by five decades
# (github.com/linusericsson/ssl-transfer); raw pixels and random encoders do best at the low end.
C_GRID = tuple(10.0**k for k in range(-5, 6))
FOLDS = 5


def standardize(X: Array, *others: Array) -> list[Array]:
    """X and others, with the mean and deviation of each feature of X made 0 and 1 (constants 0)."""
    kind = X.dtype if X.dtype.kind == "f" else np.dtype(np.float64)
    exact = X.astype(np.float64, copy=False)  # CuPy's std(dtype=...) takes a float32 mean first
    mean, deviation = exact.mean(0), exact.std(0)
    rounding = 8 * np.finfo(kind).eps + len(X) * np.finfo(np.float64).eps  # of numbers, of sums
    deviation[deviation <= rounding * abs(mean)] = 1
    mean, deviation = mean.astype(kind), deviation.astype(kind)
    return [(each - mean) / deviation for each in (X, *others)]


def stratified(labels: np.ndarray, count: int, seed: int = 0) -> np.ndarray:
    """Indices of `count` labels: each class by its share and, if there is room, at least once.

    A smaller count takes some of those that a larger one does. Raises ConfigError unless the count
    is in 1 ... N.
    """
    if not 1 <= count <= len(labels):
        raise ConfigError(f"cannot take {count} of {len(labels)} labelled images")
    keys = np.random.Philox(key=seed).random_raw(len(labels))
    rows, place, size = by_class(labels, seed)
    share = np.where(place == 0, 0, (place + 0.5) / size)  # Sainte-Lague
    return np.sort(rows[np.lexsort((keys[rows], share))[:count]])


def holdout(labels: np.ndarray, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Indices of four fifths of the labels to fit to, and of the rest to choose settings by.

    Raises DataError if there is no rest, as where each label is the only one of its class.
    """
    size = max(round(0.8 * len(labels)), len(np.unique(labels)))
    if size == len(labels):
        raise DataError("too few labelled images: none are left to choose settings by")
    fit = stratified(labels, size, seed)
    return fit, np.setdiff1d(np.arange(len(labels)), fit)


def by_class(labels: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Indices of labels (N,) class by class, shuffled within each; the place of each in its class,
    and how many the class has.
    """
    rows = np.lexsort((np.random.Philox(key=seed).random_raw(len(labels)), labels))
    sizes = np.unique(labels, return_counts=True)[1]
    return rows, np.concatenate([np.arange(size) for size in sizes]), np.repeat(sizes, sizes)


def folds(labels: np.ndarray, seed: int = 0) -> np.ndarray:
    """The fold 0 ... 4 of each label (N,), each class spread over them as evenly as possible."""
    fold = np.empty(len(labels), np.int64)
    fold[by_class(labels, seed)[0]] = np.arange(len(labels)) % FOLDS
    return fold


def select_c(
    X: Array, y: Array, grid: Sequence[float] = C_GRID, seed: int = 0, notify: Notify | None = None
) -> tuple[float, str]:
    """The C that does best in five-fold cross-validation, and a warning or "" (see `best_of`).

    Each fit starts from the one with the C before. Holding out one part would not do: on a fifth of
    1,716 labels, an accuracy of 12 % has a standard error of 2 %.
    """
    xp, grid = xp_of(X), sorted(grid)
    if len(np.unique(y)) == len(y):
        return 1.0, "too few labelled images to choose C: it was set to 1"
    fold, right = folds(y, seed), np.zeros(len(grid))
    parts = [(np.flatnonzero(fold != k), np.flatnonzero(fold == k)) for k in range(FOLDS)]
    parts = [(fit, rest) for fit, rest in parts if len(np.unique(y[fit])) > 1 and len(rest)]
    for k, (fit, rest) in enumerate(parts):
        fit_X, rest_X = standardize(X[xp.asarray(fit)], X[xp.asarray(rest)])
        problem = Problem(fit_X, y[fit])
        for j, C in enumerate(grid):
            right[j] += (LogisticRegression(C).solve(problem).predict(rest_X) == y[rest]).sum()
            if notify:
                done = {"done": k * len(grid) + j + 1, "total": len(parts) * len(grid)}
                notify("progress", {"label": "choosing the penalty"} | done)
    best, edge = best_of("C", grid, right)
    blind = "all C did alike: too few labelled images, or features that tell nothing"
    return best, blind if right.min() == right.max() < len(y) else edge


def best_of(name: str, tried: Sequence[float], reached: Any) -> tuple[float, str]:
    """The one of those `tried`, in order, that reached most: among equals the middle one.

    Also returns a warning if it is the first or the last, or "".
    """
    equals = np.flatnonzero(np.asarray(reached) == max(reached))
    best = tried[equals[len(equals) // 2]]
    edge = f"the best {name}, {best:g}, is at the edge of those tried: a better one may lie beyond"
    return best, edge if best in (tried[0], tried[-1]) else ""


def measure(
    X: Array, y: Array, test_X: Array, test_y: Array, seed: int = 0, notify: Notify | None = None
) -> dict[str, Any]:
    """Choose C, fit again to all of X (N, D), test once: top1, top5, ci95, knn, C, warning."""
    X, test_X = finite(X), finite(test_X)
    y = labels_of(X, y)
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # by the C not chosen
        C, edge = select_c(X, y, seed=seed, notify=notify)
    fit_X, rest_X = standardize(X, test_X)
    model = LogisticRegression(C).fit(fit_X, y)
    order = model.classes_[np.argsort(-to_host(model.decision_function(rest_X)), axis=1)]
    return scores(order, test_y) | {"knn": knn_score(X, y, test_X, test_y), "C": C, "warning": edge}


def scores(ranked: np.ndarray, y: np.ndarray) -> dict[str, Any]:
    """top1, top5 and ci95 of classes ranked (N, K), the likeliest first; y (N,) is right."""
    right = ranked[:, :5] == labels_of(ranked, y, ranked)[:, None]  # (N, 5)
    top1, top5 = float(right[:, 0].mean()), float(right.any(axis=1).mean())
    return {"top1": top1, "top5": top5, "ci95": wilson_interval(top1, len(y))}


def wilson_interval(p: float, n: int) -> list[float]:
    """[low, high]: the 95 % interval of a fraction p seen in n trials (Wilson 1927)."""
    z = 1.959964  # 95 % of a normal distribution lie between -z and z
    centre, half = p + z * z / (2 * n), z * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    # Rounded, since a share of 0 or 1 is one of the ends; and without -0.0.
    return [round(float((centre + side) / (1 + z * z / n)), 12) + 0.0 for side in (-half, half)]


def knn_score(
    X: Array, y: Array, test_X: Array, test_y: Array, k: int = 200, temperature: float = 0.07
) -> float:
    """The fraction of test_X named right by the k nearest of X, votes weighted by exp(cosine / T).

    From Wu et al. 2018 (instance discrimination), with their k and T. All of X vote if k is larger.
    Raises ConfigError for k below 1 and T not above 0.
    """
    if k < 1 or not temperature > 0:
        raise ConfigError(f"k must be at least 1 and T above 0, not {k} and {temperature}")
    xp, k = xp_of(X), min(k, len(X))
    unit_X, unit_test = unit(finite(X)), unit(finite(test_X))
    classes, rows = np.unique(labels_of(X, y), return_inverse=True)
    test_y = labels_of(test_X, test_y, classes)
    rows, K, right = xp.asarray(rows), len(classes), 0
    most = max(1, min(512, 2**24 // len(X)))  # images whose similarities fit in memory
    for start in range(0, len(test_X), most):
        part = slice(start, start + most)
        similarity = unit_test[part] @ unit_X.T  # (B, D) (D, N) -> (B, N)
        # CuPy's argpartition may race: lanes of a warp exchange numbers without __syncwarp.
        order = xp.argpartition(similarity, -k, axis=1) if xp is np else similarity.argsort(axis=1)
        near = order[:, -k:]  # (B, k)
        cosines = xp.take_along_axis(similarity, near, 1)
        weights = xp.exp((cosines - cosines.max(1, keepdims=True)) / temperature)  # one is 1
        cells = rows[near] + K * xp.arange(len(near))[:, None]  # (B, k), places in votes
        votes = xp.bincount(cells.ravel(), weights.ravel(), len(near) * K).reshape(-1, K)  # (B, K)
        right += (classes[to_host(votes.argmax(1))] == test_y[part]).sum()
    return float(right / len(test_X))


def features(encode: Encode, images: Any, rows: Array, size: int, batch_size: int = 256) -> Array:
    """encode() of the centre views (n, size, size, 3) of images[rows], batched: (n, D) float32."""
    batches = [rows[i : i + batch_size] for i in range(0, max(1, len(rows)), batch_size)]
    parts = [encode(center_view(images[batch], size)) for batch in batches]
    return finite(xp_of(parts[0]).concatenate(parts).astype(np.float32, copy=False))


def labelled_and_test(
    dataset: Any, labels: int | None = None, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the images to learn from (None: all the labelled ones) and of those to test with.

    Warns of test images whose class has no labels, or that are in other splits too. Raises
    DataError without two classes or test images, ConfigError for too many `labels`.
    """
    y = dataset.labels
    train, test = (rows[y[rows] >= 0] for rows in map(dataset.split, ("labelled", "test")))
    if (classes := len(np.unique(y[train]))) < 2 or not len(test):
        raise DataError(
            f"{dataset.name}: labelled images of at least two classes and test images are needed; "
            f"labelled: {len(train)}, their classes: {classes}, to test with: {len(test)}"
        )
    train = train if labels is None else train[stratified(y[train], labels, seed)]
    lost = np.isin(y[test], y[train], invert=True)
    others = np.delete(dataset.duplicate_of, dataset.split("test"))
    seen = np.isin(dataset.duplicate_of[test], others)
    for which, what in (lost, "of classes without labels"), (seen, "in other splits too"):
        if which.any():
            said = f"{which.sum():,} of {len(test):,} test images are {what}"
            warnings.warn(f"{dataset.name}: {said}", stacklevel=1)  # once, whoever calls
    return train, test


def majority_share(y: np.ndarray) -> float:
    """The share of the commonest of the labels y: the best that one answer for all can reach."""
    return float(np.unique(y, return_counts=True)[1].max() / len(y))


def probe(
    dataset: Any, name: str, extract: Extract, fresh: Callable[[], Extract],
    labels: int | None = None, seed: int = 0, notify: Notify | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Accuracy of an encoder beside its controls, in the form of probe.json.

    name: what the encoder's row is called. fresh: makes the control, the same network with random
    weights but batch norm statistics of the data: with the initial ones, 0 and 1, the features of a
    deep network blow up or fade, too weak a control. labels: how many labelled images to use (None:
    all). Raises as labelled_and_test does, before anything else.
    """
    y = dataset.labels
    train, test = labelled_and_test(dataset, labels, seed)

    def pixels(rows: Array) -> Array:
        return features(lambda views: views.reshape(len(views), -1), dataset.images, rows, 16)

    systems = {name: extract, "random encoder": fresh(), "raw pixels": pixels}

    def named(system: str) -> Notify | None:
        return notify and (lambda event, values: notify(event, values | {"item": system}))

    rows = {
        system: measure(made(train), y[train], made(test), y[test], seed, named(system))
        for system, made in systems.items()
    }
    controls = {"chance": majority_share(y[test]), "pixels": rows["raw pixels"]["top1"]}
    controls["random_encoder"] = rows["random encoder"]["top1"]
    counts = {"labels": len(train), "test": len(test), "classes": len(dataset.class_names)}
    return {**rows[name], **counts, "controls": controls, "rows": rows}


def table(result: dict[str, Any]) -> str:
    """What `probe` (or `finetune`) returned, for the terminal."""
    rows, width = result["rows"], max(16, *(len(name) + 2 for name in result["rows"]))
    lines = [f"{'system':{width}}{'top-1':>8}{'95 % interval':>17}{'top-5':>9}{'kNN':>9}"]
    for name, row in rows.items():
        cells = (row["top1"], *row["ci95"], row["top5"])
        line = f"{name:{width}}" + "{:8.1%}{:9.1%} - {:<6.1%}{:8.1%}".format(*cells)
        lines.append(line + (f"{row['knn']:9.1%}" if "knn" in row else f"{'-':>9}"))
    lines.append(f"{'chance':{width}}{result['controls']['chance']:8.1%}")
    lines.append("{labels:,} labelled images, {test:,} to test, {classes} classes".format(**result))
    warned = {name: row["warning"] for name, row in rows.items() if row["warning"]}
    return "\n".join([*lines, *(f"warning ({name}): {text}" for name, text in warned.items())])


def unit(z: Array) -> Array:
    """Rows of z (N, D) scaled to length 1 (rows of zeros stay); float16 becomes float32."""
    return normalize(z.astype(np.promote_types(z.dtype, np.float32), copy=False))[0]


def alignment(z1: Array, z2: Array) -> float:
    """Mean squared distance between the unit embeddings (N, D) of two views (Wang & Isola 2020)."""
    return float(((unit(z1) - unit(z2)) ** 2).sum(1).mean())


def uniformity(z: Array) -> float:
    """log mean exp(-2 d^2) over pairs of N >= 2 unit embeddings (N, D) (Wang & Isola 2020).

    0 under collapse (all equal, or all zeros), about -4 when spread evenly over a sphere of many
    dimensions.
    """
    z = unit(z)
    square = (z * z).sum(1)  # (N,): 1, or 0 for rows of zeros
    kernel = xp_of(z).exp(4 * (z @ z.T) - 2 * (square[:, None] + square))  # (N, N), of d^2
    return float(np.log(float(kernel.sum() - kernel.trace()) / (len(z) * (len(z) - 1))))


def effective_rank(h: Array) -> float:
    """exp of the entropy of h's (N, D) normalised singular values (Roy & Vetterli 2007; RankMe)."""
    xp, h = xp_of(h), h.astype(np.float64)  # squares need twice the digits
    gram = h.T @ h if len(h) > h.shape[1] else h @ h.T  # the smaller; quicker than an SVD
    s = xp.linalg.eigvalsh(gram).clip(0) ** 0.5
    p = s[s > 0] / s.sum()
    return float(xp.exp(-(p * xp.log(p)).sum()))
