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
                        raise ValueError(f"of {each.get('system')}")
                    done.setdefault(each["key"], []).append(each)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise DataError(f"{path}: not results of `minisimclr compare` ({error!r})") from error
    return done


def markdown(results: dict[str, Any]) -> str:
    """The table and the curve in results.json, for people."""
    columns = ["system", "head", "pre-training", "input", "labels"]
    columns += ["top-1", "95 %", "top-5", "time"]
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
    lines.append(["chance", "", "none", "", "0", f"{results['chance']:.1%}", "", "", ""])
    systems = dict.fromkeys(each["system"] for each in results["curve"])
    budgets = dict.fromkeys(str(each["per_class"]) for each in results["curve"])
    curve = [["labels per class", *budgets], ["---"] * (1 + len(budgets))]
    for system in systems:
        points = [each for each in results["curve"] if each["system"] == system]
        curve.append([system, *(spread(each.get("top1", [])) for each in points)])
    warned = [
        f"- {each['system']}, {each['method']}: {each['warning']}"
        for each in results["rows"]
        if each.get("warning")
    ]
    texts = ["\n".join(map(table_line, table)) for table in (lines, curve)]
    texts = [texts[0], "\n".join(warned), texts[1] if systems else ""]
    return "\n\n".join(filter(None, texts))


def table_line(cells: list[str]) -> str:
    """Cells of a table in Markdown, where a | in a name must not end one."""
    return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"


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
