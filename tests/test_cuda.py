"""The CUDA kernels without a GPU: their text runs on the CPU (host_cuda.py), and nvcc compiles it.

Every kernel against the readable pass in float64, on odd shapes, its threads in three orders; with
AddressSanitizer; and with mistakes planted, to see that each of these would have told.
"""

import copy
import functools
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import fake_cupy
import host_cuda
import numpy as np
import pytest
from host_cuda import HostModule, settings
from test_device import (
    NETS,
    host,
    same_training,
    steps,
    test_stopped_and_resumed_on_the_device,  # noqa: F401
)
from test_kernels import (
    BFLOAT16,
    SAMPLES,
    distance,
    exact,
    same_numbers_in_any_order,  # noqa: F401
)
from test_nn import our_run, rand, torch_resnet, torch_run

from minisimclr import augment, backend, cores, finetune, optim
from minisimclr.config import TrainConfig
from minisimclr.data import open_dataset
from minisimclr.kernels import cuda, cuda_conv, cuda_launch
from minisimclr.nn import BatchNorm, resnet10, resnet18
from minisimclr.ops import conv, norm, pool
from minisimclr.ops.product import linear, matmul
from minisimclr.run import new_run
from minisimclr.simclr import Model
from minisimclr.tensor import Function, Parameter, Tensor, memory_of
from minisimclr.train import pretrain

FILES = sorted(Path(cuda.__file__).parent.glob("*.cu"))
ORDERS = 0, 1, 2
ROOT = Path(__file__).parents[1]
NO_COMPILER = "needs g++ on Linux"
needs_compiler = pytest.mark.skipif(not host_cuda.available(), reason=NO_COMPILER)


@pytest.fixture
def cupy(monkeypatch):
    if not host_cuda.available():
        pytest.skip(NO_COMPILER)
    monkeypatch.setattr(cuda, "SHARES", 3)
    fake_cupy.install(monkeypatch, HostModule)
    yield backend.cupy()  # which registers the kernels
    fake_cupy.remove()


def larger_views(blurred):
    """Views above 32 px, where the blur comes in, and views larger than the picture."""
    images = np.random.default_rng(0).integers(0, 256, (5, 37, 45, 3), np.uint8)
    views = augment.draw_views(5, 0, 5, 37, 45, 1.0)
    if not blurred:  # a matrix product, whose last bits depend on where arrays lie
        views = replace(views, sigmas=0 * views.sigmas)
    return [(images, views, size) for size in (36, 50)]


def unfolded():
    """Kernels that leave pixels out, that reach over the border, of 1 x 1; channels 1, 3, 33, 64"""
    rng = np.random.default_rng(0)
    for shape, kernel, stride, padding in (
        ((2, 5, 6, 3), (3, 3), (1, 1), (1, 1)),
        ((3, 7, 9, 33), (3, 2), (2, 1), (1, 0)),
        ((1, 9, 8, 1), (5, 5), (3, 2), (2, 4)),
        ((2, 6, 5, 64), (2, 3), (3, 4), (0, 1)),
        ((2, 5, 5, 3), (1, 1), (2, 2), (0, 0)),
        ((1, 4, 4, 2), (4, 4), (1, 1), (0, 0)),
        ((2, 5, 6, 3), (1, 4), (1, 1), (0, 2)),
    ):
        size = conv.output_size(shape, kernel, stride, padding)
        yield rng.standard_normal(shape, np.float32), kernel, stride, padding, size


def folded():
    rng = np.random.default_rng(1)
    for x, kernel, stride, padding, size in unfolded():
        rows, numbers = len(x) * size[0] * size[1], kernel[0] * kernel[1] * x.shape[3]
        patches = rng.standard_normal((rows, numbers), np.float32)
        yield patches, np.full_like(x, 7), kernel, stride, padding, size


def multiplied():
    """Rows and columns as they lie in memory and turned, and a place for what comes out."""
    rng = np.random.default_rng(2)
    for n, k, m in (5, 7, 3), (1, 33, 300), (64, 1, 9):
        a, b = rng.standard_normal((n, k), np.float32), rng.standard_normal((k, m), np.float32)
        yield from ((a, b), (a, b.T.copy().T), (a.T.copy().T, b), (a.T.copy().T, b.T.copy().T))
        yield a, b, np.zeros((n, m), np.float32)


TILED = [  # shape of x, channels out, padding: worth Winograd's tiles
    ((2, 8, 8, 5), 6, (1, 1)),
    ((3, 6, 7, 33), 40, (0, 2)),
    ((1, 4, 4, 64), 25, (1, 1)),
    ((2, 12, 9, 3), 8, (2, 0)),
]


def convolved():
    """(x, w, gy, stride, padding)"""
    rng = np.random.default_rng(3)
    cases = [(x.shape, 1 + kernel[0], kernel, *rest[:2]) for x, kernel, *rest in unfolded()]
    cases += [(x, o, (3, 3), (1, 1), padding) for x, o, padding in TILED]
    for x, o, kernel, stride, padding in cases:
        w = *kernel, x[3], o
        gy = x[0], *conv.output_size(x, w, stride, padding), o
        yield (*(rng.standard_normal(each, np.float32) for each in (x, w, gy)), stride, padding)


PASSES = {
    norm.moments: SAMPLES["moments"],
    norm.scale_shift: SAMPLES["scale_shift"],
    norm.gradient_sums: SAMPLES["gradient_sums"],
    norm.input_gradient: SAMPLES["input_gradient"],
    augment.apply_views: lambda: [*SAMPLES["apply_views"](), *larger_views(blurred=False)],
    conv.unfold: unfolded,
    conv.fold: folded,
    conv.conv_output: lambda: ((x, w, *rest) for x, w, _, *rest in convolved()),
    conv.conv_input_gradient: lambda: ((gy, w, x.shape, *rest) for x, w, gy, *rest in convolved()),
    conv.conv_weight_gradient: lambda: ((gy, x, w.shape, *rest) for x, w, gy, *rest in convolved()),
    matmul: multiplied,
    pool.max_pool_output: SAMPLES["max_pool_output"],
    pool.max_pool_input_gradient: SAMPLES["max_pool_input_gradient"],
}
OPTIMIZED = optim.square_of_all, optim.update_all
PLACES = {augment.apply_views: "augment", matmul: "conv"}
PLACES |= dict.fromkeys((conv.unfold, conv.fold, conv.conv_input_gradient), "conv")
PLACES |= dict.fromkeys((conv.conv_output, conv.conv_weight_gradient), "winograd")
PLACES |= {pool.max_pool_output: "pool", pool.max_pool_input_gradient: "pool"}


