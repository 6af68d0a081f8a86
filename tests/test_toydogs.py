"""Toydogs: pure functions of the number, breeds that differ; muted backgrounds."""

from itertools import combinations

import numpy as np
import pytest

from minisimclr.data import toydogs
from minisimclr.data.toydogs import CLASS_NAMES, IMAGE_SIZE, SPLIT_SIZES, draw, label

# Six random sums and differences of the pixels of the first image of each breed, over the square
# root of their number. After a change that this does not allow, raise VERSION and take the new
# values. Pillow 10.0 to 13.0 draw the very same; rounding elsewhere may move a corner.
PINNED = [
    [-171.6, -82.6, -119.0, -184.3, -185.2, -227.6], [-91.3, 34.8, -45.3, -90.7, -83.8, -137.0],
    [-237.4, -103.9, -178.3, -114.5, -204.8, -159.9],
    [-110.3, -33.1, -85.4, -30.3, -83.3, -131.1], [-138.1, -20.8, -94.2, 5.3, -105.6, -75.1],
    [-230.3, -108.1, -132.8, -94.8, -165.1, -119.1],
    [-210.5, -53.0, -93.7, -72.9, -132.2, -187.8], [-183.3, -42.9, -94.5, -75.5, -141.2, -130.9],
    [-116.6, -99.1, -54.0, -14.4, -129.1, -150.4],
    [-262.4, -121.0, -45.0, -104.0, -116.0, -107.8],
    [-237.0, -82.8, -65.0, -117.5, -104.8, -99.0], [-161.8, -120.7, -91.6, -86.1, -160.9, -64.1],
]  # fmt: skip


def test_pictures_are_pinned():
    signs = np.random.Philox(key=0).random_raw(IMAGE_SIZE**2 * 3 * 6) % 2 * 2.0 - 1
    pixels = np.stack([draw(i, IMAGE_SIZE) for i in range(len(CLASS_NAMES))]).reshape(12, -1)
    found = pixels @ signs.reshape(-1, 6) / pixels.shape[1] ** 0.5
    np.testing.assert_allclose(found, PINNED, atol=0.4)


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
