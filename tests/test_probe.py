"""The probe: logistic regression against scikit-learn, the protocol's rules, kNN, statistics."""

import json
import sys
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minisimclr.cli.display import PASSING
from minisimclr.errors import ConfigError, DataError
from minisimclr.probe import (
    C_GRID,
    LogisticRegression,
    Problem,
    alignment,
    best_of,
    effective_rank,
    features,
    folds,
    holdout,
    knn_score,
    labelled_and_test,
    majority_share,
    measure,
    probe,
    scores,
    select_c,
    standardize,
    stratified,
    table,
    uniformity,
    wilson_interval,
)
from minisimclr.probe.logistic import cubic_minimum, lbfgs, wolfe_step


def clusters(n=150, d=12, classes=4, spread=1.5, seed=0, dtype=np.float64):
    """Correlated features (n, d) of classes whose centres lie about `spread` apart, and labels."""
    rng = np.random.default_rng(seed)
    y = rng.permutation(np.arange(n) % classes)
    X = rng.normal(size=(n, d)) + spread * rng.normal(size=(classes, d))[y]
    mix = rng.normal(size=(d, d)) * np.arange(1, d + 1) ** -1.0  # a decaying spectrum
    return (X @ mix + rng.normal(size=d)).astype(dtype), y


def objective(model, X, y, C):
    """f as the docstring writes it, in float64, sample by sample."""
    w, b = np.asarray(model.coef_, np.float64), np.asarray(model.intercept_, np.float64)
    z = X.astype(np.float64) @ w.T + b
    top = z.max(1)
    lse = top + np.log(np.exp(z - top[:, None]).sum(1))
    return C * (lse - z[np.arange(len(y)), y]).sum() + 0.5 * (w**2).sum()


def tight(C=1.0):
    return LogisticRegression(C, tol=1e-14, max_iter=20_000)


# Logistic regression


@pytest.mark.parametrize("scale", [0.1, 30.0], ids=["unsure", "sure"])
def test_gradient_against_finite_differences(scale):
    X, y = clusters()
    problem, rng = Problem(X, y), np.random.default_rng(1)
    W, V = scale * rng.normal(size=problem.W.shape), rng.normal(size=problem.W.shape)
    f, gradient, diagonal = problem.evaluate(W, 3.0)
    eps = 1e-6
    ahead, behind = (problem.evaluate(W + h * V, 3.0)[0] for h in (eps, -eps))
    assert np.vdot(gradient, V) == pytest.approx((ahead - behind) / (2 * eps), rel=1e-6)
    model = SimpleNamespace(coef_=W[:, :-1] @ problem.axes.T)
    model.intercept_ = W[:, -1] - model.coef_ @ problem.mean
    assert f == pytest.approx(objective(model, X, y, 3.0), rel=1e-12)
    z = problem.Z @ W.T
    p = np.exp(z - z.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    curvature = 3 * (p * (1 - p)).mean() * (problem.Z**2).sum(0)
    assert diagonal == pytest.approx(1 / (1 + curvature), rel=1e-6)


@pytest.mark.parametrize("n, d", [(150, 12), (30, 50)], ids=["tall", "wide"])
@pytest.mark.parametrize("C", [1e-2, 1.0, 1e3])
def test_same_solution_as_scikit_learn(n, d, C):
    linear_model = pytest.importorskip("sklearn.linear_model")
    X, y = clusters(n, d)
    theirs = linear_model.LogisticRegression(C=C, tol=1e-10, max_iter=50_000).fit(X, y)
    ours = tight(C).fit(X, y)
    # scikit-learn may stop a little short of the optimum; never below it.
    assert objective(ours, X, y, C) <= objective(theirs, X, y, C) * (1 + 1e-12)
    assert objective(ours, X, y, C) == pytest.approx(objective(theirs, X, y, C), rel=1e-7)
    near = {"abs": 5e-3 * abs(theirs.coef_).max()}
    assert ours.coef_ == pytest.approx(theirs.coef_, **near)
    assert ours.intercept_ == pytest.approx(theirs.intercept_, **near)
    assert ours.score(X, y) == theirs.score(X, y)
    assert (ours.predict(X) == theirs.predict(X)).all()


def test_two_classes_are_scikit_learns_binary_form_with_twice_the_c():
    linear_model = pytest.importorskip("sklearn.linear_model")
    X, y = clusters(classes=2)
    theirs = linear_model.LogisticRegression(C=2.0, tol=1e-10, max_iter=50_000).fit(X, y)
    ours = tight(1.0).fit(X, y)
    assert ours.coef_.shape == (2, X.shape[1])
    assert ours.coef_[1] - ours.coef_[0] == pytest.approx(theirs.coef_[0], abs=1e-4)


@pytest.mark.parametrize("C", [1e-3, 1.0, 1e5])
def test_float32_reaches_the_float64_optimum(C):
    """At C = 1e5 a loss rounded to 1e-7 would drown the objective."""
    X, y = standardize(clusters(spread=4.0)[0])[0], clusters(spread=4.0)[1]
    best = objective(tight(C).fit(X, y), X, y, C)
    model = LogisticRegression(C).fit(X.astype(np.float32), y)
    assert model.coef_.dtype == np.float32
    assert best * (1 - 1e-6) <= objective(model, X, y, C) <= best * (1 + 1e-4)


@pytest.mark.parametrize("C", [1e-5, 1e-3, 1.0])
def test_mean_probabilities_are_the_shares_of_the_classes(C):
    """The intercept's gradient is zero, however strong the penalty, which does not hold it."""
    X, y = clusters(402)
    X, shares = standardize(X)[0], np.bincount(y) / len(y)
    z = LogisticRegression(C).fit(X, y).decision_function(X)
    p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    assert p.mean(0) == pytest.approx(shares, abs=5e-4)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 999), shift=st.floats(-50, 50), C=st.sampled_from([0.03, 1.0, 30.0]))
