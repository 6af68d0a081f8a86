"""Runs: repeatable to the byte, stoppable anywhere, honest when they go wrong."""

import errno
import json
import os
import pickle
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import replace
from datetime import datetime
from io import FileIO
from itertools import accumulate, chain, repeat
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock, patch

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

import minisimclr as ms
from minisimclr import checkpoint, cores, train
from minisimclr.backend import choose_device
from minisimclr.data import Dataset, Options, open_dataset, prepare
from minisimclr.errors import ConfigError, DataError, DivergedError, Interrupted, OutputError
from minisimclr.files import locked, unfinished
from minisimclr.probe import alignment, effective_rank, uniformity, unit
from minisimclr.run import (
    Run,
    log_line,
    make_run_folder,
    new_run,
    open_run,
    read_config,
    stop_signals,
)
from minisimclr.simclr import Step, chance_loss, training_step
from minisimclr.train import (
    Plan,
    draw,
    dry_run,
    epoch_line,
    epoch_means,
    pretrain,
    quiet,
    resume,
)


@pytest.fixture(scope="module")
def config(pictures):
    return ms.TrainConfig(
        data=str(pictures), width=8, image_size=16, batch_size=16, epochs=3, lr=0.05, threads=1,
        temperature=0.5, strength=0.0, crop_min=0.6,
    )  # fmt: skip


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory):
    return pretrain(config, tmp_path_factory.mktemp("runs") / "whole")


def content(run_path):
    """What of a run must be the same however it came about."""
    newest = checkpoint.listed(run_path / "checkpoints")[-1]
    return (run_path / "metrics.jsonl").read_bytes(), newest.name, newest.read_bytes()


def stopped(config, path, step, number=signal.SIGTERM):
    """The run that a signal has stopped at a step."""

    def stop(event, values):
        if event == "step" and values["step"] == step:
            signal.raise_signal(number)

    said = rf"{number.name}: saved at step \d+ of {re.escape(str(path))}$"
    with pytest.raises(Interrupted, match=said) as raised:
        pretrain(config, path, notify=stop)
    return raised.value.run


