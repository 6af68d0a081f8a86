"""Augmentation: drawn parameters, each operation beside an independent referee, both versions."""

import colorsys
import hashlib
import os
import subprocess
import sys
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance

from minisimclr import augment, kernels
from minisimclr.augment import apply_views, center_view, crop_resize, draw_views, two_views
from minisimclr.cores import set_threads, threads
from minisimclr.errors import ConfigError
from minisimclr.weights import Preprocessing

# The readable version and the one in use (the same where kernels are switched off).
VERSIONS = {"reference": object, "in use": np.ndarray}
of_the_fast_one = pytest.mark.skipif(kernels.chosen != "fast", reason="MINISIMCLR_KERNELS is set")


@pytest.fixture(params=VERSIONS)
def version(request):
    return VERSIONS[request.param]


def photos(n=6, height=40, width=40, seed=0):
    """Smooth colours with some noise: every operation has something to do."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (n, 4, 4, 3), dtype=np.uint8)
    smooth = [np.asarray(Image.fromarray(c).resize((width, height), 3)) for c in coarse]
    return np.clip(np.stack(smooth) + rng.normal(0, 12, (n, height, width, 3)), 0, 255).astype("u1")


def floats(n=6, size=24, seed=0):
    return photos(n, size, size, seed).astype(np.float32) / 255


# What is drawn


def test_draws_are_pinned():
    """Raw Philox numbers and correctly rounded operations: these bytes must never change."""
    views = draw_views(7, 3, 5, 40, 60, strength=0.8, crop_scale=(0.2, 1.0))
    digest = hashlib.sha256(
        b"".join(np.ascontiguousarray(a).tobytes() for a in vars(views).values())
    )
    assert views.boxes[0, 0].tolist() == [
        7.5403947830200195,
        2.572789192199707,
        48.13161849975586,
        36.55485534667969,
    ]
    assert digest.hexdigest()[:16] == "6fa83996dba6149b"


@pytest.mark.parametrize("other", [(1, 0, 1), (0, 1, 1), (0, 0, 2)], ids=["seed", "step", "stream"])
def test_draws_differ_by_key(other):
    first = draw_views(0, 0, 4, 40, 40)
    seed, step, stream = other
    assert not np.allclose(first.boxes, draw_views(seed, step, 4, 40, 40, stream=stream).boxes)
    assert not np.allclose(first.boxes[0], first.boxes[1])


def test_draws_have_the_stated_frequencies():
    n, s = 20_000, 0.5
    views = draw_views(0, 0, n, 50, 50, strength=s)
    jittered = (views.factors != (1, 1, 1, 0)).any(axis=2)
    for share, p in [
        (views.flips, 0.5),
        (jittered, 0.8),
        (views.greys, 0.2),
        (views.sigmas > 0, 0.5),
    ]:
        assert abs(share.mean() - p) < 0.015
    low, high = views.factors[jittered].min(axis=0), views.factors[jittered].max(axis=0)
    np.testing.assert_allclose(low, [0.6, 0.6, 0.6, -0.1], atol=2e-3)
    np.testing.assert_allclose(high, [1.4, 1.4, 1.4, 0.1], atol=2e-3)
    strong = draw_views(0, 0, n, 50, 50, strength=1.5).factors[jittered]
    np.testing.assert_allclose(strong.min(axis=0), [0, 0, 0, -0.3], atol=2e-3)
    np.testing.assert_allclose(strong.max(axis=0), [2.2, 2.2, 2.2, 0.3], atol=2e-3)
    sigmas = views.sigmas[views.sigmas > 0]
    np.testing.assert_allclose([sigmas.min(), sigmas.max()], [0.1, 2.0], atol=2e-3)
    assert len(np.unique(views.orders @ (64, 16, 4, 1))) == 24
    assert (np.sort(views.orders, axis=2) == np.arange(4)).all()


@given(
    st.integers(1, 200), st.integers(1, 200), st.floats(0.01, 1), st.floats(0, 1), st.integers(0, 9)
)
@settings(max_examples=40, deadline=None)
def test_crops_lie_inside(height, width, low, share, seed):
    scale = (low, low + share * (1 - low))
    boxes = draw_views(seed, 0, 30, height, width, crop_scale=scale).boxes.astype(float)
    left, top, w, h = np.moveaxis(boxes, 2, 0)
    assert (left >= 0).all() and (left + w <= width * (1 + 1e-6)).all()
    assert (top >= 0).all() and (top + h <= height * (1 + 1e-6)).all()
    whole = (w == width) & (h == height)
    area = (w * h / (height * width))[~whole]
    aspect = (w / h)[~whole]
    assert (area >= scale[0] - 1e-5).all() and (area <= scale[1] + 1e-5).all()
    assert (aspect >= 3 / 4 - 1e-5).all() and (aspect <= 4 / 3 + 1e-5).all()


def test_crops_are_drawn_as_by_rejection():
    """The areas of a plain loop that draws until the crop fits; ten attempts nearly always do."""
    boxes = draw_views(0, 0, 20_000, 40, 40).boxes
    rng = np.random.default_rng(0)
    drawn = zip(rng.uniform(0.08, 1, 60_000), rng.uniform(3 / 4, 4 / 3, 60_000), strict=True)
    fitting = [area for area, aspect in drawn if area * aspect <= 1 and area / aspect <= 1]
    ours = (boxes[..., 2] * boxes[..., 3]).ravel() / 1600
    quantiles = np.linspace(0, 1, 11)
    np.testing.assert_allclose(
        np.quantile(ours, quantiles), np.quantile(fitting, quantiles), atol=0.02
    )
    assert (boxes[..., 2:] == 40).all(axis=2).mean() < 1e-3


def test_fewer_attempts_take_more_whole_images(monkeypatch):
    """On images so narrow that only small crops fit."""
    whole = {}
    for attempts in (10, 1):
        monkeypatch.setattr(augment, "ATTEMPTS", attempts)
        boxes = draw_views(0, 0, 200, 64, 16).boxes
        whole[attempts] = np.mean(np.all(boxes[..., 2:] == (16, 64), axis=-1))
    assert whole[10] < 0.3 < 0.6 < whole[1]


@pytest.mark.parametrize("bad", [{"crop_scale": (0, 1)}, {"crop_scale": (0.5, 0.2)},
                                 {"crop_scale": (0.5, 1.001)}, {"strength": -1},
                                 {"strength": np.nan}, {"strength": np.inf}])  # fmt: skip
def test_bad_parameters(bad):
    with pytest.raises(ConfigError, match=next(iter(bad))):
        draw_views(0, 0, 2, 40, 40, **bad)


# Resampling


def boxes_of(*rows):
    return np.array(rows, np.float32)


BOXES = boxes_of([0, 0, 60, 40], [3.3, 1.7, 9.1, 11.2], [20, 5, 40, 30], [47.5, 30.5, 12.5, 9.5])


@pytest.mark.parametrize("size", [8, 32, 64])
def test_crop_resize_equals_pillow(version, size):
    images = photos(4, 40, 60)
    ours = crop_resize.dispatch(version)(images, BOXES, np.zeros(4, bool), size)
    for image, (x, y, w, h), our in zip(images, BOXES.tolist(), ours, strict=True):
        for channel in range(3):
            plane = Image.fromarray(image[..., channel].astype(np.float32))
            theirs = plane.resize((size, size), Image.Resampling.BILINEAR, (x, y, x + w, y + h))
            np.testing.assert_allclose(our[..., channel], np.asarray(theirs) / 255, atol=2e-5)


@pytest.mark.parametrize("size", [12, 40, 100])
def test_crop_resize_equals_torch(version, size):
    torch = pytest.importorskip("torch")
    images = photos(3, 40, 40)
    whole = np.tile(boxes_of([0, 0, 40, 40]), (3, 1))
    ours = crop_resize.dispatch(version)(images, whole, np.array([False, True, False]), size)
    planes = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    theirs = torch.nn.functional.interpolate(planes, (size, size), mode="bilinear", antialias=True)
    theirs = theirs.permute(0, 2, 3, 1).numpy()
    theirs[1] = theirs[1, :, ::-1]
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_flipping_twice_gives_the_image_back(version):
    images, fn = photos(2, 24, 24), crop_resize.dispatch(version)
    whole = np.tile(boxes_of([0, 0, 24, 24]), (2, 1))
    flipped = fn(images, whole, np.ones(2, bool), 24)
    again = fn(np.rint(flipped * 255).astype("u1"), whole, np.ones(2, bool), 24)
    np.testing.assert_allclose(again, images / 255, atol=1e-6)
    assert not np.allclose(flipped, images / 255, atol=0.05)


def test_center_view():
    images = photos(2, 44, 61)  # of which 38.5 px are shown, from 11.25 and 2.75 px on
    ours = center_view(images, 21)
    assert ours.shape == (2, 21, 21, 3) and ours.dtype == np.float32
    plane = Image.fromarray(images[1, ..., 2].astype(np.float32))
    theirs = plane.resize((21, 21), Image.Resampling.BILINEAR, (11.25, 2.75, 49.75, 41.25))
    np.testing.assert_allclose(ours[1, ..., 2], np.asarray(theirs) / 255, atol=2e-5)


def test_center_view_of_a_tall_picture():
    images = photos(2, 64, 48)
    turned = center_view(images.swapaxes(1, 2), 21)
    np.testing.assert_allclose(center_view(images, 21), turned.swapaxes(1, 2), atol=1e-6)


def test_colours_of_bytes_are_refused():
    """They would be black: a view's values lie between 0 and 1."""
    images, some = photos(2, 16, 16), np.ones(2, bool)
    orders = np.tile(np.arange(4), (2, 1))
    for change in (
        lambda x: augment.greyscale(x, some),
        lambda x: augment.colour_jitter(x, np.array([[1, 1, 1, 0.0]] * 2), orders),
        lambda x: augment.blur(x, np.ones(2)),
    ):
        with pytest.raises(TypeError, match=r"floats in \[0, 1\], not uint8"):
            change(images)
        with pytest.raises(TypeError, match="takes arrays"):
            change(images.tolist())
        assert change(images / np.float32(255)).max() > 0