def on_device(f, args, library):
    """Host copies of what pass `f` makes of device copies of its arguments."""
    given = [library.asarray(a) if isinstance(a, np.ndarray) else a for a in args]
    result = f(*given)
    return [np.array(host(r)) for r in (result if isinstance(result, tuple) else (result,))]


def reference(f, args):
    result = f.dispatch(object)(*(exact(a) for a in args))
    return result if isinstance(result, tuple) else (result,)


def optimized(like, kind, steps=3, dtype=np.float32, ok=(True, True, True)):
    """All parameters after some steps, then the squared length of the last gradients."""
    rng = np.random.default_rng(0)
    shapes = [
        ((5,), False),
        ((3, 3, 4, 29), True),
        ((1031,), False),
        ((2, 2), True),
        ((1,), True),
    ]
    arrays = [rng.standard_normal(shape) for shape, _ in shapes]
    arrays[3] *= 0  # no trust ratio without a norm
    named = {
        str(i): Parameter(like.asarray(a.astype(dtype)), adapt=adapt)
        for i, (a, (_, adapt)) in enumerate(zip(arrays, shapes, strict=True))
    }
    optimizer = kind(named.items(), 0.5, weight_decay=0.01)
    for step in range(steps):
        for p in named.values():
            p.grad = like.asarray(rng.standard_normal(p.shape).astype(dtype))
        named["0"].grad = like.broadcast_to(named["0"].grad[:1], (5,))
        optimizer.step(ok[step])
    arrays = [*(p.data for p in named.values()), optimizer.gradient_square()]
    if kind is optim.LARS:
        assert optimizer.trust.keys() == {"1", "3", "4"}
        arrays += optimizer.trust.values()
    return [np.array(host(a)) for a in arrays]


def followed(like, dtype=np.float32):
    """Running statistics behind two batches, and behind one of small numbers that replaces them."""
    rng, seen = np.random.default_rng(0), []
    mean, variance, *batches = (like.asarray(rng.random(300).astype(dtype)) for _ in range(6))
    batches = [*zip(batches[:2], batches[2:], strict=True), tuple(1e-6 * a for a in batches[:2])]
    for batch, momentum in zip(batches, (0.3, 0.3, 1), strict=True):
        norm.update_running(mean, variance, batch, momentum, 5)
        seen += [np.array(host(a)) for a in (mean, variance)]
    return seen


def in_every_order(run):
    """What `run` returns, with the threads in each order: the same bits, or it is a mistake."""
    outcomes = []
    for settings.order in ORDERS:
        outcomes.append(run())
    settings.order = 0
    for other in outcomes[1:]:
        for a, b in zip(outcomes[0], other, strict=True):
            assert a.tobytes() == b.tobytes(), "the order of the threads shows"
    return outcomes[0]


def compare(results, references):
    """float32 to its last digits; bfloat16 to half its last bit, as sums are rounded but once."""
    for ours, theirs in zip(results, references, strict=True):
        assert ours.shape == theirs.shape
        assert distance(ours, theirs) < (2**-8 if ours.dtype == BFLOAT16 else 1e-5)


def in_bfloat16(args):
    """Images and gradients in bfloat16; what there is one of per channel stays float32."""
    return [
        a.astype(BFLOAT16) if isinstance(a, np.ndarray) and a.dtype == "f4" and a.ndim > 1 else a
        for a in args
    ]


def exercise(name, library):
    """Run every kernel of a file on samples, in every order, against the reference."""
    if name == "optim":
        for kind in (optim.SGD, optim.LARS):
            ours = in_every_order(lambda kind=kind: optimized(library, kind))
            compare(ours, optimized(np, kind, dtype=np.float64))
        return
    if name == "norm":
        compare(in_every_order(lambda: followed(library)), followed(np, np.float64))
    # CuPy has the type where NumPy is new enough.
    half = in_bfloat16 if name != "augment" and "EE->E" in library.add.types else None
    for f, samples in PASSES.items():
        if PLACES.get(f, "norm") == name:
            for args in [*samples(), *(map(half, samples()) if half else [])]:
                ours = in_every_order(functools.partial(on_device, f, args, library))
                compare(ours, reference(f, args))


def test_every_kernel_is_here(cupy):
    assert all(cupy.ndarray in f.registry for f in cuda.PASSES)
    assert set(cuda.PASSES) == {*PASSES, norm.update_running, *OPTIMIZED}
    assert {f.stem for f in FILES} == {"norm", "optim", "augment", "conv", "winograd", "pool"}


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_a_file_does_what_the_readable_passes_do(file, cupy):
    exercise(file.stem, cupy)
    assert not cupy.counter.syncs


@pytest.mark.parametrize(
    "file, line",
    [
        pytest.param(f.stem, i, id=f"{f.stem}-line-{i}")
        for f in FILES
        for i, text in enumerate(f.read_text().splitlines(), 1)
        if "__syncthreads()" in text
    ],
)
def test_a_missing_barrier_is_caught(file, line, cupy, monkeypatch):
    monkeypatch.setattr(settings, "ignored_line", line)
    with pytest.raises(AssertionError, match=r"order of the threads|distance"):
        exercise(file, cupy)


PRELUDE = 'extern "C" __global__ void f(float* x) {'
BROKEN = {
    "3 of 5 threads reach the barrier": "if (threadIdx.x < 3) __syncthreads(); }",
    "barriers of lines 1 and 2": "if (threadIdx.x < 3) __syncthreads();\nelse __syncthreads(); }",
}


@pytest.mark.parametrize("said", BROKEN)
def test_a_barrier_that_some_threads_miss_is_caught(said, cupy):
    kernel = HostModule(PRELUDE + BROKEN[said]).get_function("f")
    with pytest.raises(RuntimeError, match=said):
        kernel((1,), (5,), (cupy.zeros(5, np.float32),))


@pytest.mark.parametrize(
    "order, expected", [(0, [1, 2, 3, 4]), (1, [4, 3, 2, 1]), (2, [1, 4, 3, 2])]
)
def test_threads_run_in_the_order_asked_for(order, expected, cupy, monkeypatch):
    code = f"{PRELUDE} x[threadIdx.x] = ++x[4]; }}"
    x = cupy.zeros(5, np.float32)
    monkeypatch.setattr(settings, "order", order)
    HostModule(code).get_function("f")((1,), (4,), (x,))
    assert x._host[:4].tolist() == expected


