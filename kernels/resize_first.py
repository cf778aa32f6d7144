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
from mmextract.kernels.ragged import COLUMN_TILE, ROW_TILE, Ragged
from mmextract.kernels.triton_support import jit, require_device, tl


@jit
def _divide_255(value):  # type: ignore[no-untyped-def]
    return ((value >> 8) + value) >> 8


@jit
def _composite(pixels, y, x, channel, masks_ptr, image_ptr, inside):  # type: ignore[no-untyped-def]
    """Lay the watermark over `pixels` (int32) at (y, x), shapes that broadcast; see reference.composite_text."""
    mask = tl.load(image_ptr + fields.MASK)
    height, width = tl.load(image_ptr + fields.MASK_HEIGHT), tl.load(image_ptr + fields.MASK_WIDTH)
    mask_x, mask_y = x - tl.load(image_ptr + fields.MASK_X), y - tl.load(image_ptr + fields.MASK_Y)
    color, opacity = tl.load(image_ptr + fields.COLOR).to(tl.int32), tl.load(image_ptr + fields.OPACITY).to(tl.int32)
    inside &= (mask_y >= 0) & (mask_y < height) & (mask_x >= 0) & (mask_x < width)
    cover = tl.load(masks_ptr + mask + mask_y * width + mask_x, mask=inside, other=0).to(tl.int32)
    alpha = _divide_255(cover * opacity + 128)
    ink = (color >> (8 * channel)) & 255
    return _divide_255(ink * alpha + pixels * (255 - alpha) + 128)


@jit
def _channel(source_ptr, masks_ptr, image_ptr, y, x, inside, marked, channel: tl.constexpr):  # type: ignore[no-untyped-def]
    """Load one channel of a tile, watermark on it, as signed bytes: the pixel less 128."""
    width = tl.load(image_ptr + fields.WIDTH)
    pixels = tl.load(source_ptr + (y * width + x) * 3 + channel, mask=inside, other=0)
    if marked:
        pixels = _composite(pixels.to(tl.int32), y, x, channel, masks_ptr, image_ptr, inside).to(tl.uint8)
    return (pixels ^ 128).to(tl.int8, bitcast=True)


@jit
def _multiply(pixels, low, middle, high, low_sum, middle_sum, high_sum):  # type: ignore[no-untyped-def]
    return (
        tl.dot(pixels, low, low_sum, out_dtype=tl.int32),
        tl.dot(pixels, middle, middle_sum, out_dtype=tl.int32),
        tl.dot(pixels, high, high_sum, out_dtype=tl.int32),
    )


