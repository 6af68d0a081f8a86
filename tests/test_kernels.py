"""Registered versions of the passes: the contract of the reference, on odd shapes, really called.

The walk is over every pass there is, so a version cannot be registered without samples here and a
benchmark that shows that it wins.
"""

import _thread
import gc
import importlib
import importlib.util
import inspect
import os
import pkgutil
import platform
import re
import signal
import subprocess
import sys
import threading
import time
import weakref
from contextvars import ContextVar
from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest

import minisimclr as ms
from minisimclr import cores, doctor, kernels, ops
from minisimclr.augment import draw_views
from minisimclr.errors import ConfigError
from minisimclr.kernels import norm as fast_norm
from minisimclr.kernels import winograd
from minisimclr.kernels.registry import in_blocks
from minisimclr.ops.conv import conv_gradients, conv_output, conv_weight_gradient, output_size
from minisimclr.ops.norm import gradient_sums, moments
from minisimclr.ops.pool import max_pool_output

ROOT = Path(__file__).parent.parent
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
ONE, TWO, NONE, SAME = (1, 1), (2, 2), (0, 0), (1, 1)
rng = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def same_numbers_in_any_order():
    rng.bit_generator.state = np.random.default_rng(0).bit_generator.state


def randn(*shape, dtype=np.float32):
    return rng.standard_normal(shape).astype(dtype)


# x, w, stride, padding: strides, paddings, rectangles, three channels, sizes no tile divides, and
# channels enough for either way of sharing Winograd's work between threads.
CONVOLUTIONS = [
    ((2, 9, 7, 3), (3, 3, 3, 5), ONE, SAME),
    ((2, 9, 8, 3), (7, 7, 3, 4), TWO, (3, 3)),
    ((3, 11, 9, 40), (3, 3, 40, 48), ONE, SAME),
    ((7, 8, 16, 40), (3, 3, 40, 48), ONE, SAME),
    ((9, 6, 6, 136), (3, 3, 136, 128), ONE, SAME),
    ((40, 2, 2, 40), (3, 3, 40, 40), ONE, SAME),
    ((5, 9, 8, 40), (3, 3, 40, 40), ONE, NONE),
    ((5, 10, 7, 24), (3, 3, 24, 40), TWO, SAME),
    ((2, 9, 8, 6), (1, 1, 6, 4), ONE, NONE),
    ((2, 9, 8, 6), (1, 1, 6, 4), TWO, NONE),
    ((2, 9, 8, 6), (1, 1, 6, 4), TWO, SAME),
    ((2, 9, 8, 6), (1, 7, 6, 4), ONE, (0, 3)),
    ((2, 9, 8, 6), (5, 3, 6, 4), (2, 1), (2, 0)),
    # height and width unlike each other, where Winograd or a product of pixels is near at hand
    ((3, 11, 9, 40), (3, 3, 40, 48), ONE, (1, 0)),
    ((3, 11, 9, 40), (3, 3, 40, 48), ONE, (0, 3)),
    ((3, 11, 9, 40), (3, 3, 40, 48), ONE, (3, 0)),
    ((3, 11, 9, 40), (3, 3, 40, 48), ONE, (3, 3)),
    ((3, 11, 9, 40), (3, 3, 40, 48), (2, 1), SAME),
    ((3, 11, 9, 40), (3, 3, 40, 48), (1, 2), SAME),
    ((3, 11, 9, 40), (3, 5, 40, 48), ONE, SAME),
    ((3, 11, 9, 40), (5, 3, 40, 48), ONE, SAME),
    ((2, 9, 8, 6), (1, 1, 6, 4), (1, 2), NONE),
    ((2, 9, 8, 6), (1, 1, 6, 4), (2, 1), NONE),
    ((2, 9, 8, 6), (1, 1, 6, 4), ONE, (0, 1)),
    ((2, 9, 8, 6), (1, 1, 6, 4), ONE, (1, 0)),
]
ROWS = [(128, 70), (3, 5, 7, 24), (4, 16, 16, 64), (7, 3), (33, 8, 8, 130)]


def gradient_like(x, w, stride, padding):
    return randn(x[0], *output_size(x, w, stride, padding), w[3])


def vectors(shape, count):
    return [randn(shape[-1]) for _ in range(count)]


def statistics(shape):
    """Mean, variance and eps."""
    return randn(shape[-1]), randn(shape[-1]) ** 2 + np.float32(0.1), 1e-3


def relu_like(shape):
    return np.maximum(randn(*shape), 0)


def spread(shape):
    """A gradient that is one row, broadcast, as global pooling makes it."""
    return np.broadcast_to(randn(shape[-1]), shape)


