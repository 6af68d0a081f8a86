"""A run is a folder: configuration, logs and checkpoints of one pre-training.

On one machine, with one number of threads and one choice of kernels, what training writes depends
only on the configuration and the data, except in `timings.jsonl` and `env.json`, which hold what
depends on the clock and the machine. So a run that was stopped and resumed ends with the same log
and the same last checkpoint, byte for byte, as one that was not.
"""

import json
import os
import platform
import secrets
import shutil
import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import datetime
from os.path import exists
from pathlib import Path
from typing import Any

import numpy as np

from . import __version__, checkpoint
from .backend import choose_device
from .config import TrainConfig, first_layers
from .cores import available_cores, blas_kernels
from .data import BUILT_IN, Dataset
from .errors import ConfigError, DataError, DivergedError, OutputError, typed
from .files import handling, read_json, rename, require_writable, sync, unfinished, write_bytes
from .kernels import chosen
from .optim import LARS, SGD
from .schedule import scaled_rate, warmup_cosine
from .simclr import Model

STOPPING = b"\nstopping after this step, saving its state (once more to stop at once)\n"


@dataclass
class Run:
    """A run folder with its model: what `pretrain` returns, and `open_run` beside its state."""

    path: Path
    config: TrainConfig
    model: Model = field(repr=False)
    optimizer: SGD = field(repr=False)
    step: int = 0
    stopped: str = ""  # why training ended early: "time limit" or a signal such as "SIGINT"
    trained_on: str = ""  # the identity of its data set

    @staticmethod
    def path_for(out: Path | None, config: TrainConfig) -> Path:
        """Where a new run will be: `out`, or runs/<time>-<encoder>. Raises ConfigError if something
        is there already, OutputError if nothing can be written there.
        """
        path = out or Path("runs") / f"{datetime.now():%Y%m%d-%H%M%S}-{config.encoder}"
        if out and out.exists():
            way = f", or go on with {typed('--resume', str(out))}" * (out / "config.json").exists()
            raise ConfigError(f"{out} exists already: name another --out{way}")
        if not path.exists():  # else `pretrain` finds another name beside it
            require_writable(path)
        return path

    @property
    def saved_at(self) -> Path:
        """Where the checkpoint of its current state is, once saved."""
        return self.path / "checkpoints" / f"step-{self.step:08d}.h5"

    def save(self) -> None:
        """Publish a checkpoint of the current state."""
        arrays = checkpoint.prefixed("velocity", self.optimizer.state_dict())
        for part, module in self.model.children():
            arrays |= checkpoint.prefixed(part, module.state_dict())
        state = {"step": self.step, "config": self.config.to_dict(), "data": self.trained_on}
        sync(self.path / "metrics.jsonl")  # on disk before the checkpoint that relies on it
        state["logged_bytes"] = (self.path / "metrics.jsonl").stat().st_size
        checkpoint.save(self.saved_at, arrays, state)
        checkpoint.prune(self.saved_at.parent)

    def check_data(self, dataset: Dataset, advice: str) -> None:
        """Raise DataError if it was trained on other pictures or splits than those of `dataset`."""
        if not dataset.identity.startswith(self.trained_on):
            now = f"{self.config.data} has other pictures or splits"
            raise DataError(f"{now} than when {self.path} was trained: {advice}")

    def rewind_logs(self, state: dict[str, Any]) -> None:
        """Cut both logs off after this step, whose `state` was saved: the lines of later steps will
        be written again. Raises DataError unless they are the logs of this training.
        """
        log, logged = self.path / "metrics.jsonl", state.get("logged_bytes", 0)
        if not log.exists():
            raise DataError(f"{log} is gone: restore it, or begin anew")
        lines = log.read_bytes()
        before = lines.rstrip().rpartition(b"\n")[0]  # all but its last line
        if not state and b"alignment" in before:  # an epoch has ended, and was saved
            raise DataError(f"{self.path}: its checkpoints are gone: restore them, or begin anew")
        # A log that has become shorter would be filled up with nothing.
        last = lines[:logged].ljust(logged).rpartition(b'{"step": ')[2]
        if logged and not (last.startswith(b"%d," % self.step) and last.endswith(b"}\n")):
            said = f"the lines of the first {self.step} steps are not those of their training"
            raise DataError(f"{log}: {said}: restore it")
        os.truncate(log, logged)
        if (clock := self.path / "timings.jsonl").exists():  # perhaps cut short by a crash
            times = clock.read_bytes()
            later = times.find(b'{"step": %d,' % (self.step + 1))
            os.truncate(clock, later if later >= 0 else times.rfind(b"\n") + 1)

    def begun(self, plan: "Plan") -> list[tuple[float, float]]:
        """Logged loss and accuracy of each step so far of the epoch that it is in."""
        steps = self.step % plan.steps_per_epoch
        lines = (self.path / "metrics.jsonl").read_bytes().splitlines()[self.step - steps :]
        with suppress(ValueError, TypeError, KeyError):  # somebody may have changed them
            return [(row["loss"], row["accuracy"]) for row in map(json.loads, lines)]
        return []

    def differences(self) -> str:
        """What its last digits depend on, where that is no longer as when it began."""
        began, now = read_json(self.path / "env.json", dict) or {}, environment(self.config)
        other = []
        for key in "minisimclr", "kernels", "numpy", "blas_kernels", "machine", "threads", "device":
            was, is_now = (str(each.get(key)).partition(" (")[0] for each in (began, now))
            if key in began and was != is_now:
                other.append(f"{key} {was}, now {is_now}")
        return "; ".join(other)

    def diverged(self, step: int, seen: str) -> DivergedError:
        """Log the step at which training diverged and what was seen; returns the error to raise."""
        with (self.path / "metrics.jsonl").open("ab", 0) as log:
            log_line(log, {"step": step, "diverged": seen})
        kept = checkpoint.listed(self.path / "checkpoints")
        state = f"; the last good state is {kept[-1]}" if kept else ""
        advice = f"lower --lr or raise --temperature{state}"
        return DivergedError(f"training diverged at step {step}: {seen}; {advice}")

    def restore(self, path: Path) -> dict[str, Any]:
        """Load a checkpoint; returns its state. Raises ConfigError if config.json changed since."""
        arrays, state = checkpoint.load(path)
        for name, value in self.config.to_dict().items():
            was = state["config"].get(name, value)
            if value != was and name not in ("data", "device", "threads"):
                changed = f"config.json has {name} {value!r}, training had {was!r}: set it back"
                raise ConfigError(f"{self.path}: {changed}")
        for part, module in self.model.children():
            module.load_state_dict(checkpoint.unprefixed(part, arrays))
        self.optimizer.load_state_dict(checkpoint.unprefixed("velocity", arrays))
        self.step, self.trained_on = state["step"], state["data"]
        return state


