"""Pre-training: epochs around Algorithm 1, with logs, checkpoints, and a way to stop and go on."""

import os
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from . import augment
from .backend import choose_device, set_threads, threads, to_device, to_host
from .config import TrainConfig
from .data import Dataset, batches, open_dataset
from .errors import ConfigError, DataError, DivergedError, OutputError
from .files import locked
from .probe import alignment, effective_rank, uniformity
from .run import Run, make_run_folder, open_run, read_config, stop_signals, write_line
from .schedule import scaled_rate, warmup_cosine
from .simclr import chance_loss, training_step

ORDER, VIEWS, MONITOR = 0, 1, 2  # Philox streams: order of images, training views, monitoring views
MONITORED = 256  # images on which alignment, uniformity and rank are measured
Notify = Callable[[str, dict[str, Any]], None]


def pretrain(
    config: TrainConfig,
    out: Path | None = None,
    *,
    origins: dict[str, str] | None = None,
    time_limit: float | None = None,
    notify: Notify = lambda event, values: None,
) -> Run:
    """Train encoder and head without labels and leave a run folder at `out`.

    out: must not exist (default runs/<time>-<encoder>). origins: where each setting came from,
    stored with it. time_limit: seconds after which to save and stop; it never changes the schedule.
    notify: called with ("start" | "step" | "epoch" | "warning", values). Raises ConfigError,
    DataError, OutputError, and DivergedError where the loss stops being a number.
    """
    out = out or Path("runs") / f"{datetime.now():%Y%m%d-%H%M%S}-{config.encoder}"
    if out.exists():
        raise ConfigError(f"{out} exists already: name another --out, or go on with --resume {out}")
    dataset = open_training_data(config, notify)
    make_run_folder(out, config, origins or {})
    return resume(out, time_limit=time_limit, notify=notify, dataset=dataset)


def open_training_data(config: TrainConfig, notify: Notify) -> Dataset:
    """The data set, with pictures a quarter larger than the views so that crops keep detail."""
    dataset = open_dataset(config.data, config.image_size * 5 // 4, progress=progress_of(notify))
    n = len(dataset.split("pretrain"))
    if config.batch_size > n:
        raise ConfigError(
            f"batch_size {config.batch_size} is larger than "
            f"the {n} unlabelled images of {config.data}"
        )
    return dataset


def progress_of(notify: Notify) -> Callable[[int, int], None]:
    return lambda done, total: notify("prepare", {"done": done, "total": total})


def resume(
    path: Path,
    *,
    time_limit: float | None = None,
    notify: Notify = lambda event, values: None,
    dataset: Dataset | None = None,
) -> Run:
    """Go on with the run at `path` from its newest checkpoint (step 0 without one) to its end."""
    config = read_config(path)
    set_threads(config.threads or threads())
    device, reason = choose_device(config.device)
    dataset = dataset or open_training_data(config, notify)
    try:
        with locked(path / "run", wait=False):
            run, state = open_run(path, device)
            if state and state["data"] != dataset.fingerprint:
                raise DataError(f"{path} was trained on other data than {config.data} holds now")
            # Lines after the checkpoint will be written again.
            os.truncate(path / "metrics.jsonl", state.get("logged_bytes", 0))
            notify("start", {"run": run, "device": device, "reason": reason, "dataset": dataset})
            train(run, dataset, device, time_limit, notify)
            return run
    except BlockingIOError as error:
        raise OutputError(f"{path} is being trained by another process") from error


def train(
    run: Run, dataset: Dataset, device: str, time_limit: float | None, notify: Notify
) -> None:
    """The training loop: from run.step to the end, a time limit or a signal."""
    config, model = run.config, run.model
    pool = dataset.split("pretrain")
    n = config.batch_size
    steps_per_epoch = len(pool) // n
    total = config.epochs * steps_per_epoch
    warmup = round(config.warmup_epochs * steps_per_epoch)
    peak = scaled_rate(config.lr, n, config.lr_scaling)
    height, width = dataset.images.shape[1:3]
    started = time.monotonic()
    losses: list[float] = []

    source = batches(dataset.images, pool, n, config.seed, start_step=run.step)
    with (
        stop_signals() as stop,
        (run.path / "metrics.jsonl").open("a") as metrics,
        (run.path / "timings.jsonl").open("a") as timings,
    ):
        while run.step < total and not run.stopped:
            begin = time.perf_counter()
            _, images, _ = next(source)  # (N, S, S, 3) uint8
            waited = time.perf_counter() - begin

            run.optimizer.lr = warmup_cosine(run.step, peak, warmup, total)
            views = augment.draw_views(
                config.seed, run.step, n, height, width,
                strength=config.strength, crop_scale=(config.crop_min, 1.0),
            )  # fmt: skip
            model.train()
            loss, accuracy = training_step(
                model, run.optimizer, to_device(images, device), views,
                config.image_size, config.temperature,
            )  # fmt: skip
            if not np.isfinite(loss):
                raise DivergedError(
                    f"the loss of step {run.step} is {loss}: lower --lr or raise --temperature; "
                    f"the last good state is in {run.path / 'checkpoints'}"
                )

            epoch, run.step = run.step // steps_per_epoch, run.step + 1
            losses.append(loss)
            line = {"step": run.step, "epoch": epoch + 1, "loss": loss, "chance": chance_loss(n),
                    "accuracy": accuracy, "lr": run.optimizer.lr}  # fmt: skip
            seconds = time.perf_counter() - begin
            timing = {"step": run.step, "seconds": seconds, "data_wait": waited,
                      "views_per_second": 2 * n / seconds}  # fmt: skip
            if end_of_epoch := run.step % steps_per_epoch == 0:
                line |= monitor(model, dataset, config, device)
            write_line(metrics, line)
            write_line(timings, timing)
            notify("step", line | timing | {"steps": total})

            if time_limit is not None and time.monotonic() - started >= time_limit:
                run.stopped = "time limit"
            run.stopped = stop.get("signal", run.stopped)
            if end_of_epoch:
                mean = float(np.mean(losses))
                losses.clear()
                notify("epoch", line | timing | {"mean_loss": mean, "epochs": config.epochs})
                if mean > chance_loss(n) - 0.01:
                    notify("warning", {"text": CHANCE_WARNING.format(mean, chance_loss(n))})
            if end_of_epoch or run.stopped or run.step == total:
                run.save(dataset.fingerprint)


CHANCE_WARNING = (
    "the loss ({:.3f}) sits on its chance line ln(2N-1) = {:.3f}: the model does not tell images apart. "
    "Usual causes: learning rate far too high or zero, too high a temperature, embeddings collapsed"
)


def monitor(model: Model, dataset: Dataset, config: TrainConfig, device: str) -> dict[str, float]:
    """Alignment, uniformity and effective rank on a fixed set of images and views."""
    chosen = dataset.split("pretrain")[:MONITORED]
    images = to_device(dataset.images[chosen], device)
    views = augment.draw_views(
        config.seed, 0, len(chosen), *images.shape[1:3],
        strength=config.strength, crop_scale=(config.crop_min, 1.0), stream=MONITOR,
    )  # fmt: skip
    x1, x2 = augment.apply_views(images, views, config.image_size)
    z1, z2 = model.project(x1), model.project(x2)
    return {
        "alignment": float(alignment(z1, z2)),
        "uniformity": float(uniformity(z1)),
        "effective_rank": float(effective_rank(to_host(model.encode(x1)))),
    }
