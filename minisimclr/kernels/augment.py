"""Augmentation on the CPU: views that share one order of colour operations are made together.

Four things make it fast. A group of views fits into a core's cache, so its passes never wait for
memory. Channels lie in planes (n, 3, S, S), so every operation runs over contiguous numbers, mostly
in place. Resizing is one matrix product an axis for all channels of an image. And the hue comes
from a formula without cases, because choosing elementwise costs NumPy more than arithmetic.
Views do not depend on each other, so results do not depend on grouping or threads.
"""

import numpy as np

from ..augment import LUMA, SMALL, Views, apply_views, crop_resize
from ..cores import parallel, threads

GROUP_BYTES = 1024 * 1024  # float32 pixels of a group of views


@apply_views.register(np.ndarray)
def apply_views_grouped(
    images: np.ndarray, views: Views, size: int
) -> tuple[np.ndarray, np.ndarray]:
    n = len(images)
    boxes, flips, factors, orders, greys, sigmas = (
        drawn.reshape(2 * n, *drawn.shape[2:]) for drawn in vars(views).values()
    )
    jittered = (factors != (1, 1, 1, 0)).any(axis=1)  # (2N,)
    kind = np.where(jittered, orders @ (64, 16, 4, 1), -1)
    rows = np.argsort(kind, kind="stable")
    most = max(1, GROUP_BYTES // (12 * size**2))
    groups = [
        alike[i : i + most]
        for alike in np.split(rows, np.flatnonzero(np.diff(kind[rows])) + 1)
        for i in range(0, len(alike), most)
    ]
    groups = [g for first in range(threads()) for g in groups[first :: threads()]]  # equal shares
    out = np.empty((2 * n, size, size, 3), np.float32)

    def work(start: int, stop: int) -> None:
        for g in groups[start:stop]:
            x = _crop(images[g % n], boxes[g], flips[g], size)
            if kind[g[0]] >= 0:
                for op in orders[g[0]]:
                    _JITTER[op](x, factors[g, op][:, None, None])
            _grey(x, np.flatnonzero(greys[g]))
            if size > SMALL:
                _blur(x, sigmas[g])
            np.clip(x, 0, 1, out=x)
            out[g] = _interleaved(x)

    parallel(work, len(groups))
    return out[:n], out[n:]


@crop_resize.register(np.ndarray)
def crop_resize_planes(
    images: np.ndarray, boxes: np.ndarray, flips: np.ndarray, size: int
) -> np.ndarray:
    out = np.empty((len(images), size, size, 3), np.float32)
    block = max(1, GROUP_BYTES // (12 * size**2))

    def work(start: int, stop: int) -> None:
        for i in range(start, stop, block):
            part = slice(i, min(i + block, stop))
            out[part] = _interleaved(_crop(images[part], boxes[part], flips[part], size))

    parallel(work, len(images))
    return out


def _interleaved(x: np.ndarray) -> np.ndarray:
    """Planes (n, 3, S, S) -> (n, S, S, 3), a channel at a time: NumPy is slow at all three."""
    y = np.empty((len(x), *x.shape[2:], 3), np.float32)
    for channel in range(3):
        y[..., channel] = x[:, channel]
    return y


def _crop(images: np.ndarray, boxes: np.ndarray, flips: np.ndarray, size: int) -> np.ndarray:
    """crop_resize into planes (n, 3, S, S)."""
    n, height, width, _ = images.shape
    left, top, across, down = boxes.T
    rows = np.zeros((n, size, height), np.float32)
    _triangles(_centres(top, down, size), down / size, rows)
    columns = np.zeros((n, width, size), np.float32)
    centres = _centres(left, across, size)
    centres = np.where(flips[:, None], centres[:, ::-1], centres)
    _triangles(centres, across / size, columns.swapaxes(1, 2))
    x = rows @ images.astype(np.float32).reshape(n, height, width * 3)  # (S, H) @ (H, W 3)
    x = np.ascontiguousarray(x.reshape(n, size, width, 3).transpose(0, 3, 1, 2))  # (n, 3, S, W)
    columns *= np.float32(1 / 255)
    return (x.reshape(n, 3 * size, width) @ columns).reshape(n, 3, size, size)  # (3 S, W) @ (W, S)


def _centres(start: np.ndarray, length: np.ndarray, size: int) -> np.ndarray:
    """Where the output pixels lie in the input: (n, size)."""
    step = (length / size)[:, None]
    return start[:, None] + step * (np.arange(size, dtype=np.float32) + np.float32(0.5))


def _triangles(centres: np.ndarray, scale: np.ndarray, into: np.ndarray) -> None:
    """`resampling` about centres (n, S), added to the zeros `into` (n, S, n_in)."""
    n, size, n_in = into.shape
    reach = np.maximum(scale, 1)[:, None]  # input pixels to either side
    first = np.floor(centres - reach + np.float32(0.5)).astype(np.intp)  # (n, S)
    taps = np.arange(np.ceil(2 * reach.max()).astype(int))[:, None, None] + first  # (taps, n, S)
    weights = 1 - np.abs(taps.astype(np.float32) + np.float32(0.5) - centres) / reach
    weights = np.where((taps >= 0) & (taps < n_in), np.maximum(weights, 0), np.float32(0))
    weights /= weights.sum(axis=0)
    place = np.arange(n)[:, None], np.arange(size)
    for pixel, weight in zip(np.clip(taps, 0, n_in - 1), weights, strict=True):
        into[(*place, pixel)] += weight


def _brightness(x: np.ndarray, factor: np.ndarray) -> None:
    x *= factor[..., None]
    np.clip(x, 0, 1, out=x)


def _contrast(x: np.ndarray, factor: np.ndarray) -> None:
    factor = factor[..., None]
    mean = np.einsum("ncyx->nc", x)[:, :, None, None] / x[0, 0].size
    x *= factor
    x += mean * (1 - factor)
    np.clip(x, 0, 1, out=x)


def _extremes(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The largest and the smallest channel, each (n, S, S)."""
    value = np.maximum(x[:, 0], x[:, 1])
    lowest = np.minimum(x[:, 0], x[:, 1])
    return np.maximum(value, x[:, 2], out=value), np.minimum(lowest, x[:, 2], out=lowest)


def _saturation(x: np.ndarray, factor: np.ndarray) -> None:
    value, spread = _extremes(x)
    np.subtract(value, spread, out=spread)
    np.clip(spread, 1e-12, 1, out=spread)
    gain = np.divide(value, spread, out=spread)
    np.minimum(gain, factor, out=gain)
    x *= gain[:, None]
    value -= np.multiply(value, gain, out=gain)
    x += value[:, None]


def _hue(x: np.ndarray, turns: np.ndarray) -> None:
    """With channels as shares of the spread above the lowest, H = +-(1 - R + G + B) sixths of a
    turn, its sign that of G - B.
    """
    red, green, blue = x[:, 0], x[:, 1], x[:, 2]
    value, lowest = _extremes(x)
    spread = value - lowest
    sixths = green + blue
    sixths -= red
    sixths += spread
    sixths -= lowest
    sixths /= np.clip(spread, 1e-12, 1)
    np.copysign(sixths, green - blue, out=sixths)
    sixths += 6 * turns
    sixths -= 6 * np.floor(sixths / 6)  # in [0, 6)
    for plane, opposite in ((red, 3), (green, 2), (blue, 4)):
        np.subtract(sixths, opposite, out=plane)
    np.abs(x, out=x)
    x -= 1
    np.clip(x, 0, 1, out=x)
    x *= spread[:, None]
    red += lowest
    np.subtract(value[:, None], x[:, 1:], out=x[:, 1:])


_JITTER = (_brightness, _contrast, _saturation, _hue)


def _grey(x: np.ndarray, chosen: np.ndarray) -> None:
    part = x[chosen]
    x[chosen] = (LUMA[0] * part[:, 0] + LUMA[1] * part[:, 1] + LUMA[2] * part[:, 2])[:, None]


def _blur(x: np.ndarray, sigmas: np.ndarray) -> None:
    """Both axes with the symmetric weights of `gaussian`, then divided by their sums."""
    chosen, size = np.flatnonzero(sigmas), x.shape[2]
    bell = np.zeros((len(chosen), 2 * size - 1), np.float32)  # by distance, -(size - 1) and up
    near = slice(size - 1 - size // 10 // 2, size + size // 10 // 2)
    distance = np.arange(1 - size, size, dtype=np.float32)[near]
    bell[:, near] = np.exp(-0.5 * (distance / sigmas[chosen][:, None]) ** 2)
    windows = np.lib.stride_tricks.sliding_window_view(bell, size, axis=1)
    weight = np.ascontiguousarray(windows[:, ::-1])  # (m, S, S)
    scale = 1 / np.einsum("nij->ni", weight)  # (m, S)
    part = x[chosen].reshape(-1, 3 * size, size) @ weight  # (3 S, S) @ (S, S)
    part = weight[:, None] @ part.reshape(-1, 3, size, size)  # (S, S) @ (S, S)
    part *= (scale[:, :, None] * scale[:, None])[:, None]
    x[chosen] = part
