"""Batches: their order is a pure function of seed and step; ranks share it; fetched ahead."""

import threading
import time
import tracemalloc
from itertools import islice

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minisimclr.data import batches, loader
from minisimclr.data.loader import permutation
from minisimclr.errors import ConfigError

IMAGES = np.arange(50, dtype=np.uint8).repeat(12).reshape(50, 2, 2, 3).view(np.memmap)
INDICES = np.arange(3, 48)  # 45 of the 50


def take(n, **options):
    options = {"batch_size": 10, "seed": 1} | options
    return list(islice(batches(IMAGES, INDICES, **options), n))


def test_batches_hold_the_images_they_name():
    for step, (number, images, rows) in enumerate(take(6)):
        assert number == step
        np.testing.assert_array_equal(images, IMAGES[rows])
        assert images.dtype == np.uint8 and type(images) is np.ndarray


def test_indices_may_be_a_list():
    _, images, _ = next(batches(IMAGES, INDICES.tolist(), 10, seed=1))
    np.testing.assert_array_equal(images, take(1)[0][1])


def test_an_epoch_sees_each_image_once_and_drops_the_short_batch():
    rows = [rows for _, _, rows in take(8)]
    for epoch in (rows[:4], rows[4:]):
        seen = np.concatenate(epoch)
        assert len(set(seen)) == 40 and set(seen) <= set(INDICES)
    assert np.concatenate(rows[:4]).tolist() != np.concatenate(rows[4:]).tolist()


@given(st.integers(0, 30), st.integers(0, 2**63), st.integers(1, 45))
def test_resuming_at_any_step(start, seed, batch_size):
    whole = take(start + 2, seed=seed, batch_size=batch_size)
    for (a, _, b), (c, _, d) in zip(
        whole[start:], take(2, seed=seed, batch_size=batch_size, start_step=start), strict=True
    ):
        assert a == c
        np.testing.assert_array_equal(b, d)


@pytest.mark.parametrize("world_size", [2, 5])
def test_ranks_share_what_one_process_sees(world_size):
    ranks = [take(6, rank=r, world_size=world_size) for r in range(world_size)]
    for step, (_, images, rows) in enumerate(take(6)):
        parts = [rank[step] for rank in ranks]
        np.testing.assert_array_equal(np.concatenate([p[1] for p in parts]), images)
        np.testing.assert_array_equal(np.concatenate([p[2] for p in parts]), rows)


def test_seeds_differ_and_order_is_fixed_for_ever():
    assert permutation(0, 0, 8).tolist() == [0, 2, 1, 5, 4, 3, 6, 7]
    assert permutation(0, 1, 8).tolist() == [1, 2, 3, 5, 0, 4, 7, 6]
    assert (
        len({tuple(permutation(seed, epoch, 8)) for seed in range(5) for epoch in range(5)}) == 25
    )


def test_the_first_epoch_is_number_0():
    given = islice(batches(IMAGES, np.arange(8), 4, seed=5), 4)
    rows = np.concatenate([rows for _, _, rows in given])
    assert rows.tolist() == [*permutation(5, 0, 8), *permutation(5, 1, 8)]


def test_epochs_do_not_share_numbers():
    """Philox counts up as it draws: epochs too close together would be shifts of each other."""
    first, second = permutation(0, 0, 40), permutation(0, 1, 40)
    assert (first[first >= 4] - 4).tolist() != second[second < 36].tolist()


def test_permutations_are_uniform():
    counts = np.zeros((4, 4))
    for epoch in range(4000):
        counts[np.arange(4), permutation(3, epoch, 4)] += 1
    assert np.abs(counts - 1000).max() < 140  # 5 standard deviations


@pytest.mark.parametrize(
    "options",
    [
        {"batch_size": 46},
        {"batch_size": 0},
        {"batch_size": -1},
        {"world_size": 3},
        {"world_size": 0},
        {"world_size": 2, "rank": 2},
        {"world_size": 2, "rank": -1},
    ],
)
def test_impossible_batches_are_refused_at_once(options):
    with pytest.raises(ConfigError, match="batch size"):
        batches(IMAGES, INDICES, **({"batch_size": 10, "seed": 1} | options))


def test_the_order_of_an_epoch_is_drawn_once_and_not_kept(monkeypatch):
    drawn, kept, images = [], [], np.zeros((30_000, 1, 1, 3), np.uint8)
    once = loader.permutation
    monkeypatch.setattr(loader, "permutation", lambda *a: drawn.append(a[1]) or once(*a))
    tracemalloc.start()
    try:
        for step, *_ in batches(images, np.arange(30_000), 3_000, seed=1):
            kept.append(tracemalloc.get_traced_memory()[0])
            if step == 120:
                break
    finally:
        tracemalloc.stop()
    assert len(drawn) <= 2 * 13  # perhaps by both threads
    assert kept[-1] < kept[20] + 5 * 240_000  # bytes of an order


def test_fetched_ahead_and_no_further():
    fetched = []

    class Slow:
        def take(self, rows, axis):
            fetched.append(threading.current_thread())
            return IMAGES.take(rows, axis)

    source = batches(Slow(), INDICES, 10, seed=1)
    next(source)
    deadline = time.monotonic() + 5
    while len(fetched) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert len(fetched) == 3  # the one asked for and two ahead
    assert all(thread.name.startswith("loader") for thread in fetched)
    source.close()
    assert not any(thread.is_alive() for thread in fetched)


def test_errors_of_the_thread_are_raised_here():
    with pytest.raises(IndexError):
        list(islice(batches(IMAGES[:9], INDICES, 10, seed=1), 1))


def test_a_mask_is_no_list_of_images():
    with pytest.raises(ConfigError, match="numbers of images, and not bool"):
        next(batches(IMAGES, np.ones(len(IMAGES), bool), 10, seed=1))
