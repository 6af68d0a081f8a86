"""The engine: graphs, freeing, accumulation, and a gradcheck that can fail."""

import copy
import gc
import pickle
import re
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from operator import iadd, imatmul, imul, ipow, isub, itruediv, matmul, mul, truediv

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import minisimclr as ms
from minisimclr.backend import xp_of
from minisimclr.ops.basic import cast, concatenate
from minisimclr.ops.conv import conv2d
from minisimclr.ops.product import linear
from minisimclr.tensor import Function, Tensor, gradcheck, no_grad


class Series:
    """Has a `get`, as pandas' and CuPy's arrays have."""

    dtype = np.dtype(np.float32)

    def get(self):
        """Something else than CuPy's."""


def randn(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def test_keeps_float_types_and_converts_others():
    assert Tensor(np.zeros(2, np.float64)).dtype == np.float64
    assert Tensor(np.zeros(2, np.float32)).dtype == np.float32
    assert Tensor(np.zeros(2, np.int64)).dtype == np.float32
    assert Tensor([1.0, 2.0]).dtype == Tensor([1, 2]).dtype == Tensor(0.5).dtype == np.float32
    assert isinstance(Tensor(np.float64(0.5)).data, np.ndarray)
    for other in (None, Series(), Tensor(np.ones(2))):  # None: of a leaf that no gradient reached
        with pytest.raises(TypeError, match=f"takes arrays .* not {re.escape(str(type(other)))}"):
            Tensor(other)
    assert Tensor(np.float64(0.5)).dtype == np.float64
    x = Tensor(np.ones(2, np.float32))
    assert (2.0 * x + 1 - x / 3.0 + np.ones(2)).dtype == np.float32


def test_what_is_no_array_is_named_where_cupy_is_not_to_be_had(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(TypeError, match=r"takes arrays .* not <class 'list'>"):
        xp_of([1])


def test_ndarray_on_the_left_defers_to_tensor():
    y = np.ones(3) * Tensor(np.arange(3.0), requires_grad=True)
    assert isinstance(y, Tensor)
    with pytest.raises(TypeError, match="operand is None"):
        y * None
    a, b = randn(2, 3), randn(3, 2)
    np.testing.assert_array_equal((a @ Tensor(b)).data, a @ b)
    with pytest.raises(ValueError, match=r"matmul needs matrices, not shapes \(3,\) and \(3, 2\)"):
        y @ Tensor(np.ones((3, 2)))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_what_is_written_into_an_operand_later_changes_no_gradient(dtype):
    queue, w = np.ones((3, 2), dtype), Tensor(np.ones((2, 3), np.float32), requires_grad=True)
    y = ((w * queue.T) @ queue).sum()
    queue[:] = 9
    y.backward()
    np.testing.assert_array_equal(w.grad, np.full((2, 3), 2))


@pytest.mark.parametrize("key", [np.arange(2), [0, 1], (np.arange(2), ...), np.arange(4) < 2])
def test_what_is_written_into_a_key_later_changes_no_gradient(key):
    """As by `place += n`, which moves on in a memory bank."""
    x = Tensor(randn(4, 3), requires_grad=True)
    y = x[key].sum()
    place = key[0] if isinstance(key, tuple) else key
    place[:] = place[::-1] if len(place) == 4 else [2, 3]
    y.backward()
    np.testing.assert_array_equal(x.grad, np.repeat([1, 1, 0, 0], 3).reshape(4, 3))


@pytest.mark.filterwarnings("ignore:the matrix subclass")
def test_a_matrix_is_computed_with_as_an_array():
    """`*` of NumPy's class of matrices, which SciPy's `todense` gives, is their product."""
    a = Tensor(np.matrix([[1.0, 2], [3, 4]]), requires_grad=True)
    y = a * a
    np.testing.assert_array_equal(y.data, [[1, 4], [9, 16]])
    y.sum(axis=0).sum().backward()
    np.testing.assert_array_equal(a.grad, [[2, 4], [6, 8]])


@pytest.mark.parametrize("apply", [lambda x, p: linear(x, p), lambda x, p: x @ p, lambda x, p: p.T])
def test_a_tensor_in_the_place_of_data_is_named(apply):
    """`p.data = 0.9 * p + 0.1 * q` lacks four times `.data`."""
    p = ms.Parameter(randn(3, 3))
    p.data = 0.9 * p
    with pytest.raises(TypeError, match=r"takes arrays .* not <class 'minisimclr\.tensor"):
        apply(Tensor(randn(2, 3)), p)


@pytest.mark.parametrize(
    "fn",
    [
        lambda a, b: a + b,
        lambda a, b: a - b,
        lambda a, b: 2.0 - a * b,
        lambda a, b: a / (b * b + 1.0),
        lambda a, b: 1.0 / (b**2.0 + 1.0) + a,
        lambda a, b: (a * b).exp().sum(axis=1) + (b * b + 0.5).log().mean(),
        lambda a, b: a.sum(axis=(0, 1), keepdims=True) * b,
        lambda a, b: (a - b).relu() * b,
        lambda a, b: a.reshape(4, 3) @ (b * a)[0:2].transpose()[:3],
        lambda a, b: concatenate([a, a + b], axis=1).transpose()[1:5, ::2],
        lambda a, b: concatenate([b, a, a * b], axis=1) ** 2,
        lambda a, b: (a * b).reshape(2, 3, 2).transpose(-1, 0, 1)[np.eye(2, dtype=bool)],
    ],
)
def test_gradients_of_expressions(fn):
    gradcheck(fn, randn(3, 4), randn(3, 1, seed=1))


@pytest.mark.parametrize(
    "fn",
    [
        lambda a, b: (a + b, a + 2.0, 2.0 + a, a + b.sum()),
        lambda a, b: (a - b, a - 2.0, 2.0 - a, -a),
        lambda a, b: (a * b, a * 2.0, 2.0 * a, a * b[0]),
        lambda a, b: (a / b, a / 2.0, 2.0 / a),
        lambda a, b: (a**2.0, a**-1.0, a**0.5),
        lambda a, b: (a @ b.T, a.transpose(1, 0) @ b),
        lambda a, b: (a.sum(), a.sum(axis=1), b.mean(), b.mean(axis=(0, 1), keepdims=True)),
        lambda a, b: (a.reshape(4, 3), a.reshape((2, -1)), a[1:, ::2], a[0]),
    ],
)
def test_operators_have_numpy_s_values(fn):
    a, b = abs(randn(3, 4)) + 0.5, abs(randn(3, 4, seed=1)) + 0.5
    for ours, theirs in zip(fn(Tensor(a), Tensor(b)), fn(a, b), strict=True):
        np.testing.assert_allclose(ours.data, theirs, rtol=1e-14)


@pytest.mark.parametrize(
    "key",
    [
        *([0, 2, 0], ((0, 0),), range(2), np.array([[2, 2], [1, 2]]), [], ([0, 0], [1, 1])),
        *((slice(None), np.array([1, 1])), (np.array([2, 2]), slice(1, 3)), (..., None, 1)),
        *(1, (1, 2), slice(None, None, -2), np.arange(3) > 0, randn(3, 4) > 0, True),
    ],
    ids=repr,
)
def test_an_element_s_gradient_is_the_sum_over_where_it_was_picked(key):
    x = randn(3, 4)
    np.testing.assert_array_equal(Tensor(x)[key].data, x[key])
    gradcheck(lambda x: x[key] * 2.0, x)


def test_shapes_may_be_given_as_numpy_takes_them():
    x = Tensor(randn(2, 3))
    assert x.reshape(3, 2).shape == x.reshape((3, 2)).shape == x.reshape([3, 2]).shape == (3, 2)
    assert x.transpose().shape == x.transpose(1, 0).shape == x.transpose((1, 0)).shape == (3, 2)
    np.testing.assert_array_equal(x.T.data, x.data.T)
    assert x.transpose([-1, 0]).shape == (3, 2) and x.reshape(6).shape == x.reshape((6,)).shape


def test_the_mean_of_nothing_is_no_number():
    x = Tensor(np.zeros((0, 3)), requires_grad=True)
    assert x.mean(axis=1).shape == (0,)
    with pytest.warns(RuntimeWarning):  # NumPy's
        assert np.isnan(x.mean().data)
    x.mean(axis=1).sum().backward()
    assert x.grad.shape == (0, 3)


def test_a_power_is_a_number_and_keeps_the_type():
    x = Tensor(np.ones(2, np.float32))
    assert (x ** np.float64(2)).dtype == np.float32
    assert (x ** np.array(2.0)).dtype == np.float32
    for p in (np.array([2.0, 3.0]), Tensor(np.array(3.0), requires_grad=True)):
        with pytest.raises(TypeError, match=rf"takes one number p, not a {type(p).__name__}"):
            x**p


@pytest.mark.parametrize("change", [iadd, isub, imul, itruediv])
def test_a_leaf_is_not_replaced_by_what_looks_like_a_change(change):
    leaf, number = Tensor(np.ones(2), requires_grad=True), Tensor(np.ones(2))
    with pytest.raises(TypeError, match=r"a leaf is not changed in place: change its \.data"):
        change(leaf, number)
    total = change(leaf * 2, leaf)  # as sums of losses are made
    assert (total.data == change(np.full(2, 2.0), np.ones(2))).all() and total.creator
    assert change(number, 2.0).shape == (2,)


def test_a_leaf_is_not_replaced_by_a_power_or_a_product_either():
    """An optimizer would go on with the old leaf, which nobody uses any more."""
    leaf, eye = Tensor(2 * np.eye(2), requires_grad=True), np.eye(2)
    for change, other, changed in ((ipow, 2, 4), (imatmul, Tensor(eye), 2), (imatmul, eye, 2)):
        with pytest.raises(TypeError, match=r"a leaf is not changed in place: change its \.data"):
            change(leaf, other)
        assert (change(leaf * 1, other).data == changed * eye).all()
        assert change(Tensor(eye), other).shape == (2, 2)


@pytest.mark.parametrize("copied", [copy.deepcopy, pickle.dumps])
def test_a_graph_is_not_copied(copied):
    """The copy's backward would reach leaves that nobody has."""
    x = Tensor([1.0, 2.0], requires_grad=True)
    with pytest.raises(TypeError, match=r"a graph is not copied: .* \.detach\(\)"):
        copied((x * 2).sum())
    copied(x)
    copied(detached := (x * 2).detach())
    assert not detached.requires_grad


def test_numpy_s_functions_take_no_tensor(tmp_path):
    x = Tensor(np.ones(2), requires_grad=True)
    save = partial(np.save, tmp_path / "x.npy")
    for call in (np.asarray, np.linalg.norm, save):
        with pytest.raises(TypeError, match=r"give them a Tensor's \.data"):
            call(x)


def test_a_gradient_that_was_saved_is_copied_for_a_leaf():
    kept = np.ones(3)

    class Scaled(Function):
        def forward(self, x):
            self.m = kept
            return (x * self.m).sum()

        def backward(self, gy):
            return [self.m]  # a list will do

    x = Tensor(np.ones(3), requires_grad=True)
    Scaled()(x).backward()
    x.grad *= 0.5
    assert (kept == 1).all()


@pytest.mark.parametrize("shape", [(3,), (2, 4, 3), (2, 4)])
def test_linear_takes_rows_of_its_width(shape):
    with pytest.raises(ValueError, match=r"linear: x \(N, C\) and weight \(O, C\), not"):
        linear(Tensor(np.ones(shape)), Tensor(np.ones((5, 3))))
    with pytest.raises(ValueError, match=r"linear: bias \(O,\) for weight \(5, 3\), not \(1,\)"):
        linear(Tensor(np.ones((2, 3))), Tensor(np.ones((5, 3))), Tensor(np.ones(1)))


def test_the_gradient_of_a_leaf_is_its_own():
    given = np.ones((2, 3))
    a, b = (Tensor(randn(2, 3), requires_grad=True) for _ in range(2))
    (a + b).backward(given)
    a.grad *= 2
    assert (a.grad == 2).all() and (b.grad == 1).all() and (given == 1).all()
    for function in (Tensor.sum, Tensor.transpose, lambda x: x.reshape(6), lambda x: 1.0 + x):
        leaf = Tensor(randn(2, 3), requires_grad=True)
        result = function(leaf)
        given = np.ones(result.shape)
        result.backward(given)
        leaf.grad *= 2
        assert (leaf.grad == 2).all() and (given == 1).all()


@pytest.mark.parametrize(
    "fn", [lambda x: x.mean(), lambda x: x.sum(), lambda x: (x * Tensor(np.ones(4))).sum()]
)
def test_the_gradient_of_a_leaf_is_like_its_data(fn):
    x = Tensor(np.ones((3, 4), np.float32), requires_grad=True)
    fn(x).backward()
    assert x.grad.dtype == np.float32
    before = x.grad[0, 1]
    x.grad[0, 0] = 7  # as clipping does: one number, and no other
    assert x.grad[0, 1] == x.grad[2, 3] == before != 7


def test_threads_that_share_a_leaf_lose_no_gradient():
    leaf = Tensor(np.ones((512, 512), np.float32), requires_grad=True)
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda _: (leaf * 1.0).sum().backward(), range(40)))
    assert (leaf.grad == 40).all()