def test_a_run_learns_and_leaves_its_folder(finished, config):
    lines = [json.loads(x) for x in (finished.path / "metrics.jsonl").read_text().splitlines()]
    total = Plan.of(config, len(ms.data.open_dataset(config.data, 20).split("pretrain"))).total
    assert [line["step"] for line in lines] == list(range(1, total + 1))
    plan = Plan.of(config, 16 * total // config.epochs)
    assert [line["lr"] for line in lines] == [plan.rate(i) for i in range(total)]
    assert lines[0]["lr"] == 0 < lines[3]["lr"]
    first, last = (np.mean([x["loss"] for x in lines if x["epoch"] == e]) for e in (1, 3))
    assert last < first - 0.1
    assert lines[0]["chance"] == chance_loss(16) == pytest.approx(np.log(31))
    assert {"alignment", "uniformity", "effective_rank"} <= lines[-1].keys()
    assert not any("seconds" in line for line in lines)
    timings = [json.loads(x) for x in (finished.path / "timings.jsonl").read_text().splitlines()]
    assert {"seconds", "data_wait", "views_per_second"} <= timings[0].keys()
    settings = json.loads((finished.path / "config.json").read_text())
    assert settings["lr"] == {"value": 0.05, "origin": "default"}
    assert read_config(finished.path) == config
    assert not list(finished.path.rglob(".*.tmp"))


def test_an_epoch_ends_with_the_cosines_of_pairs(finished):
    line = json.loads((finished.path / "metrics.jsonl").read_text().splitlines()[-1])
    positives, negatives = np.array(line["positives"]), np.array(line["negatives"])
    n = positives.sum()
    assert negatives.sum() == n * (n - 1)
    middles = np.linspace(-0.95, 0.95, 20)
    # |u - v|^2 = 2 - 2 cos: the histogram agrees with alignment up to the width of its bins.
    assert positives @ middles / n == pytest.approx(1 - line["alignment"] / 2, abs=0.05)
    assert positives @ middles / n > negatives @ middles / negatives.sum() + 0.1
    assert "trust" not in line


def test_lars_logs_a_trust_ratio_for_every_weight(config, tmp_path):
    run = pretrain(replace(config, optimizer="lars", epochs=1, lr=1.0), tmp_path / "run")
    trust = json.loads((run.path / "metrics.jsonl").read_text().splitlines()[-1])["trust"]
    weights = {name for name, p in run.model.named_parameters() if p.adapt}
    assert trust.keys() == weights
    assert all(ratio > 0 for ratio in trust.values())
    assert len(set(trust.values())) > 1


@pytest.mark.parametrize("settings, peak", [
    ({"lr": 0.3}, 0.3),
    ({"lr": 0.3, "lr_scaling": "linear"}, 0.6),
    ({"lr": 0.01, "lr_scaling": "sqrt"}, 0.01 * 512**0.5),
])  # fmt: skip
def test_the_plan_follows_the_settings(settings, peak):
    config = ms.TrainConfig(batch_size=512, epochs=10, warmup_epochs=1.94, **settings)
    plan = Plan.of(config, 5 * 512 + 100)
    assert (plan.steps_per_epoch, plan.total, plan.warmup) == (5, 50, 10)
    assert [plan.rate(step) for step in (0, 5, 10, 30)] == pytest.approx(
        [0, peak / 2, peak, peak / 2]
    )
    assert Plan.of(replace(config, warmup_epochs=1.26), 2660).warmup == 6  # to the nearest


def test_views_follow_the_settings():
    images = np.zeros((64, 40, 40, 3), np.uint8)
    calm = draw(ms.TrainConfig(strength=0.0, crop_min=0.9), 3, images)
    assert (calm.factors == [1, 1, 1, 0]).all()
    assert (calm.boxes[..., 2] * calm.boxes[..., 3] >= 0.9 * 1600 * (1 - 1e-5)).all()
    wild = draw(ms.TrainConfig(strength=1.0, crop_min=0.1), 3, images)
    assert (wild.factors[..., 0] > 1.5).any()
    assert (wild.boxes[..., 2] * wild.boxes[..., 3] < 0.2 * 1600).any()
    for other in (ms.TrainConfig(seed=1), ms.TrainConfig()):
        same = np.array_equal(draw(other, 3, images).boxes, draw(ms.TrainConfig(), 3, images).boxes)
        assert same == (other.seed == 0)


def test_a_new_run_follows_the_settings():
    config = ms.TrainConfig(optimizer="lars", weight_decay=0.5, width=4, encoder="resnet10")
    run = new_run(None, config)
    assert type(run.optimizer).__name__ == "LARS" and run.optimizer.weight_decay == 0.5
    for size, side in ((32, 3), (48, 3), (49, 7)):  # up to 48 px: cifar's stem
        run = new_run(None, replace(config, image_size=size))
        assert run.model.encoder.conv1.weight.data.shape == (side, side, 3, 4)
    assert new_run(None, ms.TrainConfig(width=4)).optimizer.weight_decay == 1e-4


def test_the_seed_decides_on_weights_and_on_batches(config, tmp_path, monkeypatch):
    seen, once = [], train.training_step

    def step(model, optimizer, images, *rest):
        seen.append((model.encoder.conv1.weight.data.tobytes(), images.tobytes()))
        return once(model, optimizer, images, *rest)

    monkeypatch.setattr(train, "training_step", step)
    for seed in (0, 1):
        pretrain(replace(config, seed=seed), tmp_path / str(seed), time_limit=0, notify=quiet)
    (weights, images), (other_weights, other_images) = seen
    assert weights != other_weights and images != other_images


def test_the_estimate_is_in_minutes_and_megabytes(config, tmp_path, monkeypatch):
    clock = accumulate(chain([0, 90, 0, 30, 0, 60], repeat(0)))  # three steps
    monkeypatch.setattr(train.time, "perf_counter", lambda: float(next(clock)))
    assert 2e7 < train.peak_memory("cpu") < 1e12  # bytes
    monkeypatch.setattr(train, "peak_memory", lambda device: 3_400_000_000)
    cores.set_threads(2)
    plan = dry_run(replace(config, device="cpu"), quiet, tmp_path / "run")
    assert cores.threads() == config.threads == 1
    figures = {"seconds a step": 30, "minutes in all": 6, "peak memory, MB": 3400}
    assert plan | figures == plan and plan["steps"] == "12 (4 an epoch)"
    assert plan["run folder"] == str(tmp_path / "run")
    assert plan["images"] == f"72 unlabelled of {Path(config.data).name}"
    fresh = new_run(None, config)
    assert "model" not in repr(fresh)  # hundreds of lines
    weights = fresh.model.named_parameters()
    assert plan["parameters"] == sum(p.data.size for _, p in weights)
    assert plan["first layers"] == "small"
    assert plan["runs on"] == "cpu (asked for)"


def test_the_estimate_is_of_whole_steps_like_those_of_training(config, tmp_path, monkeypatch):
    steps, sized, start, size = [], [], train.start_step, train.backend.sized_by_first

    def step(run, plan, images):
        steps.append((run.step, images.shape))
        return start(run, plan, images)

    def first(device):
        sized.append((device, len(steps)))
        return size(device)

    monkeypatch.setattr(train, "start_step", step)
    monkeypatch.setattr(train.backend, "sized_by_first", first)
    dry_run(config, quiet, tmp_path / "run")
    assert steps == [(k, (16, 20, 20, 3)) for k in range(3)] and sized == [("cpu", 0)]


def test_gradients_are_freed_before_the_next_step(config):
    run, images = new_run(None, config), np.zeros((16, 20, 20, 3), np.uint8)
    train.start_step(run, Plan.of(config, 72), images)
    assert all(p.grad is None for _, p in run.model.named_parameters())


def test_views_have_the_side_that_was_set_whatever_that_of_the_pictures(config, monkeypatch):
    dataset, run, sides = open_dataset(config.data, 20), new_run(None, config), []
    dataset = replace(dataset, images=dataset.images.repeat(2, axis=1).repeat(2, axis=2))
    forward = ms.nn.ResNet.forward
    noted = lambda net, x: sides.append(x.shape[1]) or forward(net, x)  # noqa: E731
    monkeypatch.setattr(ms.nn.ResNet, "forward", noted)
    train.start_step(run, Plan.of(config, 72), dataset.images[:16])
    train.monitor(run, dataset, "cpu")
    train.calibrate_run(run, dataset, "cpu")
    assert {*sides} == {config.image_size}


def test_the_monitor_s_figures_are_those_of_the_checkpoint(finished, config):
    line = json.loads((finished.path / "metrics.jsonl").read_text().splitlines()[-1])
    images = open_dataset(config.data, 20).sample(256)
    model, views = open_run(finished.path)[0].model, draw(config, 0, images, stream=2)
    h1, h2 = (model.encode(x) for x in ms.augment.apply_views(images, views, config.image_size))
    z1, z2 = model.project(h1), model.project(h2)
    assert line["alignment"] == pytest.approx(float(alignment(z1, z2)), rel=1e-3)
    assert line["uniformity"] == pytest.approx(uniformity(z1), rel=1e-3)
    assert line["effective_rank"] == pytest.approx(effective_rank(h1), rel=1e-3)
    cosines = unit(z1) @ unit(z2).T
    same = np.eye(len(images), dtype=bool)
    bins = np.linspace(-1, 1, 21)
    for pairs, counts in (same, line["positives"]), (~same, line["negatives"]):
        expected = np.histogram(cosines[pairs].clip(-1, 1), bins)[0]
        assert sum(counts) == pairs.sum()
        assert abs(expected - counts).sum() <= 2 + pairs.sum() // 1000  # at the ends of bins


def test_of_many_images_256_are_monitored(config):
    dataset, rows = open_dataset(config.data, 20), np.arange(300) % 72
    many = replace(dataset, images=dataset.images[rows], splits=np.zeros(300, np.uint8))
    line = train.monitor(new_run(None, config), many, "cpu")
    assert (sum(line["positives"]), sum(line["negatives"])) == (256, 256 * 255)


def test_times_are_kept_for_every_step(finished, config):
    lines = list(map(json.loads, (finished.path / "timings.jsonl").read_text().splitlines()))
    assert [line["step"] for line in lines] == list(range(1, finished.step + 1))
    for line in lines:
        assert 0 <= line["data_wait"] <= line["seconds"]
        assert line["views_per_second"] == 2 * config.batch_size / line["seconds"]


def test_a_step_tells_what_it_saw(config):
    run = new_run(None, replace(config, temperature=0.3))
    images = np.random.default_rng(0).integers(0, 256, (8, 20, 20, 3), np.uint8)
    views, twin = draw(config, 0, images), deepcopy(run.model).train()
    seen = training_step(run.model, run.optimizer, images, views, 16, 0.3).figures
    x = np.concatenate(ms.augment.apply_views(images, views, 16))
    z = twin.head(twin.encoder(ms.Tensor(x)))
    loss = ms.nt_xent(z[:8], z[8:], 0.3)
    loss.backward()
    gradient = np.concatenate([p.grad.ravel() for _, p in twin.named_parameters()])
    u = z.data / np.linalg.norm(z.data, axis=1, keepdims=True)
    nearest = (u @ u.T - 9 * np.eye(16)).argmax(axis=1)
    assert seen["loss"] == pytest.approx(float(loss), rel=1e-5)
    assert seen["gradient_norm"] == pytest.approx(np.linalg.norm(gradient), rel=1e-4)
    assert seen["accuracy"] == (nearest == (np.arange(16) + 8) % 16).mean()


def test_a_step_that_is_not_finite_moves_nothing(config):
    run = new_run(None, config)
    weight = run.model.head.linear2.weight.data
    weight[0, 0] = np.nan
    before = {name: p.data.copy() for name, p in run.model.named_parameters()}
    images = np.random.default_rng(0).integers(0, 256, (8, 20, 20, 3), np.uint8)
    with np.errstate(invalid="ignore"):
        step = training_step(run.model, run.optimizer, images, draw(config, 0, images), 16, 0.5)
    assert not step.finite
    for name, p in run.model.named_parameters():
        np.testing.assert_array_equal(p.data, before[name])
    assert not any(v.any() for v in run.optimizer.velocity.values())


def test_a_gradient_alone_may_be_infinite():
    for figures in ((np.inf, 1, 1), (1, np.nan, 1), (1, 1, np.inf)):
        step = Step(*map(np.float64, figures))
        assert not step.ok and not step.finite


@pytest.mark.parametrize(
    "name", ["minisimclr", "kernels", "numpy", "blas_kernels", "machine", "threads", "device"]
)
def test_all_that_the_last_digits_depend_on_is_told(name, tmp_path):
    config = ms.TrainConfig(width=2, device="cpu")
    run = new_run(make_run_folder(tmp_path / "run", config, {}), config)
    began = json.loads((run.path / "env.json").read_text())
    (run.path / "env.json").write_text(json.dumps(began | {name: "other"}))
    assert run.differences() == f"{name} other, now {str(began[name]).partition(' (')[0]}"
    others = dict.fromkeys(began.keys() & {"python", "platform", "cores", "started"}, "other")
    (run.path / "env.json").write_text(json.dumps(began | others))
    assert len(others) == 4 and run.differences() == ""


@pytest.mark.parametrize(
    "name, value",
    [("strength", 0.1), ("crop_min", 0.5), ("batch_size", 16), ("image_size", 16),
     ("stem", "cifar"), ("encoder", "resnet10"), ("optimizer", "lars"), ("weight_decay", 0.5),
     ("warmup_epochs", 3.0), ("lr_scaling", "sqrt"), ("precision", "tf32")],
)  # fmt: skip
def test_no_setting_of_a_run_may_change(name, value, tmp_path):
    config = ms.TrainConfig(width=2)
    run = new_run(make_run_folder(tmp_path / "run", config, {}), config)
    run.save()
    run.config = replace(config, **{name: value})
    with pytest.raises(ConfigError, match=rf"config\.json has {name} {value!r}, training had"):
        run.restore(run.saved_at)


def test_only_a_run_can_be_gone_on_with(tmp_path):
    with pytest.raises(ConfigError, match=r"exists already: name another --out$"):
        Run.path_for(tmp_path, ms.TrainConfig())


def test_the_same_seed_twice_is_the_same_run(finished, config, tmp_path):
    assert content(pretrain(config, tmp_path / "again").path) == content(finished.path)


@pytest.mark.parametrize("step", [1, 3, None])  # early, at the edge of an epoch, at the end
def test_a_checkpoint_has_the_batch_norm_statistics_of_its_weights(
    step, finished, config, tmp_path
):
    run = stopped(config, tmp_path / "run", step) if step else finished
    views = ms.augment.center_view(open_dataset(config.data, 20).sample(256), config.image_size)
    assert config.at_once == 32 and replace(config, batch_size=4096).at_once == 256
    views = views[:64]  # whole batches
    model = open_run(run.path)[0].model
    seen = model.encoder.conv1(ms.Tensor(views)).data.mean((0, 1, 2))
    np.testing.assert_allclose(model.encoder.bn1.running_mean, seen, rtol=1e-4, atol=1e-6)
    seen = model.head.linear1(ms.Tensor(model.encode(views))).data.mean(0)
    np.testing.assert_allclose(model.head.bn1.running_mean, seen, atol=0.01 * np.ptp(seen))


def test_ctrl_c_ends_the_program_once_the_state_is_saved(config, tmp_path):
    """A loop over runs must not go on to the next."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # some parents ignore it
    try:
        run = stopped(config, tmp_path / "run", 2, signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)
    assert open_run(run.path)[0].step == run.step > 0
    assert issubclass(Interrupted, KeyboardInterrupt)


@pytest.mark.parametrize("step", [1, 3, 6])  # warming up, at the edge of an epoch, within one
def test_stopped_and_resumed_is_uninterrupted(step, finished, config, tmp_path):
    run = stopped(config, tmp_path / "run", step)
    assert run.stopped == "SIGTERM"
    assert run.step == step + 1
    with (tmp_path / "run" / "metrics.jsonl").open("a") as log:
        log.write('{"step": torn')  # a later line that was not finished
    assert resume(tmp_path / "run").stopped == ""
    assert content(tmp_path / "run") == content(finished.path)


def test_a_signal_is_noted_where_nobody_can_be_told(monkeypatch):
    def closed(*_):
        raise OSError("closed")

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    monkeypatch.setattr(os, "write", closed)
    with stop_signals() as note:
        signal.raise_signal(signal.SIGINT)
        assert note == {"signal": "SIGINT"}
    signal.signal(signal.SIGINT, before)


def test_a_second_signal_acts_at_once():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # some parents ignore it
    other = signal.getsignal(signal.SIGTERM)
    with stop_signals() as note:
        assert signal.getsignal(signal.SIGTERM) != other
        signal.raise_signal(signal.SIGINT)
        assert note == {"signal": "SIGINT"} and signal.getsignal(signal.SIGTERM) == other
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    signal.signal(signal.SIGINT, before)


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="has no such signal")
def test_a_terminal_may_close_twice():
    """Shells send the signal twice, at nearly the same time."""
    before = signal.signal(signal.SIGHUP, signal.default_int_handler)
    with stop_signals() as note:
        signal.raise_signal(signal.SIGHUP)
        signal.raise_signal(signal.SIGHUP)
        assert note == {"signal": "SIGHUP"}
    assert signal.signal(signal.SIGHUP, before) is signal.default_int_handler


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="has no such signal")
def test_a_run_under_nohup_outlives_its_terminal():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with stop_signals() as note:
        signal.raise_signal(signal.SIGHUP)
    assert note == {} and signal.signal(signal.SIGHUP, before) is signal.SIG_IGN


def test_a_job_in_the_background_goes_on_after_an_interrupt():
    """Shells without job control let those ignore it."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    with stop_signals() as note:
        signal.raise_signal(signal.SIGINT)
        assert note == {}
        signal.raise_signal(signal.SIGTERM)
        assert note == {"signal": "SIGTERM"}
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    assert signal.signal(signal.SIGINT, before) is signal.SIG_IGN


def test_signals_that_another_program_handles_are_left_to_it(monkeypatch):
    monkeypatch.setattr(signal, "getsignal", lambda _: None)  # not by a handler of Python's
    monkeypatch.setattr(signal, "signal", Mock())
    with stop_signals() as note:
        assert note == {} and not signal.signal.called


def test_training_in_another_thread_leaves_signals_alone():
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(stop_signals().__enter__).result() == {}


@pytest.mark.parametrize("limit", [None, 0])
def test_ctrl_c_while_the_last_state_is_saved_is_no_less(limit, config, tmp_path, monkeypatch):
    def save(run):
        once(run)
        signal.raise_signal(signal.SIGTERM)

    once = Run.save
    monkeypatch.setattr(Run, "save", save)
    with pytest.raises(Interrupted) as raised:
        pretrain(replace(config, epochs=1), tmp_path / "run", time_limit=limit, notify=quiet)
    assert str(pickle.loads(pickle.dumps(raised.value))) == str(raised.value)  # between processes


def test_a_time_limit_stops_and_keeps_the_schedule(finished, config, tmp_path):
    run = pretrain(config, tmp_path / "run", time_limit=0)
    assert run.stopped == "time limit"
    assert run.step == 1
    resume(tmp_path / "run")
    assert content(tmp_path / "run") == content(finished.path)


def test_a_time_limit_is_in_seconds(config, tmp_path):
    clock = chain([0.0, 49.0], repeat(51.0))
    with patch("minisimclr.train.time.monotonic", lambda: next(clock)):
        run = pretrain(config, tmp_path / "run", time_limit=50, notify=quiet)
    assert (run.step, run.stopped) == (2, "time limit")


def test_runs_that_begin_in_one_second_have_folders_of_their_own(config, tmp_path, monkeypatch):
    class Now:
        @staticmethod
        def now():
            return datetime(2026, 5, 4, 3, 2, 1)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("minisimclr.run.datetime", Now)
    other = Run.path_for(None, replace(config, encoder="resnet10"))
    assert other == Path("runs/20260504-030201-resnet10")
    first, *more = (pretrain(config, time_limit=0, notify=quiet).path for _ in range(4))
    assert first == Path("runs/20260504-030201-resnet_small") and len(set(more)) == 3
    for second in more:
        assert second.parent == first.parent and second.name.startswith(f"{first.name}-")
    with pytest.raises(ConfigError, match="exists already"):
        pretrain(config, second, notify=quiet)


def test_another_run_may_begin_while_the_folder_is_made(config, tmp_path):
    def meanwhile(path, content):
        (tmp_path / "run" / "checkpoints").mkdir(parents=True, exist_ok=True)

    with patch("minisimclr.run.write_bytes", meanwhile):
        path = make_run_folder(tmp_path / "run", config, {}, beside=True)
        assert re.fullmatch("run-[0-9a-f]{4}", path.name) and (path / "metrics.jsonl").exists()
        with pytest.raises(OutputError, match="cannot make the run folder"):
            make_run_folder(tmp_path / "run", config, {})


def test_runs_that_begin_at_once_in_threads_have_folders_of_their_own(config, tmp_path):
    def begin(_):
        return make_run_folder(tmp_path / "run", config, {}, beside=True)

    with ThreadPoolExecutor(4) as pool:
        made = set(pool.map(begin, range(12)))
    assert len(made) == 12 and {*tmp_path.iterdir()} == made
    for path in made:
        assert read_config(path) == config


def test_what_is_no_configuration_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TypeError, match=r"a TrainConfig\(data=...\), not 'photos/'"):
        pretrain("photos/")
    assert not list(tmp_path.iterdir())


