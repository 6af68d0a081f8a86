"""Step times and memory of minisimclr and PyTorch, side by side.

    python benchmarks/compare_torch.py [--rounds 7] [--threads 2] [--case NAME ...]

One step is forward, NT-Xent, backward and SGD with momentum on views that are already there. Each
side runs in a process of its own, and the two take turns step by step, so that whatever else the
machine does meets both; the ratio (ours / PyTorch's, lower is better) is that of the median times.
PyTorch runs float32 in channels_last. Memory is the peak resident set above that after import.
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import time

# name: encoder, stem, side of a view in px, images in a batch
CASES = {
    "resnet18-cifar": ("resnet18", "cifar", 32, 64),
    "resnet18-imagenet": ("resnet18", "imagenet", 64, 64),
    "resnet50-imagenet": ("resnet50", "imagenet", 96, 16),
    "default": ("resnet_small", "small", 32, 128),
}


def our_step(case: str, threads: int):
    import numpy as np

    from minisimclr import backend
    from minisimclr.ops.loss import nt_xent
    from minisimclr.optim import SGD
    from minisimclr.simclr import Model
    from minisimclr.tensor import Tensor

    backend.set_threads(threads)
    encoder, stem, size, n = CASES[case]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    model = Model.build(encoder, stem, 0, seed=0)
    optimizer = SGD(model.named_parameters(), 0.1, momentum=0.9, weight_decay=1e-4)
    views = np.random.default_rng(0).random((2 * n, size, size, 3), np.float32)

    def step() -> None:
        optimizer.zero_grad()
        z = model.head(model.encoder(Tensor(views)))
        nt_xent(z[:n], z[n:], 0.5).backward()
        optimizer.step()

    return step, before


def torch_step(case: str, threads: int):
    import torch
    import torch.nn.functional as F
    from torch import nn

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    encoder, stem, size, n = CASES[case]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

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
        nn.BatchNorm1d(128),
    )
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)
    model = model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, 0.9, weight_decay=1e-4, foreach=True)
    views = torch.rand(2 * n, 3, size, size).contiguous(memory_format=torch.channels_last)
    partners = (torch.arange(2 * n) + n) % (2 * n)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        z = F.normalize(model(views))
        logits = (z @ z.T / 0.5).fill_diagonal_(float("-inf"))
        F.cross_entropy(logits, partners).backward()
        optimizer.step()

    return step, before


def worker(side: str, case: str, threads: int) -> None:
    """Two steps to warm up; then one step, and a line "seconds bytes", for every line read."""
    step, before = (our_step if side == "ours" else torch_step)(case, threads)
    step(), step()
    print("ready", flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        step()
        seconds = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        print(seconds, peak * 1024, flush=True)


def compare(case: str, rounds: int, threads: int) -> None:
    sides = {}
    for side in ("ours", "torch"):
        command = [sys.executable, __file__, "--worker", side, case, "--threads", str(threads)]
        pipe = subprocess.PIPE
        sides[side] = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)
    for process in sides.values():
        assert process.stdout.readline() == "ready\n", "a worker did not start: see above"
    seconds, peak = {side: [] for side in sides}, {}
    for _ in range(rounds):
        for side, process in sides.items():
            process.stdin.write("step\n")
            process.stdin.flush()
            taken, held = process.stdout.readline().split()
            seconds[side].append(float(taken))
            peak[side] = int(held) / 2**20
    for process in sides.values():
        process.stdin.close()
        process.wait()
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
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--case", choices=CASES, nargs="*", default=list(CASES))
    parser.add_argument("--worker", nargs=2, metavar=("SIDE", "CASE"), help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.worker:
        return worker(*a.worker, a.threads)
    print(f"{a.threads} threads, {a.rounds} rounds, load before {os.getloadavg()[0]:.1f}")
    print("                        ms/step           ratio   (range)      MiB peak        ratio")
    print("                     ours     torch                        ours     torch")
    for case in a.case:
        compare(case, a.rounds, a.threads)


if __name__ == "__main__":
    main()