def test_every_number_is_rounded_as_numpys_bfloat16_is(cupy):
    """By the pass of batch norm that writes (0 - 0) + beta."""
    shift = np.random.default_rng(0).integers(0, 1 << 32, 4096, np.uint32)
    shift[:8] = 0x7FFFFFFF, 0x7F800001, 0x7F800000, 0xFF800000, 0x7F7FFFFF, 0x7FC00000, 0, 1
    shift[8:1024] = shift[8:1024] & 0xFFFF0000 | 0x8000  # ties
    shift = shift.view(np.float32)
    shift[abs(shift) < np.finfo(np.float32).tiny] = 0  # as CuPy compiles
    x, zeros, ones = np.zeros((1, 4096), BFLOAT16), np.zeros_like(shift), np.ones_like(shift)
    given = x, zeros, ones, 0.0, ones, shift, None, False
    (y,) = on_device(norm.scale_shift, given, cupy)
    assert y.dtype == BFLOAT16 and np.isnan(y).sum() > 2 and np.isinf(y).sum() > 2
    with np.errstate(invalid="ignore"):
        expected = shift.astype(BFLOAT16)
    np.testing.assert_array_equal(y[0].astype(np.float32), expected.astype(np.float32))


def tiled_where(x, o, padding=(1, 1), kernel=(3, 3), stride=(1, 1), dtype="f4"):
    w = *kernel, x[3], o
    size = conv.output_size(x, w, stride, padding)
    return cuda_conv.tile_grid(np.empty(x, dtype), w, size, stride)


def test_winograds_tiles_are_taken_where_they_pay():
    assert [tiled_where(*case) for case in TILED] == [(2, 2), (1, 3), (1, 1), (4, 2)]
    for x, o, other in (
        ((2, 8, 8, 5), 6, {"dtype": BFLOAT16}),
        ((2, 8, 8, 5), 6, {"stride": (1, 2)}),
        ((2, 8, 8, 5), 6, {"kernel": (3, 5)}),
        ((2, 2, 2, 64), 64, {}),  # three quarters of each tile are outside
        ((2, 5, 5, 64), 64, {}),
        ((2, 8, 8, 3), 64, {}),  # patches are few numbers
    ):
        assert tiled_where(x, o, **other) is None


def test_images_are_tiled_a_few_at_a_time(cupy, monkeypatch):
    for x, w, gy, *geometry in list(convolved())[-len(TILED) :]:
        for f, args in (
            (conv.conv_output, (x, w, *geometry)),
            (conv.conv_weight_gradient, (gy, x, w.shape, *geometry)),
        ):
            monkeypatch.setattr(conv, "GPU_WORKSPACE", 1 << 27)
            at_once = on_device(f, args, cupy)
            monkeypatch.setattr(conv, "GPU_WORKSPACE", 1)
            compare(on_device(f, args, cupy), at_once)


def test_tiles_take_no_more_memory_than_they_may(cupy, monkeypatch):
    made, take = [], cuda_conv.take

    def spy(x, side, *rest):
        made.append((side, len(x)))
        return take(x, side, *rest)

    monkeypatch.setattr(cuda_conv, "take", spy)
    x, w, gy, *geometry = next(each for each in convolved() if each[0].shape == TILED[0][0])
    x, gy = (np.concatenate([each] * 3) for each in (x, gy))  # 6 images of 2 x 2 tiles
    monkeypatch.setattr(conv, "GPU_WORKSPACE", 2 * cuda_conv.FF * 2 * 2 * (5 + 6))
    on_device(conv.conv_output, (x, w, *geometry), cupy)
    assert made == [(3, 1), (6, 2), (6, 2), (6, 2)]
    made.clear()
    on_device(conv.conv_weight_gradient, (gy, x, w.shape, *geometry), cupy)
    assert made == [(6, 2), (4, 2)] * 3


def test_a_launch_has_no_more_blocks_than_run_at_once():
    for rows, c in ((1, 3), (1 << 28, 64), (100_000_000, 512)):
        (wide, high), (_, _, tile) = cuda.tiles(SimpleNamespace(size=rows * c, shape=(rows, c)))
        assert wide * high <= cuda.BLOCKS and high * tile >= rows and wide * 32 >= c


def test_winograds_tiles_round_a_little_more_than_plain_sums(cupy):
    rng = np.random.default_rng(0)
    shapes = (1, 8, 8, 64), (3, 3, 64, 64), (1, 8, 8, 64)
    x, w, gy = (rng.standard_normal(shape, np.float32) for shape in shapes)
    for f, args in (
        (conv.conv_output, (x, w)),
        (conv.conv_input_gradient, (gy, w, x.shape)),
        (conv.conv_weight_gradient, (gy, x, w.shape)),
    ):
        args = *args, (1, 1), (1, 1)
        (ours,), (exactly,) = on_device(f, args, cupy), reference(f, args)
        # Here products are exact, and the points 1 and 2 would give 8e-7.
        most = 6e-7 if cupy.__version__.endswith("fake") else 2e-6
        assert 2e-7 < distance(ours, exactly) < most


def test_what_is_not_a_number_or_infinite_stays_so(cupy):
    x = np.full((1, 3, 3, 2), -np.inf, np.float32)
    x[0, 1, 1] = np.nan, 5
    for y, argmax in (
        on_device(pool.max_pool_output, (x, (2, 2), (2, 2), ((1, 0), (1, 0))), cupy),
        pool.max_pool_output.dispatch(object)(x, (2, 2), (2, 2), ((1, 0), (1, 0))),
    ):
        np.testing.assert_array_equal(y[0, :, :, 1], [[-np.inf, -np.inf], [-np.inf, 5]])
        np.testing.assert_array_equal(np.isnan(y[0, :, :, 0]), [[False, False], [False, True]])
        assert argmax[0, 1, 1, 0] == 0
    args = np.full((1, 2, 2, 1), -np.inf, np.float32), (2, 2), (1, 1), ((1, 1), (1, 1))
    ours, exactly = (
        on_device(pool.max_pool_output, args, cupy),
        reference(pool.max_pool_output, args),
    )
    np.testing.assert_array_equal(ours[1], exactly[1])