def test_the_gradient_of_a_single_number_is_an_array_too():
    x = Tensor(3.0, requires_grad=True)
    for expected in (6, 12):
        (x * x).backward()
        assert x.grad.shape == () and x.grad == expected
    x.grad[...] = 0
    assert x.grad == 0


@pytest.mark.parametrize(
    "fn",
    [
        *(lambda x: x[1:], lambda x: x[[0, 0]], lambda x: cast(x, np.float64)),
        *(lambda x: x**2.0, lambda x: 1.0 / x, lambda x: x.mean(axis=0), Tensor.exp, Tensor.relu),
    ],
)
def test_the_gradient_of_a_value_is_of_its_type(fn, monkeypatch):
    """Of a value on the way, too, where a wider type would take twice the memory."""
    types = []

    def observe(function, direction, run, arrays):
        types.append(arrays[0].dtype)
        return run(*arrays)

    y = fn(2.0 * Tensor(randn(3, 4).astype(np.float32), requires_grad=True)).sum()
    monkeypatch.setattr("minisimclr.tensor.observer", observe)
    y.backward()
    assert types[-1] == np.float32


def test_an_operation_is_applied_once():
    """Its saved arrays and edges are those of one use: a second would overwrite the first's."""
    double = ms.ops.basic.Exp()
    x = Tensor(randn(2), requires_grad=True)
    y = double(x)
    with pytest.raises(RuntimeError, match="Exp was applied before"):
        double(x)
    y.sum().backward()
    with pytest.raises(RuntimeError, match="Exp was applied before"):
        double(x)