@dataclass(frozen=True)
class Plan:
    """How long a run is, in steps, and how its learning rate moves."""

    steps_per_epoch: int
    total: int
    warmup: int
    peak: float

    @classmethod
    def of(cls, config: TrainConfig, images: int) -> "Plan":
        """That of a run on so many unlabelled images. Raises ConfigError if they fill no batch."""
        if not (each := images // config.batch_size):
            said = f"batch_size {config.batch_size} is larger than the number of unlabelled images"
            advice = "lower --batch-size, and --lr with it"
            raise ConfigError(f"{said} of {config.data}, {images}: {advice}")
        peak = scaled_rate(config.lr, config.batch_size, config.lr_scaling)
        return cls(each, config.epochs * each, round(config.warmup_epochs * each), peak)

    def rate(self, step: int) -> float:
        """The learning rate of step 0, 1, ..."""
        return warmup_cosine(step, self.peak, self.warmup, self.total)


def new_run(path: Path, config: TrainConfig, device: str = "cpu") -> Run:
    """A run at step 0, of which nothing has been written yet."""
    stem = first_layers(config.stem, config.encoder, config.image_size)
    model = Model.build(config.encoder, stem, config.width, config.seed).to(device).eval()
    optimizer = {"sgd": SGD, "lars": LARS}[config.optimizer]
    named = model.named_parameters()
    return Run(path, config, model, optimizer(named, config.lr, weight_decay=config.weight_decay))


def read_config(path: Path) -> TrainConfig:
    """The configuration of the run at `path`. Raises DataError if there is no run."""
    try:
        entries = json.loads((path / "config.json").read_text())
        config = TrainConfig(**{name: entry["value"] for name, entry in entries.items()})
        return replace(config, data=moved(path, config.data))
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        reason = f"config.json: {getattr(error, 'strerror', None) or error}"
        raise DataError(f"{path}: not a run folder ({reason})") from error


def moved(path: Path, data: str) -> str:
    """Where the pictures of the run at `path` are: where they were or, as both may have moved
    together, under the same name in the current folder or in one above the run.
    """
    if data in BUILT_IN or exists(data):  # noqa: PTH110 - False without permission
        return data
    places = (folder / Path(data).name for folder in (Path.cwd(), *path.resolve().parents))
    found = (place for place in places if place.exists() and not (place / "config.json").exists())
    return str(next(found, data))  # one with config.json is a run of that name


def open_run(path: str | Path, device: str = "cpu") -> tuple[Run, dict[str, Any]]:
    """The run at `path` at its newest whole checkpoint, and its state ({} at step 0).

    A damaged checkpoint is skipped with a warning; DataError if all of them are damaged.
    """
    path = Path(path)
    run = new_run(path, read_config(path), device)
    found = checkpoint.listed(path / "checkpoints")
    for newest in reversed(found):
        try:
            return run, run.restore(newest)
        except DataError as error:
            warnings.warn(f"{error}; trying the one before", stacklevel=2)
    if found:
        raise DataError(f"{path}: none of its {len(found)} checkpoints is whole")
    return run, {}


def environment(config: TrainConfig) -> dict[str, Any]:
    """What the figures of a run depend on besides its settings, here and now."""
    return {
        "minisimclr": __version__,
        "kernels": chosen,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "blas_kernels": blas_kernels(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "threads": config.threads or available_cores(),
        "device": "{} ({})".format(*choose_device(config.device)),
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
    }


def make_run_folder(out: Path, config: TrainConfig, origins: dict, beside: bool = False) -> Path:
    """Create `out` with config.json (value and origin of every setting) and env.json; or, if that
    exists and `beside`, a folder with a longer name. Returns which.
    """
    named = config.to_dict().items()
    settings = {k: {"value": v, "origin": origins.get(k, "default")} for k, v in named}
    unfinished.add(making := out.with_name(f".{out.name}.{secrets.token_hex(4)}"))
    try:
        (making / "checkpoints").mkdir(parents=True)
        write_bytes(making / "config.json", json.dumps(settings, indent=1).encode())
        write_bytes(making / "env.json", json.dumps(environment(config), indent=1).encode())
        (making / "metrics.jsonl").touch()
        while True:
            try:
                rename(making, out)
                break
            except OSError:
                if not (beside and out.exists()):  # else another run began in the same second
                    raise
                out = out.with_name(f"{out.name}-{secrets.token_hex(2)}")
        sync(out.parent)
        return out
    except BaseException as error:
        shutil.rmtree(making, ignore_errors=True)  # a full disk leaves nothing
        if not isinstance(error, OSError):
            raise
        raise OutputError(f"cannot make the run folder {out}: {error.strerror}") from error
    finally:
        unfinished.discard(making)


def log_line(log: Any, values: dict[str, Any]) -> None:
    """Append a line to a file opened without a buffer, so that closing it cannot fail again."""
    line = (json.dumps(values) + "\n").encode()
    try:
        while line := line[log.write(line) :]:  # a disk that fills up takes only a part
            pass
    except OSError as error:
        error.filename = log.name  # missing when the disk is full
        raise


@contextmanager
def stop_signals() -> Iterator[dict[str, str]]:
    """Turn the first SIGINT, SIGTERM or SIGHUP (a terminal that closes) into a note for the loop. A
    second one acts at once, but for SIGHUP, which shells send twice.
    """
    note: dict[str, str] = {}

    def stop(number: int, before: dict[int, Any]) -> None:
        note["signal"] = signal.Signals(number).name
        with suppress(OSError):  # there may be no one to read it
            os.write(2, STOPPING)  # print could interrupt itself in a handler
        for s in before.keys() & {signal.SIGINT, signal.SIGTERM}:
            signal.signal(s, before[s])

    ours = {signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)}
    with handling(ours, stop):
        yield note
