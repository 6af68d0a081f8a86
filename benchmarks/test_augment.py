"""Two augmented views of a batch: the reference, the version in use, and Pillow image by image.

    pytest benchmarks/test_augment.py

Pillow's pipeline does the same operations with the same drawn parameters on 8-bit images, one image
after the other, as a data loader's worker does.
"""

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageFilter, ImageStat

import minisimclr.kernels  # noqa: F401
from minisimclr.augment import SMALL, apply_views, crop_resize, draw_views
from minisimclr.data import toydogs

N = 256
STORED = {32: 40, 64: 80}  # px a side of the stored images, for views of this size


@pytest.fixture(scope="module", params=STORED, ids="size={}".format)
def batch(request):
    size = request.param
    images = np.stack([toydogs.draw(i, STORED[size]) for i in range(N)])
    return images, draw_views(0, 0, N, *images.shape[1:3], strength=0.8), size


def pillow_brightness(image: Image.Image, factor: float) -> Image.Image:
    return ImageEnhance.Brightness(image).enhance(factor)


def pillow_contrast(image: Image.Image, factor: float) -> Image.Image:
    means = ImageStat.Stat(image).mean
    return image.point([mean + (v - mean) * factor for mean in means for v in range(256)])


def pillow_saturation(image: Image.Image, factor: float) -> Image.Image:
    hue, saturation, value = image.convert("HSV").split()
    saturation = saturation.point([v * factor for v in range(256)])
    return Image.merge("HSV", (hue, saturation, value)).convert("RGB")


def pillow_hue(image: Image.Image, turns: float) -> Image.Image:
    hue, saturation, value = image.convert("HSV").split()
    hue = hue.point([(v + round(256 * turns)) % 256 for v in range(256)])
    return Image.merge("HSV", (hue, saturation, value)).convert("RGB")


PILLOW_JITTER = (pillow_brightness, pillow_contrast, pillow_saturation, pillow_hue)


def pillow_view(image, box, flip, factors, order, grey, sigma, size):
    left, top, width, height = box.tolist()
    right, bottom = min(left + width, image.width), min(top + height, image.height)
    image = image.resize((size, size), Image.Resampling.BILINEAR, (left, top, right, bottom))
    if flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if tuple(factors) != (1, 1, 1, 0):
        for kind in order:
            image = PILLOW_JITTER[kind](image, float(factors[kind]))
    if grey:
        image = image.convert("L").convert("RGB")
    if sigma and size > SMALL:
        image = image.filter(ImageFilter.GaussianBlur(float(sigma)))
    return np.asarray(image, np.float32) / 255


def pillow_views(images, views, size):
    photos = [Image.fromarray(image) for image in images]
    return tuple(
        np.stack([pillow_view(p, *drawn, size) for p, *drawn in zip(photos, *view, strict=True)])
        for view in zip(*vars(views).values(), strict=True)
    )


VERSIONS = {
    "in use": apply_views,
    "reference": apply_views.dispatch(object),
    "pillow": pillow_views,
}


@pytest.mark.parametrize("version", VERSIONS)
def test_two_views(benchmark, batch, version):
    images, views, size = batch
    benchmark.group = f"two views of {N} images at {size} px"
    benchmark.extra_info["views"] = 2 * N
    made = benchmark(VERSIONS[version], images, views, size)
    expected = apply_views.dispatch(object)(images, views, size)
    # Pillow rounds to 8 bits after every step, and its Gaussian is a run of box filters.
    tolerance = {"in use": 1e-6, "reference": 0, "pillow": 0.005}[version]
    assert np.abs(np.stack(made) - np.stack(expected)).mean() <= tolerance


@pytest.mark.parametrize("version", ["in use", "reference"])
def test_crop_resize(benchmark, batch, version):
    images, views, size = batch
    benchmark.group = f"crop and resize {N} images to {size} px"
    chosen = {"in use": crop_resize, "reference": crop_resize.dispatch(object)}[version]
    made = benchmark(chosen, images, views.boxes[0], views.flips[0], size)
    expected = crop_resize.dispatch(object)(images, views.boxes[0], views.flips[0], size)
    np.testing.assert_allclose(made, expected, atol=1e-5)
