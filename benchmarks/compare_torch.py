"""Step times and memory of minisimclr and PyTorch, side by side.

    python benchmarks/compare_torch.py [--rounds 7] [--threads 2] [--case NAME ...]
    python benchmarks/compare_torch.py --device cuda [--json FILE]

One step is forward, NT-Xent, backward and SGD with momentum on views that are already made. Each
side runs in its own process, and the two take turns of three steps, so that whatever else the
machine does affects both. The first step of a turn is not counted: it finds caches full of the
other side's data and threads asleep, unlike any step of training but the first. The ratio (ours /
PyTorch's, lower is better) is that of the median times.
PyTorch runs float32 in channels_last. Memory is the peak resident set above that after import.

On a GPU steps are larger and timed by CUDA events, memory is what the allocator holds, and one
process follows the other, since two may not fit. There both also run with TF32 and bfloat16
(PyTorch by autocast), and PyTorch also compiled and as a CUDA graph; in each case cuDNN first tries
its algorithms. Ratios are to our step in the same precision.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import cycle
from pathlib import Path
from typing import Any

# name: encoder, stem, side of a view in px, images in a batch
CASES = {
    "resnet18-cifar": ("resnet18", "cifar", 32, 64),
    "resnet18-imagenet": ("resnet18", "imagenet", 64, 64),
    "resnet50-imagenet": ("resnet50", "imagenet", 96, 16),
    "default": ("resnet_small", "small", 32, 128),
}
GPU_CASES = {
    "resnet18-cifar": ("resnet18", "cifar", 32, 512),
    "resnet18-cifar-64": ("resnet18", "cifar", 32, 64),
    "resnet50-imagenet": ("resnet50", "imagenet", 224, 256),
}
SIDES = {  # on a GPU in this order, since time there may be short
    "cpu": ("ours", "torch"),
    "cuda": (
        "ours",
        "torch",
        "ours-bf16",
        "torch-bf16",
        "ours-tf32",
        "torch-tf32",
        "torch-compile-bf16",
        "torch-compile",
        "torch-graph",
    ),
}
TURN = 3  # steps before it is the other side's turn, on a CPU
LEAST, PATIENCE = 10, 20  # rounds on a GPU, and the seconds after which that many are enough
BATCHES = 3  # taken in turn on a GPU, so that none stays in its cache


def sizes(case: str, device: str) -> tuple[str, str, int, int]:
    return (CASES if device == "cpu" else GPU_CASES)[case]


class Clock:
    """Times steps; `events` makes a library's CUDA events."""

    def __init__(self, events=None):
        self.pair = events and (events(), events())

    def time(self, step) -> tuple[float, float]:
        """Seconds until a step has ended on the device, and those the host took to launch it."""
        if not self.pair:
            begin = time.perf_counter()
            step()
            return (taken := time.perf_counter() - begin), taken
        start, stop = self.pair
        start.record()
        begin = time.perf_counter()
        step()
        asked = time.perf_counter() - begin
        stop.record()
        stop.synchronize()
        if hasattr(start, "elapsed_time"):  # PyTorch's
            return start.elapsed_time(stop) / 1e3, asked
        import cupy

        return cupy.cuda.get_elapsed_time(start, stop) / 1e3, asked


def resident() -> int:
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def our_step(case: str, threads: int, device: str, kind: str):
    """A step, what times it, and the peak memory so far."""
    import numpy as np

    from minisimclr import backend, cores
    from minisimclr.ops.loss import nt_xent
    from minisimclr.optim import SGD
    from minisimclr.simclr import Model
    from minisimclr.tensor import Tensor

    cores.set_threads(threads)
    encoder, stem, size, n = sizes(case, device)
    before = resident()
    where = "cpu" if device == "cpu" else "cuda:0"
    model = Model.build(encoder, stem, 0, seed=0)
    model.to(where)
    optimizer = SGD(model.named_parameters(), 0.1, momentum=0.9, weight_decay=1e-4)
    rng, shape = np.random.default_rng(0), (2 * n, size, size, 3)
    count = 1 if device == "cpu" else BATCHES
    batches = cycle([backend.to_device(rng.random(shape, np.float32), where) for _ in range(count)])

    def step() -> None:
        with backend.precision(kind or "fp32", where):
            z = model.head(model.encoder(Tensor(next(batches))))
            nt_xent(z[:n], z[n:], 0.5).backward()
        optimizer.step()
        optimizer.zero_grad()

    if device == "cpu":
        return step, Clock(), lambda: resident() - before
    with backend.sized_by_first(where):
        step()
    return step, Clock(backend.cupy().cuda.Event), lambda: backend.peak_memory(where)


