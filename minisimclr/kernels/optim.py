"""The optimizer's update, in blocks that stay in cache, and sums of gradients, for NumPy, on all
threads.
"""

import numpy as np

from ..cores import parallel
from ..optim import momentum_update
from ..tensor import added
from .registry import SMALL, blocks, for_float32

BLOCK = 1 << 15  # numbers: 128 KiB of each of four arrays


@for_float32(momentum_update)
def _momentum_update(w, g, v, lr, momentum, decay):
    if not (w.flags.c_contiguous and v.flags.c_contiguous):  # no flat view to write through
        return momentum_update.dispatch(object)(w, g, v, lr, momentum, decay)
    w, g, v = w.reshape(-1), g.reshape(-1), v.reshape(-1)
    rate, momentum, decay = (np.float32(float(x)) for x in (lr, momentum, decay))  # None: TypeError

    def work(start: int, stop: int) -> None:
        buffer = np.empty(BLOCK, w.dtype)
        for block in blocks(start, stop, BLOCK):
            some_w, some_v = w[block], v[block]
            change = np.multiply(some_w, decay, out=buffer[: len(some_w)])
            change += g[block]
            change *= rate
            some_v *= momentum
            some_v += change
            some_w -= some_v

    parallel(work, len(w), BLOCK)


@for_float32(added)
def _added(a, b):
    if a.size < SMALL:
        return a + b
    total = np.empty(a.shape, a.dtype)
    parallel(lambda i, k: np.add(a[i:k], b[i:k], out=total[i:k]), len(a))
    return total
