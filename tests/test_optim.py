"""Optimizers against the written rule, step by step; schedules at their corners."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minisimclr.optim import LARS, SGD
from minisimclr.schedule import scaled_rate, warmup_cosine
from minisimclr.tensor import Parameter, Tensor

W = [0.5, -1.0, 2.0]
CASES = [  # adapt, start, gradients of successive steps
    (True, W, [[0.1, 0.2, -0.3]] * 3),
    (True, W, [[0.1, 0.2, -0.3], [0.0, 0.0, 0.0], [5.0, -5.0, 1.0]]),
    (True, [0.0, 0.0, 0.0], [[0.1, 0.2, -0.3]] * 2),  # norm of the weight 0: trust 1
    (True, W, [[-5e-7 * 1, 1e-6, -2e-6]] * 2),  # the gradient cancels the decay: norm 0, trust 1
    (False, W, [[0.1, 0.2, -0.3]] * 3),  # neither decayed nor adapted
    (False, W, [[0.1, 0.2, -0.3], [0.0, 0.0, 0.0]]),
]


def official_lars(w, gradients, rates, adapt, momentum=0.9, decay=1e-6, eeta=0.001):
    """google-research/simclr, lars_optimizer.py with classic momentum, in words turned to
    floats.
    """
    w, v = np.array(w), np.zeros(len(w))
    for g, lr in zip(np.array(gradients), rates, strict=True):
        trust = 1.0
        if adapt:
            g = g + decay * w
            w_norm, g_norm = np.linalg.norm(w), np.linalg.norm(g)
            if w_norm > 0 and g_norm > 0:
                trust = eeta * w_norm / g_norm
        v = momentum * v + lr * trust * g
        w = w - v
    return w


@pytest.mark.parametrize("adapt, start, gradients", CASES)
def test_lars_is_the_official_rule(adapt, start, gradients):
    p = Parameter(np.array(start), adapt=adapt)
    optimizer = LARS([("p", p)], lr=0.0)
    rates = [2.0, 1.0, 0.5][: len(gradients)]
    for g, lr in zip(gradients, rates, strict=True):
        p.grad, optimizer.lr = np.array(g), lr
        optimizer.step()
    expected = official_lars(start, gradients, rates, adapt=adapt)
    np.testing.assert_allclose(p.data, expected, rtol=1e-12)


def test_sgd_matches_torch_at_a_constant_rate():
    torch = pytest.importorskip("torch")
    p, bias = Parameter(np.array(W)), Parameter(np.array(W), adapt=False)
    ours = SGD([("p", p), ("b", bias)], 0.1, momentum=0.9, weight_decay=0.01)
    tp, tb = (torch.tensor(W, dtype=torch.float64, requires_grad=True) for _ in range(2))
    groups = [{"params": [tp], "weight_decay": 0.01}, {"params": [tb]}]
    theirs = torch.optim.SGD(groups, 0.1, momentum=0.9)
    for i in range(4):
        g = np.random.default_rng(i).standard_normal(3)
        p.grad = bias.grad = g
        tp.grad, tb.grad = torch.tensor(g), torch.tensor(g)
        ours.step()
        theirs.step()
    np.testing.assert_allclose(p.data, tp.detach(), rtol=1e-12)
    np.testing.assert_allclose(bias.data, tb.detach(), rtol=1e-12)
    assert (p.data != bias.data).all()


def test_parameters_of_one_name_are_refused():
    p, q = (Parameter(np.ones(2)) for _ in range(2))
    with pytest.raises(ValueError, match="two parameters are called 'w': put a prefix"):
        SGD([("w", p), ("w", q)], lr=0.1)
    with pytest.raises(ValueError, match=r"'enc\.w' and 'dec\.w' are one parameter: give it once"):
        SGD([("enc.w", p), ("q", q), ("dec.w", p)], lr=0.1)


@pytest.mark.parametrize("kind", [SGD, LARS])
@pytest.mark.parametrize("setting", ["lr", "momentum", "weight_decay"])
def test_settings_that_are_no_rates_are_refused(kind, setting):
    p = Parameter(np.ones(2, np.float32))
    for wrong in (-1e-9, np.nan, None, "1"):
        with pytest.raises(ValueError if isinstance(wrong, float) else TypeError):
            kind([("w", p)], **{"lr": 0.1} | {setting: wrong})
    p.grad = np.ones(2, np.float32)
    optimizer = kind([("w", p)], lr=0.1)
    setattr(optimizer, setting, None)  # as from a schedule without a return
    with pytest.raises(TypeError):
        optimizer.step()
    assert np.isfinite(p.data).all()


@pytest.mark.parametrize("kind", [SGD, LARS])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_step_that_is_not_sound_moves_nothing(kind, dtype):
    p = Parameter(np.ones(2, dtype))
    optimizer, p.grad = kind([("w", p)], lr=0.1), np.full(2, np.nan, dtype)
    optimizer.step(np.bool_(False))
    assert (p.data == 1).all() and not optimizer.state_dict()["w"].any()


@pytest.mark.parametrize("kind", [SGD, LARS])
def test_without_gradients_nothing_moves(kind):
    optimizer = kind([("w", Parameter(np.ones(2, np.float32)))], lr=0.1)
    assert optimizer.gradient_square() == 0
    optimizer.step()
    assert (optimizer.parameters["w"].data == 1).all()


def test_what_is_no_named_parameter_is_refused():
    weight, bias = Parameter(np.ones((2, 5))), Parameter(np.ones(2))
    wide = Parameter(np.ones((3, 2)))  # whose rows would unpack, as a pair's would
    pairs = [("w", weight.data), ("w", Tensor(np.ones(2), True)), (None, bias), ()]
    for named in ([weight, bias], [wide], *([pair] for pair in pairs)):
        with pytest.raises(TypeError, match=r"named_parameters\(\)"):
            SGD(named, lr=0.1)
    assert SGD([["w", bias]], lr=0.1).parameters == {"w": bias}
    with pytest.raises(ValueError, match="no parameters to move"):
        SGD(iter([]), lr=0.1)


@pytest.mark.parametrize("kind", [SGD, LARS])
def test_a_number_in_place_of_an_array_is_not_left_behind(kind):
    p = Parameter(np.array(2.0, np.float32), adapt=False)
    p.data = p.data.clip(0, 0.5)  # NumPy makes a number of it
    p.grad = np.ones((), np.float32)
    kind([("p", p)], 0.1).step()
    assert isinstance(p.data, np.ndarray) and p.data == np.float32(0.5) - np.float32(0.1)


def test_parameters_without_a_gradient_stay_and_zero_grad_forgets():
    p = Parameter(np.array(W))
    optimizer = SGD([("p", p)], 0.1)
    optimizer.step()
    np.testing.assert_array_equal(p.data, W)
    p.grad = np.ones(3)
    optimizer.zero_grad()
    assert p.grad is None


def test_the_trust_of_a_large_weight_without_a_gradient_is_1():
    p = Parameter(np.full((64, 64), 100, np.float32))
    p.grad = np.zeros_like(p.data)
    optimizer = LARS([("p", p)], 0.1, weight_decay=0.0)
    optimizer.step()  # a quotient that overflows would warn
    assert optimizer.trust["p"] == 1 and (p.data == 100).all()


def test_trust_counts_the_decay_of_each_weight():
    class Halved(LARS):
        def decay_of(self, p):
            return 0.5

    p = Parameter(np.ones(4))
    p.grad = np.ones(4)
    optimizer = Halved([("p", p)], 0.1, weight_decay=0.0, eeta=1.0)
    optimizer.step()
    assert optimizer.trust["p"] == pytest.approx(1 / 1.5)  # |w| / |g + 0.5 w|


@pytest.mark.parametrize("kind", [SGD, LARS])
def test_state_restores_exactly(kind):
    def advance(optimizer, p, steps):
        for i in steps:
            p.grad = np.random.default_rng(i).standard_normal(3)
            optimizer.step()

    p, q = Parameter(np.array(W)), Parameter(np.array(W))
    a, b = kind([("p", p)], 0.1), kind([("p", q)], 0.1)
    advance(a, p, range(6))
    advance(b, q, range(3))
    c, kept = kind([("p", q)], 0.1), b.state_dict()
    c.load_state_dict(kept)
    before = kept["p"].copy()
    advance(c, q, range(3, 6))
    np.testing.assert_array_equal(kept["p"], before)
    np.testing.assert_array_equal(p.data, q.data)
    for state in ({}, {"p": np.ones(1)}, {"q": np.ones(3)}, {"p": np.ones(3), "q": np.ones(3)}):
        with pytest.raises(ValueError, match="other names or shapes"):
            c.load_state_dict(state)
    np.testing.assert_array_equal(c.state_dict()["p"], last := a.state_dict()["p"])
    before = last.copy()
    advance(a, p, range(6, 7))
    np.testing.assert_array_equal(last, before)


def test_schedule_corners():
    def rate(step):
        return warmup_cosine(step, 2.0, 10, 110)

    assert rate(0) == 0
    assert rate(5) == 1.0
    assert rate(10) == 2.0
    assert rate(60) == pytest.approx(1.0)
    assert rate(110) == pytest.approx(0.0)
    assert rate(140) == pytest.approx(0.0)  # and not up again
    assert warmup_cosine(1, 2.0, 0, 1) == pytest.approx(0.0)
    assert warmup_cosine(10, 2.0, 10, 10) == 2.0  # nothing but warm-up
    assert warmup_cosine(0, 2.0, 0, 100) == 2.0


@given(st.integers(0, 200), st.integers(0, 50))
def test_schedule_stays_between_zero_and_peak(step, warmup):
    assert 0 <= warmup_cosine(step, 1.0, warmup, 200) <= 1


def test_batch_scaling():
    assert scaled_rate(0.3, 512, "linear") == pytest.approx(0.6)
    assert scaled_rate(0.3, 128, "linear") == pytest.approx(0.15)
    assert scaled_rate(0.075, 4096, "sqrt") == pytest.approx(scaled_rate(0.3, 4096, "linear"))
    assert scaled_rate(0.3, 512, "none") == 0.3


@pytest.mark.parametrize("eeta", [0.0, -1.0, np.nan])
def test_lars_has_to_move_weights(eeta):
    with pytest.raises(ValueError, match="eeta must be positive, not"):
        LARS([("w", Parameter(np.ones(2)))], 0.1, eeta=eeta)


def test_a_gradient_of_another_shape_is_refused():
    w = Parameter(np.zeros((2, 3), np.float32))
    w.grad = np.ones((3, 2), np.float32)
    for optimizer in (SGD([("w", w)], 0.1), LARS([("w", w)], 0.1)):
        with pytest.raises(ValueError, match=r"w has shape \(2, 3\), and its gradient \(3, 2\)"):
            optimizer.step()
    assert not w.data.any()
