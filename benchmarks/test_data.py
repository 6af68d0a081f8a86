"""How fast pictures become a cache and a cache becomes batches, beside Pillow and a plain memmap.

    pytest benchmarks/test_data.py --benchmark-sort=name

The build and the comparison with Pillow read the real photos named by MINISIMCLR_TEST_DATA.
"""

import io
import os
import tarfile
from itertools import count, islice
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from minisimclr.data import batches, cache_path, open_dataset

BATCH = 256


@pytest.fixture(scope="module")
def dogs(tmp_path_factory):
    """20,580 real photos of 80 px, and a cache folder of its own."""
    folder = os.environ.get("MINISIMCLR_TEST_DATA")
    if not folder:
        pytest.skip("MINISIMCLR_TEST_DATA is not set")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield Path(folder) / "stanford-dogs-80px"


def pillow_loop(archive: Path, limit: int | None = None) -> np.ndarray:
    """The bare loop: one thread, no checks, all pixels but the last picture's thrown away."""
    with tarfile.open(archive, "r|gz") as members:
        for member in islice(members, limit):
            image = Image.open(io.BytesIO(members.extractfile(member).read()))
            pixels = image.convert("RGB").resize((64, 64), Image.Resampling.BICUBIC).tobytes()
    return np.frombuffer(pixels, np.uint8).reshape(64, 64, 3)


@pytest.mark.benchmark(group="build, 20,580 photos")
def test_build(benchmark, dogs):
    def empty():
        cache_path(dogs, 64)[0].unlink(missing_ok=True)

    dataset = benchmark.pedantic(lambda: open_dataset(dogs, 64), setup=empty, rounds=3)
    assert [len(dataset.split(s)) for s in ("pretrain", "labelled", "test")] == [12000, 1716, 6864]
    dataset.verify()


@pytest.mark.benchmark(group="build, 20,580 photos")
def test_build_by_bare_pillow(benchmark, dogs):
    last = benchmark.pedantic(lambda: pillow_loop(dogs / "images.tar.gz"), rounds=3)
    np.testing.assert_array_equal(last, open_dataset(dogs, 64).images[-1])


@pytest.mark.benchmark(group="batch of 256")
def test_batch(benchmark, dogs):
    dataset = open_dataset(dogs, 64)
    source = batches(dataset.images, dataset.split("pretrain"), BATCH, seed=0)
    _, images, rows = benchmark(next, source)
    np.testing.assert_array_equal(images, dataset.images[rows])
    source.close()


@pytest.mark.benchmark(group="batch of 256")
def test_batch_by_memmap(benchmark, dogs):
    images = open_dataset(dogs, 64).images
    rng = np.random.default_rng(0)
    rows = rng.integers(0, len(images), (1000, BATCH))
    steps = count()
    batch = benchmark(lambda: np.asarray(images[rows[next(steps) % 1000]]))
    assert batch.shape == (BATCH, 64, 64, 3)


@pytest.mark.benchmark(group="batch of 256")
def test_batch_by_pillow(benchmark, dogs):
    last = benchmark.pedantic(lambda: pillow_loop(dogs / "images.tar.gz", BATCH), rounds=3)
    np.testing.assert_array_equal(last, open_dataset(dogs, 64).images[BATCH - 1])
