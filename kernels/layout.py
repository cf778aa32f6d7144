"""One image of a batch as the resize kernels see it, all but its place: tables, lines to keep, tiles, groups.

What only the sizes decide is made once and kept, since images of one data set share sizes. Only what the output window
shows is computed: tables are cut to it, and so are the lines of the source that the second pass will read.

An image may stand on a larger canvas of one colour. No padded pixel is ever read or written: an output's weights on
padding are summed into one number, its *outside* weight, which the kernels multiply with the colour; and a line that
is all padding keeps its colour through a pass.

It knows nothing about pixels, buffers, watermarks or devices.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from mmextract.kernels import fields
from mmextract.kernels.resample import Filter, Mode, table, vertical_first

ALIGNMENT = 16
"""Bytes that one load can take at once, if they begin at a multiple of it."""
ROW_TILE = (32, 16)
"""Rows and output columns that one program of the first pass along x makes."""
COLUMN_TILE = (4, 1024)
"""Output rows and bytes that one program of the first pass along y makes."""
SECOND_TILE = 1024
"""Output elements that one program of the second pass makes."""

COLUMN = {name: index for index, name in enumerate(fields.NAMES)}
"""Where a field is in a row of `ragged.Ragged.images`."""

Size = tuple[int, int]
"""(height, width), or (top, left)."""


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """What decides a layout: sizes in pixels, as in `ragged.Picture`."""

    size: Size
    canvas: Size
    """What is resized; the image itself if it is not padded."""
    corner: Size
    """(top, left) of the image on the canvas."""
    resized: Size
    window: tuple[int, int, int, int]


@dataclass(frozen=True, eq=False)
class PackedTable:
    """Rows of a resize table as a kernel reads them, for one axis of one image."""

    values: NDArray[np.int32]
    """Flat: of each row `fields.TABLE_HEAD` numbers and the weights."""
    n_taps: int
    bits: int
    n_rows: int
    longest: int
    """Source pixels that one tile of the first pass along x needs at most."""


@dataclass(frozen=True, eq=False)
class Layout:
    """A picture's integers, and what runs for it. Shared by all pictures of one geometry, so never written to."""

    fields: NDArray[np.int64]
    """[len(fields.NAMES)]; zero where the picture's place or watermark decides."""
    axis: int
    """Of the first pass."""
    tables: tuple[PackedTable, PackedTable]
    """Of the first and of the second pass."""
    first_tiles: NDArray[np.int32]
    """[n, 3], image 0."""
    second_tiles: NDArray[np.int32]
    n_middle: int
    """Bytes between the passes."""
    n_out: int
    """Pixels of the output."""

    def first_group(self, source: int) -> tuple[int, int]:
        """Return (axis, variant) of the first pass for an image whose pixels begin at byte `source`."""
        if self.axis == 1:
            return 1, 32 if self.tables[0].longest <= 32 else 64
        line_start, n_lines, width = (self.fields[COLUMN[n]] for n in ("line_start", "n_lines", "width"))
        starts = (source + 3 * line_start, 3 * width, 3 * n_lines)
        return 0, int(all(n % ALIGNMENT == 0 for n in starts))

    @property
    def second_group(self) -> tuple[int, int]:
        """(axis, variant) of the second pass."""
        return 1 - self.axis, tap_class(self.tables[1].n_taps)