def test_only_bytes_are_pictures():
    images = photos(2, 16, 16)
    views = draw_views(0, 0, 2, 16, 16)
    whole = Preprocessing(16, "symmetric")
    for wrong in (images / np.float32(255), images[0], images[..., :1]):
        for see in (
            lambda x: two_views(x, 0, 0, 16),
            lambda x: center_view(x, 16),
            lambda x: apply_views(x, views, 16),
            lambda x: apply_views.dispatch(object)(x, views, 16),
            whole,
        ):
            with pytest.raises(TypeError, match=r"\(N, H, W, 3\) uint8, not \("):
                see(wrong)
            with pytest.raises(TypeError, match=r"takes arrays .*, not <class 'list'>"):
                see(list(images))
    see(images)


# Colour


def by_pixel(x, change):
    """`change(h, s, v)` of every pixel, through colorsys."""
    out = [
        colorsys.hsv_to_rgb(*change(*colorsys.rgb_to_hsv(*p))) for p in x.reshape(-1, 3).tolist()
    ]
    return np.array(out).reshape(x.shape)


REFEREES = {
    "brightness": lambda x, f: np.clip(np.asarray(
        ImageEnhance.Brightness(Image.fromarray(np.uint8(x * 255))).enhance(f)) / 255, 0, 1),
    "contrast": lambda x, f: np.stack([m + (c - m) * f for c in np.moveaxis(x.astype(float), 2, 0)
                                       for m in [sum(c.ravel().tolist()) / c.size]], 2),
    "saturation": lambda x, f: by_pixel(x, lambda h, s, v: (h, min(1, s * f), v)),
    "hue": lambda x, f: by_pixel(x, lambda h, s, v: ((h + f) % 1, s, v)),
}  # fmt: skip


