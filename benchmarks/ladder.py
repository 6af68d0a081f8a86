"""From the readable passes to the fast ones, rung by rung: what each is worth in a training step.

    python benchmarks/ladder.py [--threads 1] [--rounds 5]

Every rung keeps those below it. All run in one process and take turns, so that whatever else the
machine does affects all. With one thread, process time is measured, which counts our work alone.
"""

import argparse
import statistics
import time

import numpy as np
from compare_torch import CASES, our_step

from minisimclr import optim, tensor
from minisimclr.kernels import winograd
from minisimclr.ops import conv, norm, pool

GRADIENTS = (conv.conv_input_gradient, conv.conv_weight_gradient, conv.conv_gradients)
NORM = (norm.moments, norm.scale_shift, norm.gradient_sums, norm.input_gradient)
RUNGS = {  # name: passes that become fast; Winograd is switched by its choice of tiles
    "readable passes": (),
    "+ im2col: one copy of pieces, blocks in cache": (conv.conv_output, *GRADIENTS),
    "+ Winograd for 3x3 of stride 1": (winograd.tile,),
    "+ batch norm and ReLU in cache": NORM,
    "+ max pooling, optimizer, sums of gradients": (
        pool.max_pool_output,
        pool.max_pool_input_gradient,
        optim.momentum_update,
        tensor.added,
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--case", choices=CASES, default="resnet18-cifar")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    a = parser.parse_args()
    clock = time.process_time if a.threads == 1 else time.perf_counter
    step, *_ = our_step(a.case, a.threads, "cpu", "")
    tile = winograd.tile
    passes = [f for rung in RUNGS.values() for f in rung if f is not tile]
    fast = {f: f.dispatch(np.ndarray) for f in passes}
    seconds: dict[str, list[float]] = {rung: [] for rung in RUNGS}
    for _ in range(a.rounds):
        on: set = set()
        for rung, new in RUNGS.items():
            on.update(new)
            for f in passes:
                f.register(np.ndarray)(fast[f] if f in on else f.dispatch(object))
            winograd.tile = tile if tile in on else lambda *_: 0
            start = clock()
            step()
            seconds[rung].append(clock() - start)
    first = before = statistics.median(seconds["readable passes"])
    print(f"{a.case}, {a.threads} thread(s), median of {a.rounds} rounds")
    for rung, times in seconds.items():
        now = statistics.median(times)
        print(f"{rung:48} {now:7.2f} s  {before / now:5.2f}x  {first / now:5.2f}x in all")
        before = now


if __name__ == "__main__":
    main()
