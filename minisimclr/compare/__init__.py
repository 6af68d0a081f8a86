"""The report's three systems beside their controls: one table and one curve from one command.

Each part is added to results.json as soon as it is made, under a key of all it depends on. A later
call makes only the parts whose keys are new, so it also continues where an interrupted one stopped;
results of another run or other settings stay in the file, under "others".
"""

import hashlib
import json
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .. import baseline, embed, weights
from ..backend import xp_of
from ..data import Dataset, cache_folder
from ..errors import DataError, DivergedError, typed
from ..files import file_sha256, locked, sha256, write_bytes
from ..finetune import FACTORS, finetune
from ..probe import Extract, by_class, labelled_and_test, majority_share, measure, wilson_interval
from ..run import Run
from ..train import Notify, quiet
from ..weights.names import TENSORFLOW
from .table import made_before, markdown

__all__ = ["Comparison", "made_before", "markdown"]

BLOCK = "mixed8"  # of InceptionV3
INCEPTION = f"InceptionV3 {BLOCK}"
BUDGETS = (1, 2, 5, 10, None)  # labels per class in the curve; None: all
DRAWS = 5  # of these labels
IMAGENET = "ImageNet"
FIGURES = ("top1", "top5", "ci95", "labels", "test", "warning", "C", "factor", "best", "trials")
PROTOCOL = 2  # raise it when figures made before would now come out differently
Row = dict[str, Any]


class Part(NamedTuple):
    """Rows that are made together: what is known of them before, and how to get their figures."""

    depends: list[Any]  # all that the figures depend on; empty if an input is missing
    rows: list[Row]
    make: Callable[[], list[Row]]
    table: str = "rows"  # or "curve"

    @property
    def key(self) -> str:
        return sha256(json.dumps(self.depends).encode())[:16]


def row(system: str, method: str, pretraining: str, pixels: str, command: str) -> Row:
    """What a row says about itself."""
    return {
        "system": system, "method": method, "pretraining": pretraining, "pixels": pixels,
        "imagenet_weights": pretraining.startswith(IMAGENET), "command": f"minisimclr {command}",
    }  # fmt: skip