def test_a_batch_may_be_empty_here_too(cupy):
    """CUDA refuses to launch no blocks."""
    images, views = cupy.zeros((0, 40, 40, 3), np.uint8), augment.draw_views(0, 0, 0, 40, 40)
    model = Model.build("resnet10", "imagenet", 4, seed=0).to("cuda:0")
    for size in (32, 36):  # the larger ones would be blurred
        for view in augment.apply_views(images, views, size):
            assert view.shape == (0, size, size, 3) and model.encode(view).shape == (0, 32)


def test_relu_keeps_what_is_not_a_number(cupy):
    x, one = np.full((3, 2), np.nan, np.float32), np.ones(2, np.float32)
    (y,) = on_device(norm.scale_shift, (x, one, one, 1e-5, one, one, None, True), cupy)
    assert np.isnan(y).all()


def test_grey_pixels_have_no_hue(cupy):
    images = np.full((3, 20, 20, 3), [[[[128]]], [[[255]]], [[[0]]]], np.uint8)
    args = images, augment.draw_views(0, 0, 3, 20, 20, 1.0), 12
    assert (args[1].factors[..., 3] != 0).any()
    compare(on_device(augment.apply_views, args, cupy), reference(augment.apply_views, args))


def test_hues_may_turn_a_whole_turn(cupy):
    images = np.random.default_rng(0).integers(0, 256, (9, 20, 20, 3), np.uint8)
    args = images, augment.draw_views(0, 0, 9, 20, 20, 5.0), 12
    assert abs(args[1].factors[..., 3]).max() > 0.8
    compare(on_device(augment.apply_views, args, cupy), reference(augment.apply_views, args))


def test_bfloat16_costs_two_digits(cupy):
    """Errors of the three passes of convolutions, beside float64: of the norm, 0.1 to 1 %. The
    gradient of a weight is float32, as the weight is.
    """
    rng = np.random.default_rng(0)
    shapes = (2, 9, 8, 16), (3, 3, 16, 8), (2, 9, 8, 8)
    x, w, gy = (rng.standard_normal(shape, np.float32) for shape in shapes)
    step, around = (1, 1), (1, 1)
    for f, args, kind in (
        (conv.conv_output, (x, w, step, around), BFLOAT16),
        (conv.conv_input_gradient, (gy, w, x.shape, step, around), BFLOAT16),
        (conv.conv_weight_gradient, (gy, x, w.shape, step, around), np.float32),
    ):
        given = [a if a is w else in_bfloat16([a])[0] for a in args]
        (ours,) = on_device(f, given, cupy)
        assert ours.dtype == kind and not cupy.counter.syncs
        assert 1e-3 < distance(ours, f.dispatch(object)(*map(exact, args))) < 1e-2


def test_products_in_bfloat16_take_parts_of_matrices_and_float32(cupy):
    a, b = cupy.asarray(rand(5, 14).astype(BFLOAT16))[:, ::2], cupy.asarray(rand(7, 3).astype("f4"))
    exactly = exact(host(a)) @ exact(host(b).astype(BFLOAT16))
    assert distance(host(matmul(a, b)), exactly) < 1e-6


@pytest.mark.parametrize("kinds", [(BFLOAT16, "f4"), ("f4", BFLOAT16)])
def test_a_residual_in_another_precision_than_bfloat16_is_converted(kinds, cupy):
    (x, *given, residual, relu) = next(s for s in SAMPLES["scale_shift"]() if s[6] is not None)
    args = x.astype(kinds[0]), *given, residual.astype(kinds[1]), relu
    (ours,) = on_device(norm.scale_shift, args, cupy)
    expected = norm.scale_shift.dispatch(object)(*map(exact, args))
    assert ours.dtype == kinds[0] and distance(ours, expected) < 1e-2


@pytest.mark.parametrize("convert", [list, in_bfloat16], ids=["float32", "bfloat16"])
def test_a_gradient_may_be_written_over(convert, cupy):
    for args in SAMPLES["input_gradient"]():
        args = convert(args[:9])

        def run(args=args):
            g, *others = (cupy.asarray(a) if isinstance(a, np.ndarray) else a for a in args)
            g = cupy.ascontiguousarray(g)
            norm.input_gradient(g, *others, out=g)
            return [np.array(host(g))]

        compare(in_every_order(run), reference(norm.input_gradient, args))


@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
def test_images_at_odd_addresses_are_copied_number_by_number(kind, cupy):
    geometry = (3, 3), (1, 1), (1, 1), (5, 6)
    dtype = BFLOAT16 if kind == "bfloat16" else np.float32
    numbers = cupy.asarray(np.arange(1 + 5 * 6 * 8).astype(dtype))
    for x in (numbers[1:].reshape(1, 5, 6, 8), numbers[:-1].reshape(1, 5, 6, 8)):
        patches = conv.unfold(x, *geometry)
        expected = conv.unfold.dispatch(object)(host(x), *geometry)
        np.testing.assert_array_equal(host(patches), expected)


def test_large_views_are_blurred_and_small_ones_are_not(cupy):
    (images, views, _), *_ = large = larger_views(blurred=True)
    assert (views.sigmas > 0).any()
    for args in [*large, (images, views, augment.SMALL)]:
        ours = on_device(augment.apply_views, args, cupy)
        compare(ours, reference(augment.apply_views, args))


WRONG = {
    "2 arguments for 3": lambda x: (x, np.int32(1)),
    "given float64": lambda x: (x.astype(np.float64), np.int32(1), np.int64(1)),
    "with gaps": lambda x: (x[::2], np.int32(1), np.int64(1)),
    "a number for a pointer": lambda x: (np.intp(3), np.int32(1), np.int64(1)),
    r"f\(int\) given int64": lambda x: (x, np.int64(1), np.int64(1)),
    r"f\(long long\) given int": lambda x: (x, np.int32(1), 1),
}


@pytest.mark.parametrize("said", WRONG)
def test_a_wrong_argument_is_caught(said, cupy):
    code = 'extern "C" __global__ void f(float* x, int n, long long m) {}'
    kernel = HostModule(code).get_function("f")
    with pytest.raises(AssertionError, match=said):
        kernel((1,), (5,), WRONG[said](cupy.zeros(6, np.float32)))


# AddressSanitizer has to be in the process from its start: each run is a process of its own.

SCRIPT = """
import sys
import fake_cupy, test_cuda
from minisimclr import backend
from minisimclr.kernels import cuda
test_cuda.settings.sanitize, test_cuda.settings.plant = True, tuple(sys.argv[2:4])
cuda.SHARES, test_cuda.ORDERS = 3, (0,)
sys.modules["cupy"] = fake_cupy.build(test_cuda.HostModule)[0]
library = backend.cupy()
for name in sys.argv[1].split(","):
    test_cuda.exercise(name, library)
print("clean")
"""