def test_symmetries_of_the_solution(seed, shift, C):
    X, y = clusters(60, 5, 3, seed=seed)
    model = tight(C).fit(X, y)
    w = model.coef_
    near = {"abs": 1e-4 * abs(w).max(), "rel": 1e-4}
    # A shift of the features moves the intercept alone.
    shifted = tight(C).fit(X + shift, y)
    assert shifted.coef_ == pytest.approx(w, **near)
    assert shifted.decision_function(X + shift) == pytest.approx(
        model.decision_function(X), abs=1e-3 * (1 + abs(w).max())
    )
    # Other names for the classes reorder the vectors; names may be of any kind.
    names = np.array(["c", "a", "b"])
    renamed = tight(C).fit(X, names[y])
    assert list(renamed.classes_) == ["a", "b", "c"]
    assert renamed.coef_ == pytest.approx(w[[1, 2, 0]], **near)
    assert (renamed.predict(X) == names[model.predict(X)]).all()
    # Every sample twice is C twice.
    twice = tight(C / 2).fit(np.concatenate([X, X]), np.concatenate([y, y]))
    assert twice.coef_ == pytest.approx(w, **near)


def test_a_constant_feature_gets_no_weight():
    X, y = clusters()
    X[:, 3] = 7
    assert abs(tight().fit(X, y).coef_[:, 3]).max() < 1e-9
    # A constant may be off its computed mean by rounding, which must not become a deviation.
    for kind in (np.float32, np.float64):
        X = np.full((9999, 3), 0.1, kind)  # several columns are summed row by row
        here, there = standardize(X, X + kind(0.5))
        assert here == pytest.approx(0, abs=1e-6) and there == pytest.approx(0.5, abs=1e-6)
        assert here.dtype == kind


def test_a_warm_start_ends_where_a_cold_one_does():
    X, y = clusters()
    problem = Problem(X, y)
    tight(0.1).solve(problem)
    before = problem.W.copy()
    warm, cold = tight(10.0).solve(problem), tight(10.0).fit(X, y)
    assert (before != problem.W).any()
    assert warm.coef_ == pytest.approx(cold.coef_, abs=1e-5)


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_line_search_meets_the_strong_wolfe_conditions(scale):
    """From a direction far too long or too short, on a convex function that is no quadratic."""

    def evaluate(w):
        return float(np.logaddexp(w, -w).sum()), np.tanh(w), np.ones_like(w)

    w = np.array([3.0, -2.0, 0.5])
    f0, g0, _ = evaluate(w)
    direction = -scale * g0
    t, f, g, _ = wolfe_step(evaluate, w, direction, f0, g0 @ direction)
    assert f == evaluate(w + t * direction)[0]
    assert f <= f0 + 1e-4 * t * (g0 @ direction)
    assert abs(g @ direction) <= 0.9 * abs(g0 @ direction)


def test_a_high_point_ends_the_search_even_where_the_slope_goes_down():
    def evaluate(w):
        return -float(np.sin(5 * w[0])) / 5, -np.cos(5 * w), np.ones_like(w)

    assert evaluate(np.ones(1))[0] > 0 > evaluate(np.ones(1))[1]  # what the first trial finds
    t, f, _, _ = wolfe_step(evaluate, np.zeros(1), np.ones(1), 0.0, -1.0)
    assert 0 < t < np.pi / 5
    assert f < 0


def test_cubic_minimum():
    def ends(a, b):  # of (t - 2)^2 (t + 4), least at t = 2
        return [(t, (t - 2) ** 2 * (t + 4), 3 * (t - 2) * (t + 2)) for t in (a, b)]

    assert cubic_minimum(*ends(-1.0, 4.0)) == pytest.approx(2)
    assert cubic_minimum(*ends(1.9, 9.9)) == pytest.approx(1.9 + 0.8)  # a tenth from the end
    assert cubic_minimum(*ends(-8.0 / 5, 2.1)) == pytest.approx(2.1 - 0.37)
    assert cubic_minimum((0.0, 1.0, -1.0), (1.0, np.inf, np.inf)) == pytest.approx(0.1)


