"""What did an encoder learn? Freeze it, fit a linear classifier on its features, and compare.

The protocol of the SimCLR paper for small data sets (Chen et al. 2020, appendix B.8): features of
one fixed view an image, L2-regularised multinomial logistic regression fitted by L-BFGS, the
strength of the penalty chosen on a part of the labelled images. Test images are looked at once, and
every figure stands beside what no learning would have given: chance, raw pixels, an untrained
encoder. At the end, three statistics that say how representations spread while an encoder trains.
"""

import warnings
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .augment import center_view
from .backend import Array, to_host, xp_of
from .errors import ConfigError, DataError

Encode = Callable[[Array], Array]  # views (N, S, S, 3) float32 in [0, 1] -> features (N, D)

#: The best C for published SimCLR features differs by six decades between data sets: look widely.
C_GRID = tuple(10.0 ** (k / 2) for k in range(-6, 11))


class LogisticRegression:
    """Multinomial logistic regression with scikit-learn's objective and units.

    Over coef_ w (K, D) and intercept_ b (K,), given X (N, D) and y (N,) of K sorted classes_,
    minimise

        f = C sum_n [logsumexp_k(z_nk) - z_n,y(n)] + ||w||^2 / 2,       z = X w^T + b   (N, K)

    with b free. Two classes get two vectors like any other number; scikit-learn's binary form has
    one, and its fit with 2 C is this one with C. Arrays keep their type: features come in float32,
    in which products take half the time, and `Problem.evaluate` keeps that accurate. The fit stops
    when a step promises to lower f by less than tol * f. Raises DataError for features that are not
    finite and for fewer than two classes.
    """

    def __init__(self, C: float = 1.0, max_iter: int = 1000, tol: float = 1e-6):
        if not C > 0:
            raise ConfigError(f"C must be greater than 0, not {C}")
        self.C, self.max_iter, self.tol = C, max_iter, tol

    def fit(self, X: Array, y: Any) -> "LogisticRegression":
        return self.solve(Problem(X, y))

    def solve(self, problem: "Problem") -> "LogisticRegression":
        """Fit, starting where the problem was last solved with another C."""
        W = lbfgs(lambda W: problem.evaluate(W, self.C), problem.W, self.tol, self.max_iter)
        problem.W, self.classes_ = W, problem.classes
        self.coef_ = W[:, :-1] @ problem.axes.T  # (K, D) (D, D) -> (K, D)
        self.intercept_ = W[:, -1] - self.coef_ @ problem.mean  # (K,)
        return self

    def decision_function(self, X: Array) -> Array:
        """The logits z (N, K)."""
        return X @ self.coef_.T + self.intercept_

    def predict(self, X: Array) -> np.ndarray:
        return self.classes_[to_host(self.decision_function(X).argmax(1))]

    def score(self, X: Array, y: Any) -> float:
        """The fraction of X (N, D) whose class is predicted right."""
        return float((self.predict(X) == np.asarray(y)).mean())


class Problem:
    """X (N, D) and y (N,) in the axes in which logistic regression is easiest to solve.

    The intercept absorbs a shift and the penalty does not see a rotation, so X may be centred and
    turned to its principal axes without changing the optimum. There X^T X is diagonal, and nearly
    so is the Hessian, I + C sum_n (diag(p_n) - p_n p_n^T) (x) x_n x_n^T: its diagonal, with the
    mean of p (1 - p) instead of each sample's own, seeds L-BFGS. Correlated features then take as
    few iterations as independent ones. (Boehning 1992 bounds p (1 - p) instead; this follows the
    fit.)
    """

    def __init__(self, X: Array, y: Any):
        X, xp = finite(X), xp_of(X)
        self.classes, rows = np.unique(y, return_inverse=True)
        if len(rows) != len(X) or len(self.classes) < 2:
            raise DataError(
                f"a classifier needs a label for each image and at least two classes; there are "
                f"{len(X)} images, {len(rows)} labels and {len(self.classes)} class(es)"
            )
        self.mean = X.mean(0)
        X = X - self.mean
        self.axes = xp.linalg.eigh(X.T @ X)[1]  # (D, N) (N, D) -> (D, D)
        # A last column of ones carries the intercept through both products.
        self.Z = xp.concatenate([X @ self.axes, xp.ones_like(X[:, :1])], axis=1)  # (N, D + 1)
        self.spectrum = (self.Z**2).sum(0)  # (D + 1,)
        self.own = xp.asarray(rows), xp.arange(len(X))  # each sample's class, in arrays (K, N)
        self.W = xp.zeros((len(self.classes), self.Z.shape[1]), X.dtype)

    def evaluate(self, W: Array, C: float) -> tuple[float, Array, Array]:
        """f at W (K, D + 1), its gradient, and the inverse of the Hessian's estimated diagonal.

        The loss of a sample classified well is about the probability of all other classes. Summing
        just these, with log1p, keeps it exact; from 1 - p it would be a multiple of 1e-7 in
        float32, and a large C makes that larger than f. Losses are added up in float64.
        """
        xp = xp_of(W)
        penalised = W.copy()
        penalised[:, -1] = 0
        P = W @ self.Z.T  # (K, D + 1) (D + 1, N) -> (K, N): sums over classes run along memory
        P -= P.max(0)
        margin = P[self.own]  # (N,), 0 where the sample's own class is the likeliest
        xp.exp(P, out=P)
        P[self.own] = 0
        others = P.sum(0)
        excess = others + xp.expm1(margin)  # the sum over all classes, less 1
        loss = float((xp.log1p(excess) - margin).sum(dtype=np.float64))
        P[self.own] = -others
        P /= 1 + excess  # p, and p - 1 for the own class
        gradient = C * (P @ self.Z) + penalised  # (K, N) (N, D + 1) -> (K, D + 1)
        variance = -(2 * P[self.own].sum() + xp.vdot(P, P)) / P.size  # the mean of p (1 - p)
        scale = 1 / (1 + C * variance * self.spectrum)
        return C * loss + float(xp.vdot(penalised, penalised)) / 2, gradient, scale


