"""The first pass of a resize: reads each source pixel, lays the watermark on, sums along one axis into uint8.

Along x the sums are a matrix product: 32 rows of pixels times a band of weights, in signed bytes with 32-bit sums, for
which every GPU since sm_80 has tensor cores. A pixel less 128 is a signed byte; a weight of 24 bits is three of them.
So each pixel is loaded once a tile rather than once a tap, and the sums are exact to the bit, modulo 2^32, within which
the result lies. Along y rows are contiguous, and plain multiplication does: a few output rows at a time, so that a
source row is read once for all of them.

It knows nothing about filters, processors or what becomes of the result; see `ragged` for the batch.
"""

from __future__ import annotations

import torch

from mmextract.kernels import fields
from mmextract.kernels.layout import COLUMN_TILE, ROW_TILE
from mmextract.kernels.ragged import Ragged
from mmextract.kernels.triton_support import jit, require_device, tl


@jit
def _divide_255(value):  # type: ignore[no-untyped-def]
    return ((value >> 8) + value) >> 8


@jit
def _alpha(y, x, inside, masks_ptr, image_ptr):  # type: ignore[no-untyped-def]
    """Return the ink's alpha (int32) at pixels (y, x) of the source, int32 that broadcast; 0 outside the mask."""
    mask_ptr = masks_ptr + tl.load(image_ptr + fields.MASK)
    height = tl.load(image_ptr + fields.MASK_HEIGHT).to(tl.int32)
    width = tl.load(image_ptr + fields.MASK_WIDTH).to(tl.int32)
    y -= tl.load(image_ptr + fields.MASK_Y).to(tl.int32)
    x -= tl.load(image_ptr + fields.MASK_X).to(tl.int32)
    inside &= (y >= 0) & (y < height) & (x >= 0) & (x < width)
    cover = tl.load(mask_ptr + (y * width + x), mask=inside, other=0).to(tl.int32)
    return _divide_255(cover * tl.load(image_ptr + fields.OPACITY).to(tl.int32) + 128)


@jit
def _blend(pixels, alpha, channel, image_ptr):  # type: ignore[no-untyped-def]
    """Lay ink over `pixels` (uint8); see reference.composite_text."""
    ink = (tl.load(image_ptr + fields.COLOR).to(tl.int32) >> (8 * channel)) & 255
    return _divide_255(ink * alpha + pixels.to(tl.int32) * (255 - alpha) + 128).to(tl.uint8)


@jit
def _background(image_ptr, channel):  # type: ignore[no-untyped-def]
    return (tl.load(image_ptr + fields.BACKGROUND).to(tl.int32) >> (8 * channel)) & 255


@jit
def _multiply(pixels, low, middle, high, low_sum, middle_sum, high_sum):  # type: ignore[no-untyped-def]
    signed = (pixels ^ 128).to(tl.int8, bitcast=True)  # the pixel less 128
    return (
        tl.dot(signed, low, low_sum, out_dtype=tl.int32),
        tl.dot(signed, middle, middle_sum, out_dtype=tl.int32),
        tl.dot(signed, high, high_sum, out_dtype=tl.int32),
    )


@jit
def _finish(low_sum, middle_sum, high_sum, rest, bits):  # type: ignore[no-untyped-def]
    total = low_sum + (middle_sum << 8) + (high_sum << 16) + rest
    return tl.minimum(tl.maximum(total >> bits, 0), 255).to(tl.uint8)