def torch_step(case: str, threads: int, device: str, kind: str):
    import torch
    import torch.nn.functional as F
    from torch import nn

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    encoder, stem, size, n = sizes(case, device)
    before = resident()

    def conv_norm(c: int, o: int, k: int, stride: int = 1, *more: nn.Module) -> nn.Sequential:
        conv = nn.Conv2d(c, o, k, stride, k // 2, bias=False)
        return nn.Sequential(conv, nn.BatchNorm2d(o), *more)

    class Block(nn.Module):
        def __init__(self, c: int, width: int, stride: int, deep: bool):
            super().__init__()
            relu, o = nn.ReLU(inplace=True), 4 * width if deep else width
            if deep:
                first, last = conv_norm(c, width, 1, 1, relu), conv_norm(width, o, 1)
                self.body = nn.Sequential(first, conv_norm(width, width, 3, stride, relu), last)
            else:
                self.body = nn.Sequential(conv_norm(c, o, 3, stride, relu), conv_norm(o, o, 3))
            same = stride == 1 and c == o
            self.shortcut = nn.Identity() if same else conv_norm(c, o, 1, stride)

        def forward(self, x):
            return F.relu(self.body(x) + self.shortcut(x), inplace=True)

    depths = {"resnet18": (2, 2, 2, 2), "resnet50": (3, 4, 6, 3), "resnet_small": (1, 1, 1)}
    deep, width = encoder == "resnet50", 32 if encoder == "resnet_small" else 64
    kernel, stride = {"cifar": (3, 1), "small": (3, 2), "imagenet": (7, 2)}[stem]
    layers = [conv_norm(3, width, kernel, stride, nn.ReLU(inplace=True))]
    if stem == "imagenet":
        layers.append(nn.MaxPool2d(3, 2, 1))
    c = width
    for i, depth in enumerate(depths[encoder]):
        for j in range(depth):
            layers.append(Block(c, width * 2**i, 2 if i and not j else 1, deep))
            c = width * 2**i * (4 if deep else 1)
    head = nn.Sequential(
        nn.Linear(c, c, bias=False),
        nn.BatchNorm1d(c),
        nn.ReLU(inplace=True),
        nn.Linear(c, 128, bias=False),
        last := nn.BatchNorm1d(128),
    )
    last.bias.requires_grad_(False)  # ours has no shift
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)
    model = model.to(device, memory_format=torch.channels_last)
    fused = device == "cuda" and kind != "graph"  # PyTorch's fastest
    options = {"fused": True} if fused else {"foreach": True}
    optimizer = torch.optim.SGD(model.parameters(), 0.1, 0.9, weight_decay=1e-4, **options)

    def batch():
        views = torch.rand(2 * n, 3, size, size, device=device)
        return views.contiguous(memory_format=torch.channels_last)

    partners = (torch.arange(2 * n, device=device) + n) % (2 * n)
    if device == "cuda":
        torch.backends.cudnn.benchmark = True
        torch.backends.cudnn.allow_tf32 = kind == "tf32"
        torch.backends.cuda.matmul.allow_tf32 = kind == "tf32"
    forward = torch.compile(model) if "compile" in kind else model

    def work(views) -> None:
        with torch.autocast(device, torch.bfloat16, enabled="bf16" in kind):
            z = forward(views)
        z = F.normalize(z.float())
        logits = (z @ z.T / 0.5).fill_diagonal_(float("-inf"))
        F.cross_entropy(logits, partners).backward()
        optimizer.step()

    batches = cycle([batch() for _ in range(1 if device == "cpu" else BATCHES)])

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        work(next(batches))

    if device == "cpu":
        return step, Clock(), lambda: resident() - before
    if kind == "graph":
        step = captured(torch, step, work, next(batches), batches, optimizer)
    events = lambda: torch.cuda.Event(enable_timing=True)  # noqa: E731
    step(), step()  # cuDNN tries its algorithms, some of which take much memory: not counted
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return step, Clock(events), torch.cuda.max_memory_reserved