def test_folders_may_be_strings(config, tmp_path):
    run = pretrain(config, str(tmp_path / "run"), time_limit=0, notify=quiet)
    assert resume(str(run.path), time_limit=0, notify=quiet).step == 2
    assert open_run(str(run.path))[0].step == 2


def test_a_time_limit_that_ends_with_the_last_step_stops_nothing(finished, config, tmp_path):
    class Clock:
        now = 0.0

        def __call__(self, event, values):
            self.now = 100.0 * (event == "step" and values["step"] >= finished.step - 1)

    clock = Clock()
    with patch("minisimclr.train.time.monotonic", lambda: clock.now):
        run = pretrain(config, tmp_path / "run", time_limit=50, notify=clock)
    assert (run.step, run.stopped) == (finished.step, "")


def test_a_run_is_ready_for_use_however_it_was_opened(finished, config, tmp_path):
    runs = finished, resume(finished.path), open_run(finished.path)[0]
    for run in (*runs, new_run(tmp_path, config)):
        assert not run.model.encoder.training and not run.model.head.bn1.training


def test_resuming_a_finished_run_changes_nothing(finished):
    before = content(finished.path)
    assert resume(finished.path).step == finished.step
    assert content(finished.path) == before


def test_resuming_without_a_checkpoint_starts_at_step_0(finished, config, tmp_path):
    run = pretrain(config, tmp_path / "run", time_limit=0)
    for path in checkpoint.listed(run.path / "checkpoints"):
        path.unlink()
    resume(run.path)
    assert content(run.path) == content(finished.path)