def sanitized(files, old="", new=""):
    found = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True)
    if not Path(found.stdout.strip()).is_absolute():
        pytest.skip("g++ has no AddressSanitizer here")
    path = [str(Path(__file__).parent), str(Path(cuda.__file__).parents[2])]
    env = {"LD_PRELOAD": found.stdout.strip(), "PYTHONPATH": ":".join(path), "HOME": "/nowhere",
           "ASAN_OPTIONS": "detect_leaks=0", "OPENBLAS_NUM_THREADS": "1",
           "PATH": ":".join(str(Path(shutil.which(x)).parent) for x in ("g++", "as"))}  # fmt: skip
    command = [sys.executable, "-c", SCRIPT, files, old, new]
    with tempfile.TemporaryDirectory() as folder:  # one that is aborted cleans up nothing
        env["TMPDIR"] = folder
        return subprocess.run(command, env=env, capture_output=True, text=True)


@needs_compiler
def test_no_kernel_leaves_its_arrays():
    run = sanitized("augment,conv,norm,optim,pool,winograd")
    assert run.stdout == "clean\n", run.stderr[-3000:]


@needs_compiler
@pytest.mark.parametrize(
    "file, old, new",
    [
        ("norm", "min(top + tile, rows)", "min(top + tile, rows + 1)"),
        ("augment", "images + blockIdx.x % n", "images + (blockIdx.x % n + 1)"),
        ("optim", "i < (n)", "i <= (n)"),
        ("conv", "a < h &&", "a <= h &&"),
        ("conv", "i < oh &&", "i <= oh &&"),
        ("winograd", "row < h &&", "row <= h &&"),
        ("pool", "top + a < h;", "top + a <= h;"),
        ("pool", "i < oh &&", "i <= oh &&"),
    ],
)
def test_a_read_out_of_bounds_is_caught(file, old, new):
    assert old in next(f for f in FILES if f.stem == file).read_text()
    run = sanitized(file, old, new)
    assert run.returncode and "AddressSanitizer: heap-buffer-overflow" in run.stderr
    assert re.search(r"READ of size [14] .*\n.*kernels\.cu:\d+", run.stderr)


# Training on the kernels.


def test_the_readable_passes_stay_where_they_are_asked_for():
    code = "from minisimclr import backend; print(len(backend.on_cupy))"
    for choice, hooks in (("fast", "1\n"), ("reference", "0\n")):
        env = {**os.environ, "MINISIMCLR_KERNELS": choice, "PYTHONPATH": str(ROOT)}
        run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
        assert run.stdout == hooks, run.stderr


def test_rates_of_a_subclass_count_on_the_device_too(cupy):
    class Slow(optim.SGD):
        def rate_of(self, name, p):
            return self.lr * (1.0 if p.adapt else 0.1)

    class SlowLARS(optim.LARS):
        def rate_of(self, name, p):
            return 0.1 * super().rate_of(name, p)

    for kind in (Slow, SlowLARS):
        compare(optimized(cupy, kind), optimized(np, kind, dtype=np.float64))


def test_nothing_moves_where_a_number_is_not_finite(cupy):
    for kind in (optim.SGD, optim.LARS):
        for ok in ((True, np.bool_(False), np.bool_(True)), (False, True, True)):
            there = tuple(cupy.asarray(each) for each in ok)
            expected = optimized(np, kind, dtype=np.float64, ok=ok)
            compare(optimized(cupy, kind, ok=there), expected)
            compare(optimized(cupy, kind, ok=ok), expected)
    refused = optimized(cupy, optim.LARS, ok=(True, True, cupy.asarray(np.bool_(False))))
    made = optimized(np, optim.LARS, dtype=np.float64)
    compare(refused[-3:], made[-3:])  # the ratios are known all the same
    assert not cupy.counter.syncs


@pytest.mark.parametrize("kind", [optim.SGD, optim.LARS])
def test_a_training_step_waits_for_nothing(kind, cupy):
    ours = steps("cuda:0", cupy, optimizer=kind)
    assert not cupy.counter.syncs
    same_training(ours, optimizer=kind)


@pytest.fixture
def config(pictures, monkeypatch):
    """A small run, in few blocks: emulated threads take their time."""
    monkeypatch.setattr(cuda, "BLOCKS", 2)
    monkeypatch.setattr(cuda, "SHARES", 1)
    return TrainConfig(
        data=str(pictures), width=4, image_size=12, batch_size=24, epochs=2, optimizer="lars",
        threads=1, device="cuda:0",
    )  # fmt: skip


def kept(y):
    """Bytes of the images that the operations behind y hold for its backward pass."""
    functions, images = [y.creator], {}
    for function in functions:
        functions += [p for p in function.parents if isinstance(p, Function)]
        for name, a in vars(function).items():
            if getattr(a, "ndim", 0) == 4 and name != "w":
                images[memory_of(a)] = a.nbytes
    return sum(images.values())


def test_activations_in_bfloat16_take_half_the_memory(cupy):
    net = resnet10("imagenet", 4).to("cuda:0")
    x = Tensor(cupy.asarray(np.random.default_rng(0).random((4, 33, 33, 3), np.float32)))
    whole = net(x)
    with backend.precision("bf16", "cuda:0"):
        half = net(x)
    assert whole.dtype == half.dtype == np.float32
    assert 0.5 < kept(half) / kept(whole) < 0.55  # which winners of the pooling keep from 0.5
    assert 1e-4 < distance(host(half.data), host(whole.data)) < 3e-2
    pooled = host(half.data)  # means of many pixels, not rounded again
    assert (pooled.astype(BFLOAT16).astype(np.float32) != pooled).mean() > 0.5
    half.sum().backward()
    assert {p.grad.dtype.name for _, p in net.named_parameters()} == {"float32"}
    assert not any(a.dtype == BFLOAT16 for a in net.state_dict().values())


def test_a_gradient_in_float32_of_what_is_bfloat16_is_converted(cupy):
    """A kernel would take its bytes for twice as many numbers."""
    x, w = (cupy.asarray(rand(8, n).astype("f4")) for n in (4, 8))
    with backend.precision("bf16", "cuda:0"):
        x, w, layer = Tensor(x.astype(BFLOAT16), True), Tensor(w[:, :4], True), BatchNorm(4)
        y = linear(layer.to("cuda:0")(x), w)
        assert y.dtype == np.float32
        (y * y).sum().backward()
    on_host = Tensor(exact(host(x.data)), True)
    y = linear(BatchNorm(4).astype(np.float64)(on_host), Tensor(exact(host(w.data))))
    (y * y).sum().backward()
    assert distance(host(x.grad), on_host.grad) < 0.05


