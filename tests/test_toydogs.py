"""Toydogs: pure functions of the number, breeds that differ; muted backgrounds."""

from itertools import combinations

import numpy as np
import pytest

from minisimclr.data import toydogs
from minisimclr.data.toydogs import CLASS_NAMES, IMAGE_SIZE, SPLIT_SIZES, draw, label

# Mean red, green and blue of the first image of each breed. After a change that this does not
# allow, raise VERSION and take the new values.
MEANS = [
    [167, 164, 140], [102, 120, 107], [174, 158, 160], [104, 93, 79], [81, 87, 88],
    [176, 177, 164], [148, 148, 141], [137, 125, 121], [137, 111, 103], [147, 145, 131],
    [145, 126, 125], [151, 144, 123],
]  # fmt: skip


def test_pictures_are_pinned():
    means = [draw(i, IMAGE_SIZE).mean(axis=(0, 1)) for i in range(len(CLASS_NAMES))]
    np.testing.assert_allclose(means, MEANS, atol=1.5)  # Pillow's own rounding may change


def test_a_number_is_a_picture():
    first = draw(17, 40)
    np.random.seed(0)  # noqa: NPY002 (state elsewhere must not matter)
    draw(18, 24)
    assert first.shape == (40, 40, 3) and first.dtype == np.uint8
    np.testing.assert_array_equal(first, draw(17, 40))
    assert len({draw(i, 16).tobytes() for i in range(200)}) == 200


@pytest.mark.parametrize("index", [0, 5, 4321])
def test_a_picture_is_the_same_at_any_size(index):
    large = draw(index, 120).astype(float).reshape(40, 3, 40, 3, 3).mean(axis=(1, 3))
    assert np.abs(large - draw(index, 40)).mean() < 3


def test_splits_are_balanced():
    assert list(SPLIT_SIZES) == ["pretrain", "labelled", "test"]
    assert len(set(CLASS_NAMES)) == len(CLASS_NAMES) == 12
    start = 0
    for size in SPLIT_SIZES.values():
        counts = np.bincount([label(i) for i in range(start, start + size)], minlength=12)
        assert counts.max() - counts.min() <= 1
        start += size


def test_breeds_differ_in_one_pose(monkeypatch):
    """The same number drawn as each breed in turn: no two alike."""
    for index in (0, 1, 2):
        drawn = []
        for breed in range(len(CLASS_NAMES)):
            monkeypatch.setattr(toydogs, "label", lambda _, breed=breed: breed)
            drawn.append(draw(index, 40).astype(float))
        assert min(np.abs(a - b).mean() for a, b in combinations(drawn, 2)) > 2


def test_backgrounds_are_muted():
    corners = np.stack([draw(i, 16)[0, [0, -1]] for i in range(120)]).astype(float)
    assert (corners.max(axis=-1) - corners.min(axis=-1)).mean() < 35


def test_neighbouring_pixels_do_not_name_the_breed():
    """Nearest neighbour among 400 labelled pictures: above chance (8 %), far from right."""
    numbers = range(SPLIT_SIZES["pretrain"], SPLIT_SIZES["pretrain"] + 800)
    x = np.stack([draw(i, 20) for i in numbers]).reshape(800, -1).astype(np.float32)
    y = np.array([label(i) for i in numbers])
    known, asked = x[:400], x[400:]
    distances = (known**2).sum(axis=1) - 2 * asked @ known.T  # (400, 400), up to a constant a row
    assert 0.12 < (y[distances.argmin(axis=1)] == y[400:]).mean() < 0.45
