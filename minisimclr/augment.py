"""Two random views of every image: the only supervision that SimCLR has.

Appendix A of SimCLR (Chen et al. 2020, arXiv:2002.05709): a random crop, resized and perhaps
mirrored; with probability 0.8 colour jitter; with probability 0.2 greyscale; with probability 0.5
Gaussian blur, but none for views of up to 32 px, as for CIFAR-10 (appendix B.9). Colour operations
are those of the authors' code (google-research/simclr, `data_util.py`, second version of the
jitter).

Random draws and pixels are kept apart. `draw_views` draws every random parameter on the host as a
pure function of its arguments, so any worker, device or resumed run sees the same views;
`apply_views` is deterministic, works on whole batches and runs on NumPy and CuPy alike; a faster
version of it runs unless MINISIMCLR_KERNELS=reference.

Shapes: N images of H x W px, views of S x S px, three channels, values in [0, 1].
"""

from dataclasses import dataclass, fields
from functools import singledispatch

import numpy as np

from .backend import Array, xp_of
from .errors import ConfigError

ASPECTS = (3 / 4, 4 / 3)  # width / height of a crop
ATTEMPTS = 10  # at a crop that fits into the image, before the whole image is taken
JITTER = np.array([0.8, 0.8, 0.8, 0.2])  # reach of brightness, contrast, saturation, hue
SIGMAS = (0.1, 2.0)  # px, of the blur
SMALL = 32  # px; views up to this side are not blurred
CENTRE = 0.875  # share of an image's side that the evaluation view shows
LUMA = (0.299, 0.587, 0.114)  # weight of red, green and blue in grey (ITU-R BT.601)


@dataclass(frozen=True)
class Views:
    """The drawn parameters of two views of N images: host arrays whose first axes are (2, N)."""

    boxes: np.ndarray  # (2, N, 4) float32: left, top, width and height of the crop, px
    flips: np.ndarray  # (2, N) bool: mirror left and right
    factors: np.ndarray  # (2, N, 4) float32: of brightness, contrast, saturation; hue, in turns
    orders: np.ndarray  # (2, N, 4) int64: which of these four comes first, second, third, last
    greys: np.ndarray  # (2, N) bool: take the colour away
    sigmas: np.ndarray  # (2, N) float32: of the blur, px of the view; 0: none

    def part(self, start: int, stop: int) -> "Views":
        """The parameters of images start to stop - 1, for a batch that is worked on in parts."""
        return type(self)(*(getattr(self, field.name)[:, start:stop] for field in fields(self)))


def draw_views(
    seed: int, step: int, n: int, height: int, width: int, strength: float = 0.5,
    crop_scale: tuple[float, float] = (0.08, 1.0), stream: int = 1,
) -> Views:  # fmt: skip
    """Draw the parameters of both views of a batch of n images of height x width px.

    A crop shows a share of the image's area drawn from U(crop_scale) at an aspect ratio from
    U(3/4, 4/3); one that does not fit is drawn again, so large ones are rarer. Jitter of strength s
    multiplies brightness, contrast and saturation by U(max(0, 1 - 0.8 s), 1 + 0.8 s), and turns the
    hue by U(-0.2 s, 0.2 s).

    The same arguments give the same bits on every machine and NumPy: raw Philox numbers, then
    correctly rounded operations only. Another `stream` gives other draws. Processes that share a
    batch draw for all of it, and each takes its `part`: another n gives other second views, too.
    Raises ConfigError for a negative strength or bad crop_scale.
    """
    low, high = crop_scale
    if not 0 < low <= high <= 1:
        raise ConfigError(f"crop_scale must be 0 < low <= high <= 1, not {crop_scale}")
    if not 0 <= strength < np.inf:
        raise ConfigError(f"strength must be 0 or more and finite, not {strength}")
    raw = np.random.Philox(key=[seed, 0], counter=[0, 0, step, stream]).random_raw
    u = (raw((2, n, 15 + 2 * ATTEMPTS)) >> np.uint64(11)) * 2.0**-53  # uniform in [0, 1)
    coins, places, factors, order, areas, aspects = np.split(u, [5, 7, 11, 15, 15 + ATTEMPTS], 2)
    flip, jitter, grey, blur, sigma = np.moveaxis(coins, 2, 0)  # each (2, N)

    area = (low + (high - low) * areas) * (height * width)  # (2, N, ATTEMPTS)
    aspect = ASPECTS[0] + (ASPECTS[1] - ASPECTS[0]) * aspects
    sides = np.stack([np.sqrt(area * aspect), np.sqrt(area / aspect)], axis=3)
    fits = np.all(sides <= (width, height), axis=3)
    first = np.argmax(fits, axis=2)[:, :, None, None]
    side = np.take_along_axis(sides, first, axis=2)[:, :, 0]  # (2, N, 2)
    side = np.where(np.any(fits, axis=2)[:, :, None], side, (width, height))
    corner = places * ((width, height) - side)

    reach, neutral = JITTER * strength, np.array([1, 1, 1, 0])
    least = np.maximum(neutral - reach, [0, 0, 0, -np.inf])
    factors = least + (neutral + reach - least) * factors
    return Views(
        boxes=np.concatenate([corner, side], axis=2).astype(np.float32),
        flips=flip < 0.5,
        factors=np.where(jitter[:, :, None] < 0.8, factors, neutral).astype(np.float32),
        orders=np.argsort(order, axis=2, kind="stable"),
        greys=grey < 0.2,
        sigmas=np.where(blur < 0.5, SIGMAS[0] + (SIGMAS[1] - SIGMAS[0]) * sigma, 0).astype("f4"),
    )


