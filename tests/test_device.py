"""Everything on a device that is not there: a strict stand-in for CuPy over NumPy (fake_cupy.py).

The same call on host arrays says what must come out. A silent way to the host is an error in the
stand-in, a loud one is counted: nothing in a training step may wait for the device.
"""

import gc
import importlib
import importlib.util
import json
import operator
import pkgutil
import signal
import sys
from contextlib import nullcontext
from dataclasses import fields, replace
from types import SimpleNamespace
from unittest.mock import MagicMock

import fake_cupy
import numpy as np
import pytest

import minisimclr as ms
from minisimclr import augment, backend, compare, doctor, kernels, ops, profile, train
from minisimclr.embed import open_encoder, probe_run, published
from minisimclr.errors import ConfigError, DivergedError, Interrupted
from minisimclr.finetune import SCRATCH, TUNED, finetune
from minisimclr.nn import BatchNorm, inception_v3, resnet10
from minisimclr.ops import basic, loss, norm, pool, product
from minisimclr.probe import alignment, effective_rank, knn_score, measure, standardize, uniformity
from minisimclr.run import new_run, open_run
from minisimclr.simclr import Model, calibrate, training_step
from minisimclr.tensor import Function, Tensor
from minisimclr.train import pretrain, quiet, resume
from minisimclr.weights import Preprocessing


@pytest.fixture
def cupy(monkeypatch):
    """The readable passes on the stand-in: no kernels are registered for its arrays."""
    monkeypatch.setattr(backend, "on_cupy", [])
    yield fake_cupy.install(monkeypatch)
    fake_cupy.remove()