POOLS = [
    ((3, 9, 11, 5), (3, 3), TWO, ((1, 0), (1, 1))),
    ((2, 8, 8, 6), (2, 2), TWO, (NONE, NONE)),
    ((2, 7, 5, 33), (3, 3), TWO, (ONE, ONE)),  # windows that reach over every border
    ((3, 8, 6, 7), (3, 3), TWO, (NONE, NONE)),  # pixels that no window reaches
    ((2, 7, 8, 5), (2, 3), (3, 1), ((1, 0), (0, 2))),  # height and width unlike each other
    ((2, 15, 17, 3), (15, 17), ONE, (NONE, NONE)),  # as many places as a byte can tell apart
]


def pool_samples(backward):
    for shape, kernel, stride, padding in POOLS:
        x = np.round(2 * randn(*shape))  # with equal values in a window
        geometry = kernel, stride, padding
        y, argmax = max_pool_output.dispatch(object)(x, *geometry)
        yield (randn(*y.shape), argmax, shape, *geometry) if backward else (x, *geometry)


def augment_samples(crop_only):
    images = rng.integers(0, 256, (7, 20, 20, 3), np.uint8)
    views = draw_views(0, 0, 7, 20, 20, 1.0)
    yield (images, views.boxes[0], views.flips[0], 12) if crop_only else (images, views, 12)
    for kind in range(0 if crop_only else 4):  # a jitter of brightness alone, and so on
        alone = np.arange(4) == kind
        factors = np.where(alone, views.factors, np.float32([1, 1, 1, 0]))
        yield images, replace(views, factors=factors), 12


AUGMENTATION = {"apply_views", "crop_resize"}  # bytes, in one dtype; benchmarks/test_augment.py
SAMPLES = {
    "conv_output": lambda: [(randn(*x), randn(*w), s, p) for x, w, s, p in CONVOLUTIONS],
    "conv_input_gradient": lambda: [
        (gradient_like(x, w, s, p), randn(*w), x, s, p) for x, w, s, p in CONVOLUTIONS
    ],
    "conv_weight_gradient": lambda: [
        (gradient_like(x, w, s, p), randn(*x), w, s, p) for x, w, s, p in CONVOLUTIONS
    ],
    "conv_gradients": lambda: [
        (gradient_like(x, w, s, p), randn(*x), randn(*w), s, p) for x, w, s, p in CONVOLUTIONS
    ],
    "moments": lambda: [
        *((3 * randn(*s) + 5,) for s in ROWS),
        (randn(64, 8) + 1000,),
        *((randn(4096, 8) + np.float32(mean),) for mean in (30, [0, 0, 0, 0, 0, 3000, 0, 0])),
    ],
    "scale_shift": lambda: [
        (randn(*s), *statistics(s), *vectors(s, 2), residual, relu)
        for s in ROWS
        for residual, relu in ((None, True), (randn(*s), True), (None, False))
    ],
    "gradient_sums": lambda: [
        (g, randn(*s), *statistics(s), y)
        for s in ROWS
        for g, y in ((randn(*s), relu_like(s)), (randn(*s), None), (spread(s), relu_like(s)))
    ],
    "input_gradient": lambda: [
        (g, randn(*s), *statistics(s), *vectors(s, 3), count, *spare)
        for s in ROWS
        for g, count, *spare in ((randn(*s), 7), (spread(s), np.inf), (randn(*s), 9, randn(*s)))
    ],
    "max_pool_output": lambda: pool_samples(backward=False),
    "max_pool_input_gradient": lambda: pool_samples(backward=True),
    "momentum_update": lambda: [
        (randn(*s), randn(*s), randn(*s), 0.1, 0.9, 0.01) for s in ((5,), (3, 3, 40, 300))
    ]
    + [
        (*(randn(7, 5).T if i in turned else randn(5, 7) for i in range(3)), 0.1, 0.9, 0.01)
        for turned in ((0,), (1,), (2,), (0, 2))
    ],
    "added": lambda: [
        (randn(*s), other) for s in ROWS for other in (randn(*s), spread(s))
    ],
    "apply_views": lambda: augment_samples(crop_only=False),
    "crop_resize": lambda: augment_samples(crop_only=True),
}  # fmt: skip


@cache
def passes():
    """Every pass of the package that has a version for NumPy, by name."""
    modules = [
        importlib.import_module(f"minisimclr.{name}") for name in ("tensor", "optim", "augment")
    ]
    modules += [
        importlib.import_module(f"minisimclr.ops.{m.name}")
        for m in pkgutil.iter_modules(ops.__path__)
    ]
    found = [f for module in modules for f in vars(module).values() if hasattr(f, "registry")]
    return {f.__name__: f for f in found if np.ndarray in f.registry}