def lbfgs(evaluate: Callable, w: Array, tol: float, max_iter: int) -> Array:
    """Minimise f from `w` by L-BFGS (Nocedal & Wright 2006, algorithms 7.4 and 7.5).

    evaluate(w) -> (f, gradient, estimate of the inverse of the Hessian's diagonal). Also returns
    where rounding hides any further progress; warns where max_iter iterations were not enough.
    """
    xp, pairs = xp_of(w), deque[tuple[Array, Array, float]](maxlen=10)
    f, gradient, scale = evaluate(w)
    for _ in range(max_iter):
        direction, weights = -gradient, []
        for s, y, rho in reversed(pairs):
            weights.append(rho * float(xp.vdot(s, direction)))
            direction -= weights[-1] * y
        direction *= scale
        if pairs:
            s, y, rho = pairs[-1]
            direction /= rho * float(xp.vdot(y, scale * y))
        for s, y, rho in pairs:
            direction += (weights.pop() - rho * float(xp.vdot(y, direction))) * s
        slope = float(xp.vdot(gradient, direction))
        step = wolfe_step(evaluate, w, direction, f, slope) if -slope / 2 > tol * f else None
        if step is None:
            return w
        t, f, new_gradient, scale = step
        s, y = t * direction, new_gradient - gradient
        w, gradient = w + s, new_gradient
        pairs.append((s, y, 1 / float(xp.vdot(s, y))))
    warnings.warn(f"logistic regression did not converge in {max_iter} iterations", stacklevel=3)
    return w


def wolfe_step(evaluate: Callable, w: Array, direction: Array, f0: float, slope0: float) -> Any:
    """A step t that meets the strong Wolfe conditions, with evaluate's answer there.

    f(t) <= f0 + 1e-4 t slope0, give or take f's rounding error, and |slope(t)| <= 0.9 |slope0|.
    Such a t lies between low and high (Nocedal & Wright, section 3.5). f is convex: the next trial
    is where the slope would be zero if it were linear between them, but not near either. None after
    20 trials.
    """
    noise = 4 * float(np.finfo(w.dtype).eps) * f0
    low, low_slope, high, t = 0.0, slope0, np.inf, 1.0
    for _ in range(20):
        f, gradient, scale = evaluate(w + t * direction)
        slope = float(xp_of(w).vdot(gradient, direction))
        enough = f <= f0 + 1e-4 * t * slope0 + noise
        if enough and abs(slope) <= -0.9 * slope0:
            return t, f, gradient, scale
        if enough and slope < 0:
            low, low_slope = t, slope
        else:
            high, high_slope = t, slope
        if high == np.inf:
            t *= 4
        else:
            part = low_slope / (low_slope - high_slope)
            t = low + (high - low) * min(0.9, max(0.1, part))
    return None


def finite(X: Array) -> Array:
    """X (N, D) in float32 or wider. Raises DataError where it is empty or holds NaN or infinity."""
    X = X.astype(np.result_type(X.dtype, np.float32), copy=False)
    if X.ndim != 2 or X.size == 0 or not bool(xp_of(X).isfinite(X).all()):
        raise DataError(
            f"features of shape {X.shape} are empty or hold NaN or infinity: did training diverge?"
        )
    return X


def standardize(X: Array, *others: Array) -> list[Array]:
    """X and others, with the mean and deviation of each feature of X made 0 and 1 (constants 0)."""
    mean, deviation = X.mean(0), X.std(0)
    deviation[deviation <= 1e-6 * abs(mean)] = 1
    return [(each - mean) / deviation for each in (X, *others)]


