"""The probe: L-BFGS logistic regression beside scikit-learn's, the search for C, kNN, statistics.

    pytest benchmarks/test_probe.py --benchmark-json=probe.json

1,716 x 512 features of 120 classes, the size of the Stanford Dogs report. The two solvers take
turns, each with the loosest tolerance that brings its objective within 1e-4 of the optimum; the
ratio of their median times is in the JSON file's extra_info.
The features are correlated (singular values fall as 1 / rank), as an encoder's are.
"""

import statistics
import time

import numpy as np
import pytest

from minisimclr.probe import (
    C_GRID,
    LogisticRegression,
    effective_rank,
    knn_score,
    select_c,
    standardize,
    uniformity,
)

N, D, K = 1716, 512, 120
TOLERANCES = [1e-3, 1e-4, 3e-5, 1e-5, 3e-6, 1e-6]  # what to choose from


@pytest.fixture(scope="module")
def labelled():
    """Standardised float32 features (N, D) and labels (N,)."""
    rng = np.random.default_rng(0)
    y = rng.permutation(np.arange(N) % K)
    X = rng.normal(size=(N, D)) + 0.5 * rng.normal(size=(K, D))[y]
    X = X * np.arange(1, D + 1) ** -1.0 @ np.linalg.qr(rng.normal(size=(D, D)))[0]
    return standardize(X.astype(np.float32))[0], y


def objective(model, X, y, C):
    w = np.asarray(model.coef_, np.float64)
    z = X.astype(np.float64) @ w.T + model.intercept_
    z -= z.max(1, keepdims=True)
    losses = np.log(np.exp(z).sum(1)) - z[np.arange(len(y)), y]
    return C * losses.sum() + (w**2).sum() / 2


def fit_ours(X, y, C, tol):
    return LogisticRegression(C, tol=tol, max_iter=20_000).fit(X, y)


def fit_scikit_learn(X, y, C, tol):
    linear_model = pytest.importorskip("sklearn.linear_model")
    return linear_model.LogisticRegression(C=C, tol=tol, max_iter=20_000).fit(X, y)


def loosest(fit, X, y, C, best):
    """The first tolerance with which `fit` comes within 1e-4 of the best objective."""
    return next(tol for tol in TOLERANCES if objective(fit(X, y, C, tol), X, y, C) < best * 1.0001)


@pytest.mark.parametrize("C", [0.01, 1.0])
def test_logistic_regression(benchmark, labelled, C):
    X, y = labelled
    best = objective(fit_ours(X.astype(np.float64), y, C, 1e-10), X, y, C)
    tol, other_tol = (loosest(fit, X, y, C, best) for fit in (fit_ours, fit_scikit_learn))
    others = []

    def other_first():
        begin = time.perf_counter()
        fit_scikit_learn(X, y, C, other_tol)
        others.append(time.perf_counter() - begin)
        time.sleep(0.3)  # its BLAS threads go on spinning for a while

    model = benchmark.pedantic(fit_ours, (X, y, C, tol), setup=other_first, rounds=7)
    assert best * (1 - 1e-9) <= objective(model, X, y, C) <= best * 1.0001
    benchmark.extra_info.update(tol=tol, flops_per_evaluation=4 * N * D * K)
    if benchmark.enabled:
        other = statistics.median(others)
        ratio = benchmark.stats.stats.median / other
        benchmark.extra_info.update(scikit_learn_ms=1e3 * other, ours_over_scikit_learn=ratio)


def test_search_for_c(benchmark, labelled):
    X, y = labelled
    C, warning = benchmark.pedantic(select_c, (X, y), rounds=3)
    assert C in C_GRID
    assert bool(warning) == (C in (C_GRID[0], C_GRID[-1]))


def test_knn(benchmark, labelled):
    X, y = labelled
    benchmark.extra_info["flops"] = 2 * N * N * D
    score = benchmark.pedantic(knn_score, (X, y, X, y), rounds=5)
    assert score > knn_score(X, np.roll(y, 1), X, y)


@pytest.mark.parametrize("statistic", [uniformity, effective_rank])
def test_statistics_of_an_epoch(benchmark, statistic):
    z = np.random.default_rng(0).normal(size=(256, 128)).astype(np.float32)
    value = benchmark(statistic, z)
    assert value == pytest.approx(statistic(z.astype(np.float64)), rel=1e-4)