def captured(torch, step, work, still, batches, optimizer):
    """The step as a CUDA graph, replayed on copies of the batches."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    optimizer.zero_grad(set_to_none=True)
    with torch.cuda.graph(graph):
        work(still)  # its gradients are new arrays, rewritten by every replay

    def replay() -> None:
        still.copy_(next(batches))
        graph.replay()

    return replay


def worker(side: str, case: str, threads: int, device: str) -> None:
    """Two steps to warm up; then a step for each line read, printed as "seconds, host's, bytes"."""
    library, _, kind = side.partition("-")
    make = our_step if library == "ours" else torch_step
    step, clock, memory = make(case, threads, device, kind)
    clock.time(step), clock.time(step)
    print("ready", flush=True)
    for _ in sys.stdin:
        print(*clock.time(step), memory(), flush=True)


def start(side: str, case: str, threads: int, device: str, errors: Any = None) -> subprocess.Popen:
    """A worker; its standard error goes to the file `errors`, or to ours."""
    command = [sys.executable, __file__, "--worker", side, case, "--threads", str(threads)]
    pipe = subprocess.PIPE
    command += ["--device", device]
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=errors, text=True)


def stop(process: subprocess.Popen) -> None:
    process.communicate()  # it ends when its input does


def ask(process: subprocess.Popen) -> tuple[float, float, float]:
    """Have a worker do a step: its seconds, those of the host, and the MiB held."""
    process.stdin.write("step\n")
    process.stdin.flush()
    taken, asked, held = process.stdout.readline().split()
    return float(taken), float(asked), int(held) / 2**20


def one_by_one(cases: list[str], rounds: int, threads: int, out: str | None) -> None:
    """All sides of all cases on a GPU, each in a process of its own; one that fails says so.

    The like-for-like sides come first, and rows are written as they come: a run may be cut short.
    """
    rows: list[dict] = []
    ours = {}
    for side in SIDES["cuda"]:
        for case in cases:
            row = {"case": case, "side": side} | alone(side, case, rounds, threads)
            if "seconds" in row:
                library, _, kind = side.partition("-")
                if library == "ours":
                    ours[case, kind] = row["seconds"]
                rounding = next((k for k in ("tf32", "bf16") if k in kind), "")
                if like := ours.get((case, rounding)):
                    row["ours_over_this"] = like / row["seconds"]
            rows.append(row)
            figures = " ".join(f"{k} {v:.4g}" for k, v in row.items() if isinstance(v, float))
            print(f"{case:18} {side:18} {row.get('failed', figures)}", flush=True)
            if out:
                part = Path(f"{out}.part")  # if killed here, no row is lost
                part.write_text(json.dumps(rows))
                part.replace(out)


def alone(side: str, case: str, rounds: int, threads: int) -> dict[str, Any]:
    """seconds, host_seconds, rounds and mib of one side on a GPU; or failed, with its last words.

    If host_seconds are about as many as seconds, the GPU has waited for the host.
    """
    with tempfile.TemporaryFile() as errors:
        process = start(side, case, threads, "cuda", errors)
        try:
            if process.stdout.readline() != "ready\n":
                raise RuntimeError("its process ended")
            answers, begin = [], time.monotonic()
            while len(answers) < rounds and (
                len(answers) < LEAST or time.monotonic() - begin < PATIENCE
            ):
                answers.append(ask(process))
            stop(process)
            taken, asked, (*_, held) = zip(*answers, strict=True)
            median = {"seconds": statistics.median(taken), "host_seconds": statistics.median(asked)}
            return median | {"rounds": len(answers), "mib": held}
        except (RuntimeError, ValueError, OSError) as error:
            process.kill()
            stop(process)
            errors.seek(0)
            said = errors.read()[-500:].decode(errors="replace")
            return {"failed": f"{str(error) or type(error).__name__}: {said}"}


def compare(case: str, rounds: int, threads: int) -> None:
    sides = {side: start(side, case, threads, "cpu") for side in SIDES["cpu"]}
    for process in sides.values():
        assert process.stdout.readline() == "ready\n", "a worker did not start: see above"
    seconds, peak = {side: [] for side in sides}, {}
    for _ in range(rounds):
        for side, process in sides.items():
            ask(process)
            for _ in range(TURN - 1):
                taken, _, peak[side] = ask(process)
                seconds[side].append(taken)
    for process in sides.values():
        stop(process)
    ours, torchs = (statistics.median(seconds[side]) for side in sides)
    pairs = sorted(a / b for a, b in zip(*seconds.values(), strict=True))
    print(
        f"{case:18} {ours * 1e3:9.0f} {torchs * 1e3:9.0f} {ours / torchs:7.2f}"
        f"   {pairs[0]:.2f}-{pairs[-1]:.2f} {peak['ours']:9.0f} {peak['torch']:9.0f}"
        f" {peak['ours'] / peak['torch']:7.2f}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rounds", type=int, help="default: 7, on a GPU 50")
    parser.add_argument("--threads", type=int, help="default: all")
    parser.add_argument("--device", choices=SIDES, default="cpu")
    parser.add_argument("--json", help="file for the rows of a GPU")
    parser.add_argument("--case", nargs="*", metavar="NAME")
    parser.add_argument("--worker", nargs=2, metavar=("SIDE", "CASE"), help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.worker:  # before our library is imported: PyTorch's side needs none of it
        return worker(*a.worker, a.threads, a.device)
    from minisimclr.cores import available_cores

    a.threads = a.threads or available_cores()
    known = CASES if a.device == "cpu" else GPU_CASES
    if unknown := set(a.case or ()) - known.keys():
        parser.error(f"no case {', '.join(unknown)} on {a.device}: use {', '.join(known)}")
    if a.device == "cuda":
        return one_by_one(a.case or list(known), a.rounds or 50, a.threads, a.json)
    a.rounds = a.rounds or 7
    print(f"{a.threads} threads, {a.rounds} rounds, load before {os.getloadavg()[0]:.1f}")
    print("                        ms/step           ratio   (range)      MiB peak        ratio")
    print("                     ours     torch                        ours     torch")
    for case in a.case or known:
        compare(case, a.rounds, a.threads)


if __name__ == "__main__":
    main()
