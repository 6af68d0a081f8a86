"""What a run can tell: the files in its folder, and what its newest checkpoint makes of the data.

A run may be in progress, killed or stripped of parts. What is not there is None or empty, and
`missing` says so in a sentence.
"""

import json
import sys
import warnings
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from .. import augment
from ..config import TrainConfig
from ..data import Dataset, batches
from ..embed import control, extractor
from ..errors import ConfigError, DataError
from ..files import fits, locked, read_json, sha256, write_bytes
from ..probe import stratified
from ..profile import profile
from ..run import Plan, Run, new_run, open_run, read_config
from ..simclr import Model
from ..tensor import Tensor, no_grad
from ..train import Notify, draw, open_training_data, quiet
from .page import Missing

MOST, CLASSES = 1200, 120  # test pictures that are looked at, and classes of theirs
Rows = list[dict[str, Any]]

ENDED = "no epoch of this run has ended"

# What files must look like, since somebody may have changed them.
STEP = ("step", "epoch", "loss", "accuracy", "chance", "lr", "gradient_norm")
LOGS = {
    "metrics": dict.fromkeys(STEP, float),
    "timings": dict.fromkeys(("step", "seconds", "data_wait", "views_per_second"), float),
}
END: dict[str, Any] = {
    "alignment": float, "uniformity": float, "effective_rank": float,
    "positives": (-1.0,) * 20, "negatives": (-1.0,) * 20,
}  # fmt: skip
FOUND = {"top1": float, "top5": float, "ci95": (float, float), "knn": float, "C": 0.0}
PROBE = FOUND | {
    "controls": {"chance": 0.0}, "rows": {None: FOUND | {"warning": str}}, "labels": float,
    "test": float, "classes": float,
}  # fmt: skip
OP = {"name": str, "direction": str, "calls": float, "seconds": 0.0, "flops": float, "bytes": float}
PROFILE = {
    "ops": [OP], "roofline": {"flops_per_second": 0.0, "bytes_per_second": 0.0},
    "step_seconds": float, "views_per_second": float, "peak_bytes": float, "device": str,
    "threads": float, "batch_size": float,
}  # fmt: skip


