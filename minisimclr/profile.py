"""Where a training step spends its time: every operation of the engine, forward and backward.

The step is first timed without observation; then, in a separate pass, an observer on the engine
times each operation and counts the least it must do: floating-point operations, and bytes of its
inputs and outputs. With the machine's own peak rates (a large matrix product, a long addition),
these give each operation a least time (the "roofline" of Williams et al. 2009),

    seconds >= max(flops / peak flops, bytes / peak bandwidth)

and the share of the roofline that it reached.
"""

import json
import time
from collections.abc import Callable
from functools import partial
from math import prod
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from . import tensor
from .backend import choose_device, peak_memory, sized_by_first, synchronize, to_device, xp_of
from .config import first_layers
from .cores import parallel, set_threads, threaded_blas, threads
from .errors import ConfigError
from .files import write_bytes
from .ops.conv import Conv2d
from .ops.loss import NTXent, nt_xent
from .ops.product import Linear
from .optim import SGD
from .simclr import Model
from .tensor import Function, Tensor, memory_of

MOST = 16  # operations in the table
WARMUP, BATCHES = 2, 3  # untimed steps; input batches taken in turn, so that none stays in cache


def profile(
    encoder: str = "resnet18", stem: str = "auto", width: int = 0, image_size: int = 32,
    batch_size: int = 64, steps: int = 5, device: str = "auto", thread_count: int = 0,
    notify: Callable[[str, dict], Any] = lambda event, values: None,
) -> dict[str, Any]:  # fmt: skip
    """Time `steps` training steps without augmentation, then one more operation by operation.

    The step: encoder, head (D-D-128), NT-Xent, backward, SGD with momentum, on 2 * batch_size
    views. Returns step_seconds (median), views_per_second, peak_bytes (resident set; on a GPU its
    pool), roofline, ops (rows of name, direction, calls, seconds, flops, bytes), and events for a
    trace. `notify` hears of progress. Raises ConfigError.
    """
    given = {"steps": (steps, 1), "batch_size": (batch_size, 2), "image_size": (image_size, 8)}
    given["width"] = width, 0
    for name, (value, least) in given.items():
        if value < least:
            raise ConfigError(f"{name} must be at least {least}, not {value}")
    set_threads(thread_count)
    device, _ = choose_device(device)
    stem = first_layers(stem, encoder, image_size)
    model = Model.build(encoder, stem, width, seed=0).to(device)
    optimizer = SGD(model.named_parameters(), 0.1, weight_decay=1e-4)
    rng = np.random.default_rng(0)
    shape = (2 * batch_size, image_size, image_size, 3)
    views = [to_device(rng.random(shape, np.float32), device) for _ in range(BATCHES)]

    def step(i: int) -> None:
        z = model.head(model.encoder(Tensor(views[i % BATCHES])))
        nt_xent(z[:batch_size], z[batch_size:]).backward()
        optimizer.step()
        optimizer.zero_grad()

    def tell(done: int) -> None:
        notify("progress", {"done": done, "total": WARMUP + steps + 1, "label": "profiling"})

    seconds = []
    with sized_by_first(device):
        for i in range(WARMUP):
            step(i)
            tell(i + 1)
    for i in range(steps):
        seconds.append(timed(partial(step, i), device))
        tell(WARMUP + i + 1)
    peak = peak_memory(device)
    recorder = Recorder(device)
    recorder.record(partial(step, 0))
    tell(WARMUP + steps + 1)
    return {
        "encoder": encoder, "stem": stem, "image_size": image_size, "batch_size": batch_size,
        "device": device, "threads": threads(),
        "step_seconds": median(seconds), "views_per_second": 2 * batch_size / median(seconds),
        "peak_bytes": peak, "roofline": roofline(device), "ops": recorder.rows(),
        "events": recorder.events,
    }  # fmt: skip


