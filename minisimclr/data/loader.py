"""Shuffled batches of pictures, fetched ahead by threads.

The order is a pure function of (seed, step): a run can resume at any step. In loops of one's own
on several processes, `world_size` of them together see what one would see.
"""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import count

import numpy as np

from ..errors import ConfigError
from .source import permutation

AHEAD = 2  # batches fetched before they are asked for

# step, uint8 (n, S, S, 3), int64 (n,): where in the data set the pictures are
Batch = tuple[int, np.ndarray, np.ndarray]


def batches(
    images: np.ndarray, indices: np.ndarray, batch_size: int, seed: int, start_step: int = 0,
    rank: int = 0, world_size: int = 1,
) -> Iterator[Batch]:  # fmt: skip
    """Endless batches of images[indices] from step `start_step` on; each epoch is shuffled anew.

    `batch_size` is that of all processes; this one gets the n = batch_size / world_size pictures of
    its rank. An epoch is len(indices) // batch_size steps; the rest, too few for a batch, sit out.
    The time that next() takes is the time spent waiting for data. Raises ConfigError.
    """
    indices = np.asarray(indices)
    if indices.dtype.kind not in "iu":
        raise ConfigError(f"indices are the numbers of images, and not {indices.dtype}")
    steps = len(indices) // batch_size if batch_size > 0 else 0
    if not steps:
        raise ConfigError(f"batch size is {batch_size}, but the split has {len(indices)} images")
    if not 0 <= rank < world_size or batch_size % world_size:
        raise ConfigError(f"batch size {batch_size} has no share for rank {rank} of {world_size}")
    n = batch_size // world_size

    @lru_cache(maxsize=1)
    def shuffled(epoch: int) -> np.ndarray:
        return indices[permutation(seed, epoch, len(indices))]

    def fetch(step: int) -> Batch:
        epoch, position = divmod(step, steps)
        chosen = shuffled(epoch)[position * batch_size :][rank * n : (rank + 1) * n]
        # `take` is a little faster than images[chosen].
        return step, np.asarray(images.take(chosen, axis=0)), chosen

    return prefetch(fetch, start_step)


def prefetch(fetch, step: int) -> Iterator[Batch]:
    """fetch(step), fetch(step + 1), ..., AHEAD of them computed before they are asked for."""
    with ThreadPoolExecutor(AHEAD, "loader") as pool:
        waiting = deque(pool.submit(fetch, step + i) for i in range(AHEAD))
        for following in count(step + AHEAD):
            batch = waiting.popleft().result()
            waiting.append(pool.submit(fetch, following))
            yield batch
