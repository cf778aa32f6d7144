"""A batch of images of different sizes, as the resize kernels see it: a few flat tensors and a list of launches.

Each image is a row of integers (`fields`): where its pixels lie, which table resizes which axis, where its watermark
stands, where its results go. Images that share a pass order and a class of tap counts share a launch, and a launch is
a list of tiles, so no program starts in vain however much the sizes differ. Only what the output window shows is
computed: tables are cut to it, and so are the lines of the source that the second pass will read.

It knows nothing about files, processors or models, and launches nothing itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from mmextract.kernels import fields
from mmextract.kernels.resample import Filter, Mode, Table, table, vertical_first

TABLE_HEAD = 2
"""Numbers before the weights in a packed table's row: the first source pixel, and the sum of the weights."""

ALIGNMENT = 16
"""Bytes that one load can take at once, if they begin at a multiple of it."""
ROW_TILE = (32, 16)
"""Rows and output columns that one program of the first pass along x makes."""
COLUMN_TILE = (4, 1024)
"""Output rows and bytes that one program of the first pass along y makes."""
SECOND_TILE = 1024
"""Output elements that one program of the second pass makes."""
LARGEST_OUTPUT = 2**31 - SECOND_TILE
"""Elements of one image's output, which the second pass counts in 32 bits; all else is addressed with 64."""


@dataclass(frozen=True, kw_only=True)
class Mark:
    """A watermark: ink of one colour laid on through a mask, whose top left corner is at (x, y) of the image."""

    offset: int
    """Where the mask begins in the packed masks, in bytes."""
    height: int
    width: int
    x: int
    y: int
    color: tuple[int, int, int]
    """RGB of the ink."""
    opacity: int = 255
    """What the mask is multiplied with, 255 meaning one."""

    def __post_init__(self) -> None:
        if not 0 <= self.opacity <= 255 or not all(0 <= level <= 255 for level in self.color):
            raise ValueError(
                f"opacity and colours are numbers from 0 to 255, got {self.opacity} and {self.color}"
            )
        if self.height * self.width >= 2**31 or max(abs(self.x), abs(self.y)) >= 2**30:
            raise ValueError(
                f"a watermark must be smaller and nearer than the kernels can address, got {self}"
            )


@dataclass(frozen=True, kw_only=True)
class Picture:
    """One image of a batch: where it is, what size it becomes, and which window of that is the output."""

    offset: int
    """Where its pixels (uint8 [height, width, 3]) begin in the packed buffer, in bytes."""
    height: int
    width: int
    resized: tuple[int, int]
    """(height, width) after the resize."""
    window: tuple[int, int, int, int]
    """(top, left, height, width) of the output in the resized image; it may reach beyond, which pads."""
    mark: Mark | None = None

    def __post_init__(self) -> None:
        height, width = self.window[2:]
        if 3 * ROW_TILE[0] * self.width >= 2**31:
            raise ValueError(f"an image of {self.width} pixels width is wider than the kernels can address")
        if min(self.height, self.width, *self.resized, height, width) < 1:
            raise ValueError(
                f"images, their resized form and their output have at least one pixel, got {self}"
            )
        if 3 * height * width > LARGEST_OUTPUT:
            raise ValueError(
                f"an output of {height}×{width} pixels is more than one image may have: {LARGEST_OUTPUT // 3}"
            )


@dataclass(frozen=True, kw_only=True)
class Launch:
    """Programs that one compiled variant of a kernel runs."""

    axis: int
    """Along which axis it resamples: 0 is y, 1 is x."""
    variant: int
    """What it is compiled for. First pass: along x the source pixels of a step, along y whether rows are aligned.
    Second pass: the number of taps."""
    tiles: torch.Tensor
    """int32 [n_programs, 3]: image, and the tile's place in it (two numbers, or one and 0)."""