def exact(value):
    """A copy in float64 of an array of floats (a pass may change it), other values as they are."""
    if isinstance(value, np.ndarray):
        return value.astype(np.float64 if value.dtype in (np.float32, BFLOAT16) else value.dtype)
    return value


def outcome(version, args):
    """All arrays that a pass returns, and those that it may have changed in place."""
    result = version(*args)
    result = result if isinstance(result, tuple) else () if result is None else (result,)
    return [np.asarray(a) for a in (*result, *(a for a in args if isinstance(a, np.ndarray)))]


def distance(a, b):
    return np.linalg.norm(a - b.astype(np.float64)) / max(np.linalg.norm(b), 1e-30)


def check(f, args):
    references = outcome(f.dispatch(object), [exact(a) for a in args])
    results = outcome(
        f, [a.copy("K") if isinstance(a, np.ndarray) and 0 not in a.strides else a for a in args]
    )
    for result, reference in zip(results, references, strict=True):
        assert result.shape == reference.shape
        assert result.dtype == (np.float32 if reference.dtype == np.float64 else reference.dtype)
        assert distance(result, reference) < 1e-5


def test_every_registered_pass_is_sampled_and_benchmarked():
    assert set(passes()) == set(SAMPLES)
    path = ROOT / "benchmarks" / "test_ops.py"
    spec = importlib.util.spec_from_file_location("benchmarks_test_ops", path)
    benchmarks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmarks)
    assert set(benchmarks.CASES) | AUGMENTATION == set(passes())


@pytest.mark.parametrize("name", SAMPLES)
def test_same_signature(name):
    f = passes()[name]
    of_reference, of_fast = (
        list(inspect.signature(f.dispatch(array)).parameters) for array in (object, np.ndarray)
    )
    assert of_fast == of_reference


@pytest.mark.parametrize("name", SAMPLES)
def test_same_numbers_whatever_the_threads(name, threads):
    for args in SAMPLES[name]():
        check(passes()[name], args)


# How much a version takes at once: nothing in SAMPLES is larger than that.
SIZES = {
    "kernels.augment": {"GROUP": 1, "SHARE": 3 * 12 * 12}, "kernels.conv": {"WORKSPACE": 1},
    "kernels.norm": {"BLOCK": 1, "SMALL": 0}, "kernels.optim": {"BLOCK": 7, "SMALL": 0},
    "kernels.pool": {"BLOCK": 1}, "kernels.winograd": {"BLOCK": 1, "SPECTRUM_BLOCK": 1,
                                                       "IMAGES": 1},
}  # fmt: skip
REFERENCE_SIZES = {"ops.conv": {"WORKSPACE": 1}, "ops.norm": {"ROWS": 3}}


def shrink(monkeypatch, sizes):
    for module, values in sizes.items():
        for name, value in values.items():
            monkeypatch.setattr(importlib.import_module(f"minisimclr.{module}"), name, value)


@pytest.mark.parametrize("name", SAMPLES)
def test_same_numbers_in_many_small_blocks(name, threads, monkeypatch):
    shrink(monkeypatch, SIZES)
    for args in SAMPLES[name]():
        check(passes()[name], args)


@pytest.mark.parametrize("name", SAMPLES)
def test_every_pass_shares_its_work_among_the_threads(name, monkeypatch):
    shrink(monkeypatch, SIZES)
    before, parts, once = cores.threads(), [], cores._side_by_side
    monkeypatch.setattr(
        cores, "_side_by_side", lambda work, given: parts.append(len(given)) or once(work, given)
    )
    cores.set_threads(2)
    try:
        for args in SAMPLES[name]():
            outcome(passes()[name], args)
    finally:
        cores.set_threads(before)
    assert 2 in parts


def test_blocks_are_of_each_thread_s_part():
    before, seen = cores.threads(), []
    cores.set_threads(2)
    try:
        in_blocks(seen.append, 11, 4)
    finally:
        cores.set_threads(before)
    starts = sorted((some.start, some.stop) for some in seen)
    assert starts == [(0, 4), (4, 6), (6, 10), (10, 11)]


