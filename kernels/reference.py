"""Every operation of the kernels in plain NumPy: the definition that fast paths must equal, to the bit.

A watermark's compositing, the resize, the look-up table, placing and patches, and the pooling of tokens.

It knows nothing about models, files, plans or devices.
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from mmextract.kernels.resample import Filter, Mode, Table, table, vertical_first

Uint8Array = NDArray[np.uint8]
Value = TypeVar("Value", bound=np.generic)
"""Whatever number the model takes; these operations only move it."""


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


def scale_alpha(mask: Uint8Array, opacity: int) -> Uint8Array:
    """Return the alpha of ink of this opacity (0 to 255) seen through `mask` (uint8 [h, w]).

    Equal to text that Pillow draws into an empty "L" image with `fill=opacity`, if `mask` was drawn with 255.
    """
    scaled = divide_255(mask.astype(np.uint32) * np.uint32(opacity) + np.uint32(128))
    return scaled.astype(np.uint8)


def pad(
    image: Uint8Array, canvas: tuple[int, int], corner: tuple[int, int], color: tuple[int, int, int]
) -> Uint8Array:
    """Lay uint8 [H, W, 3] on a canvas (height, width) of one colour, its top left corner at (top, left)."""
    out = np.empty((*canvas, 3), np.uint8)
    out[:] = color
    out[corner[0] : corner[0] + image.shape[0], corner[1] : corner[1] + image.shape[1]] = image
    return out


def resize(image: Uint8Array, size: tuple[int, int], filter: Filter, mode: Mode) -> Uint8Array:
    """Resize uint8 [H, W, C] to (height, width) as Pillow or torchvision does; see `resample`.

    Raises ValueError for an unknown filter or mode and for a size below one.
    """
    tables = [table(filter, mode, n_in, n_out) for n_in, n_out in zip(image.shape[:2], size, strict=True)]
    source = (image.shape[0], image.shape[1])
    for axis in (0, 1) if vertical_first(mode, source, size) else (1, 0):
        image = resample(image, tables[axis], axis)
    return image


def resample(image: Uint8Array, made: Table, axis: int) -> Uint8Array:
    """Run one pass of a resize along `axis` of uint8 [H, W, C]."""
    lines = np.moveaxis(image, axis, 0)
    if made.n_taps == 1:  # a copy, or nearest
        return np.moveaxis(lines[made.starts], 0, axis)
    total = np.full((len(made.starts), *lines.shape[1:]), 1 << (made.bits - 1), np.int32)
    for tap in range(made.n_taps):
        used = np.minimum(made.starts + tap, len(lines) - 1)  # beyond the last line the weight is zero
        total += lines[used].astype(np.int32) * made.weights[:, tap, None, None]
    return np.moveaxis(np.clip(total >> made.bits, 0, 255).astype(np.uint8), 0, axis)


def normalize(image: Uint8Array, lut: NDArray[Value]) -> NDArray[Value]:
    """Turn uint8 [H, W, 3] into [3, H, W], each level into the value that `lut` ([3, 256]) has for its channel."""
    return np.stack([lut[channel][image[..., channel]] for channel in range(3)])


def place(values: NDArray[Value], window: tuple[int, int, int, int], fill: NDArray[Value]) -> NDArray[Value]:
    """Cut (top, left, height, width) out of [3, H, W]; where the window reaches beyond there is `fill` ([3])."""
    top, left, height, width = window
    out = np.empty((3, height, width), values.dtype)
    out[:] = fill[:, None, None]
    bottom, right = min(top + height, values.shape[1]), min(left + width, values.shape[2])
    rows, columns = slice(max(top, 0), bottom), slice(max(left, 0), right)
    if rows.start < bottom and columns.start < right:
        out[:, rows.start - top : bottom - top, columns.start - left : right - left] = values[
            :, rows, columns
        ]
    return out


def patchify(values: NDArray[Value], patch: int, merge: int, frames: int) -> NDArray[Value]:
    """Cut [3, H, W] into Qwen2-VL's flattened patches, [n_patches, 3 · frames · patch²], `frames` times the same.

    Patches go block by block of `merge` × `merge`. H and W must be multiples of patch · merge; ValueError otherwise.
    Source: transformers `Qwen2VLImageProcessor.patchify`.
    """
    rows, columns = values.shape[1] // (merge * patch), values.shape[2] // (merge * patch)
    if values.shape[1:] != (rows * merge * patch, columns * merge * patch):
        raise ValueError(
            f"patches need sizes that are multiples of {merge * patch} pixels, got {values.shape[1:]}"
        )
    cut = values.reshape(3, rows, merge, patch, columns, merge, patch).transpose(1, 4, 2, 5, 0, 3, 6)
    repeated = np.repeat(
        cut[:, :, :, :, :, None], frames, axis=5
    )  # [rows, columns, m, m, 3, frames, patch, patch]
    return repeated.reshape(-1, 3 * frames * patch * patch)


def pool(
    states: NDArray[np.float32], tokens: NDArray[np.int32], bounds: NDArray[np.int32]
) -> NDArray[np.float32]:
    """Pool float32 [B, T, D] into [P, B, D]: the mean over tokens[bounds[p, b, 0] : bounds[p, b, 1]] of sample b.

    Summed in float32, token after token. NaN where there is no token.
    """
    n_positions, n_samples = bounds.shape[:2]
    out = np.full((n_positions, n_samples, states.shape[2]), np.nan, np.float32)
    for position, sample in np.ndindex(n_positions, n_samples):
        begin, end = bounds[position, sample]
        if begin < end:
            chosen = states[sample, tokens[begin:end]]  # [n, D]
            out[position, sample] = np.cumsum(chosen, axis=0, dtype=np.float32)[-1] / np.float32(end - begin)
    return out
