"""Pre-training: epochs around Algorithm 1, with logs, checkpoints, stopping and resuming."""

import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from math import inf
from pathlib import Path
from typing import Any

import numpy as np

from . import augment, backend
from .backend import Array, choose_device, peak_memory, to_device, to_host, uploaded, xp_of
from .config import TrainConfig
from .cores import set_threads
from .data import BUILT_IN, Dataset, Progress, batches, open_dataset
from .errors import Interrupted, OutputError
from .files import locked
from .optim import LARS
from .probe import Notify, alignment, effective_rank, uniformity, unit
from .run import Plan, Run, log_line, make_run_folder, new_run, open_run, read_config, stop_signals
from .simclr import Step, chance_loss, training_step

VIEWS, MONITOR = 1, 2  # streams of random views: for training, for monitoring
MONITORED = 256  # images for batch norm statistics, alignment, uniformity and rank


def quiet(event: str, values: dict[str, Any]) -> None:
    """A `notify` that reports nothing."""


def say(event: str, values: dict[str, Any]) -> None:
    """Print a line for every epoch, and warnings, to standard error."""
    if event in ("epoch", "warning"):
        said = f"warning: {values['text']}" if event == "warning" else epoch_line(**values)
        print(said, file=sys.stderr, flush=True)


def epoch_line(epoch: int, epochs: int, **v: Any) -> str:
    """The figures of an epoch, as a line."""
    return (
        f"epoch {epoch}/{epochs}  loss {v['mean_loss']:.3f} (chance {v['chance']:.3f})  "
        f"contrastive accuracy {v['mean_accuracy']:.0%}  alignment {v['alignment']:.2f}  "
        f"uniformity {v['uniformity']:.2f}  effective rank {v['effective_rank']:.1f}  "
        f"{v['views_per_second']:,.0f} views/s  data wait {v['data_wait'] / v['seconds']:.1%}"
    )


def pretrain(
    config: TrainConfig, out: str | Path | None = None, *, origins: dict[str, str] | None = None,
    time_limit: float | None = None, notify: Notify = say,
) -> Run:  # fmt: skip
    """Train encoder and head without labels and leave a run folder at `out`.

    out: must not exist (default runs/<time>-<encoder>). origins: where each setting came from,
    stored with it. time_limit: seconds after which to save and stop; it never changes the schedule.
    notify: called with ("prepare" | "start" | "step" | "epoch" | "warning", values); `quiet`
    ignores them. Raises ConfigError, DataError, OutputError, DivergedError if the loss stops being
    a number, and Interrupted once the state is saved after SIGINT (Ctrl-C), SIGTERM or SIGHUP.
    """
    if not isinstance(config, TrainConfig):
        raise TypeError(f"pretrain takes a TrainConfig(data=...), not {config!r}")
    path = Run.path_for(Path(out) if out else None, config)  # fail before long work, not after it
    set_threads(config.threads)
    with backend.precision(config.precision, *choose_device(config.device)):
        pass  # raises now if the device or the precision cannot be used
    if config.data not in BUILT_IN:  # the run will be used from other folders too
        config = replace(config, data=str(Path(config.data).absolute()))
    dataset = open_training_data(config, notify)
    Plan.of(config, len(dataset.split("pretrain")))  # raises now if there are too few images
    path = make_run_folder(path, config, origins or {}, beside=not out)
    return resume(path, time_limit=time_limit, notify=notify, dataset=dataset)


def preparing(notify: Notify) -> Progress:
    """The `progress` that tells `notify` how far a data set is."""
    return lambda done, total: notify("prepare", {"done": done, "total": total})