def batch_shape(images: Array, boxes: np.ndarray | None = None) -> tuple[int, int, int]:
    """N, H and W of images (N, H, W, 3) uint8.

    Raises TypeError for others (values in [0, 1] would give black views), and ValueError unless
    boxes (..., N, 4) lie in such images.
    """
    xp_of(images)  # raises TypeError for what is no array
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
        raise TypeError(f"images are (N, H, W, 3) uint8, not {images.shape} {images.dtype}")
    n, height, width = images.shape[:3]
    if boxes is not None:
        first, last = boxes[..., :2], boxes[..., :2] + boxes[..., 2:] - (width, height)
        if boxes.shape[-2] != n or not ((first > -0.5) & (last < 0.5)).all():  # px, for rounding
            raise ValueError(f"crops were drawn for other images than these, {images.shape}")
    return n, height, width


@singledispatch
def apply_views(images: Array, views: Views, size: int) -> tuple[Array, Array]:
    """Both views of images (N, H, W, 3) uint8, each (N, size, size, 3) float32 in [0, 1]."""
    pair = []
    for k in (0, 1):
        x = crop_resize(images, views.boxes[k], views.flips[k], size)
        x = colour_jitter(x, views.factors[k], views.orders[k])
        x = greyscale(x, views.greys[k])
        if size > SMALL:
            x = blur(x, views.sigmas[k])
        pair.append(x.clip(0, 1))
    return pair[0], pair[1]


def two_views(
    images: Array, seed: int, step: int, size: int, strength: float = 0.5
) -> tuple[Array, Array]:
    """Two random views of images (N, H, W, 3) uint8, each (N, size, size, 3) float32 in [0, 1]."""
    return apply_views(images, draw_views(seed, step, *batch_shape(images), strength), size)


def center_view(images: Array, size: int) -> Array:
    """The evaluation view: the largest central square, cut to 0.875 of its side, resized.

    images (N, H, W, 3) uint8 -> (N, size, size, 3) float32 in [0, 1]
    """
    n, height, width = batch_shape(images)
    side = CENTRE * min(height, width)
    boxes = np.full((n, 4), [(width - side) / 2, (height - side) / 2, side, side], np.float32)
    return crop_resize(images, boxes, np.zeros(n, bool), size).clip(0, 1)


@singledispatch
def crop_resize(images: Array, boxes: np.ndarray, flips: np.ndarray, size: int) -> Array:
    """Cut boxes (N, 4) out of images (N, H, W, 3) uint8, mirror those with flips (N,), and resize.

    Bilinear with antialiasing, like Pillow and torchvision: an output pixel is the mean of the
    input pixels under a triangle that reaches one output pixel, and at least one input pixel, to
    either side. Without antialiasing, a shrunken photo keeps every n-th pixel, and two crops of one
    picture differ by aliasing. The authors resize bicubically, without it: values overshoot [0, 1].
    """
    xp, (_, h, w) = xp_of(images), batch_shape(images, boxes)
    left, top, width, height = xp.asarray(boxes).T  # each (N,)
    rows = resampling(top, height, h, size)
    columns = resampling(left, width, w, size)
    columns = xp.where(xp.asarray(flips)[:, None, None], columns[:, ::-1], columns)
    return separable(images.astype(xp.float32) / 255, rows, columns)


def resampling(start: Array, length: Array, n_in: int, n_out: int) -> Array:
    """Weights (N, n_out, n_in) that resize an interval of n_in pixels to n_out; rows sum to 1."""
    xp = xp_of(start)
    scale = length / n_out  # (N,) input pixels per output pixel
    centre = start[:, None] + scale[:, None] * (xp.arange(n_out, dtype=xp.float32) + 0.5)
    distance = xp.abs(xp.arange(n_in, dtype=xp.float32) + 0.5 - centre[:, :, None])
    weight = xp.maximum(0, 1 - distance / xp.maximum(scale, 1)[:, None, None])
    return weight / weight.sum(axis=2, keepdims=True)