@dataclass(frozen=True, kw_only=True)
class Ragged:
    """A batch on its device."""

    images: torch.Tensor
    """int64 [n_images, len(fields.NAMES)]."""
    tables: torch.Tensor
    """int32, flat: of each table the visible rows, each `TABLE_HEAD` numbers and the weights."""
    first: tuple[Launch, ...]
    second: tuple[Launch, ...]
    n_source: int
    """Bytes of the packed pixels that the images reach to."""
    n_masks: int
    """Bytes of the packed masks that the watermarks reach to."""
    n_middle: int
    """Bytes between the passes."""
    n_out: int
    """Pixels of all outputs together."""
    windows: tuple[tuple[int, int], ...]
    """(height, width) of each image's output."""

    def to(self, device: torch.device | str) -> Ragged:
        """Return the batch on `device`."""

        def moved(launches: tuple[Launch, ...]) -> tuple[Launch, ...]:
            return tuple(replace(launch, tiles=launch.tiles.to(device)) for launch in launches)

        return replace(
            self,
            images=self.images.to(device),
            tables=self.tables.to(device),
            first=moved(self.first),
            second=moved(self.second),
        )


def plan(pictures: Sequence[Picture], filter: Filter, mode: Mode) -> Ragged:
    """Lay out a batch on the CPU; `Ragged.to` takes it to a GPU. An empty batch is one without launches."""
    packer = _Packer()
    rows = [packer.add(picture, filter, mode) for picture in pictures]
    ends = [p.offset + 3 * p.height * p.width for p in pictures]
    masks = [p.mark.offset + p.mark.height * p.mark.width for p in pictures if p.mark]
    return Ragged(
        images=torch.tensor([[row[name] for name in fields.NAMES] for row in rows], dtype=torch.int64).view(
            -1, len(fields.NAMES)
        ),
        tables=torch.from_numpy(np.concatenate([np.zeros(1, np.int32), *packer.tables])),
        first=_launches(rows, _first_group, _first_tiles),
        second=_launches(rows, _second_group, _second_tiles),
        n_source=max(ends, default=0),
        n_masks=max(masks, default=0),
        n_middle=packer.n_middle,
        n_out=packer.n_out,
        windows=tuple(picture.window[2:] for picture in pictures),
    )


Row = dict[str, int]


class _Packer:
    """Gathers tables and gives out places, image after image."""

    def __init__(self) -> None:
        self.tables: list[NDArray[np.int32]] = []
        self.n_middle = 0
        self.n_out = 0
        self._n_tables = 1
        self._places: dict[tuple[Table, int, int, int], int] = {}

    def add(self, picture: Picture, filter: Filter, mode: Mode) -> Row:
        source, (top, left, out_height, out_width) = (picture.height, picture.width), picture.window
        tables = [
            table(filter, mode, n_in, n_out) for n_in, n_out in zip(source, picture.resized, strict=True)
        ]
        starts = (max(top, 0), max(left, 0))
        ends = (
            max(min(top + out_height, picture.resized[0]), starts[0]),
            max(min(left + out_width, picture.resized[1]), starts[1]),
        )
        first = 0 if vertical_first(mode, source, picture.resized) else 1
        second = 1 - first
        n_first, n_second = ends[first] - starts[first], ends[second] - starts[second]
        line_start, line_end = _reach(tables[second], starts[second], ends[second], source[second])
        if first == 0:  # whole vectors of columns
            line_start -= line_start % ALIGNMENT
            line_end = min(_ceil(line_end, ALIGNMENT) * ALIGNMENT, picture.width)
        n_lines = line_end - line_start
        row = {
            "axis": first,
            "reach": _longest_reach(tables[first], starts[first], ends[first]),
            "source": picture.offset,
            "height": picture.height,
            "width": picture.width,
            "line_start": line_start,
            "n_lines": n_lines,
            "first_table": self._place(tables[first], starts[first], ends[first], 0),
            "first_taps": tables[first].n_taps,
            "first_bits": tables[first].bits,
            "first_out": n_first if n_second else 0,
            "second_table": self._place(tables[second], starts[second], ends[second], line_start),
            "second_taps": tables[second].n_taps,
            "second_bits": tables[second].bits,
            "second_out": n_second if n_first else 0,
            "middle": self.n_middle,
            "top": max(-top, 0),
            "left": max(-left, 0),
            "out": self.n_out,
            "out_height": out_height,
            "out_width": out_width,
            **_mark_fields(picture.mark),
        }
        self.n_middle += 3 * n_first * n_lines
        self.n_out += out_height * out_width
        return row

    def _place(self, made: Table, start: int, end: int, shift: int) -> int:
        """Pack rows `start` to `end` of a table, its pixels counted from `shift`, unless they are packed already."""
        key = (made, start, end, shift)
        if key not in self._places:
            weights = made.weights[start:end]
            head = [made.starts[start:end, None] - shift, weights.sum(1, keepdims=True)]
            packed = np.concatenate([*head, weights], axis=1).astype(np.int32)
            self._places[key] = self._n_tables
            self.tables.append(packed.ravel())
            self._n_tables += packed.size
        return self._places[key]