@jit
def _finish(low_sum, middle_sum, high_sum, correction, bits):  # type: ignore[no-untyped-def]
    total = low_sum + (middle_sum << 8) + (high_sum << 16) + correction
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
    program = tl.program_id(0).to(tl.int64)
    image_ptr = images_ptr + tl.load(tiles_ptr + program * 3).to(tl.int64) * fields.N_FIELDS
    first_row = tl.load(tiles_ptr + program * 3 + 1).to(tl.int64) * ROWS
    first_column = tl.load(tiles_ptr + program * 3 + 2).to(tl.int64) * COLUMNS
    source_ptr = packed_ptr + tl.load(image_ptr + fields.SOURCE)
    width = tl.load(image_ptr + fields.WIDTH)
    n_lines = tl.load(image_ptr + fields.N_LINES)
    taps, n_out = tl.load(image_ptr + fields.FIRST_TAPS), tl.load(image_ptr + fields.FIRST_OUT)
    bits = tl.load(image_ptr + fields.FIRST_BITS).to(tl.int32)

    row = first_row + tl.arange(0, ROWS)  # [ROWS], of those kept
    column = first_column + tl.arange(0, COLUMNS)  # [COLUMNS], of the output
    y = (tl.load(image_ptr + fields.LINE_START) + row)[:, None]
    # past the last column its weights are repeated and not stored
    weights_ptr = tables_ptr + tl.load(image_ptr + fields.FIRST_TABLE) + tl.minimum(column, n_out - 1) * (taps + 2)
    start = tl.load(weights_ptr)  # [COLUMNS]
    begin = tl.min(start, axis=0).to(tl.int64)
    end = tl.minimum(tl.max(start, axis=0).to(tl.int64) + taps, width)

    mask_x, mask_y = tl.load(image_ptr + fields.MASK_X), tl.load(image_ptr + fields.MASK_Y)
    last_row = tl.load(image_ptr + fields.LINE_START) + first_row + ROWS
    marked_rows = (mask_y < last_row) & (mask_y + tl.load(image_ptr + fields.MASK_HEIGHT) > last_row - ROWS)

    red_0 = tl.zeros((ROWS, COLUMNS), tl.int32)
    red_1, red_2 = red_0, red_0
    green_0, green_1, green_2 = red_0, red_0, red_0
    blue_0, blue_1, blue_2 = red_0, red_0, red_0
    for step in range(begin, end, STEP):
        x = step + tl.arange(0, STEP)  # [STEP]
        tap = x[:, None] - start[None, :]  # [STEP, COLUMNS]
        used = (tap >= 0) & (tap < taps) & (x < end)[:, None]
        weight = tl.load(weights_ptr[None, :] + 2 + tap, mask=used, other=0)
        low = weight.to(tl.int8)  # the lowest byte, signed
        rest = (weight - low) >> 8
        middle = rest.to(tl.int8)
        high = ((rest - middle) >> 8).to(tl.int8)
        inside = (row < n_lines)[:, None] & (x < end)[None, :]
        marked = marked_rows & (mask_x < step + STEP) & (mask_x + tl.load(image_ptr + fields.MASK_WIDTH) > step)
        at_x = x[None, :]
        red = _channel(source_ptr, masks_ptr, image_ptr, y, at_x, inside, marked, 0)
        green = _channel(source_ptr, masks_ptr, image_ptr, y, at_x, inside, marked, 1)
        blue = _channel(source_ptr, masks_ptr, image_ptr, y, at_x, inside, marked, 2)
        red_0, red_1, red_2 = _multiply(red, low, middle, high, red_0, red_1, red_2)
        green_0, green_1, green_2 = _multiply(green, low, middle, high, green_0, green_1, green_2)
        blue_0, blue_1, blue_2 = _multiply(blue, low, middle, high, blue_0, blue_1, blue_2)

    correction = (tl.load(weights_ptr + 1) * 128 + (1 << (bits - 1)))[None, :]
    stored = (row < n_lines)[:, None] & (column < n_out)[None, :]
    plane = n_lines * n_out
    out_ptr = middle_ptr + tl.load(image_ptr + fields.MIDDLE) + row[:, None] * n_out + column[None, :]
    tl.store(out_ptr, _finish(red_0, red_1, red_2, correction, bits), mask=stored)
    tl.store(out_ptr + plane, _finish(green_0, green_1, green_2, correction, bits), mask=stored)
    tl.store(out_ptr + 2 * plane, _finish(blue_0, blue_1, blue_2, correction, bits), mask=stored)


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
):
    program = tl.program_id(0).to(tl.int64)
    image_ptr = images_ptr + tl.load(tiles_ptr + program * 3).to(tl.int64) * fields.N_FIELDS
    source_ptr = packed_ptr + tl.load(image_ptr + fields.SOURCE)
    height, pitch = tl.load(image_ptr + fields.HEIGHT), tl.load(image_ptr + fields.WIDTH) * 3
    line_start, line_bytes = tl.load(image_ptr + fields.LINE_START), tl.load(image_ptr + fields.N_LINES) * 3
    taps, n_out = tl.load(image_ptr + fields.FIRST_TAPS), tl.load(image_ptr + fields.FIRST_OUT)
    bits = tl.load(image_ptr + fields.FIRST_BITS).to(tl.int32)

    row = tl.load(tiles_ptr + program * 3 + 1).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # [ROWS], of the output
    byte = tl.load(tiles_ptr + program * 3 + 2).to(tl.int64) * BYTES + tl.arange(0, BYTES)  # [BYTES]
    kept = byte < line_bytes
    x, channel = line_start + byte // 3, (byte % 3).to(tl.int32)
    weights_ptr = tables_ptr + tl.load(image_ptr + fields.FIRST_TABLE) + tl.minimum(row, n_out - 1) * (taps + 2)
    start = tl.load(weights_ptr)  # [ROWS]
    begin = tl.min(start, axis=0).to(tl.int64)
    end = tl.max(start, axis=0).to(tl.int64) + taps

    mask_y, mask_height = tl.load(image_ptr + fields.MASK_Y), tl.load(image_ptr + fields.MASK_HEIGHT)
    total = tl.zeros((ROWS, BYTES), tl.int32) + (1 << (bits - 1))
    for y in range(begin, end):
        tap = y - start
        weight = tl.load(weights_ptr + 2 + tap, mask=(tap >= 0) & (tap < taps), other=0)  # [ROWS]
        read = kept & (y < height)
        pixels = tl.load(source_ptr + y * pitch + line_start * 3 + byte, mask=read, other=0).to(tl.int32)
        if (y >= mask_y) & (y < mask_y + mask_height):
            pixels = _composite(pixels, y, x, channel, masks_ptr, image_ptr, read)
        total += weight[:, None] * pixels[None, :]

    out_ptr = middle_ptr + tl.load(image_ptr + fields.MIDDLE) + row[:, None] * line_bytes + byte[None, :]
    stored = (row < n_out)[:, None] & kept[None, :]
    tl.store(out_ptr, tl.minimum(tl.maximum(total >> bits, 0), 255).to(tl.uint8), mask=stored)


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
            _resize_first_rows_kernel[grid](*buffers, ROWS=rows, COLUMNS=columns, STEP=launch.taps, num_warps=4)
        else:
            rows, n_bytes = COLUMN_TILE
            _resize_first_columns_kernel[grid](*buffers, ROWS=rows, BYTES=n_bytes, num_warps=4)
    return middle


def require_bytes(name: str, buffer: torch.Tensor, n_bytes: int) -> None:
    """Raise ValueError unless `buffer` is flat, uint8 and holds at least `n_bytes`."""
    if buffer.dtype != torch.uint8 or buffer.dim() != 1 or len(buffer) < n_bytes:
        raise ValueError(
            f"{name} must be a flat uint8 tensor of at least {n_bytes} bytes, "
            f"got {buffer.dtype} {list(buffer.shape)}"
        )