@pytest.mark.parametrize("name", SAMPLES)
def test_the_reference_has_the_same_numbers_in_many_small_blocks(name, monkeypatch):
    reference = passes()[name].dispatch(object)
    for args in SAMPLES[name]():
        expected = outcome(reference, [exact(a) for a in args])
        with monkeypatch.context() as small:
            shrink(small, REFERENCE_SIZES)
            found = outcome(reference, [exact(a) for a in args])
        for ours, theirs in zip(found, expected, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.fixture(params=[1, 2, 3], ids="threads={}".format)
def threads(request):
    before = cores.threads()
    cores.set_threads(request.param)
    yield
    cores.set_threads(before)


@pytest.mark.parametrize("name", [n for n in SAMPLES if n not in AUGMENTATION])
def test_float32_is_fast_and_other_types_fall_back(name):
    f = passes()[name]
    args = next(iter(SAMPLES[name]()))
    reference, calls = f.dispatch(object), []
    f.register(object)(lambda *args, **named: calls.append(args))
    try:
        f(*args)
        assert not calls
        f(*(exact(a) for a in args))
        f(*(a.astype(BFLOAT16) if isinstance(a, np.ndarray) else a for a in args))
        assert len(calls) == 2
        _, *others = zip(inspect.signature(f).parameters, map(exact, args), strict=False)
        f(args[0], **dict(others))  # named arguments count as well
        rest = [a for _, a in others if isinstance(a, np.ndarray) and a.dtype == np.float64]
        assert len(calls) == 2 + bool(rest)
    finally:
        f.register(object)(reference)


def test_images_that_tiles_just_cover_may_be_turned_views():
    x, w = randn(2, 14, 10, 40).swapaxes(1, 2), randn(3, 3, 40, 48)
    assert winograd.tile(2, w.shape, (8, 12), ONE, NONE) == 4  # nothing is left over, nor padded
    check(conv_output, (x, w, ONE, NONE))


def test_grey_images_may_be_views_of_planes():
    """Whose last axis has a stride of 0 bytes, or whose columns lie in memory one by one."""
    w, views = (3, 3, 1, 4), (randn(2, 9, 8)[..., None], randn(2, 8, 9, 1).swapaxes(1, 2))
    for x, stride in product(views, (ONE, TWO)):
        case = x.shape, w, stride, NONE
        check(conv_output, (x, randn(*w), stride, NONE))
        check(conv_weight_gradient, (gradient_like(*case), x, w, stride, NONE))


@pytest.mark.parametrize("few_channels", [True, False])
@pytest.mark.parametrize("m", winograd.POINTS)
@pytest.mark.parametrize("padding", [0, 1, 2])
def test_winograd_tiles_of_every_size(m, few_channels, padding, monkeypatch):
    monkeypatch.setattr(winograd, "tile", lambda *_: m)
    monkeypatch.setattr(winograd, "SMALL", 1 << 30 if few_channels else 0)
    monkeypatch.setattr(winograd, "BLOCK", 1)
    for x, c, o in (((11, 7, 10, 6), 6, 5), ((2, 3, 3, 4), 4, 7), ((3, 12, 12, 3), 3, 4)):
        case = x, (3, 3, c, o), ONE, (padding, padding)
        gy, w = gradient_like(*case), randn(3, 3, c, o)
        check(conv_output, (randn(*x), w, *case[2:]))
        check(conv_gradients, (gy, randn(*x), w, *case[2:]))


def test_samples_take_every_way_of_convolving():
    tiles = {winograd.tile(x[0], w, output_size(x, w, s, p), s, p) for x, w, s, p in CONVOLUTIONS}
    assert tiles == {0, *winograd.POINTS}
    assert {w[2] * w[3] <= winograd.SMALL for _, w, _, _ in CONVOLUTIONS} == {True, False}


def test_winograd_rounds_little_more_than_a_plain_sum():
    x, w = relu_like((4, 32, 32, 64)), randn(3, 3, 64, 64)
    reference = conv_output.dispatch(object)(exact(x), exact(w), ONE, SAME)
    plain = distance(conv_output.dispatch(object)(x, w, ONE, SAME), reference)
    assert winograd.tile(4, w.shape, (32, 32), ONE, SAME) == 4
    assert distance(conv_output(x, w, ONE, SAME), reference) < 5 * plain


def test_each_thread_has_a_buffer_of_its_own():
    seen, before = [], cores.threads()
    cores.set_threads(2)
    rows = np.zeros((32, fast_norm.WIDE), np.float32)  # in two parts
    fast_norm.over_blocks(lambda buffer, *_: seen.append(buffer), 4, rows)
    cores.set_threads(before)
    one, other = seen
    assert not np.shares_memory(one, other)


def test_moments_do_not_cancel_where_the_first_rows_are_unlike_the_others():
    x = randn(100_003, 4) * np.float32(0.05) + 100
    x[0] = 0
    (mean, variance), x = moments(x), x.astype(np.float64)
    np.testing.assert_allclose(mean, x.mean(0), rtol=1e-6)
    np.testing.assert_allclose(variance, x.var(0), rtol=1e-3)


def test_moments_of_a_large_mean_do_not_cancel():
    x = randn(4096, 8) + np.float32(3000)
    mean, variance = moments(x)
    np.testing.assert_allclose(mean, x.astype(np.float64).mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(variance, x.astype(np.float64).var(axis=0), rtol=1e-4)


def test_a_variance_is_never_negative():
    for constant in (0.1, 0.3, 100.3, -7.7, 1234.567):
        for rows in (7, 128, 1000, 4099, 50_000):
            assert (moments(np.full((rows, 6), constant, np.float32))[1] >= 0).all()


@pytest.mark.parametrize("channels", [slice(None), [3]], ids=["all", "one"])
@pytest.mark.parametrize("mean, std", [(0, 1), (7, 1), (9, 1), (3000, 1), (-3000, 1), (4, 0.01)])
def test_sums_of_gradients_beside_a_large_mean_do_not_cancel(mean, std, channels):
    x, gy = randn(4096, 8), randn(4096, 8)
    x[:, channels] = x[:, channels] * np.float32(std) + mean
    means, variance = x.mean(axis=0), x.var(axis=0)
    sum_gxhat = gradient_sums(gy, x, means, variance, 1e-7, None)[1]
    products = gy * (x - means.astype(float)) / (variance.astype(float) + 1e-7) ** 0.5
    error, terms = sum_gxhat - products.sum(axis=0), np.linalg.norm(products, axis=0)
    assert (abs(error) < 1e-4 * terms)[channels].all()  # a sum may be near 0, its terms are not


@pytest.mark.parametrize("name", ["scale_shift", "gradient_sums", "conv_output", "max_pool_output"])
def test_nan_stays_visible(name):
    args = list(next(iter(SAMPLES[name]())))
    args[0][...] = np.nan
    result = passes()[name](*args)
    assert np.isnan(result[0] if isinstance(result, tuple) else result).any()


@pytest.mark.parametrize("place", range(4))
def test_one_pixel_that_is_not_a_number_is_the_maximum(place):
    x = randn(1, 2, 2, 1)
    x.reshape(-1)[place] = np.nan
    for version in max_pool_output, max_pool_output.dispatch(object):
        y, argmax = version(x, TWO, TWO, (NONE, NONE))
        assert np.isnan(y) and argmax < 4


def test_pooling_of_what_is_infinitely_small_is_the_reference_s():
    args = np.full((1, 2, 2, 1), -np.inf, np.float32), TWO, ONE, (ONE, ONE)
    ours, reference = max_pool_output(*args), max_pool_output.dispatch(object)(*args)
    np.testing.assert_array_equal(ours[1], reference[1])


def test_training_is_the_same_with_and_without():
    def losses():
        model = ms.simclr.Model.build("resnet_small", "small", 16, seed=0)
        optimizer = ms.optim.SGD(model.named_parameters(), 0.1, weight_decay=1e-4)
        views = np.random.default_rng(1).random((32, 16, 16, 3), np.float32)
        for _ in range(4):
            z = model.head(model.encoder(ms.Tensor(views)))
            loss = ms.nt_xent(z[:16], z[16:])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            yield float(loss)

    fast = list(losses())
    versions = {f: f.dispatch(np.ndarray) for f in passes().values()}
    try:
        for f in versions:
            f.register(np.ndarray)(f.dispatch(object))
        reference = list(losses())
    finally:
        for f, version in versions.items():
            f.register(np.ndarray)(version)
    assert fast != reference  # not the same code twice
    np.testing.assert_allclose(fast, reference, rtol=2e-4)


ASK = "import numpy, minisimclr.ops.norm as n; print(numpy.ndarray in n.moments.registry)"


def run_with(choice, code=ASK):
    env = {**os.environ, "MINISIMCLR_KERNELS": choice, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)


def test_the_environment_chooses():
    assert run_with("reference").stdout == "False\n"
    assert run_with("fast").stdout == "True\n"
    assert "MINISIMCLR_KERNELS is 'best'" in run_with("best").stderr


def test_the_tests_of_a_readable_pass_are_of_no_other():
    """What they import, as one of the faster passes does, would replace it for all of them."""
    code = f"import pytest; pytest.main(['--collect-only', '-qq', {str(ROOT / 'tests')!r}]); {ASK}"
    listed = run_with("reference", code).stdout
    assert "test_augment.py: " in listed and "test_kernels.py: " not in listed
    assert listed.endswith("\nFalse\n")


def test_parallel_covers_the_range_once_in_order(threads):
    for n, block in ((1, 1), (2, 1), (7, 2), (64, 8), (65, 8)):
        parts = cores.parallel(lambda i, k: (i, k), n, block)
        assert [i for part in parts for i in range(*part)] == list(range(n))
        assert all(start % block == 0 for start, _ in parts)
        assert len(parts) <= cores.threads()


def test_parallel_works_in_the_caller_s_context_and_keeps_nothing():
    class Held:
        pass

    chosen: ContextVar[int] = ContextVar("chosen", default=0)
    token, held = chosen.set(7), Held()
    seen, enabled = weakref.ref(held), gc.isenabled()

    def work(start, stop, held=held):
        return chosen.get()

    def failing(start, stop, held=held):
        if start:
            raise ConfigError("the second part")

    cores.set_threads(2)
    gc.disable()  # a cycle would keep arrays until it runs
    try:
        assert cores.parallel(work, 4) == [7, 7]
        try:
            cores.parallel(failing, 4)
        except ConfigError as error:
            assert str(error) == "the second part"
        del work, failing, held
        end = time.monotonic() + 10
        while seen() is not None and time.monotonic() < end:
            time.sleep(0.01)  # a worker lets go after it has told that it is done
        assert seen() is None
    finally:
        if enabled:
            gc.enable()
        chosen.reset(token)
        cores.set_threads(cores.available_cores())


def test_threads_that_are_no_longer_wanted_end():
    def ours():
        return sum(thread.name == "minisimclr" for thread in threading.enumerate())

    cores.set_threads(3)
    cores.parallel(lambda i, k: None, 6)
    assert ours() >= 2
    cores.set_threads(1)
    end = time.monotonic() + 10
    while ours() and time.monotonic() < end:
        time.sleep(0.01)
    assert ours() == 0
    cores.set_threads(cores.available_cores())


def test_parallel_waits_for_all_before_it_raises():
    done = []

    def work(start, stop):
        if start == 0:
            raise ConfigError("first part")
        time.sleep(0.05)
        done.append(start)

    cores.set_threads(2)
    try:
        with pytest.raises(ConfigError, match="first part"):
            cores.parallel(work, 4)
        assert done == [2]
    finally:
        cores.set_threads(cores.available_cores())


@pytest.mark.parametrize(
    "files, expected",
    [
        ({}, 8),
        ({"cpu.max": "max 100000"}, 8),
        ({"cpu.max": "200000 100000"}, 2),
        ({"cpu.max": "150000 100000"}, 2),
        ({"cpu.max": "50000 100000"}, 1),
        ({"cpu.max": "6400000 100000"}, 8),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 8),
        ({"cpu/cpu.cfs_quota_us": "300000", "cpu/cpu.cfs_period_us": "100000"}, 3),
    ],
)
def test_a_container_has_its_share_of_cores(monkeypatch, tmp_path, files, expected):
    (tmp_path / "cpu").mkdir()
    for name, content in files.items():
        (tmp_path / name).write_text(content + "\n")
    monkeypatch.setattr(cores, "CGROUP", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert cores.available_cores() == expected


def test_threads_are_whole_numbers():
    before = cores.threads()
    for n in (1.5, -1, 1025):
        with pytest.raises(ConfigError, match="threads must be a whole number from 0 to 1024"):
            cores.set_threads(n)
    cores.set_threads(np.float64(before))
    assert type(cores.threads()) is int and cores.threads() == before


def test_threads_that_are_taken_are_not_waited_for():
    """Within `work`, in another thread, and in the child of a fork."""

    def count(start, stop):
        return stop - start

    def nested(start, stop):
        return sum(cores.parallel(count, 10))

    cores.set_threads(2)
    try:
        assert cores.parallel(nested, 4) == [10, 10]
        results = []
        others = [
            threading.Thread(target=lambda: results.append(cores.parallel(nested, 4)))
            for _ in range(8)
        ]
        for thread in others:
            thread.start()
        for thread in others:
            thread.join(20)
        assert results == [[10, 10]] * 8

        def forking(start, stop):  # while the threads are taken
            child = os.fork() if start == 0 and hasattr(os, "fork") else -1
            if child == 0:
                cores.set_threads(2)
                os._exit(0 if cores.parallel(count, 4) == [2, 2] else 1)
            return child

        child, _ = cores.parallel(forking, 4)
        if child > 0:
            end = time.monotonic() + 20
            while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < end:
                time.sleep(0.01)
            if ended == (0, 0):
                os.kill(child, signal.SIGKILL)
                pytest.fail("the child of a fork hangs")
            assert ended == (child, 0)
    finally:
        cores.set_threads(cores.available_cores())


def test_an_interrupt_waits_for_the_others():
    done = []

    def work(start, stop):
        if start:
            # What Ctrl-C does, on Windows with what there is: a kill would end this process there.
            _thread.interrupt_main() if os.name == "nt" else os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.3)
            done.append(start)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # some parents ignore it
    cores.set_threads(2)
    try:
        with pytest.raises(KeyboardInterrupt):
            cores.parallel(work, 4)
        assert done == [2]
    finally:
        signal.signal(signal.SIGINT, before)
        cores.set_threads(cores.available_cores())


@pytest.fixture
def collector_off():
    """Python drops what a signal raises while its collector calls hypothesis back."""
    gc.disable()
    yield
    gc.enable()


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="has no timer of signals")
def test_whenever_an_interrupt_comes_all_work_has_ended_and_the_workers_are_free(collector_off):
    working = set()

    def work(start, stop):
        if start:
            working.add(start)
            np.add(numbers[start:stop], 1, out=numbers[start:stop])
            working.discard(start)

    def interrupted():
        try:
            signal.setitimer(signal.ITIMER_REAL, rng.uniform(1e-6, 1e-3))
            while True:
                cores.parallel(work, len(numbers))
        except KeyboardInterrupt:
            return not working and cores._tasks.empty() and cores._free == [None]

    numbers, rng = np.zeros(300_000, np.float32), np.random.default_rng(0)
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    cores.set_threads(2)
    try:
        assert all(interrupted() for _ in range(1_000))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        cores._free[:] = [None]  # else nobody could set threads after a failure
        signal.signal(signal.SIGALRM, before)
        cores.set_threads(cores.available_cores())


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="has no timer of signals")
def test_no_interrupt_is_lost_in_a_convolution(collector_off):
    """NumPy drops what is raised in a Python function that it calls itself, as for some types."""
    fired, caught = [], 0

    def interrupt(*_):
        fired.append(1)
        raise KeyboardInterrupt

    x, w = randn(4, 32, 32, 8).astype(np.float32), randn(3, 3, 8, 4).astype(np.float32)
    rng = np.random.default_rng(0)
    before = signal.signal(signal.SIGALRM, interrupt)
    cores.set_threads(1)
    try:
        for _ in range(300):
            try:
                signal.setitimer(signal.ITIMER_REAL, rng.uniform(1e-6, 1e-3))
                while len(fired) == caught:
                    conv_output(x, w, ONE, ONE)
            except KeyboardInterrupt:
                caught += 1
            assert caught == len(fired)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        cores.set_threads(cores.available_cores())