@pytest.mark.parametrize(
    "name, factor",
    [(name, f) for name in REFEREES for f in (0.0, 0.07, 0.4, 1.0, 1.6)] + [("hue", -0.3)],
)
def test_colour_operation(name, factor):
    x = floats(1, 16)
    x[0, :4] = np.array([[0, 0, 0], [1, 1, 1], [1, 0, 0], [0.2, 0.2, 0.7]])[:, None]  # corner cases
    ours = getattr(augment, name)(x, np.float32([[[[factor]]]])).clip(0, 1)
    theirs = np.clip(REFEREES[name](x[0], factor), 0, 1)
    np.testing.assert_allclose(ours[0], theirs, atol=2 / 255 if name == "brightness" else 2e-6)


def test_jitter_keeps_each_image_to_its_order():
    x = floats(24)
    orders = np.array([np.random.default_rng(i).permutation(4) for i in range(24)])
    factors = np.tile(np.float32([1.7, 0.5, 1.6, 0.1]), (24, 1))
    ours = augment.colour_jitter(x, factors, orders)
    ops = (augment.brightness, augment.contrast, augment.saturation, augment.hue)
    for image, order, our in zip(x[:, None], orders, ours, strict=True):
        for kind in order:
            image = ops[kind](image, factors[0, kind]).clip(0, 1)
        np.testing.assert_allclose(our, image[0], atol=1e-6)
    one = augment.colour_jitter(x, factors[0], orders[:1])  # the same for all
    np.testing.assert_array_equal(one, augment.colour_jitter(x, factors, orders[[0] * 24]))
    for few in (factors[:23], orders), (factors, orders[:23]):
        with pytest.raises(ValueError, match="broadcast"):
            augment.colour_jitter(x, *few)