def test_two_leaves_of_one_operation_share_no_gradient():
    class Both(Function):
        def forward(self, a, b):
            return a + b

        def backward(self, gy):
            g = 2 * gy  # one array, as students write it
            return g, g

    a, b = (Tensor(randn(3), requires_grad=True) for _ in range(2))
    Both()(a, b).sum().backward()
    a.grad[0] = 7
    assert b.grad.tolist() == [2, 2, 2]


@pytest.mark.parametrize(
    "gradient", [np.ones((5, 2, 3)), np.ones((2, 1)), 1.0, None, Tensor(np.ones((2, 3)))]
)
def test_backward_takes_a_gradient_of_the_result_s_shape_only(gradient):
    x = Tensor(randn(2, 3), requires_grad=True)
    with pytest.raises(ValueError, match=r"needs a gradient array of shape \(2, 3\)"):
        (x + 1).backward(gradient)


@pytest.mark.parametrize("dtype", [np.int64, bool, np.float16])
def test_a_gradient_is_as_fine_as_the_tensor_whatever_forward_gave(dtype):
    class Straight(Function):  # as quantisers have it
        def forward(self, x):
            return (x > 0).astype(dtype)

        def backward(self, gy):
            return gy

    x, w = Tensor([2.0, -2.0], requires_grad=True), np.float32([0.3, 7e-9])
    y = Straight()(x)
    assert y.dtype == np.float32
    (y * w).sum().backward()
    np.testing.assert_array_equal(x.grad, w)