def test_a_log_is_not_begun_anew_where_its_checkpoints_are_gone(finished, config, tmp_path):
    run = pretrain(config, tmp_path / "run")
    log = (run.path / "metrics.jsonl").read_bytes()
    for path in checkpoint.listed(run.path / "checkpoints"):
        path.unlink()
    with pytest.raises(DataError, match="checkpoints are gone: restore them, or begin anew"):
        resume(run.path)
    assert (run.path / "metrics.jsonl").read_bytes() == log


def test_a_run_whose_first_checkpoint_found_no_room_begins_again(finished, config, tmp_path):
    full = patch("minisimclr.run.checkpoint.save", side_effect=OSError(28, "No space left"))
    with full, pytest.raises(OSError, match="No space"):
        pretrain(config, tmp_path / "run")
    assert b"alignment" in (tmp_path / "run" / "metrics.jsonl").read_bytes()
    resume(tmp_path / "run")
    assert content(tmp_path / "run") == content(finished.path)
    lines = (tmp_path / "run" / "timings.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, finished.step + 1))


@pytest.mark.parametrize(
    "later", ["", '{"step": 7, "seconds": 1.0}\n{"step": 8, "seconds": 1.0}\n']
)
def test_timings_have_a_line_for_each_step(later, finished, config, tmp_path):
    run = stopped(config, tmp_path / "run", 5)
    with (run.path / "timings.jsonl").open("a") as timings:  # as a crash leaves it
        timings.write(later + '{"step": 99, "sec')
    resume(run.path)
    lines = (run.path / "timings.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, finished.step + 1))


def test_two_threads_stopped_and_resumed_are_uninterrupted(config, tmp_path):
    two = replace(config, threads=2)
    whole = content(pretrain(two, tmp_path / "whole").path)
    assert content(resume(stopped(two, tmp_path / "run", 5).path).path) == whole


def test_a_damaged_checkpoint_is_passed_over(finished, config, tmp_path):
    run = pretrain(config, tmp_path / "run")
    newest = checkpoint.listed(run.path / "checkpoints")[-1]
    damaged = bytearray(newest.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    newest.write_bytes(damaged)
    with pytest.warns(UserWarning, match="trying the one before"):
        resume(run.path)
    assert content(run.path) == content(finished.path)
    for path in checkpoint.listed(run.path / "checkpoints"):
        path.write_bytes(b"")
    with pytest.warns(UserWarning), pytest.raises(DataError, match="none of its 2"):
        open_run(run.path)


def test_a_copy_of_a_checkpoint_is_neither_used_nor_removed(tmp_path):
    for name in ("1", "2", "3", "9-best"):
        (tmp_path / f"step-0000000{name}.h5").touch()
    checkpoint.prune(tmp_path)
    kept = checkpoint.listed(tmp_path)
    assert [path.name for path in kept] == ["step-00000002.h5", "step-00000003.h5"]
    assert len(list(tmp_path.iterdir())) == 3


def test_what_a_killed_process_left_of_a_checkpoint_goes_with_the_next(finished, tmp_path):
    run = shutil.copytree(finished.path, tmp_path / "run")
    left = run / "checkpoints" / ".step-00000001.h5.0123abcd.tmp"
    left.touch()
    open_run(run)[0].save()
    assert not left.exists() and len(checkpoint.listed(run / "checkpoints")) == 2


def test_a_checkpoint_that_is_open_elsewhere_goes_later(tmp_path, monkeypatch):
    for k in range(4):
        (tmp_path / f"step-0000000{k}.h5").touch()

    unlink = Path.unlink

    def held(path):
        if path.name == "step-00000000.h5":
            raise PermissionError(errno.EACCES, "somebody has it open")
        unlink(path)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "unlink", held)
        checkpoint.prune(tmp_path)
    assert len(checkpoint.listed(tmp_path)) == 3
    checkpoint.prune(tmp_path)
    assert len(checkpoint.listed(tmp_path)) == 2


@hypothesis.settings(deadline=None)
@hypothesis.given(st.data())
def test_no_change_of_a_checkpoint_goes_unseen(finished, data):
    """And HDF5, which may crash on one, is not shown it."""
    whole = checkpoint.listed(finished.path / "checkpoints")[-1].read_bytes()
    damaged = bytearray(whole)
    damaged[data.draw(st.integers(0, len(whole) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    cut, longer = whole[: data.draw(st.integers(0, len(whole) - 1))], whole + b"\0"
    with patch("h5py.File", side_effect=AssertionError):
        for changed in (damaged, cut, longer):
            path = finished.path / "copy.h5"
            path.write_bytes(changed)
            with pytest.raises(DataError, match=r"of this version|SHA-256 differs"):
                checkpoint.load(path)
            path.unlink()


def test_a_checkpoint_of_another_version_is_not_called_damaged(tmp_path):
    checkpoint.save(tmp_path / "a.h5", {"a": np.ones(3)}, {})
    old = (tmp_path / "a.h5").read_bytes().replace(b"checkpoint 2,", b"checkpoint 1,")
    (tmp_path / "a.h5").write_bytes(old)
    with pytest.raises(DataError, match="not a checkpoint of this version"):
        checkpoint.load(str(tmp_path / "a.h5"))


def test_a_log_that_lost_lines_is_not_filled_with_zeros(config, tmp_path):
    run = pretrain(replace(config, epochs=1), tmp_path / "run")
    log = run.path / "metrics.jsonl"
    os.truncate(log, log.stat().st_size - 10)
    before = log.read_bytes()
    with pytest.raises(DataError, match=f"lines of the first {run.step} steps are not those"):
        resume(run.path)
    assert log.read_bytes() == before


def test_a_log_that_was_changed_is_not_cut(config, tmp_path):
    log = pretrain(replace(config, epochs=1), tmp_path / "run").path / "metrics.jsonl"
    whole = log.read_bytes()
    # The second is shorter, and ends as it should.
    for before in (whole.replace(b", ", b",  "), whole.partition(b"\n")[2]):
        log.write_bytes(before)
        with pytest.raises(DataError, match="steps are not those of their training: restore it"):
            resume(tmp_path / "run")
        assert log.read_bytes() == before


@pytest.mark.skipif(sys.platform != "linux", reason="there is no full device")
def test_a_full_disk_names_the_log():
    with pytest.raises(OSError) as error, Path("/dev/full").open("ab", 0) as log:
        log_line(log, {"step": 1})
    assert error.value.filename == "/dev/full"


def test_an_epoch_s_line_does_without_lines_that_were_changed(config, tmp_path):
    run = pretrain(config, tmp_path / "run", time_limit=0)
    log = resume(run.path, time_limit=0).path / "metrics.jsonl"  # within an epoch of 4 steps
    for step, old, new in (3, b'"loss"', b'"lost"'), (4, b'{"step": 1,', b'["step": 1,'):
        log.write_bytes(log.read_bytes().replace(old, new, 1))
        assert resume(run.path, time_limit=0).step == step


def test_a_line_of_the_log_may_be_taken_in_parts(tmp_path):
    class Disk(FileIO):
        def write(self, line):
            return super().write(line[:5])

    with Disk(tmp_path / "log", "ab") as log:
        log_line(log, {"step": 1})
    assert (tmp_path / "log").read_bytes() == b'{"step": 1}\n'


@pytest.mark.parametrize("name", ["config.json", "env.json"])
def test_a_disk_that_fills_up_leaves_no_part_of_a_run_folder(name, config, tmp_path, monkeypatch):
    def full(path, content):
        if path.name == name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        path.write_bytes(content)

    monkeypatch.setattr("minisimclr.run.write_bytes", full)
    with pytest.raises(OutputError, match=r"cannot make the run folder .*run: No space left"):
        pretrain(config, tmp_path / "run")
    assert not list(tmp_path.iterdir())


def test_a_run_folder_s_name_is_safe_on_the_disk_or_there_is_none(config, tmp_path, monkeypatch):
    order = []

    def renamed(path, to):
        if not order:
            order.append("full")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        order.append("renamed")
        path.rename(to)

    monkeypatch.setattr("minisimclr.run.rename", renamed)
    monkeypatch.setattr("minisimclr.run.sync", order.append)
    with pytest.raises(OutputError, match="No space left"):
        make_run_folder(tmp_path / "run", config, {}, beside=True)  # asked for no other name
    assert order == ["full"] and not list(tmp_path.iterdir())
    make_run_folder(tmp_path / "run", config, {})
    assert order == ["full", "renamed", tmp_path]


def test_a_checkpoint_comes_after_its_log(config, tmp_path, monkeypatch):
    order = []
    monkeypatch.setattr("minisimclr.run.sync", lambda path: order.append(path.name))
    monkeypatch.setattr(checkpoint, "save", lambda path, *_: order.append(path.suffix))
    pretrain(replace(config, epochs=1), tmp_path / "run")
    assert order == [tmp_path.name, "metrics.jsonl", ".h5"]


def test_another_device_can_go_on_with_other_threads(config, tmp_path):
    run = pretrain(config, tmp_path / "run", time_limit=0)
    settings = json.loads((run.path / "config.json").read_text())
    settings["device"]["value"], settings["threads"]["value"] = "cuda:0", 2
    (run.path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match="cpu"):
        resume(run.path)
    assert resume(run.path, device="cpu").config == replace(run.config, device="cpu", threads=2)


def test_only_the_first_step_sizes_the_memory_of_a_gpu(config, tmp_path, monkeypatch):
    sized, once = [], train.backend.sized_by_first
    monkeypatch.setattr(train.backend, "sized_by_first", lambda d: sized.append(d) or once(d))
    run = pretrain(replace(config, epochs=1), tmp_path / "run", time_limit=0)
    assert run.step == 1 and sized == ["cpu"]
    resume(run.path)
    assert sized == ["cpu"] * 2  # of some more steps


def test_a_run_goes_on_with_its_own_threads(config, tmp_path):
    run = pretrain(replace(config, epochs=1), tmp_path / "run", time_limit=0)
    cores.set_threads(2)
    resume(run.path)
    assert cores.threads() == config.threads == 1


def test_no_threads_means_all_cores(config, tmp_path):
    pretrain(replace(config, epochs=1, threads=1), tmp_path / "one")
    assert cores.threads() == 1
    run = pretrain(replace(config, epochs=1, threads=0), tmp_path / "all")
    assert cores.threads() == cores.available_cores()
    environment = json.loads((run.path / "env.json").read_text())
    assert environment["threads"] == cores.threads() and environment["cores"] == os.cpu_count()
    assert environment["device"] == "{} ({})".format(*choose_device("auto"))
    assert environment["blas_kernels"] == cores.blas_kernels()
    kernels = os.environ.get("MINISIMCLR_KERNELS", "fast")
    assert environment["kernels"] == kernels and environment["minisimclr"] == ms.__version__
    assert environment["machine"] == platform.machine()  # not the name of one
    assert environment["python"] == platform.python_version()


@pytest.mark.parametrize(
    "edits, said",
    [
        ({}, None),
        (
            {"numpy": "1.0", "python": "3.1", "started": "long ago", "kernels": "reference"},
            f"kernels reference, now fast; numpy 1.0, now {np.__version__}",
        ),
        ({"threads": 7, "device": "cuda:0 (a card)"}, "threads 7, now 1; device cuda:0, now cpu"),
    ],
)
def test_a_run_that_goes_on_elsewhere_says_so(config, tmp_path, edits, said, monkeypatch):
    monkeypatch.setattr("minisimclr.run.chosen", "fast")
    run = pretrain(replace(config, epochs=1), tmp_path / "run", time_limit=0)
    environment = json.loads((run.path / "env.json").read_text())
    (run.path / "env.json").write_text(json.dumps(environment | edits))
    told = []
    resume(run.path, time_limit=0, notify=lambda kind, values: told.append((kind, values)))
    warned = [values["text"] for kind, values in told if kind == "warning"]
    rest = "; figures will not be those of an unbroken run"
    assert warned == ([f"changed since the run began: {said}{rest}"] if said else [])


def test_a_run_without_its_environment_goes_on(config, tmp_path):
    run = pretrain(replace(config, epochs=1), tmp_path / "run", time_limit=0)
    for content in ("[]", "{", None):
        (run.path / "env.json").write_text(content) if content else (run.path / "env.json").unlink()
        assert not resume(run.path, time_limit=0).differences()


def test_a_killed_run_goes_on(finished, config, tmp_path):
    script = (
        "import sys, json, minisimclr as ms; from pathlib import Path\n"
        "ms.pretrain(ms.TrainConfig(**json.loads(sys.argv[1])), Path(sys.argv[2]))"
    )
    out = tmp_path / "run"
    child = subprocess.Popen([sys.executable, "-c", script, json.dumps(config.to_dict()), str(out)])
    while not checkpoint.listed(out / "checkpoints"):
        assert child.poll() in (None, 0)
        time.sleep(0.005)
    child.kill()
    child.wait()
    resume(out)
    assert content(out) == content(finished.path)


def test_an_existing_folder_is_never_touched(finished, config):
    before = content(finished.path)
    unread = patch.object(train, "open_dataset", side_effect=AssertionError)  # takes minutes
    said = r"exists already: .*, or go on with --resume .*whole$"
    with unread, pytest.raises(ConfigError, match=said):
        pretrain(config, finished.path)
    assert content(finished.path) == before


def test_a_run_in_use_is_refused(finished):
    with locked(finished.path / "run"), pytest.raises(OutputError, match="another process"):
        resume(finished.path)


def test_a_state_is_read_only_once_nobody_else_trains_it(config, tmp_path, monkeypatch):
    run, opening = pretrain(config, tmp_path / "run", time_limit=0, notify=quiet), train.open_run

    def opened(path, *rest):
        with pytest.raises(BlockingIOError), locked(path / "run", wait=False):
            pass
        return opening(path, *rest)

    monkeypatch.setattr(train, "open_run", opened)
    assert resume(run.path, time_limit=0, notify=quiet).step == 2


def test_what_a_callback_raises_is_not_taken_for_another_process(finished, config, tmp_path):
    def full(event, values):
        raise BlockingIOError(11, "a pipe is full")

    run = pretrain(config, tmp_path / "run", time_limit=0, notify=quiet)
    with pytest.raises(BlockingIOError, match="a pipe is full"):
        resume(run.path, notify=full)


def test_a_resumption_that_is_refused_leaves_the_logs(config, tmp_path, monkeypatch):
    run = pretrain(config, tmp_path / "run", time_limit=0, notify=quiet)
    with (run.path / "metrics.jsonl").open("a") as log:
        log.write('{"step": 2, "lo')  # killed
    before = content(run.path)
    monkeypatch.setattr(train, "read_config", lambda _: replace(run.config, precision="tf32"))
    with pytest.raises(ConfigError, match="needs a GPU"):
        resume(run.path)
    assert content(run.path) == before


def test_an_interrupt_leaves_no_half_made_folder(config, tmp_path, monkeypatch):
    monkeypatch.setattr("minisimclr.run.environment", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        pretrain(config, tmp_path / "run")
    assert not any(tmp_path.iterdir()) and not unfinished


@pytest.mark.skipif(os.name == "nt", reason="SIGTERM ends a process of Windows at once")
def test_sigterm_leaves_no_half_made_folder(tmp_path):
    script = """
import os, pathlib, signal
from minisimclr import files, run
run.environment = lambda config: os.kill(os.getpid(), signal.SIGTERM)
with files.nothing_unfinished():
    run.make_run_folder(pathlib.Path("run"), run.TrainConfig(), {})
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, stderr=subprocess.PIPE)
    assert done.returncode == -signal.SIGTERM, done.stderr
    assert not any(tmp_path.iterdir())


def test_other_data_is_refused(finished, config, tmp_path, pictures):
    run = pretrain(config, tmp_path / "run", time_limit=0)
    fake = ms.data.open_dataset(str(pictures), 20)
    object.__setattr__(fake, "fingerprint", "0" * 64)
    with pytest.raises(DataError, match="has other pictures or splits than when"):
        resume(run.path, dataset=fake)
    del fake  # Windows replaces no file that is open
    prepare(pictures, 20, Options(labels_per_class=1))  # the same pixels, more of them for training
    with pytest.raises(DataError, match="restore them, or prepare it as it was"):
        resume(run.path)
    prepare(pictures, 20)
    few = replace(ms.data.open_dataset(str(pictures), 20), fingerprint="0" * 64)
    few = replace(few, splits=np.ones_like(few.splits))  # too few for a batch; but that came later
    with pytest.raises(DataError, match="has other pictures or splits than when"):
        resume(run.path, dataset=few)
    del few
    resume(run.path)


def test_a_run_that_knows_less_goes_on(finished, config, tmp_path, monkeypatch):
    """As those of earlier versions do."""
    without = {k: v for k, v in config.to_dict().items() if k != "precision"}
    with monkeypatch.context() as earlier:
        earlier.setattr(Dataset, "identity", property(lambda self: self.fingerprint))
        earlier.setattr(ms.TrainConfig, "to_dict", lambda self: without)
        run = pretrain(config, tmp_path / "run", time_limit=0)
    run = resume(run.path)
    assert run.step == finished.step and run.trained_on == finished.trained_on


def test_a_run_keeps_its_settings(config, tmp_path):
    run = pretrain(config, tmp_path / "run", time_limit=0, origins={"lr": "flag"})
    settings = json.loads((run.path / "config.json").read_text())
    assert settings["lr"] == {"value": 0.05, "origin": "flag"}
    others = {"epochs": config.epochs + 1, "width": 16, "lr": 0.5, "seed": 9, "temperature": 0.9}
    for name, value in others.items():
        changed = settings | {name: settings[name] | {"value": value}}
        (run.path / "config.json").write_text(json.dumps(changed))
        was = f"config.json has {name} {value}, training had {getattr(config, name)}: set it back"
        with pytest.raises(ConfigError, match=was):
            resume(run.path)
    odd = "[]", '{"lr": 5}', '{"lr": {}}', '{"lr": {"value": 0}}', '{"x": {"value": 1}}'
    for content in ("[" * 100_000, *odd):
        (run.path / "config.json").write_text(content)
        with pytest.raises(DataError, match="not a run folder"):
            resume(run.path)


def test_a_rate_that_never_reaches_its_peak_is_said(config, tmp_path):
    said = []
    short = replace(config, epochs=1, warmup_epochs=1.5)
    pretrain(short, tmp_path / "run", notify=lambda event, values: said.append((event, values)))
    texts = [values["text"] for event, values in said if event == "warning"]
    assert texts[0] == "the rate rises for 1.5 epochs, but the run has 1: lower --warmup-epochs"
    said.clear()
    short = replace(short, warmup_epochs=1.0)
    pretrain(short, tmp_path / "b", notify=lambda event, _: said.append(event), time_limit=0)
    assert "warning" not in said


def test_a_log_that_is_gone_is_missed(config, tmp_path):
    run = pretrain(config, tmp_path / "run", time_limit=0)
    (run.path / "metrics.jsonl").unlink()
    with pytest.raises(DataError, match=r"metrics.jsonl is gone: restore it, or begin anew"):
        resume(run.path)


def test_settings_that_cannot_be_leave_no_folder(config, tmp_path):
    with pytest.raises(ConfigError, match="threads must be"):
        pretrain(replace(config, threads=1025), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(ConfigError, match="data must not be empty"):
        replace(config, data="")


def test_divergence_keeps_the_last_good_state(finished, config, tmp_path, monkeypatch):
    wild = ms.TrainConfig(**config.to_dict() | {"lr": 1e30, "warmup_epochs": 0.0})
    with pytest.raises(DivergedError, match="step") as raised:  # without a word from NumPy
        pretrain(wild, tmp_path / "run")
    *lines, end = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    for line in lines:
        assert np.isfinite(json.loads(line)["loss"])
    assert f"at step {len(lines) + 1}:" in str(raised.value)
    end = json.loads(end)
    assert end["step"] == len(lines) + 1 and f": {end['diverged']};" in str(raised.value)
    assert not checkpoint.listed(tmp_path / "run" / "checkpoints")
    assert "last good state" not in str(raised.value)
    rates = chain([0.05] * 4, repeat(1e30))  # wild in the second epoch
    with monkeypatch.context() as patch, np.errstate(all="ignore"):
        patch.setattr(Plan, "rate", lambda *_: next(rates))
        with pytest.raises(
            DivergedError, match=r"at step 6: .*; the last good state is "
        ) as raised:
            pretrain(config, tmp_path / "late", notify=quiet)
    (kept,) = checkpoint.listed(tmp_path / "late" / "checkpoints")
    assert str(raised.value).endswith(str(kept))
    arrays, state = checkpoint.load(kept)
    assert state["step"] == 4 and all(np.isfinite(a).all() for a in arrays.values())
    run, _ = open_run(shutil.copytree(finished.path, tmp_path / "copy"))
    newest = checkpoint.listed(run.path / "checkpoints")[-1]
    assert str(run.diverged(13, "it")).endswith(f"; the last good state is {newest}")
    run.model.encoder.conv1.weight.data[:] = np.nan
    with np.errstate(all="ignore"), pytest.raises(DivergedError, match="outputs are not finite"):
        train.monitor(run, open_dataset(config.data, 20), "cpu")


def test_divergence_tells_what_was_seen(config, tmp_path, monkeypatch):
    step = SimpleNamespace(finite=False, figures={"loss": 1.5, "gradient_norm": np.inf})
    monkeypatch.setattr(train, "training_step", lambda *_: step)
    said = r"at step 1: loss 1\.5, gradient norm inf; lower --lr or raise --temperature$"
    with pytest.raises(DivergedError, match=said):
        pretrain(config, tmp_path / "run", notify=quiet)


def test_preparation_tells_how_far_it_is(config):
    heard = []
    other = replace(config, image_size=24)
    train.open_training_data(other, lambda event, values: heard.append((event, values["done"])))
    assert len(heard) > 2 and heard == sorted(set(heard)) and heard[-1] == ("prepare", 120)


def test_a_run_on_the_chance_line_says_so(config, tmp_path):
    heard = []
    flat = ms.TrainConfig(**config.to_dict() | {"lr": 1e-9, "temperature": 1e6, "epochs": 4})
    pretrain(flat, tmp_path / "run", notify=lambda event, values: heard.append((event, values)))
    warnings = [v["text"] for event, v in heard if event == "warning"]
    assert len(warnings) == 2 and "chance line" in warnings[0]  # at first, at last; not each epoch
    told = [event for event, _ in heard if event in ("epoch", "warning")]
    assert told == ["epoch"] * 3 + ["warning", "epoch", "warning"]  # the first two are early days
    accuracy = next(v["mean_accuracy"] for event, v in reversed(heard) if event == "epoch")
    guessing = 1 / (2 * config.batch_size - 1)
    assert (
        f". {accuracy:.1%} of the views found their partner; guessing finds {guessing:.1%}"
        in (warnings[1])
    )


@pytest.mark.parametrize("below, warned", [(0.04, 0), (0.001, 1)])
def test_a_loss_that_has_left_the_chance_line_is_no_warning(
    below, warned, config, tmp_path, monkeypatch
):
    """Such as that of the second epoch of `minisimclr train`, 5.50 where chance is 5.54."""

    def means(learned, took, n):
        return epoch_means(learned, took, n) | {"mean_loss": chance_loss(n) - below}

    heard = []
    monkeypatch.setattr("minisimclr.train.epoch_means", means)
    late = replace(config, epochs=4, warmup_epochs=3.0)  # the third epoch is early days, too
    pretrain(late, tmp_path / "run", notify=lambda event, _: heard.append(event))
    assert heard.count("warning") == warned


def test_an_epochs_line_is_about_all_its_steps(config, tmp_path):
    heard = []
    pretrain(config, tmp_path / "run", notify=lambda event, values: heard.append((event, values)))
    logged, timings = (
        [json.loads(line) for line in (tmp_path / "run" / name).read_text().splitlines()]
        for name in ("metrics.jsonl", "timings.jsonl")
    )
    steps = [a | b for a, b in zip(logged, timings, strict=True)]
    for each in (v for event, v in heard if event == "epoch"):
        of_epoch = [step for step in steps if step["epoch"] == each["epoch"]]
        assert len(of_epoch) > 1
        for name in ("loss", "accuracy", "seconds", "data_wait"):
            told = each[name if name in timings[0] else f"mean_{name}"]
            assert told == pytest.approx(np.mean([step[name] for step in of_epoch]))
        views = 2 * config.batch_size * len(of_epoch)
        taken = sum(step["seconds"] for step in of_epoch)
        assert each["views_per_second"] == pytest.approx(views / taken)


@pytest.mark.parametrize("step", [1, 4, 6])  # of 4 an epoch: within one, at its edge, in the next
def test_an_epochs_line_is_about_its_steps_before_a_stop_too(step, config, tmp_path):
    whole, heard = [], []
    run = pretrain(config, tmp_path / "run", time_limit=0, notify=quiet)
    assert run.step == 1 and Plan.of(config, 72).steps_per_epoch == 4
    while run.step < step:
        run = resume(run.path, time_limit=0, notify=quiet)
    resume(run.path, notify=lambda *given: heard.append(given))
    pretrain(config, tmp_path / "whole", notify=lambda *given: whole.append(given))
    before, after = ([v for event, v in each if event == "epoch"] for each in (whole, heard))
    for one, other in zip(before[step // 4 :], after, strict=True):
        for name in ("mean_loss", "mean_accuracy"):
            assert one[name] == other[name]


def test_an_epochs_line_has_the_means_of_its_figures():
    values = {"loss": 9.0, "mean_loss": 2.0, "chance": 3.0, "accuracy": 0.9, "mean_accuracy": 0.2}
    values |= {"alignment": 0.5, "uniformity": -1.0, "effective_rank": 4.0}
    values |= {"views_per_second": 1234.0, "data_wait": 0.5, "seconds": 2.0}
    figures = "2/5 2.000 3.000 20% 0.50 -1.00 4.0 1,234 25.0%"
    assert re.findall(r"-?\d[\d.,/%]*", epoch_line(2, 5, **values)) == figures.split()
    assert "alignment 0.50  uniformity -1.00  effective rank 4.0" in epoch_line(2, 5, **values)


def test_a_line_for_every_epoch_unless_told_to_be_quiet(config, tmp_path, capsys):
    pretrain(config, tmp_path / "a")
    said = capsys.readouterr()
    assert not said.out and [x[:9] for x in said.err.splitlines()] == [
        f"epoch {i}/3" for i in (1, 2, 3)
    ]
    pretrain(config, tmp_path / "b", notify=quiet)
    assert capsys.readouterr() == ("", "")
    train.say("warning", {"text": "the loss"})
    assert capsys.readouterr().err == "warning: the loss\n"


def test_pictures_are_not_taken_for_views(finished):
    with pytest.raises(
        TypeError, match=r"takes what center_view makes, in \[0, 1\], not \(.*\) uint8"
    ):
        finished.model.encode(np.zeros((2, 16, 16, 3), np.uint8))
    with pytest.raises(TypeError, match=r"not \(16, 16, 3\) float32"):
        finished.model.encode(np.zeros((16, 16, 3), np.float32))


def test_a_batch_larger_than_the_data_is_refused_before_anything_is_written(config, tmp_path):
    with pytest.raises(ConfigError, match=r"the number of unlabelled images of .*, 72: "):
        pretrain(replace(config, batch_size=73), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert pretrain(replace(config, batch_size=72), tmp_path / "run").step == config.epochs


CHOSEN = "encoder", "stem", "lr_scaling", "optimizer", "precision"


@pytest.mark.parametrize(
    "bad, said",
    [
        ({"temperature": 0.0}, "temperature must be greater than 0, not 0"),
        ({"lr": 0}, "lr must be greater than 0"),
        ({"crop_min": 0.0}, "crop_min must be greater than 0"),
        ({"warmup_epochs": -1.0}, r"warmup_epochs must be at least 0, not -1\.0"),
        ({"image_size": 7}, "image_size must be at least 8"),
        ({"seed": 2**63}, r"seed must be less than 2\*\*63"),
        ({"lr": float("nan")}, "lr must be a finite number"),
        ({"warmup_epochs": 1e308}, "warmup_epochs must be a finite number below 1e100"),
        *(({name: "other"}, f"{name} must be one of") for name in CHOSEN),
        ({"batch_size": 1}, "batch_size must be at least 2"),
        ({"epochs": 2.5}, "epochs must be of type int"),
        ({"crop_min": 1.5}, "crop_min must be at most 1"),
        ({"crop_min": 2}, "crop_min must be at most 1"),
        ({"seed": True}, "seed must be of type int"),
        ({"lr": -(10**400)}, r"lr must be less than 2\*\*63 in size"),
        ({"lr": -1.0, "epochs": 0}, "lr must be .*; epochs|epochs must be .*; lr"),
        ({"crop_min": 1.5, "epochs": 0}, "epochs must be .*; crop_min must be at most 1"),
    ],
)
def test_bad_settings_are_all_named(bad, said):
    with pytest.raises(ConfigError, match=said):
        ms.TrainConfig(**bad)


def test_the_defaults_are_those_of_the_figures_in_the_readme():
    config = ms.TrainConfig()
    assert (config.encoder, config.image_size, config.batch_size) == ("resnet_small", 32, 128)
    assert (config.optimizer, config.lr, config.lr_scaling) == ("sgd", 0.3, "none")
    assert (config.epochs, config.warmup_epochs, config.weight_decay) == (20, 1.0, 1e-4)
    assert (config.temperature, config.strength, config.crop_min) == (0.2, 0.8, 0.2)


def test_settings_may_be_paths_and_numbers_of_numpy(tmp_path):
    given = {"data": tmp_path, "lr": np.logspace(-1, 0, 2)[0], "epochs": np.int64(3)}
    config = ms.TrainConfig(**given, temperature=np.float32(0.5))
    found = config.data, config.lr, config.epochs, config.temperature
    assert [*map(type, found)] == [str, float, int, float]
    assert found == (str(tmp_path), 0.1, 3, 0.5)
    with pytest.raises(ConfigError, match="lr must be of type float, not array"):
        ms.TrainConfig(lr=np.ones(1))


def test_settings_may_be_at_their_limits():
    least = {"image_size": 8, "batch_size": 2, "epochs": 1, "warmup_epochs": 0, "strength": 0}
    ms.TrainConfig(**least, weight_decay=0, crop_min=1, temperature=1e-9, lr=1e-9, seed=2**63 - 1)


def test_checkpoints_hold_no_clock(finished, tmp_path):
    arrays, state = checkpoint.load(checkpoint.listed(finished.path / "checkpoints")[-1])
    checkpoint.save(tmp_path / "a.h5", arrays, state)
    time.sleep(1.1)
    checkpoint.save(tmp_path / "b.h5", arrays, state)
    assert (tmp_path / "a.h5").read_bytes() == (tmp_path / "b.h5").read_bytes()


@pytest.mark.skipif(os.name == "nt", reason="has other locks")
def test_a_checkpoint_is_read_whoever_has_locked_it(tmp_path):
    import fcntl

    checkpoint.save(tmp_path / "a.h5", {"a": np.ones(3)}, {})
    with (tmp_path / "a.h5").open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert (checkpoint.load(tmp_path / "a.h5")[0]["a"] == 1).all()


def test_a_failed_save_leaves_the_old_checkpoint(finished, tmp_path, monkeypatch):
    arrays, state = checkpoint.load(checkpoint.listed(finished.path / "checkpoints")[-1])
    target = tmp_path / "a.h5"
    checkpoint.save(target, arrays, state)
    before = target.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("minisimclr.files.os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        checkpoint.save(target, arrays, state | {"step": 99})
    assert target.read_bytes() == before
    assert list(tmp_path.iterdir()) == [target]


def test_each_step_draws_views_of_its_own(config, tmp_path, monkeypatch):
    boxes, once, dataset = [], train.training_step, open_dataset(config.data, 20)
    pool = {image.tobytes() for image in dataset.images[dataset.split("pretrain")]}

    def step(model, optimizer, images, views, *rest):
        assert {image.tobytes() for image in images} <= pool  # none to test with
        expected = draw(config, len(boxes), images)
        np.testing.assert_array_equal(views.boxes, expected.boxes)
        boxes.append(views.boxes.reshape(-1, 4))
        return once(model, optimizer, images, views, *rest)

    monkeypatch.setattr(train, "training_step", step)
    pretrain(replace(config, epochs=1), tmp_path / "run", notify=quiet)
    boxes = np.concatenate(boxes)  # of 4 steps, 2 views, 16 pictures
    assert len(np.unique(boxes, axis=0)) == len(boxes) == 4 * 2 * 16


def test_crops_are_of_all_sizes_from_the_least_to_the_whole():
    views = draw(ms.TrainConfig(crop_min=0.1), 3, np.zeros((256, 40, 40, 3), np.uint8))
    area = views.boxes[..., 2] * views.boxes[..., 3] / 1600
    assert area.min() < 0.15 and area.max() > 0.9


def test_signals_are_pythons_again_after_training_that_diverged(config, tmp_path):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    wild = replace(config, lr=1e30, warmup_epochs=0.0)
    with pytest.raises(DivergedError):
        pretrain(wild, tmp_path / "run", notify=quiet)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_embeddings_that_are_not_finite_are_divergence_too(finished, config, tmp_path):
    run, _ = open_run(shutil.copytree(finished.path, tmp_path / "copy"))
    dataset, project, asked = open_dataset(config.data, 20), run.model.project, []

    def second_is_nan(h):
        asked.append(h)
        return project(h) * np.float32(np.nan if len(asked) == 2 else 1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run.model, "project", second_is_nan)
        with pytest.raises(DivergedError, match="outputs are not finite"):
            train.monitor(run, dataset, "cpu")
    run.model.head.linear2.weight.data[:] = np.nan  # the encoder is whole
    with np.errstate(all="ignore"), pytest.raises(DivergedError, match="outputs are not finite"):
        train.monitor(run, dataset, "cpu")


def test_a_cosine_a_rounding_error_above_1_is_counted(config, monkeypatch):
    run, dataset = new_run(None, config), open_dataset(config.data, 20)
    same = lambda h: np.random.default_rng(0).standard_normal((len(h), 5), np.float32)  # noqa: E731
    monkeypatch.setattr(run.model, "project", same)
    line = train.monitor(run, dataset, "cpu")
    assert sum(line["positives"]) == line["positives"][-1] == len(dataset.sample(256))


def test_a_run_keeps_the_whole_path_of_its_pictures(config, pictures, tmp_path, monkeypatch):
    monkeypatch.chdir(pictures.parent)
    here = replace(config, data=pictures.name)
    run = pretrain(here, tmp_path / "run", time_limit=0, notify=quiet)
    settings = json.loads((run.path / "config.json").read_text())
    assert settings["data"]["value"] == str(pictures)


def test_the_time_of_a_step_is_not_that_of_saving_the_state(config, tmp_path, monkeypatch):
    now, saving, arriving = [0.0], Run.save, train.uploaded

    def save(run):
        now[0] += 100  # seconds
        saving(run)

    def slow(source, device):
        for images in arriving(source, device):
            now[0] += 1
            yield images

    monkeypatch.setattr(train.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(Run, "save", save)
    monkeypatch.setattr(train, "uploaded", slow)
    run = pretrain(replace(config, epochs=2), tmp_path / "run", notify=quiet)
    timings = (run.path / "timings.jsonl").read_text().splitlines()
    assert [json.loads(line)["seconds"] for line in timings] == [1] * 8


def test_the_time_spent_waiting_for_data_is_kept(config, tmp_path, monkeypatch):
    def slow(source, device):
        for images in once(source, device):
            time.sleep(0.02)
            yield images

    once = train.uploaded
    monkeypatch.setattr(train, "uploaded", slow)
    run = pretrain(replace(config, epochs=1), tmp_path / "run", notify=quiet)
    for line in map(json.loads, (run.path / "timings.jsonl").read_text().splitlines()):
        assert 0.02 <= line["data_wait"] <= line["seconds"]
