"""What pixels must look like before they enter a network with published weights."""

from dataclasses import dataclass

import numpy as np

from ..augment import CENTRE, batch_shape, center_view, crop_resize
from ..backend import Array, xp_of

# Mean and standard deviation per channel, of pixels in [0, 1].
PIXELS = {
    "unit": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),  # [0, 1] as they are: SimCLR
    "symmetric": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),  # [-1, 1]: InceptionV3
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),  # torchvision's ResNets
}


@dataclass(frozen=True)
class Preprocessing:
    """Resize to size x size px (bilinear, antialiased), then standardise as PIXELS says.

    SimCLR's networks ("unit") get the centre view that they are evaluated on. Raises ValueError for
    an impossible size or an unknown name.
    """

    size: int
    pixels: str = "unit"

    def __post_init__(self) -> None:
        if not 0 < self.size <= 4096 or self.pixels not in PIXELS:
            raise ValueError(f"unknown preprocessing: {self.size} px, {self.pixels!a}")

    @property
    def stored(self) -> int:
        """Side, in px, at which pictures are stored so that this hardly resizes them."""
        return round(self.size / CENTRE) if self.pixels == "unit" else self.size

    def __call__(self, images: Array) -> Array:
        """images (N, H, W, 3) uint8 -> (N, size, size, 3) float32"""
        if self.pixels == "unit":
            return center_view(images, self.size)
        n, height, width = batch_shape(images)
        boxes = np.full((n, 4), [0, 0, width, height], np.float32)
        x = crop_resize(images, boxes, np.zeros(n, bool), self.size)
        mean, std = (xp_of(x).asarray(numbers, x.dtype) for numbers in PIXELS[self.pixels])
        return (x - mean) / std