def test_a_rounding_error_is_no_step_uphill():
    def evaluate(w):  # a little higher, though it goes down
        return 1 + 1e-7, np.float32([-1e-9]), np.ones(1, np.float32)

    w, direction = np.zeros(1, np.float32), np.ones(1, np.float32)
    assert wolfe_step(evaluate, w, direction, 1.0, -1e-8)[0] == 1


def test_no_step_uphill():
    def evaluate(w):  # barely up, though the slope at the start is said to be -1
        return 1 + 1e-9 * float(w[0]), np.array([1e-9]), np.ones_like(w)

    assert wolfe_step(evaluate, np.zeros(1), np.ones(1), 1.0, -1.0) is None


def test_lbfgs_uses_the_scale_it_is_given_and_says_when_iterations_run_out():
    curvatures = np.logspace(0, 4, 12)

    def quadratic(scale):
        return lambda w: (float((curvatures * w**2).sum() / 2 + 1), curvatures * w, scale)

    plain, exact = quadratic(np.ones(12)), quadratic(1 / curvatures)
    assert abs(lbfgs(plain, np.ones(12), 1e-13, 1000)).max() < 1e-5
    assert abs(lbfgs(exact, np.ones(12), 1e-13, 2)).max() < 1e-5
    with pytest.warns(UserWarning, match="did not converge in 3 iterations"):
        lbfgs(plain, np.ones(12), 1e-13, 3)
    with pytest.warns(UserWarning) as caught:
        LogisticRegression(max_iter=2).fit(*clusters())
    assert caught[0].filename == __file__


def test_only_the_chosen_penalty_warns_of_a_fit_that_did_not_converge(monkeypatch):
    X, y = clusters()
    chosen = measure(X, y, X, y)["C"]

    def solve(self, problem, solve=LogisticRegression.solve):
        is_chosen = chosen == self.C
        if is_chosen == chosen_warns:
            warnings.warn("did not converge", stacklevel=1)
        return solve(self, problem)

    monkeypatch.setattr(LogisticRegression, "solve", solve)
    for chosen_warns in (False, True):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            measure(X, y, X, y)
        assert len(caught) == chosen_warns


def test_a_measurement_chooses_by_its_seed_and_keeps_the_warning(monkeypatch):
    def select_c(X, y, seed, notify):
        return 1.0, f"at the edge with seed {seed}"

    monkeypatch.setattr("minisimclr.probe.select_c", select_c)
    X, y = clusters()
    assert measure(X, y, X, y, seed=7)["warning"] == "at the edge with seed 7"


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_features_that_are_not_finite(bad):
    X, y = clusters()
    X[5, 2] = bad
    for call in (lambda: tight().fit(X, y), lambda: knn_score(X, y, X, y)):
        with pytest.raises(DataError, match="not finite"):
            call()


def test_features_that_are_no_matrix():
    X, y = clusters()
    for bad in (X[:, 0], X[:, :, None], X[:0]):
        for call in (tight().fit, lambda bad, labels: knn_score(bad, labels, X, y)):
            with pytest.raises(DataError, match=r"not \(N, D\), empty"):
                call(bad, y[: len(bad)])
    with pytest.raises(TypeError, match="takes arrays"):
        tight().fit(X.tolist(), y)


def test_other_bad_input():
    X, y = clusters()
    with pytest.raises(DataError, match="two classes or more are needed, not 1"):
        tight().fit(X, np.zeros(len(y)))
    with pytest.raises(DataError, match="a label for each"):  # the surplus would be a block alone
        knn_score(X, y, np.tile(X, (6, 1))[:512], np.zeros(1024))
    for calls in (
        lambda y: tight().fit(X, y),
        lambda y: tight().fit(X, np.arange(len(X)) % 3).score(X, y),
        lambda y: measure(X, y, X, np.arange(len(X))),
        lambda y: knn_score(X, y, X, np.arange(len(X))),
        lambda y: knn_score(X, np.arange(len(X)), X, y),
        lambda y: scores(np.tile(np.arange(5), (len(X), 1)), y),
    ):
        for other in (y[1:], y[:, None], y[:1], np.tile(y, 2)):  # some would broadcast
            with pytest.raises(DataError, match=r"a label for each .* not \(.* for \("):
                calls(other)
    names = y.astype(str)  # would be wrong without exception
    for call in (
        lambda: knn_score(X, y, X, names),
        lambda: measure(X, y, X, names),
        lambda: tight().fit(X, names).score(X, y),
        lambda: scores(np.tile(np.arange(5), (len(X), 1)), names),
        lambda: tight().fit(X, names).score(X, names.astype(bytes)),  # as HDF5 keeps names
        lambda: knn_score(X, names.astype(bytes), X, names),
    ):
        with pytest.raises(DataError, match=r"labels are .*, but those learned are"):
            call()
    assert tight().fit(X[y < 2], y[y < 2]).score(X[y == 2], y[y == 2]) == 0.0
    with pytest.raises(DataError, match="empty"):
        tight().fit(X[:0], y[:0])
    for C in (-1, np.inf, np.nan):
        with pytest.raises(ConfigError, match=f"greater than 0 and finite, not {C}"):
            LogisticRegression(C=C)
    with pytest.raises(ConfigError, match=r"k must be at least 1 and T above 0, not 0 and 0\.07"):
        knn_score(X, y, X, y, k=0)