def randn(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def host(value):
    """What a device array holds, behind the stand-in's back: no synchronisation is counted."""
    if hasattr(value, "_host"):
        return value._host
    return value.get() if hasattr(value, "get") else value


def close(device, reference, atol=1e-5):
    assert type(device) is not type(reference)
    np.testing.assert_allclose(host(device), reference, rtol=1e-4, atol=atol)
    assert device.dtype == reference.dtype


# The stand-in itself.

LEAKS = {
    "conversion": lambda cupy, x: np.asarray(x),
    "a NumPy function": lambda cupy, x: np.sum(x),
    "a NumPy ufunc": lambda cupy, x: np.exp(x),
    "a NumPy operand": lambda cupy, x: x + np.ones(3, np.float32),
    "a NumPy operand in front": lambda cupy, x: np.ones(3, np.float32) * x,
    "a NumPy operand in place": lambda cupy, x: x.__iadd__(np.ones(3, np.float32)),
    "a NumPy index": lambda cupy, x: x[np.array([0, 1])],
    "a list as an index": lambda cupy, x: x[[0, 1]],
    "a NumPy value": lambda cupy, x: x.__setitem__(slice(2), np.ones(2, np.float32)),
    "a NumPy argument": lambda cupy, x: cupy.maximum(x, np.ones(3, np.float32)),
    "a list of both": lambda cupy, x: cupy.concatenate([x, np.ones(3, np.float32)]),
    "a function that CuPy lacks": lambda cupy, x: cupy.spacing(x),
    "a flag that CuPy lacks": lambda cupy, x: x.flags.writeable,
}


@pytest.mark.parametrize("leak", LEAKS.values(), ids=LEAKS.keys())
def test_a_silent_leak_is_caught(cupy, leak):
    x = cupy.asarray(randn(3))
    with pytest.raises((TypeError, AttributeError)):
        leak(cupy, x)


def test_a_loud_leak_is_counted(cupy):
    x = cupy.asarray(randn(3))
    float(x[0]), int(x[1]), bool(x[2]), x.get(), cupy.asnumpy(x), x[x > 0], x.tolist()
    assert cupy.counter.syncs == ["float", "int", "bool", "get", "get", "boolean index", "tolist"]
    assert cupy.counter.uploads == [(3,)]


@pytest.mark.skipif(kernels.chosen != "fast", reason="MINISIMCLR_KERNELS is set")
def test_on_a_gpu_a_wait_is_counted_unless_it_was_asked_for():
    from test_gpu import Real

    def later():
        real.note()

    (real := Real(None)).note()
    (said,) = real.counter.syncs
    assert said.startswith("test_on_a_gpu_a_wait_is_counted_unless_it_was_asked_for < ")
    later()
    assert len(real.counter.syncs) == 1


def test_copies_travel_beside_the_work(cupy):
    """By a stream of its own, one batch ahead; nobody reads one early, or writes over one in use"""
    batches = [np.full(3, i, np.uint8) for i in range(4)]
    arriving = backend.uploaded(batches, "cuda:0")
    for i, x in enumerate(arriving):
        np.testing.assert_array_equal(x._host, batches[i])
        ahead = min(i + 2, len(batches))
        assert cupy.counter.order.count("upload by side") == ahead
        if i in (1, 2):  # the next copy waited for what was asked for meanwhile
            order = ["side waits for main", "upload by side", "main waits for side"]
            assert cupy.counter.order[-3:] == order
    assert i == len(batches) - 1 and not cupy.counter.syncs and not cupy.counter.waits
    assert list(backend.uploaded(batches, "cpu")) == batches


def test_a_leak_planted_in_an_operation_is_caught(cupy, monkeypatch):
    x = Tensor(cupy.asarray(randn(4, 3)), True)
    monkeypatch.setattr(basic.ReLU, "backward", lambda self, gy: gy * np.greater(self.y, 0))
    with pytest.raises(TypeError, match=r"numpy\.greater of a device array"):
        basic.relu(x).sum().backward()


def test_the_stand_in_offers_what_cupy_offers():
    if importlib.util.find_spec("cupy") is None:
        pytest.skip("CuPy is not installed")
    real = importlib.import_module("cupy")
    names = fake_cupy.FUNCTIONS, fake_cupy.WAITING_FUNCTIONS, fake_cupy.TYPES
    assert all(hasattr(real, name) for text in names for name in text.split())
    assert all(hasattr(real.ndarray, name) for name in fake_cupy.METHODS.split())
    assert all(hasattr(real.linalg, name) for name in fake_cupy.LINALG.split())
    assert importlib.import_module("cupyx").empty_pinned
    lacking = []
    for path in fake_cupy.PLACES.split():
        try:
            operator.attrgetter(path)(real)
        except ImportError as error:  # CuPy without the toolkit
            lacking.append(f"{path}: {error}"[:60])
    if lacking:
        pytest.skip("; ".join(lacking))


# Operations.


def running(x):
    like = backend.xp_of(x.data)
    return like.full(x.shape[-1:], 0.3, x.dtype), like.full(x.shape[-1:], 2.0, x.dtype)


def normed(training):
    return lambda x, g, b, r: norm.batch_norm(x, g, b, running(x), training, residual=r, relu=True)


def norm_and_conv(relu):
    def run(x, gamma, beta, w):
        y = norm.batch_norm(x, gamma, beta, running(x), True, relu=relu)
        return ops.conv.conv2d(y, w, 1, 1) + ops.conv.conv2d(y, w, 1, 1)

    return run


IMAGES = (3, 7, 6, 4)
NORM_AND_CONV = [IMAGES, (4,), (4,), (3, 3, 4, 5)]
OPERATIONS = {
    "Add": (lambda a, b: a + b, [(3, 4), (4,)]),
    "Multiply": (lambda a, b: a * b - 2 * a, [(3, 4), (3, 1)]),
    "Divide": (lambda a, b: a / (b * b + 1), [(3, 4), (3, 1)]),
    "Power": (lambda x: (x * x + 1) ** 1.5 / 3, [(3, 4)]),
    "Exp": (lambda x: x.exp(), [(3, 4)]),
    "Log": (lambda x: (x * x + 1).log(), [(3, 4)]),
    "ReLU": (basic.relu, [(3, 4)]),
    "MatMul": (lambda a, b: a @ b, [(5, 3, 4), (4, 2)]),
    "Linear": (product.linear, [(5, 3), (4, 3), (4,)]),
    "Cast": (lambda x: basic.cast(basic.cast(x, np.float64), np.float32), [(3, 4)]),
    "Sum": (lambda x: x.sum(axis=(0, 2)) + x.mean(), [(5, 3, 4)]),
    "Reshape": (lambda x: x.reshape(4, 3), [(3, 4)]),
    "Transpose": (lambda x: x.transpose(1, 2, 0), [(5, 3, 4)]),
    "GetItem": (lambda x: x[1:, 2], [(5, 3)]),
    "GetItem by numbers": (lambda x: x[backend.xp_of(x.data).asarray([4, 0, 4])], [(5, 3)]),
    "Concatenate": (lambda a, b: basic.concatenate([a, b]), [(5, 3), (2, 3)]),
    "Conv2d": (lambda x, w: ops.conv.conv2d(x, w, 2, 1), [IMAGES, (3, 3, 4, 5)]),
    "Conv2d 1x1": (lambda x, w: ops.conv.conv2d(x, w, 2), [IMAGES, (1, 1, 4, 5)]),
    "BatchNorm": (normed(True), [IMAGES, (4,), (4,), IMAGES]),
    "BatchNorm in evaluation": (normed(False), [IMAGES, (4,), (4,), IMAGES]),
    "BatchNorm and two convolutions": (norm_and_conv(relu=True), NORM_AND_CONV),
    "BatchNorm without ReLU and two": (norm_and_conv(relu=False), NORM_AND_CONV),
    "MaxPool": (lambda x: pool.max_pool(x, 3, 2, 1), [IMAGES]),
    "AveragePool": (lambda x: pool.average_pool(x, 3, 2, 1), [IMAGES]),
    "Sum as a mean over pixels": (pool.global_average_pool, [IMAGES]),
    "NTXent": (loss.nt_xent, [(5, 3), (5, 3)]),
    "CrossEntropy": (lambda x: loss.cross_entropy(x, np.arange(5) % 3), [(5, 3)]),
}


def test_no_operation_is_forgotten():
    modules = [
        importlib.import_module(f"minisimclr.ops.{m.name}")
        for m in pkgutil.iter_modules(ops.__path__)
    ]
    found = {f for m in modules for f in vars(m).values() if isinstance(f, type)}
    names = {
        f.__name__ for f in found if issubclass(f, Function) and f.forward is not Function.forward
    }
    assert names == {name.split()[0] for name in OPERATIONS}


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_and_its_gradients(name, cupy):
    run, shapes = OPERATIONS[name]
    arrays = [randn(*s, seed=i) for i, s in enumerate(shapes)]
    ours = [Tensor(cupy.asarray(a), True) for a in arrays]
    theirs = [Tensor(a, True) for a in arrays]
    y, reference = run(*ours), run(*theirs)
    close(y.data, reference.data)
    cupy.counter.clear()
    gy = randn(*y.shape, seed=9)
    y.backward(cupy.asarray(gy))
    reference.backward(gy)
    assert not cupy.counter.syncs
    for a, b in zip(ours, theirs, strict=True):
        close(a.grad, b.grad)


def test_what_batch_norm_made_is_made_again_on_the_device_alone(cupy):
    """Where a residual went into it, it is kept: x does not tell all of it."""
    for like, is_kept in (np, (True, True)), (cupy, (False, True)):
        x, *vectors, w = (Tensor(like.asarray(randn(*s)), True) for s in NORM_AND_CONV)
        y = norm.batch_norm(x, *vectors, running(x), True, relu=True)
        z = norm.batch_norm(x, *vectors, running(x), True, relu=True, residual=y)
        for made, kept in zip((y, z), is_kept, strict=True):
            function = ops.conv.conv2d(made, w).creator
            assert function.x is None and function.source is made.creator
            assert (made.creator.y is not None) == kept
            np.testing.assert_array_equal(host(made.creator.recompute()), host(made.data))


@pytest.mark.parametrize("size", [12, 40])
def test_views(size, cupy):
    images = np.random.default_rng(0).integers(0, 256, (6, 44, 50, 3), np.uint8)
    views = augment.draw_views(3, 5, 6, 44, 50, 1.0)
    on_device = cupy.asarray(images)
    for ours, theirs in zip(
        augment.apply_views(on_device, views, size),
        augment.apply_views(images, views, size),
        strict=True,
    ):
        close(ours, theirs)
    assert not cupy.counter.syncs
    close(augment.center_view(on_device, size), augment.center_view(images, size))
    pair = augment.two_views(on_device, 3, 5, size), augment.two_views(images, 3, 5, size)
    close(pair[0][1], pair[1][1])


def test_networks(cupy):
    """Inception's and ResNet's layers, running statistics, and state dicts to the host and back."""
    inception, resnet = inception_v3(), resnet10("simclr", 4)
    for net, x in ((inception, randn(2, 75, 75, 3)), (resnet, randn(2, 33, 33, 3))):
        calibrate(net, x, len(x))
        expected = net.eval()(Tensor(x)).data
        net.to("cuda:0")
        state = net.state_dict()
        assert all(type(a) is np.ndarray for a in state.values())
        net.load_state_dict(state)
        h = net(Tensor(cupy.asarray(x))).data
        assert np.linalg.norm(host(h) - expected) < 1e-3 * np.linalg.norm(expected)


@pytest.mark.parametrize("kind", [ms.optim.SGD, ms.optim.LARS])
def test_optimizers(kind, cupy):
    def run(like):
        model = BatchNorm(5)
        model.extra = ms.nn.Linear(5, 3, rng=np.random.default_rng(0))
        model.to("cuda:0" if like is cupy else "cpu")
        optimizer = kind(model.named_parameters(), 0.5, weight_decay=0.01)
        for i in range(3):
            for k, p in enumerate(optimizer.parameters.values()):
                p.grad = like.asarray(randn(*p.shape, seed=10 * i + k))
            optimizer.step()
            if i == 1:
                optimizer.load_state_dict(optimizer.state_dict())
        square = optimizer.gradient_square()
        return [square, *(p.data for p in optimizer.parameters.values())]

    for ours, theirs in zip(run(cupy), run(np), strict=True):
        close(ours, theirs)


def test_the_probe_and_its_metrics(cupy):
    y = np.arange(90) % 3
    X = randn(90, 6) + 2 * np.eye(3, 6, dtype=np.float32)[y]
    ours, theirs = (
        measure(like.asarray(X[:60]), y[:60], like.asarray(X[60:]), y[60:]) for like in (cupy, np)
    )
    assert ours.keys() == theirs.keys()
    assert ours["top1"] == theirs["top1"] > 0.6
    assert ours["knn"] == theirs["knn"]
    on_device = cupy.asarray(X)
    assert alignment(on_device, on_device[::-1]) == pytest.approx(alignment(X, X[::-1]), rel=1e-5)
    assert uniformity(on_device) == pytest.approx(uniformity(X), rel=1e-5)
    assert effective_rank(on_device) == pytest.approx(effective_rank(X), rel=1e-9)
    assert knn_score(on_device, y, on_device, y) == knn_score(X, y, X, y)
    close(standardize(on_device)[0], standardize(X)[0])


# Training.


def steps(where, like, count=2, optimizer=ms.optim.LARS, **net):
    """The figures of some training steps, and the weights after them."""
    model = Model.build(**{"encoder": "resnet_small", "stem": "small", "width": 8, "seed": 0} | net)
    model.to(where)
    if hasattr(like, "counter"):
        like.counter.clear()  # the GPU is tried when it is first used
    opt = optimizer(model.named_parameters(), 0.01, weight_decay=1e-4)
    images = np.random.default_rng(0).integers(0, 256, (8, 20, 20, 3), np.uint8)
    seen = []
    for i in range(count):
        model.train()
        views = augment.draw_views(0, i, 8, 20, 20)
        seen.append(training_step(model, opt, like.asarray(images), views, 16, 0.5))
    return seen, model


def same_training(ours, **how):
    """The first step to a rounding error; later ones are too chaotic to be held to that."""
    (seen, model), (reference, on_host) = ours, steps("cpu", np, **how)
    first, expected = (side[0].figures for side in (seen, reference))
    assert first["loss"] == pytest.approx(expected["loss"], rel=1e-3)
    assert first["gradient_norm"] == pytest.approx(expected["gradient_norm"], rel=0.03)
    start, end, there = (
        np.concatenate([host(p.data).ravel() for _, p in m.named_parameters()])
        for m in (steps("cpu", np, 0, **how)[1], on_host, model)
    )
    assert np.linalg.norm(there - end) < 0.05 * np.linalg.norm(end - start)


NETS = {
    "small": {},
    "pooled": {"encoder": "resnet10", "stem": "imagenet", "width": 4},
}


@pytest.mark.parametrize("net", NETS.values(), ids=NETS.keys())
def test_a_training_step_waits_for_nothing_but_its_guard(net, cupy):
    """The readable optimizer asks once whether all is finite; the kernels do not (test_cuda.py)."""
    seen, model = steps("cuda:0", cupy, **net)
    assert cupy.counter.syncs == ["bool"] * 2
    same_training((seen, model), **net)


def test_a_buffer_that_nobody_reads_is_kept_while_the_copy_may_be_on_its_way(cupy):
    before = list(backend._landing)
    backend.later(cupy.asarray(np.arange(3.0)))  # and what it returns is dropped
    assert [each.shape for each in backend._landing] == [*(b.shape for b in before), (3,)][-64:]
    for _ in range(100):
        backend.later(cupy.asarray(np.arange(2.0)))
    assert [each.shape for each in backend._landing] == [(2,)] * 64


def test_figures_are_read_only_after_the_copy_has_ended(cupy):
    read = backend.later(cupy.asarray(np.arange(3.0)))
    assert not cupy.counter.syncs
    assert read() == [0, 1, 2]
    assert cupy.counter.waits == 1


@pytest.fixture(scope="module")
def config(pictures):
    return ms.TrainConfig(
        data=str(pictures), width=8, image_size=16, batch_size=32, epochs=2, lr=0.05, threads=1,
        temperature=0.5, device="cuda:0",
    )  # fmt: skip


def lines(run):
    return [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def drawn(monkeypatch):
    """All parameters of views that were drawn, in order."""
    seen, draw = [], augment.draw_views

    def spy(*args, **kwargs):
        seen.append(draw(*args, **kwargs))
        return seen[-1]

    monkeypatch.setattr(augment, "draw_views", spy)
    return seen


def test_a_first_step_says_how_much_memory_is_kept(config, cupy, monkeypatch, tmp_path):
    pool = cupy.get_default_memory_pool()
    run = pretrain(replace(config, epochs=1), tmp_path / "run", notify=quiet)
    assert all(p.grad is None for _, p in run.model.named_parameters())  # none holds on to a piece
    assert pool.limits == [1 << 19, 0, 1 << 19, 0, 0]  # no more than there is; then as before
    # What does not fit is asked for again when all that is unused was given back.
    # Then the most that was in use, without what still is.
    assert pool.taken == [1 << 10, "free", 1 << 19, "free", 1 << 19]
    assert pool.total_bytes() == 1 << 20 and backend.peak_memory("cuda:0") == 1 << 20
    pool.taken.clear()
    pool.total = 1 << 10  # what was given back was held all the same
    cupy.allocator = pool.malloc = MagicMock(side_effect=[0, 0, MemoryError])  # nor is the last met
    small = lambda malloc: nullcontext(malloc(1 << 8))  # noqa: E731
    monkeypatch.setattr(cupy.cuda, "using_allocator", small)
    frozen = gc.get_freeze_count()
    with pytest.raises(KeyError), backend.sized_by_first("cuda:0"):
        assert gc.get_freeze_count() > 1000  # each growth of the pool would look through these
        raise KeyError
    assert gc.get_freeze_count() == frozen
    with backend.sized_by_first("cuda:0"):
        pass
    assert pool.malloc.call_count == 3 and backend.peak_memory("cuda:0") == 1 << 20
    pool.taken.clear()
    cupy.allocator = print  # somebody's own: left alone
    with backend.sized_by_first("cuda:0"):
        assert pool.taken == []


def test_a_run_is_the_same_on_the_device_and_never_waits(config, cupy, drawn, tmp_path):
    within_epochs, counter = set(), cupy.counter

    def note(event, values):
        if event == "start":
            counter.clear()
        if event == "step":  # the last of an epoch comes with what the monitor looked at
            within_epochs.update(counter.syncs if "alignment" not in values else ())
            counter.syncs.clear()

    on_device = pretrain(config, tmp_path / "device", notify=note)
    assert within_epochs == {"bool"}  # the readable optimizer's guard
    waited = counter.waits
    views = drawn.copy()
    drawn.clear()
    on_host = pretrain(replace(config, device="cpu"), tmp_path / "host")
    assert on_device.step == on_host.step == waited
    environment = [json.loads((r.path / "env.json").read_text()) for r in (on_device, on_host)]
    assert environment[0]["device"].startswith("cuda:0 (Fake, ")
    assert environment[1]["device"] == "cpu (asked for)"
    for a, b in zip(lines(on_device), lines(on_host), strict=True):
        assert a.keys() == b.keys()
        assert a["step"] == b["step"] and a["lr"] == b["lr"]
        assert a["loss"] == pytest.approx(b["loss"], rel=2e-3)
    assert len(views) == len(drawn) > 4
    for a, b in zip(views, drawn, strict=True):
        for field in fields(a):
            ours, theirs = getattr(a, field.name), getattr(b, field.name)
            assert type(ours) is np.ndarray and ours.tobytes() == theirs.tobytes()


def test_the_loop_reads_a_step_while_the_next_one_runs(config, cupy, monkeypatch, tmp_path):
    """Only the last step of an epoch is waited for at once."""
    order, step = [], train.training_step

    def spy(*args):
        order.append("ask")
        return step(*args)

    monkeypatch.setattr(train, "training_step", spy)
    run = pretrain(config, tmp_path / "run", notify=lambda event, _: order.append(event))
    each = run.step // 2
    epoch = ["ask", *["ask", "step"] * (each - 1), "step", "epoch"]
    assert [o for o in order if o in ("ask", "step", "epoch")] == 2 * epoch
    assert [line["step"] for line in lines(run)] == list(range(1, run.step + 1))


def test_stopped_and_resumed_on_the_device(cupy, config, tmp_path):
    def stop(event, values):
        if event == "step" and values["step"] == 2:
            signal.raise_signal(signal.SIGTERM)

    whole = pretrain(config, tmp_path / "whole")
    with pytest.raises(Interrupted) as raised:
        pretrain(config, tmp_path / "run", notify=stop)
    run = raised.value.run
    assert run.stopped == "SIGTERM" and 2 <= run.step < whole.step
    resume(run.path)
    for name in ("metrics.jsonl", f"checkpoints/step-{whole.step:08d}.h5"):
        assert (run.path / name).read_bytes() == (whole.path / name).read_bytes()


def test_divergence_on_the_device(config, cupy, tmp_path):
    wild = replace(config, lr=1e30, warmup_epochs=0.0, batch_size=16)
    with pytest.raises(DivergedError) as raised, np.errstate(all="ignore"):
        pretrain(wild, tmp_path / "run")
    *log, end = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert all(np.isfinite(json.loads(line)["loss"]) for line in log)
    assert json.loads(end).keys() == {"step", "diverged"}
    assert json.loads(end)["step"] == len(log) + 1 < 4  # though the next one was asked for already
    assert f"at step {len(log) + 1}:" in str(raised.value)


def test_a_run_of_the_device_is_probed(config, cupy, tmp_path, monkeypatch):
    run = pretrain(replace(config, epochs=1), tmp_path / "run")
    dataset = ms.data.open_dataset(config.data, 20)
    assert probe_run(run, dataset)["rows"].keys() == {"SimCLR", "random encoder", "raw pixels"}
    monkeypatch.setattr(compare, "BUDGETS", (2, None))
    points = compare.Comparison(run, dataset).curve().make()
    assert [len(point["top1"]) for point in points] == [5, 1, 5, 1]
    again, _ = open_run(run.path)
    again.config = replace(config, device="cpu")
    h, other = (open_encoder(each.path, device=each.config.device).embed() for each in (run, again))
    np.testing.assert_allclose(h, other, rtol=1e-3, atol=1e-4)


def test_precision_is_set_for_the_training_alone(config, cupy, monkeypatch, tmp_path):
    kinds, step = [], train.training_step

    def spy(*args):
        kinds.append(cupy.compute_type)
        return step(*args)

    monkeypatch.setattr(train, "training_step", spy)
    tf32 = replace(config, precision="tf32", epochs=1)
    pretrain(tf32, tmp_path / "run")
    train.dry_run(tf32, lambda *_: None)
    assert set(kinds) == {7} and cupy.compute_type == 1
    cupy.compute_type = 2  # chosen by the user: it comes back
    with backend.precision("tf32", "cuda:0"):
        assert cupy.compute_type == 7
    assert cupy.compute_type == 2
    monkeypatch.setattr(backend, "bfloat16", lambda: np.float16)
    with pytest.raises(KeyboardInterrupt), backend.precision("bf16", "cuda:0"):
        assert backend.activations.get() is np.float16 and cupy.compute_type == 2
        raise KeyboardInterrupt
    assert backend.activations.get() is None
    with pytest.raises(KeyboardInterrupt), backend.precision("tf32", "cuda:0"):
        raise KeyboardInterrupt
    assert cupy.compute_type == 2
    cupy.compute_type = 1
    pretrain(replace(config, epochs=1), tmp_path / "plain")
    assert set(kinds) == {7, 1}


def test_precision_that_a_device_lacks_is_refused(config, cupy, monkeypatch, tmp_path):
    tf32 = replace(config, precision="tf32")
    with pytest.raises(
        ConfigError, match=r"tf32 needs a GPU, and this is a CPU \(asked for\): use fp32"
    ):
        pretrain(replace(tf32, device="cpu"), tmp_path / "run")

    class Old(cupy.cuda.Device):
        def __init__(self, index=0):
            super().__init__(index)
            self.compute_capability = "80" if index else "75"

    bf16 = replace(config, precision="bf16")
    with pytest.raises(ConfigError, match="bf16 needs the CUDA kernels: unset MINISIMCLR_KERNELS"):
        pretrain(bf16, tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(backend, "on_cupy", [None])
        patch.setattr(cupy.add, "types", ["ee->e", "ff->f"])
        with pytest.raises(ConfigError, match=r"fake needs ml_dtypes and NumPy 2\.1\.2 or newer"):
            pretrain(bf16, tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.delattr(cupy._core, "_routines_linalg")
        with pytest.raises(ConfigError, match=r"precision tf32: CuPy 14\.0\.fake has no such"):
            pretrain(tf32, tmp_path / "run")
    monkeypatch.setattr(cupy.cuda, "Device", Old)
    with pytest.raises(ConfigError, match="compute capability 8"):
        pretrain(tf32, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with backend.precision("tf32", "cuda:1"):  # Ampere
        pass


def test_what_else_runs_on_the_device(config, cupy, tmp_path):
    """The profiler, the dry run, fine-tuning, the doctor's training, features of other weights."""
    backend.choose_device("cuda:0")
    cupy.counter.clear()
    small = profile.profile("resnet_small", "small", 4, 16, 4, steps=1, device="cuda:0")
    timings = 1 + len(small["events"]) + 2 * 5  # of a step, its operations, and the peaks
    assert cupy.counter.syncs.count("stream") == 2 * timings  # before and after each
    assert small["device"] == "cuda:0" and small["peak_bytes"] == 1 << 20
    profile.table(small)
    cupy.counter.clear()
    assert train.dry_run(config, lambda *_: None)["runs on"].startswith("cuda:0 (Fake")
    assert cupy.counter.syncs.count("stream") == 3  # or the time would be that of asking
    run, dataset = new_run(tmp_path, config, "cuda:0"), ms.data.open_dataset(config.data, 20)
    assert finetune(run, dataset, epochs=1)["rows"].keys() == {TUNED, SCRATCH}
    cupy.counter.clear()
    assert doctor.learning()[0] and cupy.counter.uploads
    net, preprocessing = resnet10("imagenet", 4), Preprocessing(32, "imagenet")
    extract = published(net, preprocessing, dataset, None, "cuda:0", lambda *_: None)
    assert extract(np.arange(3)).shape == (3, 32)


def test_convolutions_work_on_larger_blocks_there(cupy):
    """Products of a few images would leave most of a GPU idle."""
    x = np.zeros((64, 1, 1, 1), np.float32)
    assert len(ops.conv.image_blocks(x, 1 << 20)) == 16
    for n, most in ((1024, 455), (512, 148), (5, 2), (3, 9), (1, 1), (0, 4)):
        images = np.empty((n, 1))
        blocks = ops.conv.image_blocks(images, ops.conv.WORKSPACE // most)
        sizes = [len(images[block]) for block in blocks]
        assert sum(sizes) == n and len(sizes) == -(-n // most) and max(sizes, default=0) <= most
        assert max(sizes, default=0) - min(sizes, default=0) < max(1, len(sizes))  # alike
    assert len(ops.conv.image_blocks(cupy.asarray(x), 1 << 20)) == 1


# Which device, and why.


def driver(monkeypatch, version):
    monkeypatch.setattr(backend, "cuda_driver", lambda: version)
    monkeypatch.setattr(doctor, "cuda_driver", lambda: version)


def test_a_gpu_that_works_is_named(cupy, monkeypatch):
    driver(monkeypatch, 12040)
    said = "Fake, driver for CUDA 12.4, CuPy 14.0.fake"
    assert backend.choose_device("auto") == backend.choose_device("cuda:0") == ("cuda:0", said)
    assert cupy.device_in_use == 0
    with pytest.raises(ConfigError, match="CUDA devices here: 1"):
        backend.choose_device("cuda:1")
    assert doctor.gpu() == (True, f"a kernel, a matrix product and eigenvalues ran on {said}")
    names = lambda index: {"name": b"Fake %d" % index}  # noqa: E731
    monkeypatch.setattr(cupy.cuda.runtime, "getDeviceCount", lambda: 2)
    monkeypatch.setattr(cupy.cuda.runtime, "getDeviceProperties", names)
    assert backend.choose_device("cuda:1") == ("cuda:1", said.replace("Fake", "Fake 1", 1))
    assert cupy.device_in_use == 1
    assert cupy.counter.devices == [0, 1]  # those on which something was tried
    backend.to_device(np.ones(3), "cuda:2")
    assert cupy.counter.devices == [0, 1, 2]
    with pytest.raises(ConfigError, match="no device cuda:7: number of CUDA devices here: 2"):
        backend.choose_device("cuda:7")


def unmoved(cupy):
    cupy.RawModule = lambda code: SimpleNamespace(get_function=lambda name: lambda *_: None)


BROKEN = {
    "4.0 where 16 is right": unmoved,
    "eigenvalues (cuSOLVER): 0.0 where": lambda cupy: setattr(
        cupy.linalg, "eigvalsh", lambda x: cupy.zeros(2)
    ),
    "kernel (NVRTC": lambda cupy: setattr(cupy, "RawModule", None),
    "matrix product (cuBLAS)": lambda cupy: setattr(cupy.ndarray, "__matmul__", None),
    "eigenvalues (cuSOLVER)": lambda cupy: delattr(cupy.linalg, "eigvalsh"),
    "a CUDA device": lambda cupy: delattr(cupy.cuda, "runtime"),
}


@pytest.mark.parametrize("part", BROKEN)
def test_a_broken_part_is_named_with_the_line_to_type(part, cupy, monkeypatch):
    driver(monkeypatch, 13000)
    BROKEN[part](cupy)
    with pytest.raises(ConfigError) as error:
        backend.choose_device("cuda:0")
    assert part in str(error.value) and 'pip install "cupy-cuda12x[ctk]"' in str(error.value)
    assert backend.choose_device("auto") == ("cpu", str(error.value))
    assert doctor.gpu() == (False, str(error.value))


def test_a_driver_without_a_gpu_is_sound(cupy, monkeypatch):
    def none():
        raise RuntimeError("cudaErrorNoDevice: no CUDA-capable device is detected")

    driver(monkeypatch, 12040)
    monkeypatch.setattr(cupy.cuda.runtime, "getDeviceCount", none)
    sound, said = doctor.gpu()
    assert sound and "no GPU can be seen: nvidia-smi and CUDA_VISIBLE_DEVICES" in said


def test_bfloat16_needs_a_cupy_that_has_it(cupy, monkeypatch):
    monkeypatch.setattr(cupy, "__version__", "13.6.0")
    monkeypatch.setattr(backend, "on_cupy", [print])
    with pytest.raises(ConfigError, match=r"bf16 needs CuPy 14 or newer, not 13\.6\.0"):
        backend.bfloat16()


def test_a_card_that_is_full_needs_no_other_package(cupy, monkeypatch):
    def full(*_):
        raise MemoryError("out of memory allocating 512 bytes")

    driver(monkeypatch, 12040)
    monkeypatch.setattr(cupy, "ones", full)
    with pytest.raises(ConfigError, match="512 bytes; its memory is full: nvidia-smi"):
        backend.choose_device("cuda:0")


def test_the_wheel_that_is_there_is_the_one_to_mend(cupy, monkeypatch):
    monkeypatch.setattr(cupy, "RawModule", None)
    there = SimpleNamespace(metadata={"Name": "cupy-cuda13x"})
    monkeypatch.setattr(backend, "distributions", lambda: [there])
    for version, name in (
        (12040, "cupy-cuda12x"),
        (13000, "cupy-cuda13x"),
    ):  # if the driver runs it
        backend.try_gpu.cache_clear()
        driver(monkeypatch, version)
        with pytest.raises(ConfigError, match=rf'pip install "{name}\[ctk\]"'):
            backend.choose_device("cuda:0")


def test_without_cupy_the_line_to_type_is_told(cupy, monkeypatch):
    driver(monkeypatch, 13010)
    monkeypatch.setitem(sys.modules, "cupy", None)
    line = r'pip install "cupy-cuda12x\[ctk\]" ml_dtypes'
    with pytest.raises(ConfigError, match=line):
        backend.choose_device("cuda:0")
    device, reason = backend.choose_device("auto")
    assert device == "cpu" and "cupy-cuda12x[ctk]" in reason
    assert doctor.gpu()[0]
    with pytest.raises(ConfigError, match=f"needs a GPU, and this is a CPU .CuPy is not .*{line}"):
        train.pretrain(ms.TrainConfig(precision="tf32"))


def test_without_a_driver_nothing_else_is_asked(cupy, monkeypatch):
    driver(monkeypatch, 0)
    assert backend.choose_device("auto") == ("cpu", "no NVIDIA driver")
    with pytest.raises(ConfigError, match="no NVIDIA driver for CUDA"):
        backend.choose_device("cuda:0")
    assert doctor.gpu() == (True, "none: there is no NVIDIA driver")


def test_times_of_steps_that_overlap_add_up_to_the_time_they_took(
    config, cupy, tmp_path, monkeypatch
):
    now, once = [0.0], train.training_step

    def clock():
        now[0] += 1e-6
        return now[0]

    def step(*given):
        now[0] += 1  # second
        return once(*given)

    monkeypatch.setattr(train.time, "perf_counter", clock)
    monkeypatch.setattr(train, "training_step", step)
    config = replace(config, batch_size=16, epochs=1)
    run = pretrain(config, tmp_path / "run", notify=quiet)
    timings = (run.path / "timings.jsonl").read_text().splitlines()
    assert sum(json.loads(line)["seconds"] for line in timings) == pytest.approx(4, abs=1e-3)