@dataclass
class Facts:
    """All that the report of one run is made of."""

    path: Path
    config: TrainConfig
    # config, env, probe: what the .json holds; metrics, timings: rows; diverged: a row, if it did
    files: dict[str, Any]
    going: bool  # another process is training it
    missing: list[str] = field(default_factory=list)
    dataset: Dataset | None = None
    run: Run | None = None  # at its newest checkpoint
    total: int = 0  # steps planned
    notify: Notify = quiet

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @property
    def done(self) -> int:
        """Steps taken."""
        return self.files["metrics"][-1]["step"] if self.files["metrics"] else 0

    @property
    def ended(self) -> bool:
        """Whether its last step has been taken or, without a data set, its last epoch has ended."""
        if self.total:
            return self.done >= self.total
        return bool(self.epochs) and self.epochs[-1]["epoch"] >= self.config.epochs

    def need(self, what: str) -> Any:
        """A file's content, the data set or the run. Raises Missing if it is not there."""
        if not (value := self.files.get(what) or getattr(self, what, None)):
            said = {"run": "no checkpoint with its data", "dataset": "no data set", "epochs": ENDED}
            raise Missing(said.get(what, f"no {what} of this run"))
        return value

    @cached_property
    def epochs(self) -> Rows:
        """The rows of steps that end an epoch, with the epoch's mean loss, accuracy and speed."""
        speed = {row["step"]: row["views_per_second"] for row in self.files["timings"]}
        ends = []
        for _, group in groupby(self.files["metrics"], lambda row: row["epoch"]):
            steps = list(group)
            if fits(row := steps[-1], END):
                means = {k: float(np.mean([r[k] for r in steps])) for k in ("loss", "accuracy")}
                seen = [speed[r["step"]] for r in steps if r["step"] in speed]
                ends.append(row | means | {"views/s": float(np.median(seen)) if seen else None})
        return ends

    @cached_property
    def fresh(self) -> Model:
        """The run's own network as it was before step 0; its running statistics may change."""
        return new_run(self.path, self.config).model

    @cached_property
    def first_views(self) -> tuple[np.ndarray, augment.Views, tuple[np.ndarray, np.ndarray]]:
        """Of step 1: its images (N, S, S, 3), the drawn parameters, both views (N, s, s, 3)."""
        data, config = self.need("dataset"), self.config
        source = batches(data.images, data.split("pretrain"), config.batch_size, config.seed)
        _, images, _ = next(source)
        views = draw(config, 0, images)
        return images, views, augment.apply_views(images, views, config.image_size)

    @cached_property
    def first_z(self) -> tuple[np.ndarray, np.ndarray]:
        """Embeddings (N, d_out) of both first views by the fresh network, as step 1 had them."""
        x = np.concatenate(self.first_views[2])  # (2N, s, s, 3)
        self.fresh.train()
        with no_grad():
            z = self.fresh.head(self.fresh.encoder(Tensor(x))).data.astype(np.float64)
        return z[: len(z) // 2], z[len(z) // 2 :]  # from (2N, d_out)

    @cached_property
    def movement(self) -> float:
        """How far training has moved the weights, as a fraction of their own length."""
        after = dict(self.need("run").model.named_parameters())
        pairs = [(p.data, after[name].data) for name, p in self.fresh.named_parameters()]
        moved = sum(float(((b - a) ** 2).sum()) for a, b in pairs)
        return (moved / sum(float((a**2).sum()) for a, _ in pairs)) ** 0.5

    @cached_property
    def test_rows(self) -> np.ndarray:
        """Rows of the data set whose features are shown: test pictures or, if there are none, those
        it was trained on; only labelled ones if any are. Of very many classes some are left out, so
        that a picture has others of its class. Raises Missing for one picture alone.
        """
        data = self.need("dataset")
        rows = data.split("test" if len(data.split("test")) else "pretrain")
        labelled = rows[data.labels[rows] >= 0]
        rows = labelled if len(labelled) else rows
        if len(rows) < 2:
            raise Missing("there is one picture alone to test with")
        if len(rows) > MOST:
            kinds = np.unique(data.labels[rows])
            rows = rows[np.isin(data.labels[rows], kinds[:: -(-len(kinds) // CLASSES)])]
        return rows if len(rows) <= MOST else rows[stratified(data.labels[rows], MOST)]

    @cached_property
    def test_h(self) -> tuple[np.ndarray, np.ndarray]:
        """Features (n, D) of the test rows, by the trained network and by the fresh one."""
        data, run, rows = self.need("dataset"), self.need("run"), self.test_rows
        models = run.model, control(run, data)
        h, fresh_h = (extractor(run, m, data, notify=self.notify)(rows) for m in models)
        return h, fresh_h

    @cached_property
    def profile(self) -> dict[str, Any]:
        """profile.json; if there is none, a step is profiled now and the result kept there."""
        path, config = self.path / "profile.json", self.config
        if kept := read_json(path, PROFILE):
            return kept
        if self.going or not self.run:
            raise Missing("no profile.json; a step is timed only if a run has ended and is whole")
        stem, size = self.run.model.encoder.stem, min(config.batch_size, 32)
        result = profile(config.encoder, stem, config.width, config.image_size, size, steps=2,
                         device="cpu", thread_count=config.threads, notify=self.notify)  # fmt: skip
        result.pop("events")
        with suppress(OSError):  # a folder that cannot be written gets its report all the same
            write_bytes(path, json.dumps(result).encode())
        return result


def read_lines(path: Path, like: Any) -> tuple[Rows, int]:
    """Rows of a JSON Lines file, up to the first that is incomplete, not shaped like `like` or not
    of the next step (of losses: times may be lost in a crash); and how many lines are left out: a
    run that is killed may leave half a line, which does not count.
    """
    rows: Rows = []
    with suppress(OSError), path.open("rb") as file:
        line = b""
        with suppress(ValueError, RecursionError):
            for line in file:
                row = json.loads(line)
                sound = fits(row, like) or fits(row, {"step": float, "diverged": str})
                lost = sound and "loss" in like and row["step"] != len(rows) + 1  # lines before it
                if not sound or lost or (rows and "diverged" in rows[-1]):
                    break
                # All rows share their keys: a long run has 100,000 of them.
                rows.append({sys.intern(key): value for key, value in row.items()})
            else:
                return rows, 0
        return rows, line.endswith(b"\n") + sum(1 for _ in file)
    return rows, 0


def is_going(path: Path) -> bool:
    """Whether another process holds the run's lock."""
    try:
        with locked(path / "run", wait=False):
            return False
    except OSError as error:  # a folder that cannot be written: nobody trains there
        return isinstance(error, BlockingIOError)


def read(path: str | Path, notify: Notify = quiet) -> Facts:
    """The run at `path`. Raises DataError if there is none."""
    path = Path(path)
    likes = {"config": {None: {"value": object, "origin": object}}, "env": {}, "probe": PROBE}
    files = {name: read_json(path / f"{name}.json", like) for name, like in likes.items()}
    facts = Facts(path, read_config(path), files, is_going(path), notify=notify)
    for name, like in LOGS.items():
        files[name], left = read_lines(path / f"{name}.jsonl", like)
        if left:
            bad = f"line {len(files[name]) + 1} cannot be used"
            facts.missing.append(f"{name}.jsonl: {bad}; lines left out from there on: {left:,}.")
    if files["probe"] and len(files["probe"]["rows"]) < 2:
        files["probe"] = None  # a figure without its controls
    if files["metrics"] and "diverged" in files["metrics"][-1]:  # and no other figures
        files["diverged"] = files["metrics"].pop()
    facts.missing += [f"This run has no complete {name}." for name, v in files.items() if not v]
    try:
        dataset = open_training_data(facts.config, notify)
        facts.total = Plan.of(facts.config, len(dataset.split("pretrain"))).total
        facts.dataset = dataset
    except (DataError, ConfigError, OSError) as error:
        facts.missing.append(f"{error}.")
    try:
        with warnings.catch_warnings(record=True) as notes:
            warnings.simplefilter("always")
            run, _ = open_run(path)
    except (DataError, ConfigError, OSError) as error:
        facts.missing.append(f"{error}.")
        return facts
    run.config = replace(run.config, device="cpu")
    facts.missing += [str(note.message) for note in notes]
    if (data := facts.dataset) and not data.identity.startswith(run.trained_on):
        facts.missing.append("The data set has changed since this run: its pictures are left out.")
        facts.dataset, facts.total, data = None, 0, None
    probe, truth = files["probe"] or {}, data and sha256(data.labels.tobytes())
    if run.step != probe.get("step", run.step) or truth not in (None, probe.get("truth", truth)):
        files["probe"] = None
        facts.missing.append("Its probe is of another step or other labels: run minisimclr probe.")
    if data and run.step:
        facts.run = run
    elif data:
        facts.missing.append("There is no checkpoint yet.")
    return facts