def stratified(labels: np.ndarray, count: int, seed: int = 0) -> np.ndarray:
    """Indices of `count` labels, each class by its share and, if there is room, at least once.

    A smaller count is a part of a larger one with the same seed. Raises ConfigError for a count
    outside of 1 ... N.
    """
    n = len(labels)
    if not 1 <= count <= n:
        raise ConfigError(f"cannot take {count} of {n} labelled images")
    order = np.argsort(np.random.Philox(key=seed).random_raw(n), kind="stable")
    _, classes, sizes = np.unique(labels[order], return_inverse=True, return_counts=True)
    place = np.empty(n)  # 0, 1, 2, ... within each class, in the shuffled order
    place[np.argsort(classes, kind="stable")] = np.arange(n) - np.repeat(
        sizes.cumsum() - sizes, sizes
    )
    share = np.where(place == 0, 0, (place + 0.5) / sizes[classes])  # Sainte-Lague's quotients
    return np.sort(order[np.argsort(share, kind="stable")[:count]])


def select_c(
    X: Array, y: np.ndarray, grid: Sequence[float] = C_GRID, seed: int = 0
) -> tuple[float, str]:
    """The C that does best on a fifth of X when fitted to the rest, and a warning or "".

    The middle one where several are equally good.
    """
    size = max(round(0.8 * len(y)), len(np.unique(y)))
    if size == len(y):
        return 1.0, "too few labelled images to choose C: it was set to 1"
    fit = stratified(y, size, seed)
    held_out = np.setdiff1d(np.arange(len(y)), fit)
    fit_X, held_out_X = standardize(X[fit], X[held_out])
    problem, grid = Problem(fit_X, y[fit]), sorted(grid)
    scores = [LogisticRegression(C).solve(problem).score(held_out_X, y[held_out]) for C in grid]
    best = np.flatnonzero(np.equal(scores, max(scores)))
    C = grid[best[len(best) // 2]]
    if C in (grid[0], grid[-1]):
        return C, f"the best C, {C:g}, is at the edge of those tried: a better one may lie beyond"
    return C, ""


def linear_probe(
    X: Array, y: np.ndarray, test_X: Array, test_y: np.ndarray, seed: int = 0
) -> dict[str, Any]:
    """Choose C, fit again to all of X (N, D), and test once: top1, top5, ci95, C, warning."""
    C, warning = select_c(finite(X), y, seed=seed)
    X, test_X = standardize(X, finite(test_X))
    model = LogisticRegression(C).fit(X, y)
    ranked = np.argsort(-to_host(model.decision_function(test_X)), axis=1)  # (N, K)
    right = model.classes_[ranked[:, :5]] == test_y[:, None]  # (N, 5)
    top1, top5 = float(right[:, 0].mean()), float(right.any(1).mean())
    ci95 = wilson_interval(top1, len(test_y))
    return {"top1": top1, "top5": top5, "ci95": ci95, "C": C, "warning": warning}


def wilson_interval(p: float, n: int, z: float = 1.959964) -> list[float]:
    """[low, high]: the 95 % interval of a fraction p seen in n trials (Wilson 1927)."""
    centre, half = p + z * z / (2 * n), z * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return [float((centre + sign * half) / (1 + z * z / n)) for sign in (-1, 1)]


def knn_score(
    X: Array,
    y: np.ndarray,
    test_X: Array,
    test_y: np.ndarray,
    k: int = 200,
    temperature: float = 0.07,
) -> float:
    """The fraction of test_X right by a vote of the k nearest of X, each with exp(cosine / T).

    Wu et al. 2018 (instance discrimination), whose k and T are the field's. k may exceed N.
    """
    xp = xp_of(X)
    unit_X, unit_test = unit(finite(X)), unit(finite(test_X))
    classes, rows = np.unique(y, return_inverse=True)
    rows, k, K, right = xp.asarray(rows), min(k, len(X)), len(classes), 0
    for start in range(0, len(test_X), 512):  # similarities of 512 images at a time
        part = slice(start, start + 512)
        similarity = unit_test[part] @ unit_X.T  # (B, D) (D, N) -> (B, N)
        near = xp.argpartition(similarity, -k, axis=1)[:, -k:]  # (B, k)
        weights = xp.exp((xp.take_along_axis(similarity, near, 1) - 1) / temperature)
        cells = rows[near] + K * xp.arange(len(near))[:, None]  # (B, k), into (B, K) flat
        votes = xp.bincount(cells.ravel(), weights.ravel(), len(near) * K).reshape(-1, K)
        right += (classes[to_host(votes.argmax(1))] == test_y[part]).sum()
    return float(right / len(test_X))


def features(
    encode: Encode, images: Any, indices: np.ndarray, size: int, batch_size: int = 256
) -> Array:
    """encode() of the centre view (size, size, 3) of images[indices], in batches: (n, D)
    float32.
    """
    batches = [indices[i : i + batch_size] for i in range(0, len(indices), batch_size)]
    parts = [encode(center_view(images[rows], size)) for rows in batches]
    return xp_of(parts[0]).concatenate(parts).astype(np.float32, copy=False)


def small_pixels(views: Array, side: int = 16) -> Array:
    """The control that has learned nothing: views (N, S, S, 3) averaged to 16 px, (N, 768)."""
    xp, size = xp_of(views), views.shape[1]
    side = min(side, size)
    start, pixel = xp.arange(side)[:, None] * size / side, xp.arange(size)
    cover = xp.minimum(start + size / side, pixel + 1) - xp.maximum(start, pixel)
    mean = cover.clip(0) * (side / size)  # (side, S): how much of each pixel lies in each cell
    small = xp.einsum("ih,nhwc,jw->nijc", mean, views, mean, optimize=True)
    return small.reshape(len(views), -1)  # (N, side, side, 3) -> (N, D)


def probe(
    dataset: Any,
    encode: Encode,
    size: int,
    random_encode: Encode,
    labels: int | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Linear and kNN accuracy of an encoder beside its controls, as in probe.json; fractions.

    labels: use only so many labelled images, stratified by class. random_encode is the same network
    with fresh weights, and batch norm statistics taken from data: left at 0 and 1, deep features
    blow up or fade, and anything would look good beside them. Raises DataError without two classes.
    """
    y = dataset.labels
    train, test = (rows[y[rows] >= 0] for rows in map(dataset.split, ("labelled", "test")))
    if (classes := len(np.unique(y[train]))) < 2 or not len(test):
        raise DataError(
            f"cannot probe: that takes labelled images of at least two classes and test images; "
            f"there are {len(train)} of {classes} class(es) and {len(test)}"
        )
    if labels is not None:
        train = train[stratified(y[train], labels, seed)]
    rows = {}
    encoders = {"SimCLR": encode, "random encoder": random_encode, "raw pixels": small_pixels}
    for name, encoder in encoders.items():
        X, test_X = (features(encoder, dataset.images, part, size) for part in (train, test))
        rows[name] = linear_probe(X, y[train], test_X, y[test], seed)
        rows[name]["knn"] = knn_score(X, y[train], test_X, y[test])
    controls = {"chance": 1 / len(dataset.class_names)}
    controls |= {
        "pixels": rows["raw pixels"]["top1"],
        "random_encoder": rows["random encoder"]["top1"],
    }
    counts = {"labels": len(train), "test": len(test), "classes": len(dataset.class_names)}
    return {**rows["SimCLR"], **counts, "controls": controls, "rows": rows}


def table(result: dict[str, Any]) -> str:
    """What `probe` returned, for the terminal."""
    lines = [f"{'system':16}{'top-1':>8}{'95 % interval':>17}{'top-5':>9}{'kNN':>9}"]
    for name, row in result["rows"].items():
        low, high = row["ci95"]
        lines.append(
            f"{name:16}{row['top1']:8.1%}{low:9.1%} -{high:6.1%}{row['top5']:9.1%}{row['knn']:9.1%}"
        )
    lines.append(f"{'chance':16}{result['controls']['chance']:8.1%}")
    notes = [f"warning ({name}): {row['warning']}" for name, row in result["rows"].items()]
    return "\n".join(lines + [note for note in notes if not note.endswith(": ")])


def unit(z: Array) -> Array:
    """Rows of z (N, D) scaled to length 1 (rows of zeros stay)."""
    length = xp_of(z).linalg.norm(z, axis=1, keepdims=True)
    return z / length.clip(float(np.finfo(z.dtype).tiny))


def alignment(z1: Array, z2: Array) -> float:
    """Mean squared distance between the unit embeddings (N, D) of two views (Wang & Isola 2020)."""
    return float(((unit(z1) - unit(z2)) ** 2).sum(1).mean())


def uniformity(z: Array) -> float:
    """log mean exp(-2 d^2) over all pairs of N >= 2 unit embeddings (N, D) (Wang & Isola 2020).

    0 under collapse, about -4 when spread evenly over a sphere of many dimensions.
    """
    z = unit(z)
    kernel = xp_of(z).exp(4 * (z @ z.T) - 4)  # (N, D) (D, N) -> (N, N); d^2 = 2 - 2 cos
    return float(np.log(float(kernel.sum() - kernel.trace()) / (len(z) * (len(z) - 1))))


def effective_rank(h: Array) -> float:
    """exp of the entropy of h's (N, D) normalised singular values (Roy & Vetterli 2007; RankMe)."""
    xp = xp_of(h)
    s = xp.linalg.svd(h, compute_uv=False)
    p = s[s > 0] / s.sum()
    return float(xp.exp(-(p * xp.log(p)).sum()))
