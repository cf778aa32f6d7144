"""The second pass of a resize, and all that follows: sums along the other axis, look-up table, the model's layout.

An output element is one sum of at most `TAPS` bytes, turned into the model's number by a table of 3×256 and written
once (Qwen2-VL: once a repeated frame), in the order of memory. Outside the resized image there is padding.

It knows nothing about how the table was filled or which processor it stands for; see `ragged` for the batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mmextract.kernels import fields
from mmextract.kernels.layout import SECOND_TILE
from mmextract.kernels.ragged import Ragged
from mmextract.kernels.resize_first import require_bytes
from mmextract.kernels.triton_support import jit, require_device, tl


@dataclass(frozen=True, kw_only=True)
class Patches:
    """How Qwen2-VL cuts an image: square patches, in blocks of `merge` × `merge`, each repeated `frames` times."""

    patch: int = 14
    merge: int = 2
    frames: int = 2

    def __post_init__(self) -> None:
        if min(self.patch, self.merge, self.frames) < 1:
            raise ValueError(f"patch, merge and frames must be at least 1, got {self}")

    @property
    def size(self) -> int:
        """Values of one flattened patch."""
        return 3 * self.frames * self.patch**2


@jit
def _resize_second_kernel(  # type: ignore[no-untyped-def]
    middle_ptr,  # uint8, of each image [3, n_lines, first_out] (AXIS 0) or [first_out, n_lines, 3] (AXIS 1)
    images_ptr,  # int64 [n_images, fields.N_FIELDS]
    tables_ptr,  # int32
    tiles_ptr,  # int32 [n_programs, 3]
    lut_ptr,  # [3, 256]
    fill_ptr,  # [3]
    out_ptr,  # like lut, of each image [3, height, width], or patches [n, 3, FRAMES, PATCH, PATCH]
    AXIS: tl.constexpr,
    TAPS: tl.constexpr,
    PATCH: tl.constexpr,  # 0: no patches
    MERGE: tl.constexpr,
    FRAMES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    image_ptr = images_ptr + tl.load(tiles_ptr + program * 3).to(tl.int64) * fields.N_FIELDS
    out_height = tl.load(image_ptr + fields.OUT_HEIGHT).to(tl.int32)
    out_width = tl.load(image_ptr + fields.OUT_WIDTH).to(tl.int32)
    element = tl.load(tiles_ptr + program * 3 + 1) * BLOCK + tl.arange(0, BLOCK)
    if PATCH == 0:
        channel = element // (out_height * out_width)
        y, x = element // out_width % out_height, element % out_width
    else:
        patch, inner = element // (3 * PATCH * PATCH), element % (PATCH * PATCH)
        channel = element // (PATCH * PATCH) % 3
        block, blocks_a_row = patch // (MERGE * MERGE), out_width // (PATCH * MERGE)
        patch_y = block // blocks_a_row * MERGE + patch // MERGE % MERGE
        patch_x = block % blocks_a_row * MERGE + patch % MERGE
        y, x = patch_y * PATCH + inner // PATCH, patch_x * PATCH + inner % PATCH

    first_out, n_lines = tl.load(image_ptr + fields.FIRST_OUT), tl.load(image_ptr + fields.N_LINES)
    taps, second_out = tl.load(image_ptr + fields.SECOND_TAPS), tl.load(image_ptr + fields.SECOND_OUT)
    bits = tl.load(image_ptr + fields.SECOND_BITS).to(tl.int32)
    y -= tl.load(image_ptr + fields.TOP).to(tl.int32)
    x -= tl.load(image_ptr + fields.LEFT).to(tl.int32)
    written = element < 3 * out_height * out_width
    if AXIS == 0:
        along, across, line_ptr = y, x, channel * n_lines * first_out + x
        pitch = first_out
    else:
        along, across, line_ptr = x, y, y * n_lines * 3 + channel
        pitch = 3
    shown = written & (along >= 0) & (along < second_out) & (across >= 0) & (across < first_out)

    line_ptr += middle_ptr + tl.load(image_ptr + fields.MIDDLE)
    weights_ptr = tables_ptr + tl.load(image_ptr + fields.SECOND_TABLE) + along * (taps + fields.TABLE_HEAD)
    start = tl.load(weights_ptr, mask=shown, other=0)
    background = (tl.load(image_ptr + fields.BACKGROUND).to(tl.int32) >> (8 * channel)) & 255
    total = tl.load(weights_ptr + 2, mask=shown, other=0) * background + (1 << (bits - 1))
    for tap in range(TAPS):
        line = start + tap
        used = shown & (tap < taps) & (line < n_lines)
        weight = tl.load(weights_ptr + fields.TABLE_HEAD + tap, mask=used, other=0)
        total += weight * tl.load(line_ptr + line * pitch, mask=used, other=0).to(tl.int32)
    level = tl.minimum(tl.maximum(total >> bits, 0), 255)

    value = tl.load(lut_ptr + channel * 256 + level, mask=shown)
    value = tl.where(shown, value, tl.load(fill_ptr + channel, mask=written))
    base_ptr = out_ptr + tl.load(image_ptr + fields.OUT) * (3 * FRAMES)
    if PATCH == 0:
        tl.store(base_ptr + element, value, mask=written)
    else:
        # [patch, channel] of the element, each taking FRAMES times as much room
        place = element // (PATCH * PATCH) * (FRAMES * PATCH * PATCH) + inner
        for frame in range(FRAMES):
            tl.store(base_ptr + place + frame * (PATCH * PATCH), value, mask=written)


def resize_second(
    middle: torch.Tensor,
    batch: Ragged,
    lut: torch.Tensor,
    fill: torch.Tensor,
    *,
    patches: Patches | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Run the second pass of every image's resize and write what the model takes.

    middle: uint8 [batch.n_middle], from `resize_first`. lut: [3, 256] in the dtype of the result, the value of each
    level in each channel. fill: [3] likewise, the value of padding.

    Returns pixel_values, `out` if given: [n_images, 3, height, width], for which all images must share a window; or,
    given `patches`, [n_patches, patches.size], image after image in Qwen2-VL's order.

    Raises ValueError for shapes that do not fit, ModuleNotFoundError without Triton.
    """
    _require_table(lut, fill)
    require_bytes("middle", middle, batch.n_middle)
    shape = _out_shape(batch, patches)
    values = torch.empty(shape, dtype=lut.dtype, device=lut.device) if out is None else out
    if values.shape != shape or values.dtype != lut.dtype:
        raise ValueError(f"out must be {lut.dtype} {list(shape)}, got {values.dtype} {list(values.shape)}")
    require_device(middle, batch.images, lut, fill, values)
    cut = patches or Patches(patch=1, merge=1, frames=1)
    for launch in batch.second:
        _resize_second_kernel[(len(launch.tiles),)](
            middle,
            batch.images,
            batch.tables,
            launch.tiles,
            lut,
            fill,
            values,
            AXIS=launch.axis,
            TAPS=launch.variant,
            PATCH=cut.patch if patches else 0,
            MERGE=cut.merge,
            FRAMES=cut.frames,
            BLOCK=SECOND_TILE,
            num_warps=4,
        )
    return values


def _out_shape(batch: Ragged, patches: Patches | None) -> torch.Size:
    if patches:
        step = patches.patch * patches.merge
        ragged = [size for size in batch.windows if size[0] % step or size[1] % step]
        if ragged:
            raise ValueError(f"patches need outputs that are multiples of {step} pixels, got {ragged[0]}")
        return torch.Size((batch.n_out // patches.patch**2, patches.size))
    sizes = set(batch.windows)
    if len(sizes) > 1:
        raise ValueError(f"images of one pixel_values tensor must share one output size, got {sorted(sizes)}")
    height, width = sizes.pop() if sizes else (0, 0)
    return torch.Size((len(batch.windows), 3, height, width))


def _require_table(lut: torch.Tensor, fill: torch.Tensor) -> None:
    if lut.shape != (3, 256) or fill.shape != (3,) or lut.dtype != fill.dtype:
        raise ValueError(
            f"lut must be [3, 256] and fill [3] of one dtype, got {list(lut.shape)} {lut.dtype} and "
            f"{list(fill.shape)} {fill.dtype}"
        )
