"""Toydogs: cartoon portraits of twelve dog breeds, each drawn from its number; no download.

A breed fixes coat colours, ear shape, markings, snout and proportions. Pose, scale, expression,
light and background vary from image to image. Four breeds have their own colours of coat, trim and
ears; the other eight share theirs in pairs, which only shape and markings tell apart.
Backgrounds are muted on purpose: with vivid ones, the background is an easier cue than the dog for
matching two crops of one picture.

Shapes are given in head coordinates: origin between the eyes, x to the right, y down, one unit =
half a head. Everything is a closed outline or an oval, painted back to front.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from ..errors import ConfigError
from .source import Job, Options, Plan, Source

VERSION = 2  # of the drawing: raise it whenever a pixel of any image changes
IMAGE_SIZE = 40  # px stored per side, a little more than the 32 px that training crops to
SPLIT_SIZES = {"pretrain": 4000, "labelled": 400, "test": 1200}  # in this order, SPLITS' own
SUPERSAMPLING = 4  # drawn this much larger, then averaged, for smooth edges

COLOURS = {
    "black": (62, 58, 64),
    "grey": (138, 142, 150),
    "white": (240, 237, 230),
    "red": (200, 128, 68),
    "fawn": (216, 184, 142),
    "brown": (124, 80, 54),
    "pink": (226, 140, 140),
}
# Control points of the right ear; the left one is its mirror image.
EARS = {
    "prick": ((0.15, -0.75), (0.55, -1.75), (0.75, -1.75), (1.05, -0.20), (0.50, -0.30)),
    "bat": ((0.20, -0.65), (0.45, -1.65), (0.95, -2.00), (1.25, -1.40), (0.95, -0.20)),
    "tipped": ((0.25, -0.70), (0.60, -1.55), (0.95, -1.40), (1.60, -0.85), (0.90, -0.30)),
    "button": ((0.30, -0.95), (0.85, -1.20), (1.35, -0.75), (1.00, 0.15), (0.65, -0.50)),
    "drop": ((0.45, -0.90), (1.10, -0.95), (1.50, 0.10), (1.20, 0.85), (0.80, 0.00)),
    "long": ((0.45, -0.85), (1.15, -0.85), (1.55, 0.70), (1.25, 1.65), (0.80, 0.80)),
}
HANGING = {"button", "drop", "long"}  # ears in front of the head; the others stand behind it
# Ovals on the head: centre x, y, half width, half height; one off the centre line makes a pair.
MARKS = {
    "blaze": ((0.00, -0.45, 0.18, 0.60), (0.00, 0.45, 0.62, 0.42)),
    "mask": ((0.50, 0.45, 0.46, 0.42), (0.36, -0.38, 0.17, 0.11)),
    "goggles": ((0.40, -0.04, 0.36, 0.32),),
    "beard": ((0.36, 0.85, 0.36, 0.55), (0.38, -0.36, 0.26, 0.12)),
    "curls": ((0.50, -0.80, 0.50, 0.45), (0.00, -1.15, 0.55, 0.50)),
    "ruff": ((0.85, 0.45, 0.50, 0.60), (0.00, 0.75, 0.80, 0.60)),
    "spots": ((0.62, 0.40, 0.17, 0.14), (0.30, -0.72, 0.18, 0.13), (0.70, -0.32, 0.12, 0.16)),
}


class Breed(NamedTuple):
    """What all dogs of a breed share. Colours are names in COLOURS, sizes half width and height."""

    name: str
    coat: str
    trim: str  # colour of snout, chest and marks; spots have the colour of the ears
    ears: str  # an outline in EARS
    ear: str  # its colour
    mark: str  # a pattern in MARKS
    head: tuple[float, float]
    snout: tuple[float, float]


BREEDS = (
    Breed("beagle", "red", "white", "long", "brown", "blaze", (0.90, 1.00), (0.42, 0.38)),
    Breed("border collie", "black", "white", "tipped", "black", "blaze", (0.92, 1.0), (0.38, 0.4)),
    Breed("boston terrier", "black", "white", "bat", "black", "blaze", (1.08, 0.9), (0.48, 0.34)),
    Breed("corgi", "red", "white", "bat", "red", "blaze", (1.02, 0.90), (0.36, 0.34)),
    Breed("dalmatian", "white", "white", "drop", "black", "spots", (0.90, 1.02), (0.44, 0.40)),
    Breed("husky", "grey", "white", "prick", "grey", "mask", (1.00, 0.96), (0.40, 0.40)),
    Breed("poodle", "white", "white", "long", "white", "curls", (0.80, 0.98), (0.32, 0.46)),
    Breed("pug", "fawn", "black", "button", "black", "goggles", (1.10, 1.00), (0.56, 0.40)),
    Breed("rottweiler", "black", "red", "drop", "black", "mask", (1.04, 1.00), (0.48, 0.40)),
    Breed("samoyed", "white", "white", "prick", "white", "ruff", (1.04, 0.94), (0.38, 0.34)),
    Breed("schnauzer", "grey", "white", "button", "grey", "beard", (0.88, 1.00), (0.46, 0.40)),
    Breed("shiba", "red", "white", "prick", "red", "mask", (1.04, 0.92), (0.36, 0.32)),
)
CLASS_NAMES = tuple(breed.name for breed in BREEDS)
CIRCLE = np.exp(2j * np.pi * np.arange(24) / 24).view(float).reshape(24, 2)


def source(options: Options) -> Source:
    """All pictures, one split after another. Raises ConfigError for options it cannot follow."""
    if options != Options():
        raise ConfigError("toydogs has no boxes, no bad pictures and a fixed split")

    def plan() -> Plan:
        total = sum(SPLIT_SIZES.values())
        labels = np.array([label(index) for index in range(total)], np.int64)
        splits = np.repeat(np.arange(3, dtype=np.uint8), list(SPLIT_SIZES.values()))

        def jobs(size: int) -> Iterator[Job]:
            return ((index, draw, (index, size)) for index in range(total))

        return Plan([f"toydog {i}" for i in range(total)], labels, CLASS_NAMES, splits, jobs)

    return Source("toydogs", VERSION, plan)


def label(index: int) -> int:
    """The breed of an image, a position in CLASS_NAMES; the breeds take turns."""
    return index % len(BREEDS)


def draw(index: int, size: int) -> np.ndarray:
    """Image number `index` as (size, size, 3) uint8: one picture, at any size."""
    rng = np.random.Generator(np.random.Philox(key=index))
    image = _background(rng, size * SUPERSAMPLING)
    _portrait(_Pen(rng, image), BREEDS[label(index)], rng)
    return _light(rng, np.asarray(image.reduce(SUPERSAMPLING)))


def _background(rng, side: int) -> Image.Image:
    """Two muted tones that meet at a horizon, mottled and out of focus."""
    behind = rng.uniform((142, 152, 144), (188, 192, 196))  # sky, wall or trees
    in_front = rng.uniform((110, 118, 90), (172, 156, 122))  # grass, sand or floor
    nearness = np.clip(np.arange(6) - rng.uniform(1, 5), 0, 1)[:, None, None]  # 0 above the horizon
    tones = behind + (in_front - behind) * nearness + rng.uniform(-16, 16, (6, 6, 1))
    return Image.fromarray(tones.astype(np.uint8)).resize((side, side), Image.Resampling.BICUBIC)


def _light(rng, pixels: np.ndarray) -> np.ndarray:
    """Brightness, a warm or cool cast, and light that falls off in some direction."""
    slopes = rng.uniform(-0.2, 0.2, (2, 1)) * np.linspace(-1, 1, len(pixels))
    cast = rng.uniform(0.58, 1.15) * (1 + rng.uniform(-0.06, 0.06) * np.array([1, 0, -1]))
    light = (1 + np.add.outer(*slopes))[:, :, None] * cast  # (size, size, 3)
    return np.clip(pixels * light, 0, 255).astype(np.uint8)


def _smooth(points) -> np.ndarray:
    """A smooth closed curve (8n, 2) from control points (n, 2), by Chaikin's corner cutting."""
    points = np.asarray(points)
    for _ in range(3):
        after = np.roll(points, -1, axis=0)
        points = np.stack([3 * points + after, points + 3 * after], axis=1).reshape(-1, 2) / 4
    return points