def test_in_bfloat16_a_network_is_as_exact_as_in_torchs_autocast(cupy):
    """Eight images make a rough gradient, and three digits change half of it: there as here."""
    torch = pytest.importorskip("torch")
    reference, x = torch_resnet("resnet18", "imagenet", 8), rand(8, 32, 32, 3, dtype=np.float32)
    net = resnet18("imagenet", 8)
    net.load_state_dict({k: v.numpy() for k, v in reference.state_dict().items()})
    expected = torch_run(copy.deepcopy(reference).double(), x.astype(np.float64))
    in_autocast = torch.autocast("cpu", torch.bfloat16)(reference.forward)
    reference.forward = lambda x: in_autocast(x).float()
    theirs = torch_run(reference, x)
    with backend.precision("bf16", "cuda:0"):
        ours = our_run(net.to("cuda:0"), cupy.asarray(x))

    def all_of(gradients):
        return np.concatenate([host(gradients[name]).ravel() for name in expected[2]])

    def errors(h, _, gradients):
        return distance(host(h), expected[0]), distance(all_of(gradients), all_of(expected[2]))

    for error, of_torch in zip(errors(*ours), errors(*theirs), strict=True):
        assert 0.5 * of_torch < error < 1.2 * of_torch  # sums of another order: up to 1.15


def test_a_training_step_in_bfloat16(cupy):
    """What SGD moves the weights by, that is the gradient, beside that of float32 on the host."""
    (_, at_start), (theirs, on_host) = (
        steps("cpu", np, count, optim.SGD, **NETS["pooled"]) for count in (0, 1)
    )
    with backend.precision("bf16", "cuda:0"):
        (ours, model) = steps("cuda:0", cupy, 1, optim.SGD, **NETS["pooled"])
    assert not cupy.counter.syncs
    before, after, expected = (
        np.concatenate([host(p.data).ravel() for _, p in m.named_parameters()])
        for m in (at_start, model, on_host)
    )
    assert 1e-3 < distance(after - before, expected - before) < 0.25
    assert ours[0].figures["loss"] == pytest.approx(theirs[0].figures["loss"], rel=0.01)


def test_a_weight_without_a_gradient_has_no_trust_ratio(cupy):
    p = Parameter(cupy.ones((2, 3), np.float32))
    optimizer = optim.LARS([("w", p)], 0.1, weight_decay=0.0)
    p.grad = cupy.zeros((2, 3), np.float32)
    optimizer.step()
    assert (host(p.data) == 1).all() and host(optimizer.trust["w"]) == 1
    frozen = Parameter(cupy.ones(2, np.float32))  # one before it that gets no gradient at all
    optimizer = optim.LARS([("frozen", frozen), ("w", p)], 0.1)
    optimizer.step()
    assert optimizer.trust.keys() == {"w"}


def test_parameters_that_a_kernel_would_misread_are_refused(cupy):
    good, gap = (Parameter(cupy.asarray(np.ones((4, 3), np.float32))) for _ in range(2))
    double = Parameter(gap.data.astype(np.float64))
    gap.data = gap.data.T
    for wrong in (gap, double):
        optimizer = optim.SGD([("good", good), ("wrong", wrong)], 0.1)
        for p in (good, wrong):
            p.grad = cupy.ones_like(p.data)
        with pytest.raises(ValueError, match="wrong: not in one piece of float32"):
            optimizer.step()
    good.grad = good.grad.astype(np.float64)
    with pytest.raises(ValueError, match="good: not in one piece of float32"):
        optim.SGD([("good", good)], 0.1).step()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_waits_for_nothing_within_an_epoch(precision, cupy, config, tmp_path):
    within, counter = [], cupy.counter

    def note(event, values):
        if event == "start":
            counter.clear()
        if event == "step":
            within.append(counter.syncs.copy())
            counter.syncs.clear()

    few = replace(config, epochs=1, precision=precision)
    run = pretrain(few, tmp_path / "run", notify=note)
    assert within[:-1] == [[]] * (run.step - 1) and run.step > 2
    assert counter.waits == run.step


def test_finetuning_waits_once_an_epoch(cupy, config, tmp_path, monkeypatch):
    monkeypatch.setattr(finetune, "BATCH", 6)
    run, dataset = new_run(tmp_path, config, "cuda:0"), open_dataset(config.data, 15)
    waits = []

    def progress(done, total):
        waits.append(cupy.counter.syncs.copy())
        cupy.counter.clear()

    rows = dataset.split("labelled")[:18]
    cupy.counter.clear()
    finetune.fit(run.model, dataset, rows, finetune.Recipe(2, 12, 12, "cuda:0"), 0, progress)
    assert waits[1:] == [[], ["bool"], [], [], ["bool"]]  # the first copies the model, too


# What will run first where there is a GPU.