def test_operations_are_shown_by_their_names():
    assert Tensor.mean.__name__ == "mean"
    assert repr(ms.Parameter([1.0])) == "Parameter([1.])"


@pytest.mark.parametrize("dtype", [np.int64, bool, np.float64])
def test_backward_takes_a_gradient_of_any_numbers(dtype):
    x, w = Tensor(np.ones((1, 4, 4, 1), np.float32), requires_grad=True), randn(1, 1, 1, 2)
    y = conv2d(x, Tensor(w.astype(np.float32)))
    y.backward(np.ones(y.shape, dtype))
    np.testing.assert_allclose(x.grad, np.full(x.shape, w.sum()), rtol=1e-6)
    assert x.grad.dtype == np.float32


def test_division_is_that_of_ieee():
    a, b = np.float32([0, 1e-30, 7]), np.float32([1e-39, 1e-30, 49])
    x, y = Tensor(a, requires_grad=True), Tensor(b, requires_grad=True)
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal((x / y).data, a / b)
        assert (y / y).data.tolist() == [1, 1, 1]
    (x[1:] / y[1:]).sum().backward()
    np.testing.assert_allclose(y.grad, [0, -1e30, -7 / 49**2], rtol=1e-6)
    np.testing.assert_allclose(x.grad, [0, 1e30, 1 / 49], rtol=1e-6)
    gradcheck(lambda a, b: a / b, randn(3, 1), 2 + randn(4) ** 2)
    gradcheck(lambda a: 2.0 / a, 2 + randn(4) ** 2)