@lru_cache(maxsize=256)
def layout(geometry: Geometry, filter: Filter, mode: Mode) -> Layout:
    """Return how an image is laid out for both passes of its resize.

    Raises ValueError for a canvas so large that padding would not keep its colour.
    """
    (top, left, out_height, out_width), resized = geometry.window, geometry.resized
    starts = (max(top, 0), max(left, 0))
    ends = (
        max(min(top + out_height, resized[0]), starts[0]),
        max(min(left + out_width, resized[1]), starts[1]),
    )
    first = 0 if vertical_first(mode, geometry.canvas, resized) else 1
    second = 1 - first
    reach = _reach(geometry, second, filter, mode, starts[second], ends[second])
    if first == 0:  # whole vectors of columns
        reach = reach[0] // ALIGNMENT * ALIGNMENT, min(_up(reach[1], ALIGNMENT), geometry.size[1])
    tables = (
        _packed(geometry, first, filter, mode, starts[first], ends[first], 0),
        _packed(geometry, second, filter, mode, starts[second], ends[second], reach[0]),
    )
    if geometry.size[second] < geometry.canvas[second]:
        _require_constant(tables[0])
    n_lines, n_first, n_second = reach[1] - reach[0], tables[0].n_rows, tables[1].n_rows
    found = {
        "height": geometry.size[0],
        "width": geometry.size[1],
        "line_start": reach[0],
        "n_lines": n_lines,
        "first_taps": tables[0].n_taps,
        "first_bits": tables[0].bits,
        "first_out": n_first if n_second else 0,
        "second_taps": tables[1].n_taps,
        "second_bits": tables[1].bits,
        "second_out": n_second if n_first else 0,
        "top": max(-top, 0),
        "left": max(-left, 0),
        "out_height": out_height,
        "out_width": out_width,
    }
    if first == 0:
        grid = -(-found["first_out"] // COLUMN_TILE[0]), -(-3 * n_lines // COLUMN_TILE[1])
    else:
        grid = -(-n_lines // ROW_TILE[0]), -(-found["first_out"] // ROW_TILE[1])
    return Layout(
        fields=np.array([found.get(name, 0) for name in fields.NAMES], np.int64),
        axis=first,
        tables=tables,
        first_tiles=_tiles(*grid),
        second_tiles=_tiles(-(-3 * out_height * out_width // SECOND_TILE), 1),
        n_middle=3 * n_first * n_lines,
        n_out=out_height * out_width,
    )


def tap_class(n_taps: int) -> int:
    """Return the number of taps that a kernel is compiled for to serve `n_taps`: at most a quarter more."""
    step = max(1 << max(n_taps - 1, 1).bit_length() - 3, 1) if n_taps > 4 else 1
    return _up(n_taps, step)


def _packed(
    geometry: Geometry, axis: int, filter: Filter, mode: Mode, start: int, end: int, shift: int
) -> PackedTable:
    sizes = (geometry.canvas[axis], geometry.resized[axis])
    return pack(filter, mode, sizes, (geometry.corner[axis], geometry.size[axis]), (start, end), shift)


@lru_cache(maxsize=512)
def pack(
    filter: Filter, mode: Mode, sizes: Size, inside: tuple[int, int], rows: tuple[int, int], shift: int
) -> PackedTable:
    """Pack some rows of a table.

    sizes: pixels before and after. inside: (first, how many) of the pixels before that are the image's own, the others
    being padding. rows: a half-open range of outputs. shift: the image's pixel that a kernel calls 0.
    """
    made = table(filter, mode, *sizes)
    starts, weights = made.starts[slice(*rows)], made.weights[slice(*rows)]
    outside = np.zeros(len(starts), np.int32)
    if inside != (0, sizes[0]):
        starts, weights, outside = _without_padding(starts, weights, *inside)
    head = [starts[:, None] - shift, weights.sum(1, keepdims=True), outside[:, None]]
    values = np.concatenate([*head, weights], axis=1).astype(np.int32).ravel()
    values.flags.writeable = False
    longest = 0
    if len(starts):
        last = np.minimum(np.arange(len(starts)) + ROW_TILE[1] - 1, len(starts) - 1)
        longest = int((starts[last] - starts).max()) + made.n_taps
    return PackedTable(values, made.n_taps, made.bits, len(starts), longest)


def _without_padding(
    starts: NDArray[np.int32], weights: NDArray[np.int32], first: int, n_inside: int
) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int32]]:
    """Return starts counted from the image's first pixel, the weights of its pixels, and each output's outside weight.

    An output that sees none of the image gets a start within it and no weights, so that starts never fall.
    """
    n_taps = weights.shape[1]
    before = starts - first
    moved = np.clip(before, 0, n_inside - 1)
    taps = np.arange(n_taps, dtype=np.int32)
    tap = taps + (moved - before)[:, None]  # which of an output's weights is that of pixel `moved + taps`
    valid = (tap >= 0) & (tap < n_taps) & (moved[:, None] + taps < n_inside)
    chosen = np.take_along_axis(weights, np.clip(tap, 0, n_taps - 1), 1)
    kept = np.where(valid, chosen, np.int32(0))
    return moved, kept, weights.sum(1, dtype=np.int32) - kept.sum(1, dtype=np.int32)


def _reach(
    geometry: Geometry, axis: int, filter: Filter, mode: Mode, start: int, end: int
) -> tuple[int, int]:
    """Return which pixels of the image outputs `start` to `end` depend on, as a half-open range."""
    if start == end:
        return 0, 0
    made = table(filter, mode, geometry.canvas[axis], geometry.resized[axis])
    first, n_inside = geometry.corner[axis], geometry.size[axis]
    lowest = min(max(int(made.starts[start]) - first, 0), n_inside - 1)
    highest = min(max(int(made.starts[end - 1]) - first, 0) + made.n_taps, n_inside)
    return lowest, highest


def _require_constant(packed: PackedTable) -> None:
    """Raise ValueError unless a line of one level comes out of a pass as that level."""
    values = packed.values.reshape(packed.n_rows, -1)
    excess = values[:, 1].astype(np.int64) + values[:, 2] - (1 << packed.bits)
    if packed.n_rows and 255 * np.abs(excess).max() >= 1 << packed.bits - 1:
        raise ValueError(
            f"padding would change its colour under {packed.n_taps} taps: resize so large an image before padding it"
        )


def _tiles(n_rows: int, n_columns: int) -> NDArray[np.int32]:
    grid = np.indices((n_rows, n_columns), np.int32).reshape(2, -1)
    return np.column_stack([np.zeros(grid.shape[1], np.int32), *grid])


def _up(n: int, step: int) -> int:
    return -(-n // step) * step
