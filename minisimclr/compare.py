"""The report's three systems beside their controls: one table and one curve from one command.

Each part joins results.json as soon as it is made, under a key of all it depends on. A later call
makes only the parts whose keys are new, so it also goes on where an interrupted one stopped.
"""

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from . import baseline, checkpoint, embed, weights
from .data import Dataset
from .embed import Notify
from .errors import DataError
from .files import file_sha256, write_bytes
from .finetune import finetune
from .probe import Extract, labelled_and_test, measure, wilson_interval
from .run import Run

BLOCK = "mixed8"  # of InceptionV3
BUDGETS = (1, 2, 5, 10, None)  # labels per class in the curve; None: all
DRAWS = 5  # of these labels
IMAGENET = "ImageNet, which holds Stanford Dogs, test photos too"
FIGURES = ("top1", "top5", "ci95", "labels", "test", "warning")
Row = dict[str, Any]


class Part(NamedTuple):
    """Rows that are made together: what is known of them before, and how to get their figures."""

    depends: list[Any]  # all that the figures rest on; empty where an input is not at hand
    rows: list[Row]
    make: Callable[[], list[Row]]
    table: str = "rows"  # or "curve"

    @property
    def key(self) -> str:
        return hashlib.sha256(json.dumps(self.depends).encode()).hexdigest()[:16]