def test_features_of_half_precision_are_as_good():
    X, y = clusters(spread=4)
    X[0] = 0
    half = (300 * X).astype(np.float16)  # lengths beyond what squares of its type can hold
    assert knn_score(half, y, half, y, k=5) == knn_score(half.astype("f4"), y, half, y, k=5) > 0.9
    assert uniformity(half) == uniformity(half.astype("f4")) < -1
    assert alignment(half, half[::-1]) == alignment(half.astype("f4"), half[::-1].astype("f4")) > 0
    assert tight().fit(half, y).score(half.astype("f4"), y) > 0.9
    assert measure(half, y, half, y)["top1"] > 0.9


def test_features_far_from_zero_are_standardized():
    X = np.stack([1.7e9 + 7 * np.arange(100.0), np.full(100, 1.7e9)], axis=1)
    (scaled,) = standardize(X)
    np.testing.assert_allclose(scaled.std(0), [1, 0], atol=1e-6)
    assert (standardize(np.full((9, 1), 0.1, np.float32))[0] == 0).all()
    last_digits = np.float32([[0.1], [np.nextafter(np.float32(0.1), 1)]] * 9)
    assert abs(standardize(last_digits)[0]).max() < 1e-7
    small = np.random.default_rng(0).normal(1, 1e-4, (100, 1)).astype(np.float32)
    np.testing.assert_allclose(standardize(small)[0].std(0), 1, rtol=0.01)
    (scaled,) = standardize(np.arange(6).reshape(3, 2))  # whole numbers
    np.testing.assert_allclose(scaled.std(0), 1)