def test_greyscale_equals_pillow():
    x = floats(3)
    ours = augment.greyscale(x, np.array([True, False, True]))
    np.testing.assert_array_equal(ours[1], x[1])
    theirs = np.asarray(Image.fromarray(np.rint(x[2] * 255).astype("u1")).convert("L")) / 255
    np.testing.assert_allclose(ours[2], np.repeat(theirs[..., None], 3, 2), atol=1 / 255)


def test_blur_equals_scipy():
    ndimage = pytest.importorskip("scipy.ndimage")
    x, sigmas = floats(3, 60), np.float32([1.3, 0, 0.4])
    ours = augment.blur(x, sigmas)
    np.testing.assert_array_equal(ours[1], x[1])
    np.testing.assert_allclose(augment.blur(x, 1.3)[0], ours[0], atol=1e-6)  # the same for all
    with pytest.raises(ValueError, match="broadcast"):
        augment.blur(x, sigmas[:2])
    for i in (0, 2):
        kernel = np.exp(
            -0.5 * (np.arange(-3, 4) / sigmas[i]) ** 2
        )  # 60 // 10 // 2 = 3 to each side
        theirs = x[i].astype(float)
        for axis in (0, 1):
            inside = ndimage.convolve1d(np.ones_like(theirs), kernel, axis, mode="constant")
            theirs = ndimage.convolve1d(theirs, kernel, axis, mode="constant") / inside
        np.testing.assert_allclose(ours[i], theirs, atol=1e-6)


# Whole views


def neutral(n, side):
    return augment.Views(
        boxes=np.tile(np.float32([0, 0, side, side]), (2, n, 1)),
        flips=np.zeros((2, n), bool),
        factors=np.tile(np.float32([1, 1, 1, 0]), (2, n, 1)),
        orders=np.tile(np.arange(4), (2, n, 1)),
        greys=np.zeros((2, n), bool),
        sigmas=np.zeros((2, n), np.float32),
    )


def test_neutral_parameters_give_the_image_back(version):
    images = photos(3, 48, 48)
    for view in apply_views.dispatch(version)(images, neutral(3, 48), 48):
        np.testing.assert_allclose(view, images / 255, atol=2e-6)


@pytest.mark.parametrize("side", [32, 33])
def test_views_above_32_px_are_blurred(version, side):
    images, sharp, fn = photos(3, side, side), neutral(3, side), apply_views.dispatch(version)
    blurred = replace(sharp, sigmas=np.full((2, 3), 2, np.float32))
    pairs = zip(fn(images, sharp, side), fn(images, blurred, side), strict=True)
    assert all(np.array_equal(a, b) == (side == 32) for a, b in pairs)


@pytest.mark.parametrize(
    "height, width, size", [(40, 40, 32), (50, 70, 48), (20, 30, 40), (20, 30, 38), (9, 7, 8)]
)
@pytest.mark.parametrize("n, strength", [(1, 1.0), (37, 1.0), (37, 5.0)])  # hues: a whole turn
def test_version_in_use_equals_reference(n, strength, height, width, size):
    images = photos(n, height, width)
    images[0] //= 64  # darkness and exact greys have no hue
    images[-1] = images[-1, ..., :1]
    views = draw_views(3, 1, n, height, width, strength)
    expected = apply_views.dispatch(object)(images, views, size)
    for ours, theirs in zip(apply_views(images, views, size), expected, strict=True):
        assert ours.dtype == np.float32 and ours.flags.c_contiguous
        np.testing.assert_allclose(ours, theirs, atol=1e-5 * strength**2)  # rounding is multiplied