class _Pen:
    """Fills shapes given in head coordinates, for one drawn pose of the head."""

    def __init__(self, rng, image: Image.Image):
        self.draw = ImageDraw.Draw(image)
        tilt, self.turn = rng.uniform(-0.5, 0.5), rng.uniform(-1, 1)
        self.centre = image.width * rng.uniform((0.26, 0.34), (0.74, 0.64))
        axes = np.array([[np.cos(tilt), np.sin(tilt)], [-np.sin(tilt), np.cos(tilt)]])
        self.axes = image.width * rng.uniform(0.14, 0.28) * axes  # px per unit of x and of y
        self.tint = rng.uniform(0.75, 1.12) * rng.uniform(0.95, 1.05, 3)  # no two coats are alike

    def fill(self, outline, colour: str, shade: float = 1.0, depth: float = 0.0) -> None:
        """Fill an (n, 2) outline; the nearer to the viewer, the more it moves as the head turns."""
        corners = (outline + np.array([self.turn * depth, 0])) @ self.axes + self.centre  # (n, 2)
        tone = np.clip(np.multiply(COLOURS[colour], shade * self.tint), 0, 255).astype(int)
        self.draw.polygon(np.rint(corners).ravel().tolist(), fill=tuple(tone.tolist()))

    def oval(self, x, y, width, height, colour: str, shade: float = 1.0, depth: float = 0.0):
        self.fill(CIRCLE * (width, height) + (x, y), colour, shade, depth)


