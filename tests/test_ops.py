"""Every operation: gradients against finite differences, values and gradients against torch."""

import re
import weakref

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minisimclr.ops import loss, norm
from minisimclr.ops.basic import relu
from minisimclr.ops.conv import conv2d, fold, output_size, unfold
from minisimclr.ops.loss import contrastive_accuracy, cross_entropy, nt_xent
from minisimclr.ops.norm import batch_norm, merge_moments, moments
from minisimclr.ops.pool import average_pool, global_average_pool, max_pool
from minisimclr.ops.product import linear
from minisimclr.tensor import Tensor, gradcheck


def randn(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def running(c):
    return np.full(c, 0.3), np.full(c, 2.0)


CONVS = [  # H, W, C, O, kernel, stride, padding
    (7, 8, 3, 5, (3, 3), (1, 1), (1, 1)),
    (9, 9, 2, 4, (3, 3), (2, 2), (1, 1)),
    (8, 11, 3, 2, (1, 7), (1, 1), (0, 3)),
    (11, 8, 1, 3, (7, 1), (2, 1), (3, 0)),
    (6, 6, 4, 4, (1, 1), (1, 1), (0, 0)),
    (7, 5, 4, 6, (1, 1), (2, 2), (0, 0)),
    (13, 12, 3, 4, (7, 7), (2, 2), (3, 3)),
    (5, 5, 2, 3, (5, 5), (1, 1), (0, 0)),
    (4, 6, 2, 3, (2, 3), (3, 2), (1, 0)),
]


@pytest.mark.parametrize("h, w, c, o, kernel, stride, padding", CONVS)
def test_conv2d(h, w, c, o, kernel, stride, padding):
    x, weight = randn(3, h, w, c), randn(*kernel, c, o, seed=1)
    gradcheck(lambda x, w: conv2d(x, w, stride, padding), x, weight)
    torch = pytest.importorskip("torch")
    tx = torch.tensor(x.transpose(0, 3, 1, 2), requires_grad=True)
    tw = torch.tensor(weight.transpose(3, 2, 0, 1), requires_grad=True)
    ty = torch.nn.functional.conv2d(tx, tw, stride=stride, padding=padding)
    ours = Tensor(x, True), Tensor(weight, True)
    y = conv2d(*ours, stride, padding)
    np.testing.assert_allclose(y.data, ty.detach().permute(0, 2, 3, 1), rtol=1e-10, atol=1e-10)
    gy = randn(*y.shape, seed=2)
    y.backward(gy)
    ty.backward(torch.tensor(gy.transpose(0, 3, 1, 2)))
    np.testing.assert_allclose(ours[0].grad, tx.grad.permute(0, 2, 3, 1), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(ours[1].grad, tw.grad.permute(2, 3, 1, 0), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("stride, padding", [((0, 1), 1), (1, (0, -1)), (1, -4)])
def test_a_convolution_without_a_result_is_refused(stride, padding):
    with pytest.raises(ValueError, match=r"stride .* must be 1 or more, padding .* 0 or more"):
        conv2d(Tensor(randn(2, 7, 7, 3)), Tensor(randn(3, 3, 3, 4)), stride, padding)


@settings(max_examples=30, deadline=None)
@given(
    st.tuples(st.integers(3, 8), st.integers(3, 8)),
    st.tuples(st.integers(1, 3), st.integers(1, 3)),
    st.tuples(st.integers(1, 3), st.integers(1, 3)),
    st.tuples(st.integers(0, 2), st.integers(0, 2)),
)
def test_fold_is_the_transpose_of_unfold(image, kernel, stride, padding):
    x = randn(2, *image, 3)
    size = output_size(x.shape, (*kernel, 3, 1), stride, padding)
    patches = unfold(x, kernel, stride, padding, size)
    u = randn(*patches.shape, seed=1)
    folded = fold(u, np.empty_like(x), kernel, stride, padding, size)
    fold(u[:0], np.empty_like(x[:0]), kernel, stride, padding, size)  # of no image
    with pytest.raises(ValueError, match="cannot reshape"):
        fold(u[:, :-1], np.empty_like(x), kernel, stride, padding, size)
    np.testing.assert_allclose((patches * u).sum(), (x * folded).sum(), rtol=1e-10, atol=1e-10)


def test_conv2d_blocks_of_the_batch_change_nothing(monkeypatch):
    x, w = randn(7, 6, 6, 3), randn(3, 3, 3, 4, seed=1)
    whole = conv2d(Tensor(x), Tensor(w), 1, 1).data
    monkeypatch.setattr("minisimclr.ops.conv.WORKSPACE", 2 * 36 * 27)
    np.testing.assert_allclose(conv2d(Tensor(x), Tensor(w), 1, 1).data, whole, rtol=1e-12)
    gradcheck(lambda x, w: conv2d(x, w, 1, 1), x, w)


def test_conv2d_errors_name_the_shapes():
    with pytest.raises(ValueError, match=r"\(3, 3, 2, 5\) does not fit images \(1, 4, 4, 3\)"):
        conv2d(Tensor(randn(1, 4, 4, 3)), Tensor(randn(3, 3, 2, 5)))
    for image in ((1, 2, 2, 3), (1, 2, 9, 3), (1, 9, 2, 3)):
        with pytest.raises(ValueError, match="does not fit"):
            conv2d(Tensor(randn(*image)), Tensor(randn(3, 3, 3, 5)))
    with pytest.raises(ValueError, match=r"stride \(0, 0\)"):
        conv2d(Tensor(randn(1, 4, 4, 3)), Tensor(randn(3, 3, 3, 5)), stride=0)
    for image in ((32, 32, 3), (3, 32), (2, 4, 4, 3, 3)):  # first of all: one without its batch
        with pytest.raises(ValueError, match=re.escape(f"does not fit images {image}")):
            conv2d(Tensor(randn(*image)), Tensor(randn(3, 3, 3, 5)))
    for kernel in ((3, 5), (3, 3, 3), (3, 3, 3, 5, 1)):
        with pytest.raises(ValueError, match=re.escape(f"weight {kernel} does not fit")):
            conv2d(Tensor(randn(1, 4, 4, 3)), Tensor(randn(*kernel)))


class Swish(norm.BatchNorm):
    """Makes more of what it inherits."""

    def forward(self, x, gamma, beta):
        self.h = super().forward(x, gamma, beta)
        return self.h / (1 + np.exp(-self.h))

    def backward(self, gy):
        p = 1 / (1 + np.exp(-self.h))
        return super().backward(gy * (p + self.h * p * (1 - p)))


def test_conv2d_asks_batch_norm_only_for_what_it_was_given():
    x, w, mask = randn(2, 4, 4, 3), randn(3, 3, 3, 2, seed=1), randn(2, 4, 4, 3, seed=2)
    weight = Tensor(w, requires_grad=True)
    for changed in (False, True):
        y = batch_norm(Tensor(x, True), Tensor(np.ones(3)), Tensor(np.zeros(3)), running(3), True)
        if changed:
            y.data = y.data * mask
        z = conv2d(y, weight)
        assert bool(z.creator.source) != changed
        z.sum().backward()
        # (2, 3, 3, 3, 2, 2): what each number of the kernel is multiplied by
        taken = np.lib.stride_tricks.sliding_window_view(y.data, (2, 2), (1, 2))
        np.testing.assert_allclose(weight.grad[..., 0], taken.sum((0, 4, 5)), rtol=0, atol=1e-9)
        weight.grad = None
    y = batch_norm(Tensor(x, True), Tensor(np.ones(3)), Tensor(np.zeros(3)), running(3), True)
    y.sum().backward()  # after which batch norm has nothing left
    np.testing.assert_array_equal(conv2d(y, weight).data, conv2d(Tensor(y.data), weight).data)
    vectors = np.ones(3), np.zeros(3)
    gradcheck(lambda *a: conv2d(Swish(False, 1e-5)(*a[:3]), a[3]), x, *vectors, w)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("shape", [(4, 3, 5, 6), (9, 6)])
def test_batch_norm(relu, training, residual, shape):
    x, gamma, beta = randn(*shape), randn(6, seed=1), randn(6, seed=2)
    extra = (randn(*shape, seed=3),) if residual else ()

    def fused(x, gamma, beta, *r):
        return batch_norm(
            x, gamma, beta, running(6), training, residual=r[0] if r else None, relu=relu
        )

    def composed(x, gamma, beta, *r):
        y = batch_norm(x, gamma, beta, running(6), training)
        y = y + r[0] if r else y
        return y.relu() if relu else y

    gradcheck(fused, x, gamma, beta, *extra)
    a, b = ([Tensor(v, True) for v in (x, gamma, beta, *extra)] for _ in range(2))
    ya, yb = fused(*a), composed(*b)
    np.testing.assert_allclose(ya.data, yb.data, rtol=1e-12, atol=1e-12)
    u = randn(*shape, seed=4)
    ya.backward(u)
    yb.backward(u)
    for p, q in zip(a, b, strict=True):
        np.testing.assert_allclose(p.grad, q.grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("residual", [False, True])
def test_a_convolution_of_what_batch_norm_made(relu, training, residual):
    """It saves nothing of it, and asks for it again."""

    def run(x, gamma, beta, w, *r):
        y = batch_norm(
            x, gamma, beta, running(4), training, residual=r[0] if r else None, relu=relu
        )
        return conv2d(y, w, 1, 1) + y

    shapes = [(3, 5, 6, 4), (4,), (4,), (3, 3, 4, 4), *[(3, 5, 6, 4)] * residual]
    gradcheck(run, *(randn(*shape, seed=i) for i, shape in enumerate(shapes)))
    if residual:  # x does not tell all of what was made
        return
    x, gamma, beta, w = (Tensor(randn(*shape), True) for shape in shapes)
    y = batch_norm(x, gamma, beta, running(4), training, relu=relu)
    made = weakref.ref(y.data)
    z = conv2d(y, w, 1, 1)
    del y
    assert z.creator.x is None and z.creator.source
    assert relu or made() is None  # for ReLU's gradient, batch norm keeps it


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("residual", [False, True])
def test_batch_norm_writes_only_into_its_own(relu, residual):
    """In float32, where it may run in place, with a gradient that others need as well."""

    def gradients(dtype):
        shapes = ((8, 3, 5, 6), (6,), (6,), (8, 3, 5, 6))
        x, gamma, beta, r = leaves = [
            Tensor(randn(*shape, seed=i).astype(dtype), True) for i, shape in enumerate(shapes)
        ]
        h, extra = x * 2.0, r * 2.0 if residual else None
        y = h + batch_norm(h, gamma, beta, running(6), True, residual=extra, relu=relu)
        gy = randn(*shapes[0], seed=4).astype(dtype)
        gy.flags.writeable = False
        y.backward(gy)
        return [leaf.grad for leaf in leaves[: 4 if residual else 3]]

    for ours, exact in zip(gradients(np.float32), gradients(np.float64), strict=True):
        np.testing.assert_allclose(ours, exact, rtol=1e-3, atol=1e-4)


def test_batch_norm_matches_torch_with_running_statistics():
    torch = pytest.importorskip("torch")
    x = randn(4, 5, 5, 3)
    norm = torch.nn.BatchNorm2d(3).double()
    expected = norm(torch.tensor(x.transpose(0, 3, 1, 2)))
    mean, variance = np.zeros(3), np.ones(3)
    y = batch_norm(Tensor(x), Tensor(np.ones(3)), Tensor(np.zeros(3)), (mean, variance), True)
    np.testing.assert_allclose(
        y.data, expected.detach().permute(0, 2, 3, 1), rtol=1e-10, atol=1e-10
    )
    np.testing.assert_allclose(mean, norm.running_mean, rtol=1e-12)
    np.testing.assert_allclose(variance, norm.running_var, rtol=1e-12)


def test_moments_survive_a_large_mean():
    x = (np.random.default_rng(0).standard_normal((50_000, 2)) + 1000).astype(np.float32)
    mean, variance = moments(x)
    exact = x.astype(np.float64)
    np.testing.assert_allclose(mean, exact.mean(0), rtol=1e-6)
    np.testing.assert_allclose(variance, exact.var(0), rtol=1e-3)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 20), st.integers(1, 20), st.floats(-1e4, 1e4))
def test_merged_moments_are_those_of_the_whole(n_a, n_b, offset):
    x = randn(n_a + n_b, 3) + offset
    parts = [(len(p), p.mean(0), ((p - p.mean(0)) ** 2).sum(0)) for p in (x[:n_a], x[n_a:])]
    count, mean, m2 = merge_moments(*parts)
    assert count == len(x)
    np.testing.assert_allclose(mean, x.mean(0), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(m2, ((x - x.mean(0)) ** 2).sum(0), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_of_other_channels_is_refused(training):
    x = Tensor(randn(3, 1))  # would broadcast
    with pytest.raises(ValueError, match=r"batch norm of \(4,\) channels does not fit \(3, 1\)"):
        batch_norm(x, Tensor(np.ones(4)), Tensor(np.zeros(4)), running(4), training)


@pytest.mark.parametrize(
    "apply",
    [
        lambda x: nt_xent(x[0, 0], x[0, 1]),
        relu,
        lambda x: conv2d(x, Tensor(randn(3, 3, 2, 4))),
        lambda x: batch_norm(x, Tensor(np.ones(2)), Tensor(np.zeros(2)), running(2), True),
        lambda x: linear(x[0, 0], Tensor(randn(3, 2))),
    ],
)
def test_an_array_in_place_of_a_tensor_is_named(apply):
    with pytest.raises(TypeError, match=r"takes Tensors, not <class 'numpy\.ndarray'>"):
        apply(randn(2, 4, 4, 2))


@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_stretches_nothing(training):
    """A residual or shift of another shape would broadcast, and its gradient would not fit."""
    x, gamma, beta = randn(3, 4), np.ones(4), np.zeros(4)
    for other in ((1, 4), (4,), (3, 1)):
        with pytest.raises(ValueError, match=re.escape(f"residual is {other}, but x is (3, 4)")):
            given = map(Tensor, (x, gamma, beta))
            batch_norm(*given, running(4), training, residual=Tensor(randn(*other)))
    with pytest.raises(ValueError, match="does not fit"):
        batch_norm(Tensor(x), Tensor(gamma), Tensor(np.zeros(1)), running(4), training)


def test_batch_norm_of_one_row_is_refused():
    x = Tensor(randn(1, 4))
    with pytest.raises(ValueError, match="two rows"):
        batch_norm(x, Tensor(np.ones(4)), Tensor(np.zeros(4)), running(4), True)


@pytest.mark.parametrize(
    "kernel, stride, padding",
    [(2, 2, 0), (3, 2, 1), (3, 1, 1), ((2, 3), (1, 2), 0), ((2, 3), (2, 1), (1, 0))],
)
@pytest.mark.parametrize("pool", [max_pool, average_pool])
def test_pooling(pool, kernel, stride, padding):
    x = randn(2, 7, 8, 3)
    gradcheck(lambda x: pool(x, kernel, stride, padding), x)
    torch = pytest.importorskip("torch")
    F = torch.nn.functional
    x = np.maximum(x, 0)  # ties, as after a ReLU: the first of equals gets the gradient
    tx = torch.tensor(x.transpose(0, 3, 1, 2), requires_grad=True)
    options = {} if pool is max_pool else {"count_include_pad": False}
    ty = (F.max_pool2d if pool is max_pool else F.avg_pool2d)(
        tx, kernel, stride, padding, **options
    )
    ours = Tensor(x, True)
    y = pool(ours, kernel, stride, padding)
    np.testing.assert_allclose(y.data, ty.detach().permute(0, 2, 3, 1), rtol=1e-12)
    gy = randn(*y.shape, seed=2)
    y.backward(gy)
    ty.backward(torch.tensor(gy.transpose(0, 3, 1, 2)))
    np.testing.assert_allclose(ours.grad, tx.grad.permute(0, 2, 3, 1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("pool", [max_pool, average_pool])
def test_pooling_that_does_not_fit_is_refused(pool):
    with pytest.raises(ValueError, match=r"kernel \(5, 3\) exceeds images \(2, 4, 4, 1\)"):
        pool(Tensor(np.ones((2, 4, 4, 1))), (5, 3), 1)
    for sizes in ((2, 2, 2), (0, 1, 0), (2, 0, 0)):  # windows of padding alone, of nothing; no step
        with pytest.raises(ValueError, match="kernel must exceed padding, stride must be"):
            pool(Tensor(np.ones((2, 4, 4, 1))), *sizes)
    for sizes in (((2, 3), 1, (2, 0)), ((3, 2), 1, (0, 2)), (2, 1, ((0, 2), (0, 0)))):
        with pytest.raises(ValueError, match="kernel must exceed padding, stride must be"):
            pool(Tensor(np.ones((2, 4, 4, 1))), *sizes)
    with pytest.raises(ValueError, match="256 pixels is too large"):
        max_pool(Tensor(np.ones((2, 16, 16, 1))), 16, 1)
    assert max_pool(Tensor(np.ones((2, 15, 17, 1))), (15, 17), 1).shape == (2, 1, 1, 1)


def test_pooling_with_more_padding_at_the_end():
    """TensorFlow's SAME for 3/2 windows on an even side: nothing before, one pixel after."""
    x = randn(2, 6, 6, 3)
    same = ((0, 1), (0, 1))
    gradcheck(lambda x: max_pool(x, 3, 2, same), x)
    gradcheck(lambda x: average_pool(x, 3, 2, same), x)
    y = max_pool(Tensor(x), 3, 2, same).data
    assert y.shape == (2, 3, 3, 3)
    np.testing.assert_array_equal(y[:, 2, 2], x[:, 4:, 4:].max(axis=(1, 2)))


def test_global_average_pool():
    gradcheck(global_average_pool, randn(2, 3, 4, 5))


def double_loop(z1, z2, temperature):
    """Algorithm 1, letter by letter."""
    z = np.concatenate([z1, z2])
    n = len(z1)
    u = z / np.linalg.norm(z, axis=1, keepdims=True)
    total = 0.0
    for i in range(2 * n):
        j = (i + n) % (2 * n)
        others = [np.exp(u[i] @ u[k] / temperature) for k in range(2 * n) if k != i]
        total += -np.log(np.exp(u[i] @ u[j] / temperature) / sum(others))
    return total / (2 * n)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.floats(0.05, 10), st.integers(0, 1000))
def test_nt_xent_is_algorithm_1_and_blind_to_order_and_scale(n, temperature, seed):
    rng = np.random.default_rng(seed)
    z1, z2 = rng.standard_normal((2, n, 4))
    loss = float(nt_xent(Tensor(z1), Tensor(z2), temperature))
    assert loss == pytest.approx(double_loop(z1, z2, temperature), rel=1e-10)
    order = rng.permutation(n)
    scale = 10.0 ** rng.uniform(-8, 8, (n, 1))
    assert float(nt_xent(Tensor(z1[order]), Tensor(z2[order]), temperature)) == pytest.approx(loss)
    assert float(nt_xent(Tensor(z1 * scale), Tensor(z2), temperature)) == pytest.approx(loss)
    assert float(nt_xent(Tensor(z2), Tensor(z1), temperature)) == pytest.approx(loss)


@pytest.mark.parametrize("n", [2, 64, 512])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_nt_xent_of_a_collapsed_model_is_the_chance_line(n, dtype):
    z = np.tile(randn(1, 8), (n, 1)).astype(dtype)
    assert float(nt_xent(Tensor(z), Tensor(z), 0.5)) == pytest.approx(np.log(2 * n - 1), rel=1e-6)


@pytest.mark.parametrize("block", [loss.BLOCK, 60, 1])  # all 12 rows of similarities, 5, 1
def test_nt_xent_gradients_and_torch(block, monkeypatch):
    monkeypatch.setattr(loss, "BLOCK", block)
    z1, z2 = randn(2, 6, 5)
    gradcheck(lambda a, b: nt_xent(a, b, 0.3), z1, z2)
    torch = pytest.importorskip("torch")
    F = torch.nn.functional
    tz = torch.tensor(np.concatenate([z1, z2]), requires_grad=True)
    u = F.normalize(tz)
    s = (u @ u.T / 0.3).fill_diagonal_(float("-inf"))
    F.cross_entropy(s, (torch.arange(12) + 6) % 12).backward()
    a, b = Tensor(z1, True), Tensor(z2, True)
    nt_xent(a, b, 0.3).backward()
    np.testing.assert_allclose(np.concatenate([a.grad, b.grad]), tz.grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("temperature", [0.005, 0.01, 0.07, 10])
def test_nt_xent_is_stable_in_float32(temperature):
    z1, z2 = randn(2, 32, 16).astype(np.float32)
    a, b = Tensor(z1, True), Tensor(z2, True)
    loss = nt_xent(a, b, temperature)
    loss.backward()
    exact = float(
        nt_xent(Tensor(z1.astype(np.float64)), Tensor(z2.astype(np.float64)), temperature)
    )
    assert float(loss) == pytest.approx(exact, rel=1e-4)
    assert np.isfinite(a.grad).all()


@pytest.mark.parametrize(
    "shapes",
    [((2, 3), (3, 3)), ((2, 3), (2, 4)), ((2, 3, 1), (2, 3, 1)), ((0, 3), (0, 3))],
    ids=str,
)
def test_nt_xent_refuses_other_shapes(shapes):
    with pytest.raises(ValueError, match=r"needs two \(N, D\) embeddings, not"):
        nt_xent(*(Tensor(randn(*shape)) for shape in shapes))


def test_the_temperature_of_nt_xent_is_half_unless_given():
    z1, z2 = map(Tensor, randn(2, 4, 3))
    assert float(nt_xent(z1, z2)) == float(nt_xent(z1, z2, 0.5)) != float(nt_xent(z1, z2, 0.1))


def test_nt_xent_keeps_the_type_of_its_input():
    z = Tensor(randn(2, 3).astype(np.float32), requires_grad=True)
    loss = nt_xent(z, z, np.float64(0.5))
    loss.backward()
    assert loss.dtype == z.grad.dtype == np.float32


def test_nt_xent_of_zero_vectors_is_finite():
    a, b = Tensor(np.zeros((3, 4)), True), Tensor(np.zeros((3, 4)), True)
    nt_xent(a, b).backward()
    assert np.isfinite(a.grad).all()


def test_nt_xent_of_vectors_of_infinite_length_is_no_number():
    """u would be 0 and the loss on the chance line, as if all views were equal."""
    z = 1e20 * randn(4, 8).astype(np.float32)
    with np.errstate(all="ignore"):
        assert np.isnan(float(nt_xent(Tensor(z), Tensor(z))))
        assert np.isfinite(float(nt_xent(Tensor(1e15 * z / 1e20), Tensor(z / 1e20))))


# A Tensor would not be trained.
@pytest.mark.parametrize("temperature", [0, -1, float("nan"), Tensor([0.1])])
def test_nt_xent_refuses_bad_temperatures(temperature):
    with pytest.raises(ValueError, match="temperature must be a positive number, not"):
        nt_xent(Tensor(randn(2, 3)), Tensor(randn(2, 3)), temperature)


def test_contrastive_accuracy():
    z = np.eye(4)
    assert contrastive_accuracy(np.concatenate([z, z])) == 1.0
    assert contrastive_accuracy(np.concatenate([z, z[::-1]])) == 0.0
    alike = np.ones((8, 3))  # of a collapsed model: the partner is no nearer than all others
    assert contrastive_accuracy(alike) <= 1 / 7


@pytest.mark.parametrize("block", [loss.BLOCK, 200, 1])
def test_contrastive_accuracy_in_blocks(block, monkeypatch):
    monkeypatch.setattr(loss, "BLOCK", block)
    z1 = randn(20, 3)
    z2 = z1 + 0.5 * randn(20, 3, seed=1)
    u = np.concatenate([z1, z2])
    u /= np.linalg.norm(u, axis=1, keepdims=True)
    nearest = (u @ u.T - 9 * np.eye(40)).argmax(axis=1)
    found = (nearest == (np.arange(40) + 20) % 40).mean()
    assert 0.2 < found < 0.8 and contrastive_accuracy(np.concatenate([z1, z2])) == found


def test_cross_entropy():
    logits, labels = randn(5, 3), np.array([0, 2, 1, 1, 0])
    for some in (labels, labels * 0 + 2):
        gradcheck(lambda x, y=some: cross_entropy(x, y), logits)
    x, given = Tensor(logits, requires_grad=True), labels.copy()
    loss = cross_entropy(x, given)
    given[:] = 2  # as the next batch's, before the gradient is taken
    loss.backward()
    assert x.grad is not None and (x.grad.argmin(axis=1) == labels).all()
    for off, said in (1, "1 to 3"), (-1, "-1 to 1"):  # -1: without a label
        with pytest.raises(ValueError, match=rf"labels {said}, classes 0 to 2"):
            cross_entropy(Tensor(logits), labels + off)
    others = labels[:4], labels / 2, labels > 0
    for shape, wrong in ((5, 3, 2), labels), *(((5, 3), other) for other in others):
        with pytest.raises(ValueError, match=r"logits \(N, classes\) and integers \(N,\), not"):
            cross_entropy(Tensor(randn(*shape)), wrong)
    with pytest.raises(TypeError, match=r"takes arrays .*, not <class 'list'>"):
        cross_entropy(Tensor(logits), labels.tolist())
    torch = pytest.importorskip("torch")
    expected = torch.nn.functional.cross_entropy(torch.tensor(logits), torch.tensor(labels))
    assert float(cross_entropy(Tensor(logits), labels)) == pytest.approx(expected.item(), rel=1e-12)


def test_a_convolution_makes_the_gradients_that_are_wanted_and_no_others():
    rng = np.random.default_rng(0)
    x, w, gy = (rng.standard_normal(s) for s in ((2, 9, 9, 40), (3, 3, 40, 48), (2, 9, 9, 48)))

    def gradients(dtype, *wanted):
        images, weight, g = (a.astype(dtype) for a in (x, w, gy))
        y = conv2d(Tensor(images, wanted[0]), Tensor(weight, wanted[1]), 1, 1)
        return y.creator.backward(g)

    exact = gradients("f8", True, True)
    for wanted in ((True, False), (False, True), (True, True)):  # float32 has other versions
        for want, gradient, expected in zip(wanted, gradients("f4", *wanted), exact, strict=True):
            assert (gradient is not None) == want
            if want:
                np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-3)


def test_batch_norm_in_evaluation_is_of_the_statistics_it_saw():
    x, statistics = Tensor(randn(6, 3), requires_grad=True), running(3)
    gamma, beta = Tensor(np.ones(3)), Tensor(np.zeros(3))
    y = batch_norm(x, gamma, beta, statistics, training=False)
    expected = 1 / np.sqrt(statistics[1] + 1e-5)
    batch_norm(Tensor(randn(9, 3, seed=1)), gamma, beta, statistics, training=True)
    y.sum().backward()
    np.testing.assert_allclose(x.grad, np.tile(expected, (6, 1)))


@pytest.mark.parametrize("types", [("f4", "f8"), ("f8", "f4")])
def test_conv2d_of_two_types_has_the_better_one(types):
    x, w = randn(2, 8, 8, 16).astype(types[0]), randn(3, 3, 16, 8).astype(types[1])
    y = conv2d(Tensor(x), Tensor(w), 1, 1).data
    expected = conv2d(Tensor(x.astype("f8")), Tensor(w.astype("f8")), 1, 1).data
    assert y.dtype == np.float64
    np.testing.assert_array_equal(y, expected)


def test_sizes_may_be_numpy_s_numbers_and_padding_a_pair():
    x, w = Tensor(randn(1, 7, 6, 2)), Tensor(randn(3, 3, 2, 2))
    one = np.int64(1)
    np.testing.assert_array_equal(conv2d(x, w, one, one).data, conv2d(x, w, 1, 1).data)
    pooled = max_pool(x, 3, 2, ((1, 1), (0, 0))).data
    np.testing.assert_array_equal(max_pool(x, np.int64(3), 2, (1, 0)).data, pooled)
