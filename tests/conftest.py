"""Fixtures that several tests share: their own cache, and a small folder of pictures."""

import os
from pathlib import Path

import hypothesis
import numpy as np
import pytest
from PIL import Image

hypothesis.settings.register_profile("ours", deadline=None)  # machines may be busy
hypothesis.settings.load_profile("ours")

# Those of the faster versions import them, and so would have them run in all other tests, too.
WITHOUT = os.environ.get("MINISIMCLR_KERNELS") == "reference"
collect_ignore = ["test_kernels.py", "test_cuda.py", "test_gpu.py"] if WITHOUT else []


def pytest_report_header() -> str | None:
    return f"MINISIMCLR_KERNELS=reference: without {', '.join(collect_ignore)}" if WITHOUT else None


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """No test reads or writes the user's cache or environment settings."""
    kept = dict(os.environ)
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))
    os.environ.pop("TERM", None)  # one without a cursor gets no bar
    for name in kept:
        if name.startswith("MINISIMCLR_") and name not in (
            "MINISIMCLR_TEST_DATA",
            "MINISIMCLR_KERNELS",
        ):
            del os.environ[name]
    yield
    os.environ.clear()
    os.environ.update(kept)


@pytest.fixture(scope="session")
def test_data() -> Path:
    """The folder of real photos and weights; skips the test if there is none."""
    folder = os.environ.get("MINISIMCLR_TEST_DATA")
    if not folder:
        pytest.skip("MINISIMCLR_TEST_DATA is not set")
    return Path(folder)


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> Path:
    """Three classes of 40 pictures of 20 px: stripes, checks and blobs in random colours."""
    root = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:20, :20]
    for name in ("blob", "check", "stripe"):
        (root / name).mkdir()
        for i in range(40):
            a, b = rng.integers(2, 6, 2)
            mask = {
                "stripe": (x // a) % 2,
                "check": (x // a + y // a) % 2,
                "blob": (x - 10) ** 2 + (y - 10) ** 2 < 9 * b * b / 4,
            }[name]
            two = rng.integers(0, 256, (2, 3))
            pixels = np.where(mask[..., None], *two) + rng.integers(-10, 10, (20, 20, 3))
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(root / name / f"{i:02}.png")
    return root