def separable(x: Array, rows: Array, columns: Array) -> Array:
    """rows @ x @ columns.T for every image and channel: (N, H, W, C) -> (N, H', W', C)."""
    planes = x.transpose(0, 3, 1, 2)  # (N, C, H, W)
    y = rows[:, None] @ planes @ columns[:, None].swapaxes(2, 3)  # (H', H) @ (H, W) @ (W, W')
    return xp_of(x).ascontiguousarray(y.transpose(0, 2, 3, 1))  # (N, H', W', C)


def xp_of_views(x: Array):
    """xp_of(x). Raises TypeError if x holds bytes, as pictures do: a view has floats in [0, 1]."""
    xp = xp_of(x)
    if x.dtype.kind in "biu":
        raise TypeError(f"views hold floats in [0, 1], not {x.dtype}: center_view makes them")
    return xp


def colour_jitter(x: Array, factors: np.ndarray, orders: np.ndarray) -> Array:
    """Brightness, contrast, saturation and hue by factors (N, 4), in each image's order (N, 4).

    Factors or an order (4,) are for all images. Values are clipped to [0, 1] after each of the
    four, so their order matters.
    """
    xp = xp_of_views(x)
    factors, orders = (np.broadcast_to(drawn, (len(x), 4)) for drawn in (factors, orders))
    x, factors = x.copy(), xp.asarray(factors)
    for place in range(4):
        for kind, adjust in enumerate((brightness, contrast, saturation, hue)):
            chosen = xp.asarray(np.flatnonzero(orders[:, place] == kind))
            factor = factors[chosen, kind][:, None, None, None]
            x[chosen] = adjust(x[chosen], factor).clip(0, 1)
    return x


def brightness(x: Array, factor: Array) -> Array:
    """Scale all values."""
    return x * factor


def contrast(x: Array, factor: Array) -> Array:
    """Scale the distance from the mean, that of each channel of each image."""
    mean = x.mean(axis=(1, 2), keepdims=True)
    return mean + (x - mean) * factor


def saturation(x: Array, factor: Array) -> Array:
    """Scale the S of hue, saturation, value, up to 1; the brightest channel, V, stays."""
    xp = xp_of(x)
    value = x.max(axis=3, keepdims=True)
    spread = value - x.min(axis=3, keepdims=True)  # S = spread / V
    most = value / xp.maximum(spread, 1e-12)
    return value - (value - x) * xp.minimum(factor, most)


def hue(x: Array, turns: Array) -> Array:
    """Turn the H of hue, saturation, value around the colour circle."""
    xp = xp_of(x)
    red, green, blue = x[..., :1], x[..., 1:2], x[..., 2:]
    value = x.max(axis=3, keepdims=True)
    spread = value - x.min(axis=3, keepdims=True)
    unit = xp.where(spread > 0, spread, 1)  # greys have no hue: any will do
    sixths = 6 * turns + xp.where(
        value == red,
        (green - blue) / unit,
        xp.where(value == green, 2 + (blue - red) / unit, 4 + (red - green) / unit),
    )
    # A channel is full within a sixth of a turn of its own hue, and lowest from two sixths on.
    away = sixths - xp.asarray([0, 2, 4], dtype=x.dtype)
    away = xp.abs(away - 6 * xp.rint(away / 6))  # in [0, 3]
    return value - spread * (away - 1).clip(0, 1)


def greyscale(x: Array, chosen: np.ndarray) -> Array:
    """The chosen (N,) images in grey, with three equal channels."""
    xp = xp_of_views(x)
    grey = x @ xp.asarray(LUMA, dtype=x.dtype)  # (N, H, W, 3) @ (3,)
    return xp.where(xp.asarray(chosen)[:, None, None, None], grey[..., None], x)


def blur(x: Array, sigmas: np.ndarray) -> Array:
    """Gaussian blur of images (N, S, S, 3) with a kernel of about S / 10 px; sigma 0: no blur.

    One sigma is for all images. At the border the kernel is cut off and renormalised; the authors'
    black padding darkens it.
    """
    xp, sigmas = xp_of_views(x), np.broadcast_to(sigmas, len(x))
    chosen = np.flatnonzero(sigmas)
    weight = gaussian(xp.asarray(sigmas[chosen]), x.shape[1])
    x, rows = x.copy(), xp.asarray(chosen)
    x[rows] = separable(x[rows], weight, weight)
    return x


def gaussian(sigma: Array, size: int) -> Array:
    """Weights (N, size, size) of a Gaussian around every pixel of a line; rows sum to 1."""
    xp = xp_of(sigma)
    pixel = xp.arange(size)
    bell = xp.exp(-0.5 * (pixel.astype(xp.float32) / sigma[:, None]) ** 2)
    bell = bell * (pixel <= size // 10 // 2)  # (N, size): the weight at each distance
    weight = bell[:, xp.abs(pixel[:, None] - pixel)]
    return weight / weight.sum(axis=2, keepdims=True)