@jit
def _resize_first_rows_kernel(  # type: ignore[no-untyped-def]
    packed_ptr,  # uint8, images of [H, W, 3]
    masks_ptr,  # uint8, masks of [h, w]
    images_ptr,  # int64 [n_images, fields.N_FIELDS]
    tables_ptr,  # int32
    tiles_ptr,  # int32 [n_programs, 3]
    middle_ptr,  # uint8, images of [3, n_lines, first_out]
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
):
    tile_ptr = tiles_ptr + tl.program_id(0).to(tl.int64) * 3
    image_ptr = images_ptr + tl.load(tile_ptr).to(tl.int64) * fields.N_FIELDS
    first_row = tl.load(tile_ptr + 1) * ROWS
    width = tl.load(image_ptr + fields.WIDTH).to(tl.int32)
    n_lines = tl.load(image_ptr + fields.N_LINES).to(tl.int32)
    n_out = tl.load(image_ptr + fields.FIRST_OUT).to(tl.int32)
    taps = tl.load(image_ptr + fields.FIRST_TAPS).to(tl.int32)
    bits = tl.load(image_ptr + fields.FIRST_BITS).to(tl.int32)

    row = tl.arange(0, ROWS)[:, None]  # [ROWS, 1], of the tile
    kept = first_row + row < n_lines
    column = tl.load(tile_ptr + 2) * COLUMNS + tl.arange(0, COLUMNS)  # [COLUMNS], of the output
    # past the last column its weights are repeated and not stored
    table_ptr = tables_ptr + tl.load(image_ptr + fields.FIRST_TABLE)
    weights_at = tl.minimum(column, n_out - 1) * (taps + fields.TABLE_HEAD)
    start = tl.load(table_ptr + weights_at)  # [COLUMNS]
    begin = tl.min(start, axis=0)
    end = tl.minimum(tl.max(start, axis=0) + taps, width)

    first_y = tl.load(image_ptr + fields.LINE_START).to(tl.int32) + first_row
    # addresses of 64 bits for the tile, of 32 within it
    source_ptr = packed_ptr + tl.load(image_ptr + fields.SOURCE) + first_y.to(tl.int64) * width * 3
    mask_x, mask_y = tl.load(image_ptr + fields.MASK_X), tl.load(image_ptr + fields.MASK_Y)
    mask_right = mask_x + tl.load(image_ptr + fields.MASK_WIDTH)
    marked = (mask_y < first_y + ROWS) & (mask_y + tl.load(image_ptr + fields.MASK_HEIGHT) > first_y)

    red_0 = tl.zeros((ROWS, COLUMNS), tl.int32)
    red_1, red_2 = red_0, red_0
    green_0, green_1, green_2 = red_0, red_0, red_0
    blue_0, blue_1, blue_2 = red_0, red_0, red_0
    for step in range(begin, end, STEP):
        x = step + tl.arange(0, STEP)  # [STEP]
        tap = x[:, None] - start[None, :]  # [STEP, COLUMNS]
        used = (tap >= 0) & (tap < taps) & (x < end)[:, None]
        weight = tl.load(table_ptr + (weights_at[None, :] + fields.TABLE_HEAD + tap), mask=used, other=0)
        low = weight.to(tl.int8)  # the lowest byte, signed
        rest = (weight - low) >> 8
        middle = rest.to(tl.int8)
        high = ((rest - middle) >> 8).to(tl.int8)

        inside = kept & (x < end)[None, :]  # [ROWS, STEP]
        pixel_ptr = source_ptr + (row * width + x[None, :]) * 3
        red = tl.load(pixel_ptr, mask=inside, other=0)
        green = tl.load(pixel_ptr + 1, mask=inside, other=0)
        blue = tl.load(pixel_ptr + 2, mask=inside, other=0)
        if marked & (mask_x < step + STEP) & (mask_right > step):
            alpha = _alpha(first_y + row, x[None, :], inside, masks_ptr, image_ptr)
            red = _blend(red, alpha, 0, image_ptr)
            green = _blend(green, alpha, 1, image_ptr)
            blue = _blend(blue, alpha, 2, image_ptr)
        red_0, red_1, red_2 = _multiply(red, low, middle, high, red_0, red_1, red_2)
        green_0, green_1, green_2 = _multiply(green, low, middle, high, green_0, green_1, green_2)
        blue_0, blue_1, blue_2 = _multiply(blue, low, middle, high, blue_0, blue_1, blue_2)

    correction = (tl.load(table_ptr + weights_at + 1) * 128 + (1 << (bits - 1)))[None, :]
    outside = tl.load(table_ptr + weights_at + 2)[None, :]
    red_rest = correction + outside * _background(image_ptr, 0)
    green_rest = correction + outside * _background(image_ptr, 1)
    blue_rest = correction + outside * _background(image_ptr, 2)
    stored = kept & (column < n_out)[None, :]
    plane = n_lines.to(tl.int64) * n_out
    out_ptr = middle_ptr + tl.load(image_ptr + fields.MIDDLE) + first_row.to(tl.int64) * n_out
    out_ptr += row * n_out + column[None, :]
    tl.store(out_ptr, _finish(red_0, red_1, red_2, red_rest, bits), mask=stored)
    tl.store(out_ptr + plane, _finish(green_0, green_1, green_2, green_rest, bits), mask=stored)
    tl.store(out_ptr + 2 * plane, _finish(blue_0, blue_1, blue_2, blue_rest, bits), mask=stored)