def script(name):
    path = ROOT / "benchmarks" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_script_for_a_gpu_runs_to_its_end(cupy, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch", None)
    parts = ["facts", "ceilings", "kernels", "losses", "convolutions", "blocks", "views", "lars"]
    parts += ["shares"]
    out = tmp_path / "gpu.json"
    results = script("gpu").main(["--small", "--here", "--out", str(out), "--part", *parts])
    assert list(results) == parts and json.loads(out.read_text()) == results
    assert not [row for rows in results.values() for row in rows if "failed" in row]
    assert results["lars"][0]["ms"] == 1.0
    assert all({"host_ms", "busy_ms"} <= row.keys() for row in results["losses"][:-1])
    assert len({row.get("numbers") for row in results["blocks"]}) == 8
    assert len(results["shares"]) == 4
    for row in results["shares"][:-1]:
        assert row["share"] == pytest.approx(row["roofline_ms"] / row["ms"]) and row["share"] > 0
    assert [row["skipped"] for row in results["lars"] if "skipped" in row]


def test_a_gain_is_how_many_times_as_fast_a_kernel_is(monkeypatch):
    gpu, readable = script("gpu"), MagicMock()
    kernel = MagicMock(dispatch=lambda kind: readable)
    monkeypatch.setattr(gpu, "seconds", lambda f, *_: 0.002 if f is kernel else 0.006)
    monkeypatch.setattr(gpu, "busy_seconds", lambda: 60.0)
    row = gpu.row("a", kernel, [()], gpu.Sizes(small=True), 4e6)
    assert row["gain"] == 3 and (row["ms"], row["readable_ms"]) == (2, 6)
    assert row["gb_per_second"] == pytest.approx(2)


def test_both_sides_are_timed_alike(cupy, monkeypatch):
    gpu = script("gpu")
    monkeypatch.setattr(gpu, "BUSY", 64)
    sizes, draw = gpu.Sizes(small=True), gpu.augment.draw_views

    def slow(*given):
        time.sleep(0.01)
        return draw(*given)

    monkeypatch.setattr(gpu.augment, "draw_views", slow)
    monkeypatch.setitem(sys.modules, "torch", None)
    ours, theirs = gpu.views(sizes)  # torchvision's views are drawn while the clock runs
    assert ours["views_per_second"] < 2 * sizes.views[0][0] / 0.01 and theirs["skipped"]
    monkeypatch.setitem(sys.modules, "torch", torch := MagicMock())
    torch.cuda.Event.return_value.elapsed_time.return_value = 2.0
    assert gpu.torch_seconds(lambda: None, 3) == 2e-3
    assert torch.randn.call_args.args == gpu.busy(64)[0].shape  # as long a head start


def test_a_part_that_fails_costs_neither_its_rows_nor_other_parts(cupy, monkeypatch, tmp_path):
    gpu, out = script("gpu"), tmp_path / "gpu.json"

    def failing(sizes):
        yield {"what": "the first"}
        raise MemoryError("none left")

    monkeypatch.setattr(gpu, "PARTS", (failing, gpu.losses))
    results = gpu.main(["--small", "--here", "--out", str(out)])
    assert [*results["failing"][0].values()] == ["the first"]
    assert results["failing"][1] == {"failed": "MemoryError: none left"}
    assert results["losses"][0]["ms"] == 1.0


def test_what_a_precision_lacks_is_said_and_costs_no_other(cupy, monkeypatch, tmp_path):
    gpu = script("gpu")
    monkeypatch.setattr(cupy, "__version__", "13.6.0")
    parts = ["ceilings", "convolutions", "shares"]
    out = str(tmp_path / "gpu.json")
    results = gpu.main(["--small", "--here", "--out", out, "--part", *parts])
    assert "needs CuPy 14" in results["ceilings"][-2]["skipped"]
    assert {row.get("precision") for row in results["shares"][:-1]} == {"fp32", "tf32"}
    assert len(results["convolutions"]) == 7


def test_cudnn_is_given_the_same_convolutions(cupy):
    torch = pytest.importorskip("torch")
    gpu = script("gpu")
    for layout in "channels_last", "contiguous_format":
        theirs = gpu.torch_passes((2, 6, 5, 4), (3, 3, 4, 7), 2, "fp32", layout, "cpu")
        ours = gpu.passes_of((2, 6, 5, 4), (3, 3, 4, 7), 2)
        for which, (f, given) in ours.items():
            y, reference = theirs[which](), f(*given)
            nhwc = y.permute(2, 3, 1, 0) if which == "weight" else y.permute(0, 2, 3, 1)
            assert nhwc.shape == reference.shape and y.is_contiguous(
                memory_format=getattr(torch, layout)
            )


CHILD = """
import json, os, sys, time
options = dict(zip(sys.argv[2::2], sys.argv[3::2]))  # what comes after --here
part = options["--part"]
row = {{"failed": "no GPU"}} if {broken} and part == "facts" else {{"options": options}}
open(options["--out"], "w").write(json.dumps({{part: [row]}}))
if part == "kernels":
    os.abort()
if part == "losses":
    time.sleep(60)
"""


@pytest.fixture
def apart(monkeypatch, tmp_path):
    """The script for a GPU, its parts replaced by processes of which one dies and one hangs."""
    gpu, out = script("gpu"), tmp_path / "gpu.json"

    def main(*arguments, broken=False):
        (tmp_path / "child.py").write_text(CHILD.format(broken=broken))
        return gpu.main(["--out", str(out), *arguments])

    monkeypatch.setattr(gpu, "__file__", str(tmp_path / "child.py"))
    monkeypatch.setattr(gpu, "LONG", 4)
    monkeypatch.setattr(gpu, "SLACK", 0)
    return main, out


def test_a_process_that_dies_or_hangs_costs_its_part_alone(apart):
    main, out = apart
    results = main("--minutes", "1")
    assert json.loads(out.read_text()) == results and len(results) == 12
    assert "its process ended with" in results.pop("kernels")[1]["failed"]
    assert results.pop("losses")[1]["failed"] == "no end after 4 s"
    assert all(len(rows) == 1 for rows in results.values())
    minutes = {name: float(rows[0]["options"]["--minutes"]) for name, rows in results.items()}
    assert minutes["views"] == 4 / 60 and minutes["steps"] > 0.5  # all that is left
    assert list(out.parent.glob("gpu*")) == [out]


def test_without_a_gpu_the_script_leaves_what_it_can(apart):
    main, out = apart
    results = main(broken=True)
    assert list(results) == ["facts", "steps"] and results["facts"][0]["failed"] == "no GPU"
    out.write_text("of another run")
    with pytest.raises(SystemExit, match="error: no GPU"):
        main("--part", "facts", broken=True)
    assert out.read_text() == "of another run"


def test_without_cupy_a_part_says_so(monkeypatch, tmp_path):
    gpu = script("gpu")
    monkeypatch.setattr(gpu, "try_gpu", gpu.try_gpu.__wrapped__)
    monkeypatch.setattr(backend, "cuda_driver", lambda: 12040)
    monkeypatch.setattr(backend, "cupy", backend.cupy.__wrapped__)
    monkeypatch.setattr(gpu, "cupy", backend.cupy)
    monkeypatch.setitem(sys.modules, "cupy", None)
    results = gpu.main(["--small", "--here", "--out", str(tmp_path / "o.json"), "--part", "facts"])
    assert "CuPy is not installed" in results["facts"][0]["failed"]


def test_a_number_of_numpys_is_a_number(cupy):
    x, one = rand(2, 3, dtype=np.float32), np.ones(3, np.float32)
    (y,) = on_device(norm.scale_shift, (x, one, one, np.float64(1e-5), one, one, None, 0), cupy)
    np.testing.assert_allclose(y, x, atol=1e-5)


@pytest.mark.parametrize("code, last, passed", [
    (0, "==== 80 passed in 9s ====", True),
    (0, "==== 73 passed, 7 skipped in 9s ====", True),  # as on cards without bfloat16
    (0, "==== 80 skipped in 1s ====", False),
    (1, "==== 1 failed, 79 passed in 9s ====", False),
])  # fmt: skip
def test_tests_pass_if_some_do_and_none_fails(code, last, passed, monkeypatch):
    gpu, done = script("gpu"), subprocess.CompletedProcess([], code, f"a\n{last}\n", "")
    monkeypatch.setattr(gpu.subprocess, "run", lambda *_, **__: done)
    sizes = gpu.Sizes(small=True)
    sizes.left = lambda: 60.0
    assert gpu.tests(sizes) == [{"summary": last, "passed": passed, "failed": []}]


def test_a_step_that_does_not_fit_costs_no_other(cupy, monkeypatch):
    gpu = script("gpu")
    monkeypatch.setattr(gpu, "BUSY", 64)
    sizes = gpu.Sizes(small=True)
    sizes.steps = [("resnet50", 64, 224, 256), *sizes.steps]
    run = gpu.profile.profile

    def profile(encoder, *args, **named):
        if encoder == "resnet50":
            raise MemoryError("out of memory")
        return run(encoder, *args, **named)

    monkeypatch.setattr(gpu.profile, "profile", profile)
    rows = list(gpu.shares(sizes))
    assert [row.get("failed") for row in rows] == ["MemoryError: out of memory", None] * 3


def test_tests_that_hang_do_not_cost_the_rest(monkeypatch):
    gpu = script("gpu")
    sizes = gpu.Sizes(small=True)
    sizes.left = lambda: 0.2
    (row,) = gpu.tests(sizes)
    assert row["summary"].startswith("no end after") and not row["passed"]


def test_a_step_beside_pytorch_on_a_gpu(cupy, monkeypatch):
    compare = script("compare_torch")
    monkeypatch.setitem(compare.GPU_CASES, "tiny", ("resnet_small", "small", 8, 4))
    for kind in ("", "tf32", "bf16"):
        step, clock, memory = compare.our_step("tiny", 1, "cuda", kind)
        taken, asked = clock.time(step)
        assert taken == 1e-3 and 1e-3 < asked < 60 and memory() == 1 << 20
    cores.set_threads(cores.available_cores())


SECONDS = {"ours": 2.0, "torch": 4.0, "ours-tf32": 0.5, "torch-tf32": 2.0, "torch-compile": 1.0}


def test_sides_on_a_gpu_stand_beside_each_other_and_one_may_fail(monkeypatch, tmp_path):
    compare = script("compare_torch")
    answer = (
        "import sys; print('ready', flush=True)\n"
        "for _ in sys.stdin: print({}, 0.25, 1 << 20, flush=True)"
    )
    programs = {side: answer.format(seconds) for side, seconds in SECONDS.items()}
    programs["torch-bf16"] = answer.format(1.0)  # with none of ours in that precision beside it
    programs["torch-compile-bf16"] = answer.format(1.0)
    programs["torch-graph"] = "raise SystemExit('no capture here')"

    def start(side, case, threads, device, errors):
        command = [sys.executable, "-c", programs[side]]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=errors, text=True)

    monkeypatch.setattr(compare, "start", start)
    monkeypatch.setitem(compare.SIDES, "cuda", tuple(programs))
    compare.one_by_one(["a", "b"], 3, 1, str(tmp_path / "rows.json"))
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [(r["side"], r["case"]) for r in rows] == [(s, c) for s in programs for c in "ab"]
    ratios = [r.get("ours_over_this") for r in rows if r["case"] == "b"]
    assert ratios == [1, 0.5, 1, 0.25, 2, None, None, None]
    assert (rows[2]["rounds"], rows[2]["host_seconds"], rows[2]["mib"]) == (3, 0.25, 1)
    ended = f"its process ended: no capture here{os.linesep}"
    assert all(r["failed"] == ended for r in rows[-2:])


