"""results.json: what it holds, and its table and curve for people."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DataError
from ..files import fits

# The form of measured rows, and of points of the curve.
ABOUT = dict.fromkeys(("system", "method", "pretraining", "pixels", "key"), str)
MEASURED = ABOUT | {"top1": float, "ci95": (float, float), "labels": float, "seconds": float}
POINT = {"system": str, "key": str, "per_class": object, "top1": [float], "labels": float}


def made_before(path: Path) -> dict[str, list[dict[str, Any]]]:
    """The rows in results.json by the key of their part. Raises DataError for other files."""
    done: dict[str, list[dict[str, Any]]] = {}
    if path.exists():
        try:
            results = json.loads(path.read_bytes())
            for each in results["rows"] + results["curve"] + results.get("others", []):
                if each["status"] == "measured":
                    if not fits(each, POINT) and not fits(each, MEASURED):
                        raise ValueError(f"figures of {each.get('system')} are missing")
                    done.setdefault(each["key"], []).append(each)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            said = f"not results of `minisimclr compare` ({error!r}): name another --out"
            raise DataError(f"{path}: {said}") from error
    return done


def markdown(results: dict[str, Any]) -> str:
    """The table and the curve in results.json, for people."""
    head = ["system", "head", "pre-training", "input", "labels", "top-1", "95 %", "top-5", "time"]
    rows = []
    for each in results["rows"]:
        about = [each["system"], each["method"], each["pretraining"], each["pixels"]]
        if each["status"] == "not run":
            rows.append([*about, "", "not run", "", "", ""])
            continue
        low, high = each["ci95"]
        top5 = f"{each['top5']:.1%}" if "top5" in each else ""
        times = (each[k] for k in ("pretraining_seconds", "seconds") if k in each)
        took = ["?" if seconds is None else clock(seconds) for seconds in times]
        shown = [f"{each['top1']:.1%}", f"{low:.1%} - {high:.1%}", top5, " + ".join(took)]
        rows.append([*about, f"{each['labels']:,}", *shown])
    rows.append(["chance", "", "none", "", "0", f"{results['chance']:.1%}", "", "", ""])
    budgets = dict.fromkeys(str(each["per_class"]) for each in results["curve"])
    curve: dict[str, list[str]] = {}  # a row for each system
    for each in results["curve"]:
        curve.setdefault(each["system"], [each["system"]]).append(spread(each.get("top1", [])))
    warned = [
        f"- {each['system']}, {each['method']}: {each['warning']}"
        for each in results["rows"]
        if each.get("warning")
    ]
    texts = [table(head, rows), "\n".join(warned)]
    texts += [table(["labels per class", *budgets], list(curve.values()))] if curve else []
    return "\n\n".join(filter(None, texts))


def table(head: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown, where a | in a name must not end a cell."""
    lines = [head, ["---"] * len(head), *rows]
    escaped = ([cell.replace("|", r"\|") for cell in line] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in escaped)


def spread(values: list[float]) -> str:
    """Mean and standard deviation of accuracies; "not run" for none."""
    deviation = f" ± {np.std(values, ddof=1):.1%}" if len(values) > 1 else ""
    return f"{np.mean(values):.1%}{deviation}" if values else "not run"


def clock(seconds: float) -> str:
    """Seconds as people say them."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 90 else f"{round(seconds / 3600, 1)} h"