def open_training_data(config: TrainConfig, notify: Notify) -> Dataset:
    """The data set, with pictures a quarter larger than the views so that crops keep detail."""
    return open_dataset(config.data, config.image_size * 5 // 4, preparing(notify))


def resume(
    path: str | Path, *, time_limit: float | None = None, notify: Notify = say,
    dataset: Dataset | None = None, device: str | None = None,
) -> Run:  # fmt: skip
    """Continue the run at `path` from its newest checkpoint (step 0 without one) to its end.

    device: to use instead of the run's own.
    """
    path = Path(path)
    config = read_config(path)
    config = replace(config, device=device or config.device)
    set_threads(config.threads)
    device, reason = choose_device(config.device)
    dataset = dataset or open_training_data(config, notify)
    with backend.precision(config.precision, device, reason), ExitStack() as held:
        try:
            held.enter_context(locked(path / "run", wait=False))
        except BlockingIOError as error:
            raise OutputError(f"{path} is being trained by another process") from error
        run, state = open_run(path, device)
        run.config = config
        run.check_data(dataset, "restore them, or prepare it as it was")
        run.trained_on = dataset.identity
        plan = Plan.of(config, len(dataset.split("pretrain")))
        run.rewind_logs(state)
        about = {"run": run, "device": device, "reason": reason, "dataset": dataset}
        notify("start", about | {"steps": plan.total})
        if other := run.differences():
            said = f"changed since the run began: {other}"
            notify("warning", {"text": f"{said}; figures will not be those of an unbroken run"})
        if plan.warmup > plan.total:
            notify("warning", {"text": LONG_WARMUP.format(config.warmup_epochs, config.epochs)})
        train(run, dataset, plan, device, time_limit, notify)
        run.model.eval()
        if run.stopped.startswith("SIG"):
            raise Interrupted(run)
        return run


def draw(config: TrainConfig, step: int, images: Array, stream: int = VIEWS) -> augment.Views:
    """The random parameters of both views of `images` (N, S, S, 3) at a step."""
    n, height, width, _ = images.shape
    how = config.strength, (config.crop_min, 1.0)
    return augment.draw_views(config.seed, step, n, height, width, *how, stream=stream)


def calibrate_run(run: Run, dataset: Dataset, device: str) -> None:
    """Set the running statistics of a run's model to those of centre views of some images."""
    x = to_device(augment.center_view(dataset.sample(MONITORED), run.config.image_size), device)
    run.model.calibrate(x, run.config.at_once)


def start_step(run: Run, plan: Plan, images: Array) -> tuple[Step, dict[str, Any]]:
    """Start one step of Algorithm 1; returns it and what is known so far of its log line."""
    config, optimizer = run.config, run.optimizer
    optimizer.lr = plan.rate(run.step)
    views = draw(config, run.step, images)
    step = training_step(run.model, optimizer, images, views, config.image_size, config.temperature)
    optimizer.zero_grad()  # frees their memory for the next forward pass
    run.step += 1
    line = {"step": run.step, "epoch": -(-run.step // plan.steps_per_epoch)}  # rounded up
    return step, line | {"chance": chance_loss(config.batch_size), "lr": optimizer.lr}


def finished_steps(
    run: Run, plan: Plan, arriving: Iterator[Array], device: str, deadline: float, stop: dict
) -> Iterator[tuple[dict[str, Any], dict[str, Any], bool]]:
    """Take steps to the end, a deadline or a signal: yields each one's log line, its times, and
    whether the epoch or the training ends with it.
    """
    # A GPU is asked for the next step before the last one's figures are read, so it never waits.
    open_steps: deque[tuple[Step, dict, float]] = deque()
    first, mark = run.step, 0.0  # mark: when the previous step was read
    while run.step < plan.total and not run.stopped:
        begin = time.perf_counter()
        mark = mark if open_steps else begin
        images = next(arriving)  # (N, S, S, 3) uint8
        waited = time.perf_counter() - begin

        with backend.sized_by_first(device) if run.step == first else nullcontext():
            open_steps.append((*start_step(run, plan, images), waited))
        late = time.monotonic() >= deadline and run.step < plan.total
        run.stopped = stop.get("signal", "time limit" if late else "")
        last = bool(run.stopped) or run.step % plan.steps_per_epoch == 0

        while len(open_steps) > (0 if last or device == "cpu" else 1):
            step, line, waited = open_steps.popleft()
            if not step.finite:
                raise run.diverged(line["step"], DIVERGED.format(**step.figures))
            seconds = time.perf_counter() - mark
            mark += seconds
            timing = {"step": line["step"], "seconds": seconds, "data_wait": waited}
            timing["views_per_second"] = 2 * len(images) / seconds
            yield line | step.figures, timing, last and not open_steps


def train(
    run: Run, dataset: Dataset, plan: Plan, device: str, time_limit: float | None, notify: Notify
) -> None:
    """The training loop: from run.step to the end, a time limit or a signal."""
    config, pool, n = run.config, dataset.split("pretrain"), run.config.batch_size
    source = batches(dataset.images, pool, n, config.seed, start_step=run.step)
    arriving = uploaded((batch for _, batch, _ in source), device)
    deadline = time.monotonic() + (inf if time_limit is None else time_limit)
    learned, took, warned = run.begun(plan), [], False  # each step of this epoch, and its time
    with (
        np.errstate(over="ignore", invalid="ignore"),  # steps that are not finite are reported
        stop_signals() as stop,
        (run.path / "metrics.jsonl").open("ab", 0) as metrics,
        (run.path / "timings.jsonl").open("ab", 0) as timings,
    ):
        for line, timing, closing in finished_steps(run, plan, arriving, device, deadline, stop):
            learned.append((line["loss"], line["accuracy"]))
            took.append((timing["seconds"], timing["data_wait"]))
            end_of_epoch = closing and run.step % plan.steps_per_epoch == 0
            if closing:
                calibrate_run(run, dataset, device)
            if end_of_epoch:
                line |= monitor(run, dataset, device)
            log_line(metrics, line)
            log_line(timings, timing)
            if closing:
                run.save()
            notify("step", line | timing | {"steps": plan.total})
            if end_of_epoch:
                means = epoch_means(learned, took, n)
                learned, took = [], []
                notify("epoch", line | means | {"epochs": config.epochs})
                mean, chance = means["mean_loss"], line["chance"]
                wanted = line["epoch"] > 2 and run.step > plan.warmup and not warned
                if mean > chance - 0.01 and (wanted or run.step == plan.total):
                    warned, found = True, (means["mean_accuracy"], 1 / (2 * n - 1))
                    notify("warning", {"text": ON_CHANCE_LINE.format(mean, chance, *found)})
        run.stopped = stop.get("signal", run.stopped)  # perhaps while the last step was saved


def epoch_means(learned: list, took: list, n: int) -> dict[str, float]:
    """Mean loss and accuracy of an epoch's steps of `n` images each; mean seconds and data wait of
    those steps since it went on.
    """
    loss, accuracy = np.mean(learned, axis=0).tolist()
    seconds, waited = np.mean(took, axis=0).tolist()
    means = {"mean_loss": loss, "mean_accuracy": accuracy, "data_wait": waited}
    return means | {"seconds": seconds, "views_per_second": 2 * n / seconds}


LONG_WARMUP = "the rate rises for {} epochs, but the run has {}: lower --warmup-epochs"
DIVERGED = "loss {loss}, gradient norm {gradient_norm}"
ON_CHANCE_LINE = (
    "the loss ({:.3f}) is not clearly below the chance line, {:.3f} = ln(2N-1): the loss if all "
    "views look alike. {:.1%} of the views found their partner; guessing finds {:.1%}. Early on "
    "that is normal; later, try a lower --temperature or a lower --lr, which small batches need; "
    "or a higher one, if the weights hardly move"
)


def monitor(run: Run, dataset: Dataset, device: str) -> dict[str, Any]:
    """Alignment, uniformity and effective rank on a fixed set of images and views.

    Also how many positive and negative pairs have a cosine in each of 20 bins from -1 to 1, and the
    trust ratios that LARS used last. Raises DivergedError.
    """
    images = to_device(dataset.sample(MONITORED), device)
    views = draw(run.config, 0, images, stream=MONITOR)
    pair = augment.apply_views(images, views, run.config.image_size)
    h1, h2 = (run.model.encode(x, run.config.at_once) for x in pair)
    z1, z2 = run.model.project(h1), run.model.project(h2)
    if not all(xp_of(seen).isfinite(seen).all() for seen in (h1, z1, z2)):
        raise run.diverged(run.step, "the network's outputs are not finite")
    cosines = to_host(unit(z1) @ unit(z2).T).clip(-1, 1)  # (N, d_out) (d_out, N) -> (N, N)
    positive = np.eye(len(cosines), dtype=bool)
    line: dict[str, Any] = {
        "alignment": alignment(z1, z2),
        "uniformity": uniformity(z1),
        "effective_rank": effective_rank(h1),
        "positives": np.histogram(cosines[positive], 20, (-1, 1))[0].tolist(),
        "negatives": np.histogram(cosines[~positive], 20, (-1, 1))[0].tolist(),
    }
    if isinstance(run.optimizer, LARS):
        line["trust"] = {name: float(ratio) for name, ratio in run.optimizer.trust.items()}
    return line


def dry_run(config: TrainConfig, notify: Notify, out: Path | None = None) -> dict[str, Any]:
    """What `pretrain` would do, estimated from a few discarded steps; writes no run folder."""
    path = Run.path_for(out, config)
    set_threads(config.threads)
    device, reason = choose_device(config.device)
    dataset = open_training_data(config, notify)
    run, pool = new_run(Path("-"), config, device), dataset.split("pretrain")
    plan = Plan.of(config, len(pool))
    images = to_device(dataset.images[pool[: config.batch_size]], device)
    seconds = []
    for step in range(3):
        begin = time.perf_counter()
        rounding = backend.precision(config.precision, device, reason)
        with rounding, nullcontext() if step else backend.sized_by_first(device):
            start_step(run, plan, images)
        backend.synchronize(device)
        seconds.append(time.perf_counter() - begin)
    return {
        "settings": config.to_dict(),
        "runs on": f"{device} ({reason})",
        "run folder": str(path),
        "images": f"{len(pool):,} unlabelled of {dataset.name}",
        "first layers": run.model.encoder.stem,
        "parameters": sum(p.data.size for _, p in run.model.named_parameters()),
        "steps": f"{plan.total} ({plan.steps_per_epoch} an epoch)",
        "seconds a step": round(min(seconds), 3),
        "minutes in all": round(plan.total * min(seconds) / 60, 1),
        "peak memory, MB": round(peak_memory(device) / 1e6),
    }
