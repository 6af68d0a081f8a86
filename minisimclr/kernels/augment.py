"""Augmentation on the CPU: as few passes over as few numbers, in as few calls, as NumPy allows.

Channels lie in planes (3, n, S, S), so every operation runs over long contiguous rows, mostly in
place. Resizing and blur are matrix products, block by block of output pixels, with only the input
pixels under each block: resizing with all of them would be 1.7 times the work for views of 32 px,
3.6 for 64 and 13 for 224. The hue comes from a formula without cases, because choosing elementwise
costs NumPy more than arithmetic.
Views are sorted: for the crops by size, so that small ones gather few pixels; then by the order of
their colour operations, so that one call does many: two threads that make many short calls spend
their time waiting for the interpreter's lock.
Views do not depend on each other, so from 8 px on the results are the same, to the bit, for any
grouping and any number of threads.
"""

from itertools import pairwise

import numpy as np

from ..augment import LUMA, SMALL, apply_views, batch_shape, crop_resize
from ..cores import parallel, threads
from .registry import blocks, in_blocks

SHARE = 1 << 23  # numbers in one share of views, which is cropped as a whole
GROUP = 1_200_000  # numbers in a block of views; for crops, those of their pictures count too
BAND = 16  # output pixels in a block, at most: a cache line of weights