@pytest.mark.skipif(sys.platform != "linux", reason="of Linux")
def test_peak_memory_is_not_that_of_the_process_before():
    much = np.ones(100_000_000, np.float32)
    assert cores.peak_resident() > much.nbytes
    script = "from minisimclr import cores; print(cores.peak_resident())"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert 1e7 < int(done.stdout) < much.nbytes


def test_blas_has_no_more_threads_than_there_are_cores(monkeypatch):
    asked = []
    monkeypatch.setattr(cores, "_blas", lambda: (asked.append, ""))
    monkeypatch.setattr(cores, "_blas_threads", 0)
    monkeypatch.setattr(cores, "available_cores", lambda: 2)
    cores.set_threads(5)
    assert asked == [2] and cores.threads() == 5
    monkeypatch.undo()
    cores.set_threads(cores.available_cores())


def test_blas_keeps_to_one_thread_beside_ours(monkeypatch):
    asked = []
    monkeypatch.setattr(cores, "available_cores", lambda: 3)
    monkeypatch.setattr(cores, "_blas", lambda: (asked.append, ""))
    monkeypatch.setattr(cores, "_blas_threads", 0)
    cores.set_threads(3)
    with cores.threaded_blas():
        pass
    assert asked == [3]  # as it was, for those who multiply large matrices alone
    cores.parallel(lambda i, k: None, 6)
    cores.parallel(lambda i, k: None, 6)
    with pytest.raises(KeyboardInterrupt), cores.threaded_blas():
        assert asked == [3, 1, 3]
        raise KeyboardInterrupt
    assert asked == [3, 1, 3, 1]
    monkeypatch.undo()
    cores.set_threads(cores.available_cores())