def timed(run: Callable[[], Any], device: str) -> float:
    """Seconds that `run` takes, until the device has done what it asks."""
    synchronize(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - start


def roofline(device: str, n: int = 2048, length: int = 1 << 25) -> dict[str, float]:
    """This machine's measured peaks: matrix product n^3 (flop/s), a vector plus itself (byte/s)."""
    xp = xp_of(to_device(np.zeros(1, np.float32), device))
    a, b = xp.ones((n, n), xp.float32), xp.ones(length, xp.float32)
    c, total = xp.empty_like(a), xp.empty_like(b)

    def add(start: int, stop: int) -> None:
        xp.add(b[start:stop], b[start:stop], out=total[start:stop])

    whole = partial(parallel, add, length) if xp is np else partial(add, 0, length)
    with threaded_blas():
        product = min(timed(lambda: xp.matmul(a, a, out=c), device) for _ in range(5))
    addition = min(timed(whole, device) for _ in range(5))
    return {"flops_per_second": 2 * n**3 / product, "bytes_per_second": 2 * b.nbytes / addition}


class Recorder:
    """Observes the engine and notes each operation: what, when, how long, how much work."""

    def __init__(self, device: str):
        self.device = device
        self.events: list[dict[str, Any]] = []

    def record(self, run: Callable[[], Any]) -> None:
        """Call `run` with the observer in place."""
        self.start = time.perf_counter()
        tensor.observer = self.observe
        try:
            run()
        finally:
            tensor.observer = None

    def observe(self, function: Function, direction: str, run: Callable, arrays: tuple) -> Any:
        """Run one operation and note it; returns what it returned (see tensor.observer)."""
        name, read = describe(function, direction, arrays), sum(a.nbytes for a in arrays)
        if direction == "backward" and getattr(function, "source", None):  # which has its input
            read += prod(function.shapes[0]) * arrays[0].itemsize
        synchronize(self.device)
        start = time.perf_counter()
        result = run(*arrays)
        synchronize(self.device)
        seconds = time.perf_counter() - start
        results = result if isinstance(result, tuple) else (result,)
        made = [r for r in results if r is not None and 0 not in r.strides]  # one number, repeated
        saved = vars(function).values() if direction == "backward" else ()  # it reads these, too
        moved = read + sum(getattr(a, "nbytes", 0) for a in (*made, *saved))
        only_seen = {*map(memory_of, made)} <= {*map(memory_of, arrays)}  # its input, as a view
        self.events.append({
            "name": name, "direction": direction, "start": start - self.start, "seconds": seconds,
            "flops": 0 if only_seen else flops(function, direction, arrays, made),
            "bytes": 0 if only_seen else moved,
        })  # fmt: skip
        return result

    def rows(self) -> list[dict[str, Any]]:
        """Events summed by name and direction, the slowest first."""
        table: dict[tuple[str, str], dict[str, Any]] = {}
        for event in self.events:
            key = event["name"], event["direction"]
            new = dict.fromkeys(("calls", "seconds", "flops", "bytes"), 0)
            row = table.setdefault(key, {"name": key[0], "direction": key[1], **new})
            row["calls"] += 1
            for figure in ("seconds", "flops", "bytes"):
                row[figure] += event[figure]
        return sorted(table.values(), key=lambda row: -row["seconds"])


def describe(function: Function, direction: str, arrays: tuple) -> str:
    """Class name, and for a convolution its kernel, stride and channels."""
    if not isinstance(function, Conv2d):
        return type(function).__name__
    kh, kw, c, o = (arrays[1] if direction == "forward" else function.w).shape
    return f"Conv2d {kh}x{kw}/{function.stride[0]} {c}>{o}"


def flops(function: Function, direction: str, arrays: tuple, made: list) -> int:
    """Multiplications and additions of the plain algorithm; elsewhere, one per number made.

    A fast convolution (Winograd) needs fewer: its rate may exceed the roofline.
    """
    if isinstance(function, (Conv2d, Linear)):
        w = arrays[1] if direction == "forward" else function.w
        inner = w[..., 0].size if isinstance(function, Conv2d) else w.shape[1]  # terms of one sum
        if direction == "forward":
            return 2 * made[0].size * inner
        return 2 * arrays[0].size * inner * sum(function.needs[:2])  # as many for each gradient
    if isinstance(function, NTXent):
        views, d = (arrays[0] if direction == "forward" else made[0]).shape
        return 2 * views * views * d
    return sum(m.size for m in made)


def table(result: dict[str, Any]) -> str:
    """The hot spots as text."""
    roof = result["roofline"]
    step = sum(row["seconds"] for row in result["ops"])
    lines = [
        f"{'operation':<26}{'':>9}{'calls':>6}{'ms':>9}{'share':>7}{'GFLOP':>8}{'MB':>8}"
        f"{'GF/s':>8}{'GB/s':>7}{'of roof':>9}"
    ]
    for row in result["ops"][:MOST]:
        s, work, moved = row["seconds"], row["flops"], row["bytes"]
        floor = max(work / roof["flops_per_second"], moved / roof["bytes_per_second"])
        lines.append(
            f"{row['name']:<26}{row['direction']:>9}{row['calls']:>6}{s * 1e3:>9.2f}"
            f"{s / step:>7.1%}{work / 1e9:>8.2f}{moved / 1e6:>8.1f}{work / s / 1e9:>8.1f}"
            f"{moved / s / 1e9:>7.1f}{floor / s:>9.0%}"
        )
    if rest := result["ops"][MOST:]:
        s = sum(row["seconds"] for row in rest)
        lines.append(f"{f'{len(rest)} more':<26}{'':>15}{s * 1e3:>9.2f}{s / step:>7.1%}")
    lines.append(
        f"step {result['step_seconds'] * 1e3:.1f} ms, {result['views_per_second']:,.0f} views/s, "
        f"peak {result['peak_bytes'] / 1e6:,.0f} MB on {result['device']}, "
        f"threads: {result['threads']}; roof {roof['flops_per_second'] / 1e9:.0f} GF/s, "
        f"{roof['bytes_per_second'] / 1e9:.1f} GB/s"
    )
    return "\n".join(lines)


def write_trace(result: dict[str, Any], path: Path) -> None:
    """Events in Chrome's trace format, for ui.perfetto.dev or chrome://tracing. Raises OSError."""
    events = [
        {"name": e["name"], "cat": e["direction"], "ph": "X", "pid": 1, "tid": 1,
         "ts": e["start"] * 1e6, "dur": e["seconds"] * 1e6,
         "args": {"flops": e["flops"], "bytes": e["bytes"]}}
        for e in result["events"]
    ]  # fmt: skip
    write_bytes(path, json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}).encode())