def _portrait(pen: _Pen, breed: Breed, rng) -> None:
    """Body, collar, standing ears, head with marks, hanging ears, tongue, snout, nose and eyes."""
    tongue_out, awake = rng.random(2) < (0.5, 0.9)
    ear = _smooth(EARS[breed.ears]) * rng.uniform(0.92, 1.08, 2)
    mirrors = ((-1, 1), (1, 1))

    pen.oval(0, 3.2, 1.2, 2.5, breed.coat, 0.95)
    pen.oval(0, 3.0, 0.6, 2.0, breed.trim)
    pen.oval(0, 1.0, 0.72, 0.28, ("red", "grey", "brown")[rng.integers(3)])
    if breed.ears not in HANGING:
        for mirror in mirrors:
            pen.fill(ear * mirror, breed.ear, 0.94, -0.1)
            pen.fill((0.55 * ear + 0.45 * ear.mean(axis=0)) * mirror, "pink", 0.9, -0.1)
    pen.oval(0, 0, *breed.head, breed.coat)
    for x, y, w, h in MARKS[breed.mark]:
        for side in (-x, x):
            pen.oval(side, y, w, h, breed.ear if breed.mark == "spots" else breed.trim, 1.0, 0.15)
    if breed.ears in HANGING:
        for mirror in mirrors:
            pen.fill(ear * mirror, breed.ear, 0.9, -0.1)
    pen.oval(0, 0.40 + tongue_out * breed.snout[1], 0.17, 0.27, "pink", 1.0, 0.28)
    pen.oval(0, 0.42, *breed.snout, breed.trim, 1.04, 0.28)
    pen.oval(0, 0.28, 0.19, 0.14, "black", 0.6, 0.38)
    for x in (-0.38, 0.38):
        pen.oval(x, -0.08, 0.17, 0.03 + 0.16 * awake, "brown", 1.0, 0.2)
        pen.oval(x, -0.08, 0.13, 0.02 + 0.13 * awake, "black", 0.6, 0.2)
        pen.oval(x + 0.05, -0.14, 0.05, 0.01 + 0.04 * awake, "white", 1.0, 0.2)