@pytest.fixture
def looked_up_anew():
    cores._blas.cache_clear()
    yield
    cores._blas.cache_clear()


@pytest.mark.skipif(not cores.sets_blas_threads(), reason="this NumPy has another BLAS")
@pytest.mark.skipif(sys.platform != "linux", reason="finds what a module is linked with")
def test_blas_is_found_wherever_it_is(monkeypatch, looked_up_anew):
    """As with NumPy from conda or a Linux distribution, whose BLAS is a package of its own."""
    monkeypatch.setattr(cores.Path, "glob", lambda *_: [])
    assert cores.sets_blas_threads()


def test_other_blas(monkeypatch, looked_up_anew):
    asked = []
    library = SimpleNamespace(MKL_Set_Num_Threads=asked.append)
    monkeypatch.setattr(cores.ctypes, "CDLL", lambda name: library)
    monkeypatch.setattr(cores, "_blas_threads", 0)
    monkeypatch.setattr(cores, "available_cores", lambda: 3)
    cores.set_threads(3)
    assert asked == [3] and not cores.blas_kernels()
    assert doctor.blas()[1].endswith(", threads: 3")
    del library.MKL_Set_Num_Threads
    cores._blas.cache_clear()
    cores.set_threads(2)
    assert asked == [3] and "threads: as many as it likes, --threads does" in doctor.blas()[1]
    monkeypatch.undo()
    cores._blas.cache_clear()
    cores.set_threads(cores.available_cores())