def test_on_a_cpu_ratios_are_ours_to_pytorchs_without_a_turns_first_step(monkeypatch, capsys):
    compare = script("compare_torch")
    answer = (
        "import sys; print('ready', flush=True)\n"
        "for i, _ in enumerate(sys.stdin): print({} if i % 3 else 9.0, 0.25, {} << 20, flush=True)"
    )
    programs = {"ours": answer.format(0.002, 3), "torch": answer.format(0.004, 12)}

    def start(side, case, threads, device):
        command = [sys.executable, "-c", programs[side]]
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    monkeypatch.setattr(compare, "start", start)
    compare.compare("a", 2, 1)
    assert " ".join(capsys.readouterr().out.split()) == "a 2 4 0.50 0.50-0.50 3 12 0.25"


@pytest.mark.parametrize("case", ["default", "resnet18-cifar", "resnet50-imagenet"])
def test_both_sides_train_the_same_network(case, monkeypatch):
    pytest.importorskip("resource")
    torch = pytest.importorskip("torch")
    compare, theirs, sgd = script("compare_torch"), [], torch.optim.SGD

    def moving(parameters, *rest, **named):
        theirs.extend(p for p in parameters if p.requires_grad)
        return sgd(theirs, *rest, **named)

    monkeypatch.setattr(torch.optim, "SGD", moving)
    compare.torch_step(case, 1, "cpu", "")
    encoder, stem, *_ = compare.CASES[case]
    ours = Model.build(encoder, stem, 0, seed=0).named_parameters()
    assert sorted(p.numel() for p in theirs) == sorted(p.data.size for _, p in ours)


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
@pytest.mark.parametrize("architecture", ["sm_75", "sm_80", "sm_90", "sm_120"])
@pytest.mark.parametrize("real", ["float", *cuda_launch.REALS.values()])
def test_nvcc_compiles_without_spills(file, architecture, real, tmp_path):
    if real != "float" and "REAL" not in file.read_text():
        pytest.skip("float32 only")
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not installed")
    command = ["nvcc", "-std=c++17", f"-arch={architecture}", "-cubin", "-Werror", "all-warnings"]
    command += [f"-DREAL={real}", "-Xptxas", "-v", "-o", tmp_path / "kernels.cubin", file]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", run.stdout + run.stderr)
    assert spills and set(spills) == {"0"}
    used = re.findall(r"Used (\d+) registers", run.stdout + run.stderr)
    assert used and max(map(int, used)) * 1024 <= 65536  # merge_tiles has 1024 threads in a block