def test_the_gradient_of_a_power_at_zero():
    for p, expected in ((0, 0), (1, 1), (2, 0)):
        x = Tensor(np.zeros(3), requires_grad=True)
        (x**p).sum().backward()
        np.testing.assert_array_equal(x.grad, expected)


def test_linear_gradients():
    gradcheck(linear, randn(5, 3), randn(2, 3, seed=1), randn(2, seed=2))
    gradcheck(linear, randn(5, 3), randn(2, 3, seed=1))
    for a, b in ((3, 4), (2, 4, 5)), ((2, 3, 4), (4, 5)):  # one matrix for a stack
        gradcheck(lambda a, b: a @ b, randn(*a), randn(*b, seed=1))


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_broadcasting_gradients(data):
    shape = data.draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))
    other = [n if data.draw(st.booleans()) else 1 for n in shape][data.draw(st.integers(0, 1)) :]
    gradcheck(lambda a, b: a * b + b, randn(*shape), randn(*other, seed=1))


class WrongSquare(Function):
    def forward(self, x):
        self.x = x
        return x * x

    def backward(self, gy):
        return gy * self.x  # the factor 2 forgotten


class Vandal(Function):
    """Writes into what belongs to somebody else."""

    def forward(self, x):
        return x * 2

    def backward(self, gy):
        gy *= 2
        return gy


class ForwardVandal(Vandal):
    def forward(self, x):
        x *= 2
        return x

    def backward(self, gy):
        return gy * 2


def test_gradcheck_catches_a_wrong_gradient_and_names_the_input():
    with pytest.raises(AssertionError, match=r"input 1 of shape \(4,\)"):
        gradcheck(lambda a, b: a + WrongSquare()(b), randn(4), randn(4, seed=1))
    with pytest.raises(AssertionError, match="input 0"):
        gradcheck(lambda a: WrongSquare()(a) * 1e-10, np.arange(1.0, 5))  # small ones, too
    gradcheck(lambda a: a * a, mine := np.ones(3))
    assert mine.flags.writeable
    with pytest.raises(AssertionError, match="input 1 got no gradient"):
        gradcheck(lambda a, b: a * b.data, randn(4), randn(4, seed=1))


@pytest.mark.parametrize("seed", range(5))
def test_gradcheck_allows_for_small_inputs_and_for_the_rounding_of_large_values(seed):
    z = 0.01 * randn(8, 4)  # a step of 1e-5 each would be 1e-3 of these
    gradcheck(lambda z: ms.nt_xent(z[:4], z[4:], 0.5), z, seed=seed)
    with pytest.raises(AssertionError, match="input 0"):
        gradcheck(lambda z: ms.nt_xent(z[:4], z[4:], 0.5) + 1e-3 * WrongSquare()(z).sum(), z)
    with pytest.raises(AssertionError, match="input 0"):
        gradcheck(lambda a: WrongSquare()(a + 1.0), np.zeros(4))  # where the step has no scale
    gradcheck(lambda a, b: a.sum() + b, np.zeros((0, 3)), randn(2))
    gradcheck(lambda a: (a + 1e6).sum(), randn(4), seed=seed)
    with pytest.raises(AssertionError, match="input 0"):
        gradcheck(lambda a: (WrongSquare()(a) + 1e6).sum(), randn(4), seed=seed)


@pytest.mark.parametrize("vandal", [Vandal, ForwardVandal])
def test_gradcheck_catches_writing_into_what_belongs_to_others(vandal):
    with pytest.raises(ValueError, match="read-only"):
        gradcheck(lambda x: vandal()(x), randn(4))