@pytest.mark.skipif(not cores.blas_kernels(), reason="this NumPy has another BLAS")
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="its processors")
def test_whose_matrix_products_are_used_is_told():
    script = "from minisimclr import cores, doctor; print(cores.blas_kernels(), doctor.blas())"
    environment = os.environ | {"OPENBLAS_CORETYPE": "Nehalem"}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment
    )
    assert done.stdout.startswith("Nehalem ") and "products for Nehalem" in done.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_memory_is_reused():
    """In a process of its own: after an allocation that failed, glibc serves a thread from another
    part of the memory, which gives arrays as large as this one back to the system at once.
    """
    code = """if True:
        import resource, numpy as np
        def faults():
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            np.empty(1 << 26, np.uint8).fill(1)
            return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
        new = min(faults() for _ in range(5))
        import minisimclr
        faults()
        print(new, min(faults() for _ in range(5)))
    """  # the least of five, since a busy system may take a few pages away
    options = {"env": os.environ | {"MINISIMCLR_KERNELS": "fast"}, "text": True, "check": True}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, **options)
    new, reused = map(int, done.stdout.split())
    assert new > 10 * reused


def test_long_rows_hold_the_same_numbers():
    x = randn(12, 5)
    k, (rows, none) = fast_norm.long_rows(x, None)
    assert none is None and rows.shape == (12 // k, 5 * k) and k == 4
    assert (rows.reshape(12, 5) == x).all()


def test_kernels_are_part_of_the_package():
    assert ms.kernels is kernels


def test_every_rung_keeps_those_below_it(monkeypatch, capsys):
    pytest.importorskip("resource")
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    ladder, seen, now = importlib.import_module("ladder"), [], [0.0]
    passes = [f for rung in ladder.RUNGS.values() for f in rung if f is not winograd.tile]
    times = iter([8.0, 4.0, 2.0, 1.0, 0.5])

    def step():
        now[0] += next(times)
        seen.append(sum(f.dispatch(np.ndarray) is not f.dispatch(object) for f in passes))

    monkeypatch.setattr(sys, "argv", ["ladder", "--rounds", "1"])
    monkeypatch.setattr(ladder, "our_step", lambda *_: (step, None, None))
    monkeypatch.setattr(ladder.time, "process_time", lambda: now[0])
    ladder.main()
    assert seen == [0, 4, 4, 8, 12]
    gains = re.findall(r"([\d.]+)x  +([\d.]+)x in all", capsys.readouterr().out)
    assert gains == [("1.00", "1.00"), *(("2.00", f"{2**k}.00") for k in (1, 2, 3, 4))]


@pytest.mark.parametrize(("script", "rows"), [("ladder", 5), ("compare_torch", 1)])
def test_scripts_that_time_whole_steps_run(script, rows):
    for needed in ["resource"] + ["torch"] * (script == "compare_torch"):
        pytest.importorskip(needed)
    command = [sys.executable, ROOT / "benchmarks" / f"{script}.py", "--case", "default"]
    done = subprocess.run([*command, "--rounds", "1"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    figures = [line for line in done.stdout.splitlines() if re.search(r"\d\.\d\d(x|-)", line)]
    assert len(figures) == rows, done.stdout