# The protocol


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 30), min_size=2, max_size=6),
    share=st.floats(0.01, 1),
    seed=st.integers(0, 9),
)
def test_stratified(sizes, share, seed):
    labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(sizes)), sizes))
    count = max(1, round(share * len(labels)))
    chosen = stratified(labels, count, seed)
    assert len(set(chosen)) == len(chosen) == count
    taken = np.bincount(labels[chosen], minlength=len(sizes))
    if count >= len(sizes):
        assert taken.min() >= 1
    # Classes that had to be given their one leave the others less than their share.
    fair = np.array(sizes) * count / len(labels)
    assert (taken < fair + 2).all()
    assert set(stratified(labels, max(1, count // 2), seed)) <= set(chosen)
    if len(labels) > 20 and count < 0.8 * len(labels):
        assert any((stratified(labels, count, other) != chosen).any() for other in range(10, 15))


def test_stratified_shares_are_exact_where_they_can_be():
    labels = np.repeat([0, 1, 2], [40, 20, 60])
    for count in (6, 12, 24, 60, 120):
        taken = np.bincount(labels[stratified(labels, count)])
        assert list(taken) == [count / 3, count / 6, count / 2]
    # Seven seats for 53, 24 and 23 voters: D'Hondt would give them as 4, 2 and 1.
    labels = np.repeat([0, 1, 2], [53, 24, 23])
    assert np.bincount(labels[stratified(labels, 7)]).tolist() == [3, 2, 2]
    # Which of equal classes get the seats is drawn, too.
    assert len({tuple(stratified(np.arange(20), 3, seed)) for seed in range(9)}) > 5
    for count in (0, 121):
        with pytest.raises(ConfigError, match=f"{count} of 120"):
            stratified(np.zeros(120), count)


def test_folds_share_every_class_out():
    labels = np.random.default_rng(0).permutation(np.repeat([3, 5, 9], [23, 2, 40]))
    fold = folds(labels, seed=1)
    assert set(fold) == set(range(5))
    for label, most in ((3, 5), (5, 1), (9, 8)):
        assert np.bincount(fold[labels == label]).max() == most
    assert (fold != folds(labels, seed=2)).any()


def test_select_c_is_cross_validation(monkeypatch):
    X, y = clusters(200, 20, 5, spread=0.9)
    grid = [1e-4, 1e-2, 1e-1, 1.0, 1e2]
    fold, right = folds(y, 7), np.zeros(len(grid))
    for k in range(5):
        fit, rest = fold != k, fold == k
        Z = (X - X[fit].mean(0)) / X[fit].std(0)  # what is held out stays out of the mean
        fits = [tight(C).fit(Z[fit], y[fit]) for C in grid]
        right += [(each.predict(Z[rest]) == y[rest]).sum() for each in fits]
    best = [C for C, score in zip(grid, right, strict=True) if score == max(right)]
    assert len(set(right)) > 3 and len(best) == 1
    seen = []
    module = sys.modules[select_c.__module__]
    monkeypatch.setattr(module, "standardize", lambda *a: seen.append(a) or standardize(*a))
    assert select_c(X, y, grid[::-1], seed=7) == (best[0], "")
    assert [[len(part) for part in parts] for parts in seen] == [[160, 40]] * 5


def test_correlated_features_take_few_evaluations(monkeypatch):
    """Neither L-BFGS' own scale nor the Hessian's diagonal may be left out of its first guess."""
    rng, counts = np.random.default_rng(0), []
    X = rng.standard_normal((300, 40)) @ rng.standard_normal((40, 64))
    y = (X[:, :5] + 2 * rng.standard_normal((300, 5))).argmax(axis=1)
    once = Problem.evaluate
    monkeypatch.setattr(Problem, "evaluate", lambda *given: counts.append(1) or once(*given))
    for C, most in ((1, 32), (100, 95)):
        counts.clear()
        LogisticRegression(C).fit((X / X.std(0)).astype(np.float32), y)
        assert 0 < len(counts) < most


def test_of_equals_the_middle_one_is_best_and_of_two_the_larger():
    assert best_of("C", (1, 2, 3, 4, 5), [7, 8, 8, 8, 7]) == (3, "")
    assert best_of("C", (1, 2, 3, 4), [7, 8, 8, 7]) == (3, "")


def test_select_c_warns_at_both_edges_of_its_grid():
    X, y = clusters(300, 10, 3, spread=0.6)
    C, _ = select_c(X, y)
    for grid in ([C, 1e7], [1e-9, C]):
        chosen, warning = select_c(X, y, grid)
        assert chosen == C
        assert f"the best C, {C:g}, is at the edge" in warning
    assert select_c(X, y, [C, 1e-9, 1e7]) == (C, "")


def test_select_c_takes_the_middle_one_of_equals():
    X, y = clusters(100, 10, 3, spread=9)
    assert select_c(X, y, [1.0, 2.0, 3.0, 4.0, 5.0]) == (3.0, "")


def test_select_c_says_that_it_chose_blindly():
    C, warning = select_c(np.ones((13, 3)), np.arange(13) % 12)
    assert C == 1 and "all C did alike: too few labelled images, or" in warning


def test_select_c_without_labels_to_spare():
    X, y = clusters(4, 12, 4)
    C, warning = select_c(X, y)
    assert C == 1
    assert "too few labelled images" in warning


def test_classes_missing_from_the_held_out_part_or_the_labels():
    X, y = clusters(60, 12, 3, spread=4)
    y[y == 2] = 1
    y[7] = 2  # a class of one image is never held out
    assert 7 in stratified(y, 48)
    assert select_c(X, y)[0] > 0
    result = measure(X, y, X, np.where(y == 0, 9, y))  # class 9 was never labelled
    assert result["top1"] <= (y != 0).mean()


def test_measure_looks_at_the_test_images_once(monkeypatch):
    X, y = clusters(130, 12, 4, spread=1.0)
    y = 10 - 3 * y  # names of classes, not their places
    seen, kept = [], X.copy()
    original = LogisticRegression.decision_function

    def decision_function(self, X):
        seen.append(len(X))
        return original(self, X)

    monkeypatch.setattr(LogisticRegression, "decision_function", decision_function)
    result = measure(X[:90], y[:90], X[90:], y[90:])
    assert seen.count(40) == 1
    assert set(seen) == {18, 40}
    np.testing.assert_array_equal(X, kept)  # else what follows would be of other features, too
    # ... and its figures are those of a fit to all labels with that C.
    mean, deviation = X[:90].mean(0), X[:90].std(0)
    model = tight(result["C"]).fit((X[:90] - mean) / deviation, y[:90])
    assert result["top1"] == model.score((X[90:] - mean) / deviation, y[90:])
    assert result["top5"] == 1  # of four classes
    assert result["knn"] == knn_score(X[:90], y[:90], X[90:], y[90:])


def test_top_5_counts_the_five_likeliest_classes():
    X, y = clusters(400, 8, 12, spread=0.7)
    result = measure(X[:300], y[:300], X[300:], y[300:])
    Z, test_Z = standardize(X[:300], X[300:])
    scores = LogisticRegression(result["C"]).fit(Z, y[:300]).decision_function(test_Z)
    own = scores[np.arange(100), y[300:]]
    assert result["top5"] == ((scores > own[:, None]).sum(1) < 5).mean()
    assert result["top1"] < result["top5"] < 1


def test_chance_is_the_share_of_the_commonest_class():
    """One over their number says too little where classes differ in size, or some have no test."""
    assert majority_share(np.array([7, 2, 2, 9])) == 0.5
    labels = np.where(np.arange(120) % 8 == 1, 1, 0)  # 90 % zeros in the test, and no 2
    labels[:6] = [0, 1, 2, 0, 1, 2]
    seen = Colours(labels=labels)
    result = probed(seen)
    test = labels[seen.split("test")]
    assert result["classes"] == 3
    assert result["controls"]["chance"] == (test == 0).mean() > 0.7


@pytest.mark.parametrize("hits, n", [(0, 7), (3, 10), (10, 10), (60, 60), (412, 6864)])
def test_wilson_interval(hits, n):
    stats = pytest.importorskip("scipy.stats")
    theirs = stats.binomtest(hits, n).proportion_ci(method="wilson")
    low, high = wilson_interval(hits / n, n)
    assert [low, high] == pytest.approx([*theirs], abs=1e-6)


@pytest.mark.parametrize("n", [1, 6, 24, 1200])
def test_a_share_lies_in_its_own_interval(n):
    for hits in range(n + 1):
        low, high = wilson_interval(hits / n, n)
        assert 0 <= low <= hits / n <= high <= 1


class Colours(SimpleNamespace):
    """A data set of noisy pictures, each class in a hue of its own; duck-typed."""

    name = "colours"

    def __init__(self, n=120, classes=3, labels=None, size=20):
        rng = np.random.default_rng(0)
        y = np.arange(n) % classes if labels is None else labels
        hue = rng.integers(60, 190, (classes + 1, 3))
        noise = rng.integers(-60, 60, (n, size, size, 3))
        self.images = (hue[y][:, None, None] + noise).clip(0, 255).astype(np.uint8)
        self.duplicate_of = np.arange(n)
        self.labels, self.class_names = y, tuple(f"class {k}" for k in range(classes))

    def split(self, name):
        labelled = np.arange(0, len(self.labels), 2)[:50]
        return {"labelled": labelled, "test": np.setdiff1d(np.arange(120), labelled)}[name]


def mean_colour(views):
    return views.mean((1, 2))


def probed(dataset, encode=mean_colour, **options):
    """probe() of an encoder beside one that knows nothing."""

    def no_idea(rows):
        return np.random.default_rng(len(rows)).normal(size=(len(rows), 6)).astype(np.float32)

    def extract(rows):
        return features(encode, dataset.images, rows, 16)

    return probe(dataset, "SimCLR", extract, lambda: no_idea, **options)


def test_probe_has_the_form_of_probe_json():
    colours = Colours()
    colours.class_names += ("without labels",)
    result = json.loads(json.dumps(probed(colours)))
    assert (result["labels"], result["test"], result["classes"]) == (50, 70, 4)
    assert result["top1"] == result["top5"] == 1
    assert result["knn"] > 0.9
    assert result["ci95"] == pytest.approx(wilson_interval(1.0, 70))
    controls = result["controls"]
    assert controls["chance"] == pytest.approx(24 / 70)  # the commonest of three classes
    assert controls["pixels"] > 0.9
    assert controls["random_encoder"] < 0.6
    text = table(result)
    assert [line[:14].strip() for line in text.splitlines()[:5]] == [
        "system",
        "SimCLR",
        "random encoder",
        "raw pixels",
        "chance",
    ]
    assert text.splitlines()[5] == "50 labelled images, 70 to test, 4 classes"
    assert "100.0%" in text and "34.3%" in text and " 94.8% - 100.0%  100.0%" in text
    result["rows"]["raw pixels"]["warning"] = "the best C, 1, is at the edge"
    assert table(result).endswith("warning (raw pixels): the best C, 1, is at the edge")


def test_the_probe_s_pixels_and_folds_are_those_it_names():
    noise = Colours()
    noise.labels = np.random.default_rng(0).permutation(noise.labels)
    row = probed(noise, labels=20, seed=7)["rows"]["raw pixels"]
    train, test = labelled_and_test(noise, 20, 7)
    X = features(lambda views: views.reshape(len(views), -1), noise.images, np.arange(120), 16)
    given = X[train], noise.labels[train], X[test], noise.labels[test]
    assert row == measure(*given, seed=7) != measure(*given)


def test_choosing_the_penalty_shows_progress():
    told = []

    def notify(event, values):
        told.append((event, *values.values()))

    def fits(count, *of):
        return [("progress", "choosing the penalty", k + 1, count, *of) for k in range(count)]

    probed(Colours(), notify=notify)
    systems = "SimCLR", "random encoder", "raw pixels"
    assert told == [fit for system in systems for fit in fits(5 * len(C_GRID), system)]
    assert told[0][1] in PASSING  # its bar goes when it is done
    told.clear()
    select_c(np.eye(3), np.array([0, 0, 1]), notify=notify)  # only two folds can be fitted to
    assert told == fits(2 * len(C_GRID))


def test_test_images_that_spoil_the_figure_are_told():
    colours = Colours()
    rows, labelled = colours.split("test"), colours.split("labelled")
    colours.duplicate_of[rows[:2]] = labelled[5], rows[2]  # a labelled, and a test image
    with pytest.warns(UserWarning, match="1 of 70 test images are in other splits too"):
        labelled_and_test(colours)
    with pytest.warns(UserWarning, match="1 of 70 test"):  # seen in training without labels
        assert labelled[5] not in labelled_and_test(colours, 9)[0]
    colours.duplicate_of = np.arange(120)
    colours.duplicate_of[rows[0]], colours.labels[rows[1]] = rows[1], -1  # both only to test with
    labelled_and_test(colours)
    colours.labels[rows[1]] = rows[1] % 3
    colours.labels[labelled] = colours.labels[labelled].clip(0, 1)
    lost = (colours.labels[rows] == 2).sum()
    with pytest.warns(UserWarning, match=f"{lost} of 70 test .* of classes without labels"):
        labelled_and_test(colours)


def test_test_images_that_were_pre_trained_on_are_told():
    colours = Colours(240)  # the last 120 are in neither of the two splits
    rows = colours.split("test")
    colours.duplicate_of[[130, 140]] = rows[0], 131
    with pytest.warns(UserWarning, match="1 of 70 test images are in other splits too"):
        labelled_and_test(colours)


def test_probe_with_fewer_labels_takes_them_from_every_class():
    seen = []

    def encode(views):
        seen.append(len(views))
        return mean_colour(views)

    result = probed(Colours(), encode, labels=9, seed=3)
    assert result["labels"] == 9
    assert seen == [9, 70]
    assert result["top1"] > 0.9
    one, other = (set(labelled_and_test(Colours(), 9, seed)[0]) for seed in (3, 4))
    assert one != other
    with pytest.raises(ConfigError, match="51 of 50 labelled"):
        probed(Colours(), encode, labels=51)


def test_pictures_without_a_label_are_left_out():
    labels = np.arange(120) % 3
    labels[:30] = -1
    result = probed(Colours(labels=labels))
    assert (result["labels"], result["test"]) == (35, 55)


@pytest.mark.parametrize("labels, found", [
    (np.full(120, -1), "labelled: 0, their classes: 0"),
    (np.full(120, 0), "labelled: 50, their classes: 1"),
    (np.where((np.arange(120) % 2 == 0) & (np.arange(120) < 100), np.arange(120) % 3, -1),
     "labelled: 50, their classes: 3, to test with: 0"),
])  # fmt: skip
def test_probe_says_why_it_cannot(labels, found):
    dataset = Colours(labels=labels)
    with pytest.raises(DataError, match=f"labelled images of at least two classes.*{found}"):
        probed(dataset)


def test_features_keep_the_order_of_rows_in_any_batches():
    dataset = Colours()
    rows = np.random.default_rng(1).permutation(120)[:50]
    whole = features(mean_colour, dataset.images, rows, 16, batch_size=50)
    parts = features(mean_colour, dataset.images, rows, 16, batch_size=7)
    assert whole.shape == (50, 3) and whole.dtype == np.float32
    assert parts == pytest.approx(whole, abs=1e-6)
    centre = dataset.images[rows][:, 1:19, 1:19].mean((1, 2)) / 255
    assert whole == pytest.approx(centre, abs=0.02)


# Neighbours and statistics


def test_knn_among_many_does_not_fill_the_memory(monkeypatch):
    sizes = []
    monkeypatch.setattr(
        np, "argpartition", lambda s, k, axis: sizes.append(s.size) or np.zeros((len(s), 5), int)
    )
    X, y = np.ones((2**19, 1), np.float32), np.zeros(2**19)
    assert knn_score(X, y, X[:64], y[:64], k=5) == 1
    assert sizes == [2**24, 2**24]


@pytest.mark.parametrize("k, n", [(1, 40), (7, 40), (200, 40), (200, 600)])
def test_knn_against_a_loop(k, n):
    X, y = clusters(n, 6, 5, spread=4, seed=k)
    test_X, test_y = clusters(530, 6, 5, spread=4, seed=k + 1)
    right = 0
    for x, label in zip(test_X, test_y, strict=True):
        cosine = X @ x / np.linalg.norm(X, axis=1) / np.linalg.norm(x)
        votes = np.zeros(5)
        for i in np.argsort(-cosine)[:k]:
            votes[y[i]] += np.exp(cosine[i] / 0.07)
        right += votes.argmax() == label
    names = np.array(["e", "d", "c", "b", "a"])
    given = [] if k == 200 else [k]  # 200 need not be said
    assert knn_score(X, names[y], test_X, names[test_y], *given) == right / 530


def test_alignment():
    z = np.random.default_rng(0).normal(size=(20, 8))
    assert alignment(z, 3 * z) == pytest.approx(0, abs=1e-12)
    assert alignment(z, -z) == pytest.approx(4)
    assert alignment(np.zeros((2, 3)), np.eye(2, 3)) == pytest.approx(1)  # and no warning
    assert alignment(np.eye(4), np.roll(np.eye(4), 1, axis=0)) == pytest.approx(2)


def test_uniformity():
    assert uniformity(np.ones((9, 5))) == pytest.approx(0, abs=1e-9)
    assert uniformity(np.zeros((9, 5))) == 0
    assert uniformity(np.array([[2.0, 0.0], [-3.0, 0.0]])) == pytest.approx(-8)
    assert uniformity(np.eye(6)) == pytest.approx(-4)
    z = np.random.default_rng(0).normal(size=(15, 4))
    u = z / np.linalg.norm(z, axis=1, keepdims=True)
    pairs = [np.exp(-2 * ((u[i] - u[j]) ** 2).sum()) for i in range(15) for j in range(i)]
    assert uniformity(z) == pytest.approx(np.log(np.mean(pairs)))


def test_effective_rank():
    assert effective_rank(7 * np.eye(10, 6)) == pytest.approx(6)
    assert effective_rank(np.outer(np.arange(1.0, 9), np.ones(5))) == pytest.approx(1)
    assert effective_rank(np.diag([3.0, 1.0])) == pytest.approx(4 / 3**0.75)
    assert effective_rank(np.zeros((4, 3))) == 1
    for shape in ((30, 9), (9, 30)):
        h = np.random.default_rng(0).normal(size=shape).astype(np.float32)
        s = np.linalg.svd(h.astype(np.float64), compute_uv=False)
        p = s / s.sum()
        assert effective_rank(h) == pytest.approx(np.exp(-(p * np.log(p)).sum()))
    far = np.random.default_rng(0).normal(size=(40, 64)).astype(np.float32) + 30
    assert effective_rank(far) == pytest.approx(effective_rank(far.astype(np.float64)), rel=1e-9)


def test_what_is_no_number_is_neither_a_feature_nor_a_label():
    X, y = clusters()
    model = tight().fit(X, y)
    with pytest.raises(DataError, match="not finite"):
        model.predict(np.where(np.arange(len(X[0])) == 3, np.nan, X))
    with pytest.raises(DataError, match="a label is not a number"):
        tight().fit(X, np.where(y == 1, np.nan, y))


def test_labels_may_be_names_however_they_are_stored():
    X, y = clusters()
    names = np.array(["ant", "bee", "cat", "dog"])[y]
    for kind in (names.astype(object), names.tolist()):
        assert tight().fit(X, kind).score(X, names) == tight().fit(X, names).score(X, kind) > 0.9


def test_votes_do_not_vanish_at_a_low_temperature():
    X, y = clusters()
    nearest = knn_score(X, y, X + 0.1, y, k=1)
    assert nearest > 0.9 and knn_score(X, y, X + 0.1, y, temperature=1e-4) == nearest
    far = np.array([[1.0, 0], [-1, -0.5]])  # the second has no neighbour near by
    assert knn_score(np.eye(2), np.arange(2), far, np.arange(2), temperature=1e-4) == 1
    for wrong in -1, 0, np.nan:
        with pytest.raises(ConfigError, match=f"T above 0, not 5 and {wrong}"):
            knn_score(X, y, X, y, 5, wrong)


def test_what_is_held_out_is_of_its_seed():
    labels = np.repeat([0, 1], 50)
    fit, _ = holdout(labels, 3)
    assert set(fit) == set(stratified(labels, 80, 3)) and set(fit) != set(holdout(labels, 4)[0])


def test_columns_of_the_table_hold_what_they_name():
    row = {"top1": 0.25, "ci95": [0.125, 0.5], "top5": 0.75, "knn": 0.375, "warning": ""}
    counts = {"labels": 1, "test": 2, "classes": 3}
    name = "a name of weights.safetensors"
    text = table({"rows": {name: row}, "controls": {"chance": 0.1}, **counts})
    head, line, *_ = text.splitlines()
    assert line.removeprefix(name).split() == ["25.0%", "12.5%", "-", "50.0%", "75.0%", "37.5%"]
    assert len(head) == len(line)
    assert " ".join(head.split()) == "system top-1 95 % interval top-5 kNN"