@given(st.integers(1, 9), st.integers(4, 50), st.integers(4, 50), st.integers(2, 40),
       st.floats(0, 1.5), st.integers(0, 99))  # fmt: skip
@settings(max_examples=25, deadline=None)
def test_views_stay_in_range(n, height, width, size, strength, seed):
    images = np.random.default_rng(seed).integers(0, 256, (n, height, width, 3), dtype=np.uint8)
    for view in two_views(images, seed, 0, size, strength):
        assert view.shape == (n, size, size, 3) and view.dtype == np.float32
        assert view.min() >= 0 and view.max() <= 1


def test_two_views_are_apply_of_draw():
    images = photos(5)
    for options, strength in ({"strength": 0.7}, 0.7), ({}, 0.5):
        pair = two_views(images, 3, 4, 32, **options)
        again = apply_views(images, draw_views(3, 4, 5, 40, 40, strength), 32)
        for a, b in zip(pair, again, strict=True):
            np.testing.assert_array_equal(a, b)
    assert not np.allclose(pair[0], pair[1], atol=0.1)


def test_parts_of_a_batch_see_the_views_of_the_whole(version):
    images, fn = photos(11, 50, 50), apply_views.dispatch(version)
    views = draw_views(0, 5, 11, 50, 50)
    whole = fn(images, views, 40)
    for start, stop in ((0, 4), (4, 11)):
        part = fn(images[start:stop], views.part(start, stop), 40)
        for a, b in zip(part, whole, strict=True):
            np.testing.assert_array_equal(a, b[start:stop])


def test_views_with_more_parameters_than_these(version):
    @dataclass(frozen=True)
    class Solarized(augment.Views):
        thresholds: np.ndarray  # (2, N)

    images, fn, views = photos(3), apply_views.dispatch(version), draw_views(0, 5, 3, 40, 40)
    more = Solarized(**vars(views), thresholds=np.arange(6).reshape(2, 3)).part(1, 3)
    assert more.thresholds.tolist() == [[1, 2], [4, 5]]
    for a, b in zip(fn(images[1:], more, 32), fn(images, views, 32), strict=True):
        np.testing.assert_array_equal(a, b[1:])


@pytest.mark.parametrize("drawn", [(6, 40, 48), (6, 48, 40), (5, 40, 40), (7, 40, 40)])
def test_views_of_other_images_are_refused(version, drawn):
    """Crops beyond the picture's end would be NaN."""
    views = draw_views(0, 0, *drawn)
    with pytest.raises(ValueError, match=r"drawn for other images than these, \(6, 40, 40, 3\)"):
        apply_views.dispatch(version)(photos(), views, 16)
    with pytest.raises(ValueError, match="drawn for other images"):
        crop_resize.dispatch(version)(photos(), views.boxes[1], views.flips[1], 16)


@pytest.mark.parametrize("left, width", [(-1, 9), (32, 9), (0, 41)])
def test_a_crop_a_pixel_beyond_the_picture_is_refused(version, left, width):
    boxes = boxes_of([left, 0, width, 9])
    with pytest.raises(ValueError, match="drawn for other images"):
        crop_resize.dispatch(version)(photos(1, 40, 40), boxes, np.zeros(1, bool), 16)


def test_a_batch_may_be_empty(version):
    images, views = photos()[:0], draw_views(0, 0, 0, 40, 40)
    for view in apply_views.dispatch(version)(images, views, 32):
        assert view.shape == (0, 32, 32, 3) and view.dtype == np.float32