@pytest.mark.parametrize(
    "backward, said",
    [
        (np.ravel, r"gradient \(4,\) of \(2, 2\)"),
        (lambda gy: None, r"gradient None of \(2, 2\)"),
        (lambda gy: (gy, gy), "2 of 1 gradients"),
        (lambda gy: 1.0, "gradient 1.0 of"),
    ],
)
def test_a_gradient_of_the_wrong_shape_names_the_operation(backward, said):
    class Flat(Function):
        def forward(self, x):
            return x * 1

        def backward(self, gy):
            return backward(gy)

    with pytest.raises(AssertionError, match=f"Flat: {said}"):
        Flat()(Tensor(randn(2, 2), requires_grad=True)).sum().backward()


def test_a_gradient_has_the_type_of_what_it_is_the_gradient_of():
    seen = []

    class Watch(Function):
        def forward(self, x):
            return x * 1

        def backward(self, gy):
            seen.append(gy.dtype)
            return gy

    x = Tensor(np.ones(3, np.float32), requires_grad=True)
    (Watch()(x) * Tensor(np.arange(3.0))).sum().backward()
    assert seen == [np.float32] and x.grad.dtype == np.float32


def test_shared_inputs_add_up_without_touching_each_other():
    x = Tensor(np.ones(3), requires_grad=True)
    y = x * 2.0
    (y + y + y * y).sum().backward()  # d/dx (4x + 4x^2)
    np.testing.assert_array_equal(x.grad, 12 * np.ones(3))
    kept = x.grad
    (x * 1.0).sum().backward()  # gradients of two backwards add up, in a new array
    np.testing.assert_array_equal(x.grad, 13 * np.ones(3))
    np.testing.assert_array_equal(kept, 12 * np.ones(3))


def test_gradients_that_share_an_array_do_not_add_up_in_it():
    """Addition hands the same gradient to both its inputs; each of them then gets another."""
    a, b = (Tensor(np.ones(3), requires_grad=True) for _ in range(2))
    h, k = a * 1.0, b * 1.0
    (k * 5.0 + (h * 3.0 + (h + k) * 1.0)).sum().backward()
    np.testing.assert_array_equal(a.grad, 4 * np.ones(3))
    np.testing.assert_array_equal(b.grad, 6 * np.ones(3))


def test_values_are_numpys():
    x = randn(2, 3, 4)
    assert float(Tensor(x).mean()) == pytest.approx(x.mean())
    np.testing.assert_allclose(Tensor(x).mean(axis=1).data, x.mean(axis=1))
    np.testing.assert_array_equal(Tensor(x).transpose(2, 0, 1).data, x.transpose(2, 0, 1))
    gradcheck(lambda x: x.transpose(2, 0, 1), x)
    for axes, said in (((0, 1, 5), "out of bounds"), ((1, 0), "match"), ((0, 0, 1), "repeated")):
        with pytest.raises(ValueError, match=said):
            Tensor(x).transpose(*axes)


def test_second_backward_raises():
    x = Tensor(np.ones(3), requires_grad=True)
    y = (x * x).sum()
    y.backward()
    with pytest.raises(RuntimeError, match="used this graph up"):
        y.backward()


def test_backward_needs_a_graph_and_a_scalar():
    for x in (Tensor(np.ones(1)), Tensor(np.ones(1)) * 2, Tensor(np.ones(1), requires_grad=True)):
        with pytest.raises(RuntimeError, match="did any input require a gradient"):
            x.backward()
    with pytest.raises(ValueError, match=r"shape \(3,\)"):
        (Tensor(np.ones(3), requires_grad=True) * 2.0).backward()


def test_no_grad_records_nothing():
    x = Tensor(np.ones(3), requires_grad=True)
    with no_grad():
        with no_grad():
            pass
        assert (x * x).creator is None
    assert (x * x).creator is not None


def test_unneeded_gradients_are_not_computed():
    a, b = Tensor(randn(3, 3), requires_grad=True), Tensor(randn(3, 3))
    y = a @ b
    assert y.creator.needs == (True, False)
    assert y.creator.backward(np.ones((3, 3)))[1] is None


def test_depth_is_not_limited_by_recursion():
    x = y = Tensor(np.ones(1), requires_grad=True)
    for _ in range(20_000):
        y = y + 1.0
    y.backward()
    assert x.grad == 1