@jit
def _resize_first_columns_kernel(  # type: ignore[no-untyped-def]
    packed_ptr,  # uint8, images of [H, W, 3]
    masks_ptr,  # uint8, masks of [h, w]
    images_ptr,  # int64 [n_images, fields.N_FIELDS]
    tables_ptr,  # int32
    tiles_ptr,  # int32 [n_programs, 3]
    middle_ptr,  # uint8, images of [first_out, n_lines, 3]
    ROWS: tl.constexpr,
    BYTES: tl.constexpr,
    ALIGNED: tl.constexpr,  # every row of the source, from its first kept byte on, begins at a multiple of 16 bytes
):
    tile_ptr = tiles_ptr + tl.program_id(0).to(tl.int64) * 3
    image_ptr = images_ptr + tl.load(tile_ptr).to(tl.int64) * fields.N_FIELDS
    height, pitch = tl.load(image_ptr + fields.HEIGHT), tl.load(image_ptr + fields.WIDTH) * 3
    line_start, line_bytes = tl.load(image_ptr + fields.LINE_START), tl.load(image_ptr + fields.N_LINES) * 3
    n_out = tl.load(image_ptr + fields.FIRST_OUT).to(tl.int32)
    taps = tl.load(image_ptr + fields.FIRST_TAPS).to(tl.int32)
    bits = tl.load(image_ptr + fields.FIRST_BITS).to(tl.int32)
    source = tl.load(image_ptr + fields.SOURCE) + line_start * 3
    if ALIGNED:
        source, pitch = tl.multiple_of(source, 16), tl.multiple_of(pitch, 16)
        line_bytes = tl.multiple_of(line_bytes, 16)

    row = tl.load(tile_ptr + 1) * ROWS + tl.arange(0, ROWS)  # [ROWS], of the output
    byte = tl.load(tile_ptr + 2) * BYTES + tl.arange(0, BYTES)  # [BYTES], of a row
    kept = byte < line_bytes
    table_ptr = tables_ptr + tl.load(image_ptr + fields.FIRST_TABLE)
    weights_at = tl.minimum(row, n_out - 1) * (taps + fields.TABLE_HEAD)
    start = tl.load(table_ptr + weights_at)  # [ROWS]
    begin = tl.min(start, axis=0)
    end = tl.minimum(tl.max(start, axis=0) + taps, height.to(tl.int32))

    mask_y, mask_height = tl.load(image_ptr + fields.MASK_Y), tl.load(image_ptr + fields.MASK_HEIGHT)
    outside = tl.load(table_ptr + weights_at + 2)[:, None]  # [ROWS, 1]
    total = outside * _background(image_ptr, byte % 3)[None, :] + (1 << (bits - 1))  # [ROWS, BYTES]
    for y in range(begin, end):
        tap = y - start
        weight = tl.load(
            table_ptr + weights_at + fields.TABLE_HEAD + tap, mask=(tap >= 0) & (tap < taps), other=0
        )  # [ROWS]
        pixels = tl.load(packed_ptr + (source + y * pitch) + byte, mask=kept, other=0)
        if (y >= mask_y) & (y < mask_y + mask_height):
            x = line_start.to(tl.int32) + byte // 3
            pixels = _blend(pixels, _alpha(y, x, kept, masks_ptr, image_ptr), byte % 3, image_ptr)
        total += weight[:, None] * pixels[None, :].to(tl.int32)

    out = tl.load(image_ptr + fields.MIDDLE) + row.to(tl.int64)[:, None] * line_bytes
    stored = (row < n_out)[:, None] & kept[None, :]
    level = tl.minimum(tl.maximum(total >> bits, 0), 255).to(tl.uint8)
    tl.store(middle_ptr + out + byte[None, :], level, mask=stored)


def resize_first(
    packed: torch.Tensor, masks: torch.Tensor, batch: Ragged, *, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Composite the watermarks and run the first pass of every image's resize.

    packed: uint8, flat, the images' pixels. masks: uint8, flat, the watermarks' masks. Both and `batch` on one device.
    Returns uint8 [batch.n_middle], `out` if given: what `resize_second` takes.

    Raises ValueError for a buffer that the batch reaches beyond, ModuleNotFoundError without Triton.
    """
    middle = torch.empty(batch.n_middle, dtype=torch.uint8, device=packed.device) if out is None else out
    require_bytes("packed pixels", packed, batch.n_source)
    require_bytes("masks", masks, batch.n_masks)
    require_bytes("out", middle, batch.n_middle)
    require_device(packed, masks, middle, batch.images)
    for launch in batch.first:
        buffers = (packed, masks, batch.images, batch.tables, launch.tiles, middle)
        grid = (len(launch.tiles),)
        if launch.axis == 1:
            rows, columns = ROW_TILE
            step = launch.variant
            _resize_first_rows_kernel[grid](
                *buffers, ROWS=rows, COLUMNS=columns, STEP=step, num_warps=warps_for(step)
            )
        else:
            rows, n_bytes = COLUMN_TILE
            _resize_first_columns_kernel[grid](
                *buffers, ROWS=rows, BYTES=n_bytes, ALIGNED=bool(launch.variant)
            )
    return middle


def warps_for(step: int) -> int:
    """Return how many warps share a tile of the first pass along x, so that its registers suffice."""
    return step // 8


def require_bytes(name: str, buffer: torch.Tensor, n_bytes: int) -> None:
    """Raise ValueError unless `buffer` is flat, uint8 and holds at least `n_bytes`."""
    if buffer.dtype != torch.uint8 or buffer.dim() != 1 or len(buffer) < n_bytes:
        raise ValueError(
            f"{name} must be a flat uint8 tensor of at least {n_bytes} bytes, "
            f"got {buffer.dtype} {list(buffer.shape)}"
        )