@of_the_fast_one
def test_shares_of_a_large_batch_do_not_change_views(monkeypatch):
    images, views = photos(9, 50, 70), draw_views(3, 1, 9, 50, 70, strength=1.0)
    whole = apply_views(images, views, 48)
    monkeypatch.setattr(kernels.augment, "SHARE", 3 * 48 * 48)
    for ours, theirs in zip(apply_views(images, views, 48), whole, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@of_the_fast_one
def test_shares_are_equal_and_no_larger_than_said(monkeypatch):
    """In numbers of views, and of those whose colours change, which take the time."""
    fast, before, calls = kernels.augment, threads(), {}

    def spy(name, count):
        f, seen = getattr(fast, name), calls.setdefault(name, [])
        monkeypatch.setattr(fast, name, lambda *args: seen.append(count(args)) or f(*args))

    images, views = photos(9, 20, 30), draw_views(3, 1, 9, 20, 30)
    jittered = np.count_nonzero((views.factors != (1, 1, 1, 0)).any(axis=2))
    spy("_crops", lambda args: len(args[1]))
    spy("_crop", lambda args: len(args[1]))
    spy("_jitter", lambda args: len(args[1]))
    monkeypatch.setattr(fast, "SHARE", 4 * 3 * 12 * 12)
    try:
        set_threads(2)
        apply_views(images, views, 12)
        assert len(calls["_crops"]) == 6 and sum(calls["_crops"]) == 18
        assert max(calls["_crops"]) <= 4
        assert sum(calls["_jitter"]) == jittered and set(calls["_jitter"]) == {2, 3}
        calls["_crop"].clear()
        monkeypatch.setattr(fast, "GROUP", 2 * 3 * (20 * 30 + 12 * 12))
        apply_views(images, views, 12)
    finally:
        set_threads(before)
    assert sum(calls["_crop"]) == 18 and max(calls["_crop"]) == 2


def test_threads_do_not_change_views():
    images, before = photos(16), threads()
    views = draw_views(0, 5, 16, 40, 40)
    try:
        set_threads(1)
        one = apply_views(images, views, 32)
        set_threads(3)
        three = apply_views(images, views, 32)
    finally:
        set_threads(before)
    np.testing.assert_array_equal(one, three)


@pytest.mark.parametrize("processor", ["Haswell", "Nehalem"])
def test_other_processors_products_change_nothing_of_that(processor):
    """OpenBLAS adds in an order of the processor's; others do not know the variable."""
    tests = "parts_of_a_batch or shares_of_a_large or threads_do_not"
    command = [sys.executable, "-m", "pytest", "-q", "-pno:cacheprovider", __file__, "-k", tests]
    environment = os.environ | {"OPENBLAS_CORETYPE": processor}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode < 0:
        pytest.skip("this processor lacks the instructions")
    assert done.returncode == 0, done.stdout


# Device arrays


class DeviceArray(np.ndarray):
    """Refuses, as CuPy does, to meet a host array."""

    def __array_ufunc__(self, ufunc, method, *inputs, out=(), **kwargs):
        for array in inputs:
            assert isinstance(array, DeviceArray) or np.ndim(array) == 0, f"host array in {ufunc}"
        inputs = [a.view(np.ndarray) if isinstance(a, DeviceArray) else a for a in inputs]
        result = getattr(ufunc, method)(*inputs, out=tuple(map(np.asarray, out)) or None, **kwargs)
        return np.asarray(result).view(DeviceArray)

    def __getitem__(self, key):
        for index in key if isinstance(key, tuple) else (key,):
            assert isinstance(index, DeviceArray) or not isinstance(index, np.ndarray)
        return np.asarray(super().__getitem__(key)).view(DeviceArray)


class DeviceLibrary:
    """NumPy as if it were CuPy: what it makes lives on the device."""

    def __getattr__(self, name):
        attribute = getattr(np, name)
        if isinstance(attribute, (type, np.ufunc)):
            return attribute
        return lambda *a, **k: np.asarray(attribute(*a, **k)).view(DeviceArray)


def test_reference_runs_on_device_arrays(monkeypatch):
    monkeypatch.setattr(augment, "xp_of", lambda array: DeviceLibrary())
    monkeypatch.setattr(augment, "crop_resize", crop_resize.dispatch(object))
    images = photos(4, 50, 50)
    views = draw_views(0, 0, 4, 50, 50)
    ours = apply_views.dispatch(object)(images.view(DeviceArray), views, 40)
    monkeypatch.undo()
    for a, b in zip(ours, apply_views.dispatch(object)(images, views, 40), strict=True):
        assert isinstance(a, DeviceArray)
        np.testing.assert_allclose(np.asarray(a), b, atol=1e-6)  # sums in another order