def test_bytes_are_refused():
    """Images from 0 to 255 would go through any network without a word."""
    with pytest.raises(TypeError, match="divide them by 255"):
        Tensor(np.zeros((1, 8, 8, 3), np.uint8))
    with pytest.raises(TypeError, match="divide them by 255"):
        Tensor([np.zeros((8, 8, 3), np.uint8)])
    assert Tensor(np.arange(3)).dtype == np.float32


def test_a_number_by_two_names():
    assert float(Tensor(2.5)) == Tensor(2.5).item() == 2.5
    with pytest.raises(ValueError, match="of size 1"):
        Tensor([1.0, 2.0]).item()


def test_arrays_die_without_the_collector():
    """Forward keeps only what an operation saved; backward leaves nothing behind."""
    gc.collect()
    gc.disable()
    try:
        x = Tensor(randn(100), requires_grad=True)
        hidden = x + 1.0  # nobody saves the result of the first addition
        watched = weakref.ref(hidden.data)
        y = hidden + 1.0
        del hidden
        assert watched() is None
        saved = y * y  # Multiply saves y
        watched = weakref.ref(y.data)
        loss = saved.sum()
        del y, saved
        assert watched() is not None
        loss.backward()
        assert watched() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("asks", [0, 1])
@pytest.mark.parametrize("f", [mul, truediv, matmul, linear], ids=lambda f: f.__name__)
def test_one_input_may_need_no_gradient(f, asks):
    inputs = randn(3, 3), 2 + randn(3, 3, seed=1) ** 2
    both, one = ([Tensor(a, need or i == asks) for i, a in enumerate(inputs)] for need in (1, 0))
    for tensors in both, one:
        f(*tensors).sum().backward()
    np.testing.assert_array_equal(one[asks].grad, both[asks].grad)
    assert one[1 - asks].grad is None and both[1 - asks].grad is not None


def test_a_tensor_tells_what_made_it():
    x = Tensor([1.0, 2.0], requires_grad=True)
    assert repr(x) == "Tensor([1. 2.])" and repr(x * 2) == "Tensor([2. 4.], by Multiply)"
    assert f"{x}" == repr(x) and f"{x.sum():.2f}" == "3.00"
    assert len(x) == 2 and float(x.sum()) == x[:1].sum(keepdims=True).item() * 3 == 3.0
    with pytest.raises(TypeError, match=r"^Tensor\.mean\(\) got an unexpected"):
        np.mean(x)
    assert Tensor(0.5) and not Tensor(0.0) and not Tensor([0.0])


def test_a_scalar_has_no_items():
    x = Tensor(randn(2, 3), requires_grad=True)
    a, b = x
    (a * b).sum().backward()
    np.testing.assert_array_equal(x.grad, x.data[::-1])
    with pytest.raises(TypeError, match="unsized"):  # not the empty list
        list(x.sum())


def test_memory_of_norm_relu_chain():
    """20 x (batch norm, ReLU): one map a layer is kept (the input, which is the ReLU before)."""
    import tracemalloc

    norms = [ms.nn.BatchNorm(8) for _ in range(20)]
    x = Tensor(np.random.default_rng(0).random((64, 16, 16, 8), np.float32), requires_grad=True)
    tracemalloc.start()
    y = x
    for norm in norms:
        y = norm(y, relu=True)
    kept = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert kept < 20.5 * x.data.nbytes


def test_comparing_is_refused_and_what_it_would_have_been():
    x = Tensor(np.ones(2))
    equals = lambda: x == 1, lambda: x != x.data, lambda: x.data == x
    orders = lambda: x < 1, lambda: x <= x.data, lambda: x.data < x, lambda: x >= 1
    for wrong in (*equals, *orders):
        with pytest.raises(TypeError, match=r"compare a Tensor's \.data"):
            wrong()
    assert x in [x] and {x: 1}[x] == 1


def test_a_parameter_takes_no_second_argument():
    with pytest.raises(TypeError, match="positional argument"):
        ms.Parameter(np.ones(2), False)  # torch's requires_grad


def test_a_forward_that_gives_no_array_is_refused():
    class Halves(Function):
        def forward(self, x):
            return x / 2, x / 2

    with pytest.raises(TypeError, match=r"Halves\.forward gave <class 'tuple'>, not an"):
        Halves()(Tensor(np.ones(2), requires_grad=True))
