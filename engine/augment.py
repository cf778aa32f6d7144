"""An image as an augmentation would show it: turned, mirrored, brighter or darker, with more or less contrast.

The published baseline of gradient similarity (arXiv 2503.01208): rotation by up to 30° either way with the canvas
expanded, a horizontal flip half of the time, brightness and contrast by a factor from 0.8 to 1.2. What is drawn is a
pure function of a key. This module knows nothing about samples or models.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageEnhance

from mmextract.engine.watermark import random_numbers
from mmextract.kernels.reference import Uint8Array

LARGEST_ANGLE = 30.0
FLIP_SHARE = 0.5
SMALLEST_FACTOR, LARGEST_FACTOR = 0.8, 1.2


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """What is done to one image, in this order."""

    angle: float
    """Degrees counter-clockwise; the canvas grows so that nothing is cut off, and its corners are black."""
    flip: bool
    """Left and right swapped."""
    brightness: float
    """Factor, 1 for none."""
    contrast: float
    """Factor, 1 for none."""


def draw_augmentation(key: str) -> Augmentation:
    """Return what is done to the image of `key`."""
    angle, flip, brightness, contrast = random_numbers(key)
    span = LARGEST_FACTOR - SMALLEST_FACTOR
    return Augmentation(
        angle=LARGEST_ANGLE * (2 * angle - 1),
        flip=flip < FLIP_SHARE,
        brightness=SMALLEST_FACTOR + span * brightness,
        contrast=SMALLEST_FACTOR + span * contrast,
    )


def augment(pixels: Uint8Array, augmentation: Augmentation) -> Uint8Array:
    """Return an augmented copy of an image, uint8 [H, W, 3] → [H', W', 3], with H' ≥ H and W' ≥ W."""
    image = Image.fromarray(pixels).rotate(augmentation.angle, Image.Resampling.BILINEAR, expand=True)
    if augmentation.flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    image = ImageEnhance.Brightness(image).enhance(augmentation.brightness)
    return np.asarray(ImageEnhance.Contrast(image).enhance(augmentation.contrast))