@dataclass
class Comparison:
    """What is compared: a run, and perhaps weights of InceptionV3 and a SimCLRv2 checkpoint.

    trials: of the search for the dense classifier; epochs: of fine-tuning; view: side of the run's
    test views in px (None: as in training).
    """

    run: Run
    dataset: Dataset
    inception: Path | None = None
    simclrv2: Path | None = None
    trials: int = 20
    epochs: int = 60
    view: int | None = None
    notify: Notify = quiet

    def __post_init__(self) -> None:
        self.train, self.test = labelled_and_test(self.dataset)
        self.side = self.dataset.images.shape[1]  # px
        self.name = Path(self.dataset.name).name
        self.imagenet = IMAGENET
        if self.name.startswith("stanford-dogs"):
            self.imagenet += ", which holds Stanford Dogs, test photos too"
        c = self.run.config
        seen = f"{self.run.step:,} steps of {c.batch_size}"
        self.network, self.own = c.encoder, f"{Path(c.data).name} without labels, {seen}"
        self.pixels = f"{self.view or c.image_size} px of {self.side}"
        path = self.dataset.path  # of a finished cache, its name is not that of the data
        named = typed(self.name if path.parent == cache_folder() else path.name)
        self.probing = f"probe RUN --data {named}"
        self.probing += f" --view {self.view}" if self.view else ""
        self.given = f"--data {named} --image-size {self.side}"  # with published weights
        data = hashlib.sha256(self.dataset.fingerprint.encode())
        for part in (self.dataset.labels, self.dataset.splits, np.array(self.dataset.class_names)):
            data.update(part.tobytes())
        self.data = f"{PROTOCOL} {data.hexdigest()}"
        self.depends = [self.data, file_sha256(self.run.saved_at), self.view]
        self.took = pretraining_seconds(self.run)

    def make(self, out: Path) -> dict[str, Any]:
        """Make what is not in out/results.json yet, write it there, return all of it.

        A part that cannot be made is "not run", with the reason. Raises DataError if that file
        holds something else.
        """
        path = out / "results.json"
        done = made_before(path)
        out.mkdir(parents=True, exist_ok=True)
        parts = [self.on_inception(), self.on_simclrv2(), self.probed(), self.finetuned()]
        parts += [self.curve(), self.on_random_inception()]
        reasons: dict[str, str] = {}
        for part in parts:
            if part.depends and part.key not in done:
                begin = time.perf_counter()
                try:
                    made = part.make()
                except (DataError, DivergedError) as error:  # the other parts do not need this one
                    reasons[part.key] = str(error)
                    continue
                seconds = round(time.perf_counter() - begin, 1)
                about = {"status": "measured", "seconds": seconds, "key": part.key}
                done[part.key] = [a | b | about for a, b in zip(part.rows, made, strict=True)]
                self.keep(path, parts, done, reasons)
        return self.keep(path, parts, done, reasons)

    def keep(self, path: Path, parts: list[Part], done: dict, reasons: dict) -> dict[str, Any]:
        """Write results.json, with what another process may have added meanwhile."""
        results: dict[str, Any] = {"data": self.name, "classes": len(self.dataset.class_names)}
        chance = majority_share(self.dataset.labels[self.test])
        results |= {"chance": chance, "rows": [], "curve": []}
        used = {part.key for part in parts}
        with locked(path):
            done = made_before(path) | done
            for part in parts:
                state = {"status": "not run", "warning": reasons.get(part.key, "")}
                results[part.table] += done.get(part.key, [about | state for about in part.rows])
            others = (rows for key, rows in done.items() if key not in used)
            results["others"] = [row for rows in others for row in rows]
            write_bytes(path, (json.dumps(results, indent=1) + "\n").encode())
        return results

    def digest(self, file: Path) -> str:
        """SHA-256 of a file of weights. Raises DataError if it is not one."""
        return file_sha256(weights.read(file).path)

    def figures(self, made: Row) -> Row:
        """What a row takes from the result of a probe."""
        counts = {"labels": len(self.train), "test": len(self.test)}
        return counts | {name: made[name] for name in FIGURES if name in made}

    def linear(self, extract: Extract) -> Row:
        """The figures of a linear head on frozen features."""
        X, test_X, y = extract(self.train), extract(self.test), self.dataset.labels
        return self.figures(measure(X, y[self.train], test_X, y[self.test], notify=self.notify))

    def dense(self, extract: Extract) -> Row:
        """The figures of dense layers on frozen features, tuned by random search."""
        found = baseline.baseline(self.dataset, extract, self.trials, 100, 0, self.notify)
        return self.figures(found)

    def features(self, file: Path | None) -> Extract:
        """Features by InceptionV3 with the weights in a file; None: random ones."""
        return baseline.inception(self.dataset, file, BLOCK, self.run.config.device, self.notify)

    def on_inception(self) -> Part:
        """Dense and linear layers on frozen InceptionV3 features; DataError for other weights."""
        file, pixels = self.inception, f"{self.side} px as 299"
        options = f"{typed(file.name) if file else 'FILE'} {self.given}"
        dense = f"baseline --weights {options} --trials {self.trials}"
        rows = [
            row(INCEPTION, "dense", self.imagenet, pixels, dense),
            row(INCEPTION, "linear", self.imagenet, pixels, f"probe {options} --block {BLOCK}"),
        ]
        if not file:
            return Part([], rows, list)
        extract = self.features(file)
        depends = [self.data, self.digest(file), self.trials]
        return Part(depends, rows, lambda: [self.dense(extract), self.linear(extract)])

    def on_random_inception(self) -> Part:
        """The control of InceptionV3, if that takes part: the same layers on a random one."""
        name, pixels = f"{INCEPTION}, random weights", f"{self.side} px as 299"
        command = f"baseline --random {self.given} --trials {self.trials}"
        rows = [row(name, "dense", "none", pixels, command)]
        depends = [self.data, "random", self.trials] if self.inception else []
        return Part(depends, rows, lambda: [self.dense(self.features(None))])

    def on_simclrv2(self) -> Part:
        """A linear head on the frozen features of the authors' ResNet-50.

        Raises DataError for weights that are not a TensorFlow checkpoint.
        """
        file, pixels = self.simclrv2, f"{self.side} px as 224"
        command = f"probe {typed(file.name) if file else 'FILE'} {self.given}"
        rows = [row("SimCLRv2 ResNet-50", "linear", self.imagenet, pixels, command)]
        if file and weights.read(file).format != TENSORFLOW:
            raise DataError(f"{file}: not a TensorFlow checkpoint, as SimCLRv2's authors publish")

        def make() -> list[Row]:
            net, prep = weights.encoder(file or "")
            data, device = self.dataset, self.run.config.device
            return [self.linear(embed.published(net, prep, data, None, device, self.notify))]

        return Part([self.data, self.digest(file)] if file else [], rows, make)

    def probed(self) -> Part:
        """The linear and the kNN probe of the run, with its controls."""
        rows = [
            row(f"SimCLR {self.network}", "linear", self.own, self.pixels, self.probing),
            row(f"SimCLR {self.network}", "knn", self.own, self.pixels, self.probing),
            row(f"{self.network}, random weights", "random", "none", self.pixels, self.probing),
            row("raw pixels", "pixels", "none", "16 px", self.probing),
        ]

        def make() -> list[Row]:
            made = embed.probe_run(self.run, self.dataset, view=self.view, notify=self.notify)
            linear, *controls = made["rows"].values()
            knn = {"top1": linear["knn"], "ci95": wilson_interval(linear["knn"], len(self.test))}
            simclr = [self.figures(each) | self.took for each in (linear, knn)]
            return [*simclr, *map(self.figures, controls)]

        return Part([*self.depends, "probe"], rows, make)

    def finetuned(self) -> Part:
        """The run's whole network trained with the labels, and the same one from scratch."""
        command = f"{self.probing} --finetune --epochs {self.epochs}"
        rows = [
            row(f"SimCLR {self.network}", "finetune", self.own, self.pixels, command),
            row(f"{self.network} from scratch", "supervised", "none", self.pixels, command),
        ]

        def make() -> list[Row]:
            made = finetune(
                self.run, self.dataset, epochs=self.epochs, view=self.view, notify=self.notify
            )
            simclr, scratch = map(self.figures, made["rows"].values())
            return [simclr | self.took, scratch]

        return Part([*self.depends, "finetune", self.epochs, FACTORS], rows, make)

    def curve(self) -> Part:
        """Linear heads by the number of labels per class, on every kind of frozen features.

        A number that no class has more labels than would be "all" under another name.
        """
        names = [f"SimCLR {self.network}", f"{self.network}, random weights"]
        names += [INCEPTION] if self.inception else []
        most = np.bincount(self.dataset.labels[self.train]).max()  # labels that a class has
        budgets = [n for n in BUDGETS if (n or 0) < most]
        rows = [{"system": name, "per_class": n or "all"} for name in names for n in budgets]

        def make() -> list[Row]:
            models = self.run.model, embed.control(self.run, self.dataset)
            extracts = [embed.extractor(self.run, m, self.dataset, self.view) for m in models]
            extracts += [self.features(self.inception)] if self.inception else []
            made: list[Row] = []
            for extract in extracts:
                X, test_X = extract(self.train), extract(self.test)
                for n in budgets:
                    made.append(self.efficiency(X, test_X, n))
                    done = {"done": len(made), "total": len(rows)}
                    self.notify("progress", done | {"label": "label-efficiency curve"})
            return made

        digest = self.digest(self.inception) if self.inception else None
        return Part([*self.depends, "curve", digest], rows, make, "curve")

    def efficiency(self, X: np.ndarray, test_X: np.ndarray, per_class: int | None) -> Row:
        """top1 of linear heads on features X, each with a different draw of the labels."""
        y, test_y = self.dataset.labels[self.train], self.dataset.labels[self.test]
        seeds = range(DRAWS if per_class else 1)
        draws = [some_of_each(y, per_class or len(y), seed) for seed in seeds]
        top1 = [measure(X[xp_of(X).asarray(r)], y[r], test_X, test_y)["top1"] for r in draws]
        return {"labels": len(draws[0]), "top1": top1}


def some_of_each(labels: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Indices of `count` labels of each class, or all it has; a smaller count draws a subset."""
    rows, place, _ = by_class(labels, seed)
    return np.sort(rows[place < count])


def pretraining_seconds(run: Run) -> Row:
    """How long a run's steps took, by its timings.jsonl; None if that does not tell of each."""
    took: dict[int, Any] = {}
    with suppress(OSError, ValueError, KeyError, TypeError):  # a killed run may leave half a line
        for line in (run.path / "timings.jsonl").read_text().splitlines():
            step = json.loads(line)
            took[step["step"]] = step["seconds"]
    each = [took.get(step) for step in range(1, run.step + 1)]
    return {"pretraining_seconds": None if None in each else sum(each)}