def _mark_fields(mark: Mark | None) -> Row:
    if mark is None:
        return dict.fromkeys(fields.NAMES[fields.NAMES.index("mask") :], 0)
    red, green, blue = mark.color
    return {
        "mask": mark.offset,
        "mask_height": mark.height,
        "mask_width": mark.width,
        "mask_x": mark.x,
        "mask_y": mark.y,
        "color": red | green << 8 | blue << 16,
        "opacity": mark.opacity,
    }


def _reach(made: Table, start: int, end: int, n_in: int) -> tuple[int, int]:
    """Return which source pixels outputs `start` to `end` depend on, as a half-open range."""
    if start == end:
        return 0, 0
    return int(made.starts[start]), min(int(made.starts[end - 1]) + made.n_taps, n_in)


def _longest_reach(made: Table, start: int, end: int) -> int:
    """Return how many source pixels one tile of the first pass along x needs at most."""
    starts = made.starts[start:end]
    if not len(starts):
        return 0
    last = np.minimum(np.arange(len(starts)) + ROW_TILE[1] - 1, len(starts) - 1)
    return int((starts[last] - starts).max()) + made.n_taps


def _launches(
    rows: Sequence[Row],
    group_of: Callable[[Row], tuple[int, int]],
    tiles_of: Callable[[Row], tuple[int, int]],
) -> tuple[Launch, ...]:
    groups: dict[tuple[int, int], list[NDArray[np.int32]]] = {}
    for image, row in enumerate(rows):
        grid = np.indices(tiles_of(row), np.int32).reshape(2, -1)  # [2, n_tiles]
        if grid.size:
            tiles = np.column_stack([np.full(grid.shape[1], image, np.int32), *grid])
            groups.setdefault(group_of(row), []).append(tiles)
    return tuple(
        Launch(axis=axis, variant=variant, tiles=torch.from_numpy(np.concatenate(groups[axis, variant])))
        for axis, variant in sorted(groups)
    )


def _first_group(row: Row) -> tuple[int, int]:
    if row["axis"] == 0:
        starts = (row["source"] + 3 * row["line_start"], 3 * row["width"], 3 * row["n_lines"])
        return 0, int(all(n % ALIGNMENT == 0 for n in starts))
    return 1, 32 if row["reach"] <= 32 else 64


def _first_tiles(row: Row) -> tuple[int, int]:
    if row["axis"] == 0:
        return _ceil(row["first_out"], COLUMN_TILE[0]), _ceil(3 * row["n_lines"], COLUMN_TILE[1])
    return _ceil(row["n_lines"], ROW_TILE[0]), _ceil(row["first_out"], ROW_TILE[1])


def _second_group(row: Row) -> tuple[int, int]:
    return 1 - row["axis"], tap_class(row["second_taps"])


def _second_tiles(row: Row) -> tuple[int, int]:
    return _ceil(3 * row["out_height"] * row["out_width"], SECOND_TILE), 1


def tap_class(n_taps: int) -> int:
    """Return the number of taps that a kernel is compiled for to serve `n_taps`: at most a quarter more."""
    step = max(1 << max(n_taps - 1, 1).bit_length() - 3, 1) if n_taps > 4 else 1
    return _ceil(n_taps, step) * step


def _ceil(n: int, size: int) -> int:
    return -(-n // size)