def row(system: str, method: str, pretraining: str, pixels: str, command: str) -> Row:
    """What a row says of itself."""
    return {
        "system": system, "method": method, "pretraining": pretraining, "pixels": pixels,
        "imagenet_weights": pretraining == IMAGENET, "command": f"minisimclr {command}",
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
    notify: Notify = lambda event, values: None

    def __post_init__(self) -> None:
        self.train, self.test = labelled_and_test(self.dataset)
        self.side = f"{self.dataset.images.shape[1]} px"
        c, newest = self.run.config, checkpoint.listed(self.run.path / "checkpoints")[-1]
        images = f"{len(self.dataset.split('pretrain')):,} images without labels"
        self.network, self.own = c.encoder, f"{images}, {c.epochs} epochs"
        self.pixels = f"{self.view or c.image_size} px of {self.side}"
        self.depends = [self.dataset.fingerprint, file_sha256(newest), self.view]
        steps = (self.run.path / "timings.jsonl").read_text().splitlines()
        self.trained = {"pretraining_seconds": sum(json.loads(line)["seconds"] for line in steps)}

    def make(self, out: Path) -> dict[str, Any]:
        """Make what is not in out/results.json yet, write it there, return all of it.

        Raises DataError where that file is another one, and what the parts raise.
        """
        path = out / "results.json"
        done = made_before(path)
        out.mkdir(parents=True, exist_ok=True)
        parts = [self.on_inception(), self.on_simclrv2(), self.probed(), self.finetuned()]
        parts += [self.on_random_inception(), self.curve()]
        for part in parts:
            if part.depends and part.key not in done:
                begin = time.perf_counter()
                made = part.make()
                seconds = round(time.perf_counter() - begin, 1)
                about = {"status": "measured", "seconds": seconds, "key": part.key}
                done[part.key] = [a | b | about for a, b in zip(part.rows, made, strict=True)]
                write_bytes(path, json.dumps(self.collected(parts, done), indent=1).encode())
        return self.collected(parts, done)

    def collected(self, parts: list[Part], done: dict[str, list[Row]]) -> dict[str, Any]:
        """results.json as far as it is made."""
        results: dict[str, Any] = {"data": self.dataset.name, "rows": [], "curve": []}
        results["classes"] = len(self.dataset.class_names)
        for part in parts:
            waiting = [about | {"status": "not run"} for about in part.rows]
            results[part.table] += done.get(part.key, waiting)
        return results

    def figures(self, made: Row) -> Row:
        """What a row takes over of the result of a probe."""
        counts = {"labels": len(self.train), "test": len(self.test)}
        return counts | {name: made[name] for name in FIGURES if name in made}

    def linear(self, extract: Extract) -> Row:
        y, train, test = self.dataset.labels, self.train, self.test
        return self.figures(measure(extract(train), y[train], extract(test), y[test]))

    def dense(self, file: Path | None) -> Row:
        extract = self.features(file)
        found = baseline.baseline(self.dataset, extract, self.trials, 100, 0, self.notify)
        return self.figures(found)

    def features(self, file: Path | None) -> Extract:
        return baseline.inception(self.dataset, file, BLOCK, self.run.config.device, self.notify)

    def on_inception(self) -> Part:
        """Dense layers, and a linear head, on frozen features of InceptionV3."""
        file, pixels = self.inception, f"{self.side} as 299"
        options = f"{file.name if file else 'FILE'} --data {self.dataset.name}"
        dense, linear = f"baseline --weights {options}", f"probe {options} --block {BLOCK}"
        rows = [
            row(f"InceptionV3 {BLOCK}", "dense", IMAGENET, pixels, dense),
            row(f"InceptionV3 {BLOCK}", "linear", IMAGENET, pixels, linear),
        ]
        depends = [self.depends[0], file_sha256(file), self.trials] if file else []
        return Part(depends, rows, lambda: [self.dense(file), self.linear(self.features(file))])

    def on_random_inception(self) -> Part:
        """The same dense layers on the features of a random InceptionV3."""
        name, command = f"InceptionV3 {BLOCK}", f"baseline --random --data {self.dataset.name}"
        rows = [row(f"{name}, random weights", "dense", "none", f"{self.side} as 299", command)]
        depends = [self.depends[0], "random", self.trials]
        return Part(depends, rows, lambda: [self.dense(None)])

    def on_simclrv2(self) -> Part:
        """A linear head on the frozen features of the authors' ResNet-50."""
        file = self.simclrv2
        command = f"probe {file.name if file else 'model.ckpt-250228'} --data {self.dataset.name}"
        rows = [row("SimCLRv2 ResNet-50", "linear", IMAGENET, f"{self.side} as 224", command)]

        def make() -> list[Row]:
            net, prep = weights.encoder(file or "")
            data, device = self.dataset, self.run.config.device
            return [self.linear(embed.published(net, prep, data, None, device, self.notify))]

        depends = [self.depends[0], file_sha256(weights.read(file).path)] if file else []
        return Part(depends, rows, make)

    def probed(self) -> Part:
        """The linear and the kNN probe of the run, with its controls."""
        rows = [
            row(f"SimCLR {self.network}", "linear", self.own, self.pixels, "probe RUN"),
            row(f"SimCLR {self.network}", "knn", self.own, self.pixels, "probe RUN"),
            row(f"{self.network}, random weights", "random", "none", self.pixels, "probe RUN"),
            row("raw pixels", "pixels", "none", "16 px", "probe RUN"),
        ]

        def make() -> list[Row]:
            linear, *controls = embed.probe_run(self.run, self.dataset, view=self.view)[
                "rows"
            ].values()
            knn = {"top1": linear["knn"], "ci95": wilson_interval(linear["knn"], len(self.test))}
            simclr = [self.figures(each) | self.trained for each in (linear, knn)]
            return [*simclr, *map(self.figures, controls)]

        return Part([*self.depends, "probe"], rows, make)

    def finetuned(self) -> Part:
        """The run's whole network trained with the labels, and the same one from scratch."""
        command = f"probe RUN --finetune --epochs {self.epochs}"
        rows = [
            row(f"SimCLR {self.network}", "finetune", self.own, self.pixels, command),
            row(f"{self.network} from scratch", "supervised", "none", self.pixels, command),
        ]

        def make() -> list[Row]:
            made = finetune(
                self.run, self.dataset, epochs=self.epochs, view=self.view, notify=self.notify
            )
            simclr, scratch = map(self.figures, made["rows"].values())
            return [simclr | self.trained, scratch]

        return Part([*self.depends, "finetune", self.epochs], rows, make)

    def curve(self) -> Part:
        """Linear heads by the number of labels per class, on every kind of frozen features."""
        names = [f"SimCLR {self.network}", f"{self.network}, random weights"]
        names += [f"InceptionV3 {BLOCK}"] if self.inception else []
        rows = [{"system": name, "per_class": n or "all"} for name in names for n in BUDGETS]

        def make() -> list[Row]:
            models = self.run.model, embed.control(self.run, self.dataset, self.view)
            extracts = [embed.extractor(self.run, m, self.dataset, self.view) for m in models]
            extracts += [self.features(self.inception)] if self.inception else []
            made: list[Row] = []
            for extract in extracts:
                X, test_X = extract(self.train), extract(self.test)
                for n in BUDGETS:
                    made.append(self.efficiency(X, test_X, n))
                    done = {"done": len(made), "total": len(rows)}
                    self.notify("progress", done | {"label": "label-efficiency curve"})
            return made

        digest = file_sha256(self.inception) if self.inception else None
        return Part([*self.depends, "curve", digest], rows, make, "curve")

    def efficiency(self, X: np.ndarray, test_X: np.ndarray, per_class: int | None) -> Row:
        """top1 of linear heads on features X, each with other labels drawn from all there are."""
        y, top1, chosen = self.dataset.labels[self.train], [], np.arange(0)
        for seed in range(DRAWS if per_class else 1):
            chosen = some_of_each(y, per_class or len(y), seed)
            found = measure(X[chosen], y[chosen], test_X, self.dataset.labels[self.test], seed)
            top1.append(found["top1"])
        return {"labels": len(chosen), "top1": top1}


def some_of_each(labels: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Indices of `count` labels of each class, or all it has; a smaller count draws a part."""
    rows = np.lexsort((np.random.Philox(key=seed).random_raw(len(labels)), labels))
    sizes = np.unique(labels, return_counts=True)[1]
    place = np.concatenate([np.arange(size) for size in sizes])  # within the class
    return np.sort(rows[place < count])


def made_before(path: Path) -> dict[str, list[Row]]:
    """The rows in results.json by the key of their part. Raises DataError if it is another file."""
    done: dict[str, list[Row]] = {}
    if path.exists():
        try:
            results = json.loads(path.read_bytes())
            for each in results["rows"] + results["curve"]:
                if each["status"] == "measured":
                    done.setdefault(each["key"], []).append(each)
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path}: not results of `minisimclr compare` ({error!r})") from error
    return done


def markdown(results: dict[str, Any]) -> str:
    """The table and the curve in results.json, for people."""
    columns = [
        "system",
        "head",
        "pre-training",
        "input",
        "labels",
        "top-1",
        "95 %",
        "top-5",
        "time",
    ]
    lines = [columns, ["---"] * len(columns)]
    for each in results["rows"]:
        about = [each["system"], each["method"], each["pretraining"], each["pixels"]]
        if each["status"] == "not run":
            lines.append([*about, "", "not run", "", "", ""])
            continue
        low, high = each["ci95"]
        top5 = f"{each['top5']:.1%}" if "top5" in each else ""
        took = [clock(each[k]) for k in ("pretraining_seconds", "seconds") if k in each]
        shown = [f"{each['top1']:.1%}", f"{low:.1%} - {high:.1%}", top5, " + ".join(took)]
        lines.append([*about, f"{each['labels']:,}", *shown])
    lines.append(["chance", "", "none", "", "0", f"{1 / results['classes']:.1%}", "", "", ""])
    curve = [["labels per class", *map(str, (n or "all" for n in BUDGETS))]]
    curve.append(["---"] * len(curve[0]))
    systems = dict.fromkeys(each["system"] for each in results["curve"])
    for system in systems:
        points = [each for each in results["curve"] if each["system"] == system]
        curve.append([system, *(spread(each.get("top1", [])) for each in points)])
    tables = [lines, curve] if systems else [lines]
    return "\n\n".join("\n".join(f"| {' | '.join(row)} |" for row in table) for table in tables)


def spread(values: list[float]) -> str:
    """Mean and standard deviation of accuracies; "not run" for none."""
    deviation = f" ± {np.std(values, ddof=1):.1%}" if len(values) > 1 else ""
    return f"{np.mean(values):.1%}{deviation}" if values else "not run"


def clock(seconds: float) -> str:
    """Seconds as people say them."""
    minutes, hours = round(seconds / 60), round(seconds / 3600, 1)
    return (
        f"{seconds:.0f} s" if seconds < 90 else f"{minutes} min" if minutes < 90 else f"{hours} h"
    )
