"""Logistic regression from scratch: L-BFGS on the whole data set, in good coordinates."""

import warnings
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np

from ..backend import Array, to_host, xp_of
from ..cores import threaded_blas
from ..errors import ConfigError, DataError


class LogisticRegression:
    """Multinomial logistic regression with scikit-learn's objective and units.

    From X (N, D) and y (N,) of K classes_, find coef_ w (K, D) and intercept_ b (K,) that minimise

        f = C sum_n [logsumexp_k(z_nk) - z_n,y(n)] + ||w||^2 / 2,       z = X w^T + b   (N, K)

    Two classes also have two vectors; scikit-learn's binary form has one, and needs twice our C.
    Arrays keep their type: in float32, as features come, products take half the time, and
    `Problem.evaluate` keeps f accurate. Stops when a step promises to lower f by less than tol * f.
    Raises DataError for fewer than two classes and for features that are not finite.
    """

    def __init__(self, C: float = 1.0, max_iter: int = 1000, tol: float = 1e-6):
        if not 0 < C < np.inf:
            raise ConfigError(f"C must be greater than 0 and finite, not {C}")
        self.C, self.max_iter, self.tol = C, max_iter, tol

    def fit(self, X: Array, y: Any) -> "LogisticRegression":
        """Fit to the features X (N, D) and their labels y (N,); returns itself."""
        return self.solve(Problem(X, y))

    @threaded_blas()  # large products and little else
    def solve(self, problem: "Problem") -> "LogisticRegression":
        """Fit, starting from the problem's last solution (for another C)."""
        W = lbfgs(lambda W: problem.evaluate(W, self.C), problem.W, self.tol, self.max_iter)
        problem.W, self.classes_ = W, problem.classes
        self.coef_ = W[:, :-1] @ problem.axes.T  # (K, D) (D, D) -> (K, D)
        self.intercept_ = W[:, -1] - self.coef_ @ problem.mean  # (K,)
        return self

    def decision_function(self, X: Array) -> Array:
        """The logits z (N, K)."""
        return finite(X) @ self.coef_.T + self.intercept_

    def predict(self, X: Array) -> np.ndarray:
        """The likeliest class (N,) of each row of X (N, D), on the host."""
        return self.classes_[to_host(self.decision_function(X).argmax(1))]

    def score(self, X: Array, y: Any) -> float:
        """The fraction of X (N, D) whose class is predicted correctly."""
        return float((self.predict(X) == labels_of(X, y, self.classes_)).mean())


class Problem:
    """X (N, D) and y (N,) in the axes in which logistic regression is easiest to solve.

    The intercept absorbs a shift and the penalty does not see a rotation, so X may be centred and
    rotated to its principal axes. There X.T X is diagonal, and so, nearly, is the Hessian, I (but 0
    for the intercept) + C sum_n kron(diag(p_n) - p_n p_n^T, x_n x_n^T). Its diagonal, with the mean
    of p (1 - p) in place of each sample's own (Boehning 1992 has a bound), seeds L-BFGS, which for
    correlated features then needs only a fifth to three quarters of the evaluations.
    """

    def __init__(self, X: Array, y: Any):
        X, xp = finite(X), xp_of(X)
        self.classes, rows = np.unique(labels_of(X, y), return_inverse=True)
        if len(self.classes) < 2:
            raise DataError(f"labels of two classes or more are needed, not {len(self.classes)}")
        self.mean = X.mean(0)
        X = X - self.mean
        self.axes = xp.linalg.eigh(X.T @ X)[1]  # (D, N) (N, D) -> (D, D)
        # A last column of ones carries the intercept through both products.
        self.Z = xp.concatenate([X @ self.axes, xp.ones_like(X[:, :1])], axis=1)  # (N, D + 1)
        self.spectrum = (self.Z**2).sum(0)  # (D + 1,)
        # 1, and 0 for the intercept: (D + 1,)
        self.penalty = (xp.arange(len(self.spectrum)) < len(self.mean)).astype(X.dtype)
        self.own = xp.asarray(rows), xp.arange(len(X))  # each sample's class, in arrays (K, N)
        self.W = xp.zeros((len(self.classes), self.Z.shape[1]), X.dtype)

    def evaluate(self, W: Array, C: float) -> tuple[float, Array, Array]:
        """f at W (K, D + 1), its gradient, and the inverse of the Hessian's estimated diagonal.

        The loss of a well-classified sample is about 1 - p. In float32 that would be a multiple of
        1e-7, an error that a large C makes larger than f; so the probabilities of the other classes
        are summed, and log1p is taken of the sum.
        """
        xp = xp_of(W)
        penalised = self.penalty * W
        P = W @ self.Z.T  # (K, D + 1) (D + 1, N) -> (K, N): sums over classes run along memory
        P -= P.max(0)
        margin = P[self.own]  # (N,), 0 where the sample's own class is the likeliest
        xp.exp(P, out=P)
        P[self.own] = 0
        others = P.sum(0)
        excess = others + xp.expm1(margin)  # the sum over all classes, less 1
        loss = float((xp.log1p(excess) - margin).sum())
        P[self.own] = -others
        P /= 1 + excess  # p, and p - 1 for the own class
        variance = -(2 * P[self.own].sum() + xp.vdot(P, P)) / P.size  # the mean of p (1 - p)
        gradient = C * (P @ self.Z) + penalised  # (K, N) (N, D + 1) -> (K, D + 1)
        f = C * loss + float(xp.vdot(penalised, penalised)) / 2
        # For the intercept not quite 0: its steps would be endless where all p are 0 or 1.
        return f, gradient, 1 / (xp.maximum(self.penalty, min(1, C)) + C * variance * self.spectrum)


