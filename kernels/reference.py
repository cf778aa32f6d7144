"""Every image operation of the engine in plain NumPy: the definition that fast paths must equal.

So far one: a watermark's compositing.

It knows nothing about models, files, plans or devices.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Uint8Array = NDArray[np.uint8]


def divide_255(value: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """Rounded division by 255 as Pillow does it, for `value` already offset by 128.

    Source: Pillow `AlphaComposite.c`, macro SHIFTFORDIV255: `((a >> 8) + a) >> 8`.
    """
    return ((value >> np.uint32(8)) + value) >> np.uint32(8)


def composite_text(
    image: Uint8Array, alpha: Uint8Array, x: int, y: int, color: tuple[int, int, int]
) -> Uint8Array:
    """Lay one colour over an opaque image, through an alpha mask, and return the result as a new array.

    image: uint8 [H, W, 3]. alpha: uint8 [h, w], opacity of the ink at each pixel. (x, y): where the mask's top left
    corner falls in the image, in pixels; the mask may cross any edge. color: RGB of the ink.

    Equal to Pillow's `Image.alpha_composite` on all 2^24 (source, destination, alpha) triples, because for an opaque
    destination its general formula reduces to `S(s·a + d·(255 − a) + 128)`, with S as in `divide_255`.
    """
    out = image.copy()
    height, width = image.shape[:2]
    top, left = max(y, 0), max(x, 0)
    bottom, right = min(y + alpha.shape[0], height), min(x + alpha.shape[1], width)
    if top >= bottom or left >= right:
        return out
    a = alpha[top - y : bottom - y, left - x : right - x, None].astype(np.uint32)  # [h, w, 1]
    under = out[top:bottom, left:right].astype(np.uint32)  # [h, w, 3]
    ink = np.asarray(color, np.uint32)
    out[top:bottom, left:right] = divide_255(ink * a + under * (np.uint32(255) - a) + np.uint32(128))
    return out