@apply_views.register(np.ndarray)
def apply_views_sorted(images, views, size):
    n, _, _ = batch_shape(images, views.boxes)
    drawn = views.boxes, views.flips, views.factors, views.orders, views.greys, views.sigmas
    boxes, flips, factors, orders, greys, sigmas = (a.reshape(2 * n, *a.shape[2:]) for a in drawn)
    jittered = (factors != (1, 1, 1, 0)).any(axis=1)  # (2N,)
    places = np.argsort(orders, axis=1)  # of each operation; hue, the costliest, is sorted by first
    rows = np.lexsort((*places.T, jittered))  # unchanged views come first
    still, rest = np.split(rows, [2 * n - np.count_nonzero(jittered)])
    count = threads() * (1 + 2 * n * 3 * size**2 // (threads() * SHARE))
    halves = [np.array_split(part, count) for part in (still, rest)]
    shares = [np.concatenate(pair) for pair in zip(*halves, strict=True)]  # of equal work
    out = np.empty((2 * n, size, size, 3), np.float32)

    def work(start: int, stop: int) -> None:
        for share in shares[start:stop]:
            planes = _crops(images, share % n, boxes[share], flips[share], size)
            for block in blocks(0, len(share), GROUP // (3 * size**2)):
                i, x = share[block], planes[:, block]
                moving = np.flatnonzero(jittered[i])
                if len(moving):
                    _jitter(x[:, moving[0] :], factors[i[moving]], orders[i[moving]])
                _grey(x, np.flatnonzero(greys[i]))
                if size > SMALL:
                    _blur(x, sigmas[i])
                out[i] = _interleaved(x)

    parallel(work, len(shares))
    return out[:n], out[n:]


@crop_resize.register(np.ndarray)
def crop_resize_planes(images, boxes, flips, size):
    n, _, _ = batch_shape(images, boxes)
    out = np.empty((n, size, size, 3), np.float32)

    def work(i: slice) -> None:
        out[i] = _interleaved(_crops(images, np.arange(n)[i], boxes[i], flips[i], size))

    in_blocks(work, n, GROUP // (3 * size**2))
    return out


def _interleaved(x: np.ndarray) -> np.ndarray:
    """Planes (3, n, S, S), cut to [0, 1], as (n, S, S, 3)."""
    y = np.empty((*x.shape[1:], 3), np.float32)
    for channel in range(3):
        x[channel].clip(0, 1, out=y[..., channel])
    return y


def _crops(
    images: np.ndarray, which: np.ndarray, boxes: np.ndarray, flips: np.ndarray, size: int
) -> np.ndarray:
    """crop_resize of the images `which` (n,), as planes (3, n, S, S).

    Crops of similar size go together: the largest in a block sets how many pixels each gathers.
    """
    _, height, width, _ = images.shape
    planes = np.empty((3, len(which), size, size), np.float32)
    order = np.argsort(boxes[:, 2:].prod(axis=1))
    for block in blocks(0, len(which), GROUP // (3 * (height * width + size**2))):
        i = order[block]
        planes[:, i] = _crop(images, which[i], boxes[i], flips[i], size)
    return planes


def _crop(
    images: np.ndarray, which: np.ndarray, boxes: np.ndarray, flips: np.ndarray, size: int
) -> np.ndarray:
    """Planes (3, n, S, S) of the images `which` (n,)."""
    n, (_, height, width, _) = len(which), images.shape
    left, top, across, down = boxes.T
    taps, weight = _bands(top, down, np.zeros(n, bool), size, height)  # (n, b, T), (n, b, T, B)
    x = images[which[:, None, None], taps].astype(np.float32)  # (n, b, T, W, 3)
    x = x.reshape(*taps.shape, -1).swapaxes(2, 3)  # (n, b, W 3, T)
    x = _side_by_side(x, weight).reshape(n, width, 3, -1)  # (n, W, 3, b B): S, then repeats
    taps, weight = _bands(left, across, flips, size, width)
    weight *= np.float32(1 / 255)
    x = x[np.arange(n)[:, None, None], taps].transpose(0, 3, 1, 4, 2)  # (n, 3, b, b B, T)
    x = _side_by_side(x, weight[:, None])[:, :, :size, :size]  # (b B, T) @ (T, B)
    return x.swapaxes(0, 1)


def _side_by_side(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """x @ weight, (..., b, M, T) @ (..., b, T, B), products side by side: (..., M, b B)."""
    *outer, count, m, _ = x.shape
    y = np.empty((*outer, m, count, weight.shape[-1]), np.float32)
    np.matmul(x, weight, out=y.swapaxes(-3, -2))
    return y.reshape(*outer, m, count * weight.shape[-1])


def _bands(
    start: np.ndarray, length: np.ndarray, flips: np.ndarray, size: int, n_in: int
) -> tuple[np.ndarray, np.ndarray]:
    """`resampling` in blocks of B output pixels, each over T neighbouring input pixels: those input
    pixels (n, b, T) and their weights (n, b, T, B). Past the end the last output pixel is repeated,
    and input pixels there weigh nothing.

    T depends on the largest crop of the block. Zeros added to a sum change nothing, but some BLAS
    libraries add the terms beyond a multiple of 8 in another order, so T is such a multiple.
    """
    count = -(-size // BAND)
    place = np.minimum(np.arange(count * -(-size // count)), size - 1)
    place = np.where(flips[:, None], size - 1 - place, place).reshape(len(start), count, -1)
    scale = (length / size)[:, None, None]
    reach = np.maximum(scale, 1)  # input pixels to either side
    centre = start[:, None, None] + scale * (place.astype(np.float32) + np.float32(0.5))
    most = 8 * int(np.ceil(min(n_in, place.shape[2] * scale.max() + 2 * reach.max()) / 8))
    first = np.floor(centre.min(axis=2, keepdims=True) - reach + np.float32(0.5))
    first = first.clip(0, max(0, n_in - most))  # (n, b, 1)
    tap = np.arange(most, dtype=np.float32)
    # With T outermost, every operation runs over long rows.
    weight = tap[:, None, None, None] - (centre - first - np.float32(0.5))  # (T, n, b, B)
    np.abs(weight, out=weight)
    np.subtract(reach, weight, out=weight)
    np.maximum(weight, np.zeros_like(centre), out=weight)
    weight[n_in:] = 0
    weight /= weight.sum(axis=0)
    return (first + tap).clip(max=n_in - 1).astype(np.intp), weight.transpose(1, 2, 0, 3)


def _jitter(x: np.ndarray, factors: np.ndarray, orders: np.ndarray) -> None:
    """colour_jitter of planes, in place; neighbours due the same operation share one call."""
    for kinds in orders.T:  # (n,), at each place
        for i, k in pairwise((0, *np.flatnonzero(np.diff(kinds)) + 1, len(kinds))):
            _JITTER[kinds[i]](x[:, i:k], factors[i:k, kinds[i], None, None])


def _brightness(x: np.ndarray, factor: np.ndarray) -> None:
    x *= factor
    x.clip(0, 1, out=x)


def _contrast(x: np.ndarray, factor: np.ndarray) -> None:
    mean = np.einsum("cnyx->cn", x)[..., None, None] / x[0, 0].size
    x *= factor
    x += mean * (1 - factor)
    x.clip(0, 1, out=x)


def _extremes(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The largest and the smallest channel, each (n, S, S)."""
    value, lowest = np.maximum(x[0], x[1]), np.minimum(x[0], x[1])
    return np.maximum(value, x[2], out=value), np.minimum(lowest, x[2], out=lowest)


def _saturation(x: np.ndarray, factor: np.ndarray) -> None:
    value, spread = _extremes(x)
    np.subtract(value, spread, out=spread)
    spread.clip(1e-12, 1, out=spread)
    gain = np.divide(value, spread, out=spread)
    np.minimum(gain, factor, out=gain)
    x *= gain
    value -= np.multiply(value, gain, out=gain)
    x += value


def _hue(x: np.ndarray, turns: np.ndarray) -> None:
    """With channels as shares of the spread above the lowest, H = +-(1 - R + G + B) sixths of a
    turn, with the sign of G - B. Then red is lowest + spread clip(|H - 3| - 1, 0, 1), and green and
    blue are highest - spread clip(|H - 2 or 4| - 1, 0, 1). Clipping from 1 to 2 instead saves the
    subtraction of 1: lowest and highest take it over, one spread each.
    """
    red, green, blue = x
    value, lowest = _extremes(x)
    spread = value - lowest
    sixths = green + blue
    sixths -= red
    sixths += spread
    sixths -= lowest
    sign = (green - blue).view(np.uint32)
    sign &= np.uint32(1 << 31)
    sixths /= spread.clip(1e-12, 1)
    # The same as copysign but for rounding errors below 0, in less than half the time.
    np.bitwise_xor(sixths.view(np.uint32), sign, out=sixths.view(np.uint32))
    sixths += 6 * turns
    whole = np.divide(sixths, 6, out=sign.view(np.float32))
    np.floor(whole, out=whole)
    whole *= 6
    sixths -= whole  # in [0, 6)
    np.subtract(sixths, CENTRES, out=x)
    np.abs(x, out=x)
    x.clip(1, 2, out=x)
    x *= spread
    lowest -= spread
    red += lowest
    value += spread
    np.subtract(value, x[1:], out=x[1:])


_JITTER = (_brightness, _contrast, _saturation, _hue)
CENTRES = np.array([3, 2, 4], np.float32)[:, None, None, None]  # H of least red, most green, blue


def _grey(x: np.ndarray, chosen: np.ndarray) -> None:
    red, green, blue = x[:, chosen]
    x[:, chosen] = LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue


def _blur(x: np.ndarray, sigmas: np.ndarray) -> None:
    """As in _crop, blocks of B pixels are products of weights and the T pixels under them."""
    chosen, size = np.flatnonzero(sigmas), x.shape[2]
    reach, pixel = size // 10 // 2, np.arange(size)
    bell = np.exp(-0.5 * (pixel[: BAND + reach].astype(np.float32) / sigmas[chosen][:, None]) ** 2)
    bell[:, reach + 1 :] = 0
    bands = []
    for b in blocks(0, size, BAND):
        near = slice(max(0, b.start - reach), b.stop + reach)
        weight = bell.take(np.abs(pixel[near, None] - pixel[b]), axis=1)  # (n, T, B)
        weight /= weight.sum(axis=1, keepdims=True)
        bands.append((b, near, weight))
    y, z = x[:, chosen], np.empty((3, len(chosen), size, size), np.float32)
    for b, near, weight in bands:
        np.matmul(y[..., near], weight, out=z[..., b])  # (S, T) @ (T, B)
    for b, near, weight in bands:
        np.matmul(weight.swapaxes(1, 2), z[:, :, near], out=y[:, :, b])  # (B, T) @ (T, S)
    x[:, chosen] = y