def lbfgs(evaluate: Callable, w: Array, tol: float, max_iter: int) -> Array:
    """Minimise f from `w` by L-BFGS (Nocedal & Wright 2006, algorithms 7.4 and 7.5).

    evaluate(w) -> (f, gradient, estimate of the inverse of the Hessian's diagonal). Also stops
    if rounding hides all further progress; warns if max_iter iterations were not enough.
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
        # s y, written so that rounding cannot undo what the Wolfe conditions promise: s y > 0.
        pairs.append((s, y, 1 / (t * (float(xp.vdot(new_gradient, direction)) - slope))))
        w, gradient = w + s, new_gradient
    warnings.warn(f"logistic regression did not converge in {max_iter} iterations", stacklevel=5)
    return w


def wolfe_step(evaluate: Callable, w: Array, direction: Array, f0: float, slope0: float) -> Any:
    """A step t that meets the strong Wolfe conditions, with evaluate's answer there, or None.

    f(t) <= f0 + 1e-4 t slope0, give or take f's rounding error, and |slope(t)| <= 0.9 |slope0|:
    both hold somewhere between low and high (Nocedal & Wright, section 3.5). The next trial is
    where the cubic through both ends is least (their equation 3.59), but not too near either.
    """
    noise = 4 * float(np.finfo(w.dtype).eps) * f0
    low, high, t = (0.0, f0, slope0), None, 1.0
    for _ in range(20):
        f, gradient, scale = evaluate(w + t * direction)
        slope = float(xp_of(w).vdot(gradient, direction))
        enough = f <= f0 + 1e-4 * t * slope0 + noise
        if enough and abs(slope) <= -0.9 * slope0:
            return t, f, gradient, scale
        if enough and slope < 0:
            low = (t, f, slope)
        else:
            high = (t, f, slope)
        t = 4 * t if high is None else cubic_minimum(low, high)
    return None


def cubic_minimum(low: tuple[float, ...], high: tuple[float, ...]) -> float:
    """Where the cubic through two (t, f, slope) is least, a tenth or more from both."""
    (a, fa, ga), (b, fb, gb) = low, high
    z = ga + gb - 3 * (fb - fa) / (b - a)
    root = max(z * z - ga * gb, 0.0) ** 0.5
    part = 1 - (gb + root - z) / (gb - ga + 2 * root or 1.0)
    return a + (b - a) * min(0.9, max(0.1, part))  # near a where f is not finite


def labels_of(X: Array, y: Any, known: Any = None) -> np.ndarray:
    """y as an array. Raises DataError unless it is (N,), a label for each row of X (N, D), and
    holds names if the `known` labels are names, numbers if they are numbers: else none were right.
    """
    if (labels := np.asarray(y)).shape != X.shape[:1]:
        raise DataError(f"a label for each image is needed, not {labels.shape} for {X.shape}")
    if labels.dtype == object and all(isinstance(label, str) for label in labels):
        labels = labels.astype(str)
    elif (labels != labels).any():
        raise DataError("a label is not a number (NaN)")
    # Both numbers (-1), or names of one kind: bytes and str are never equal.
    if known is not None and "US".find(labels.dtype.kind) != "US".find(known.dtype.kind):
        raise DataError(f"labels are {labels.dtype}, but those learned are {known.dtype}")
    return labels


def finite(X: Array) -> Array:
    """X (N, D) in float32 or float64 (integers, too). DataError if it is empty or not finite."""
    if not xp_of(X).isfinite(X).all() or X.ndim != 2 or X.size == 0:
        raise DataError(f"features {X.shape}: not (N, D), empty or not finite; did training fail?")
    return X.astype(np.promote_types(X.dtype, np.float32), copy=False)
