"""A batch of images of different sizes, as the resize kernels see it: a few flat tensors and a list of launches.

Each image is a row of integers (`fields`): where its pixels lie, which table resizes which axis, where its watermark
stands, where its results go. Images that share a pass order and a class of tap counts share a launch, and a launch is
a list of tiles, so no program starts in vain however much the sizes differ. What an image's sizes decide is in
`layout`; here it gets its place.

It knows nothing about files, processors or models, and launches nothing itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from mmextract.kernels import fields
from mmextract.kernels.layout import COLUMN, ROW_TILE, SECOND_TILE, Geometry, PackedTable, layout
from mmextract.kernels.resample import Filter, Mode

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
    canvas: tuple[int, int] | None = None
    """(height, width) of a larger image of one colour on which it stands before the resize; None if it does not."""
    corner: tuple[int, int] = (0, 0)
    """(top, left) of the image on the canvas."""
    background: tuple[int, int, int] = (0, 0, 0)
    """RGB of the canvas."""

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
        self._require_canvas()

    def _require_canvas(self) -> None:
        canvas, (top, left) = self.canvas or (self.height, self.width), self.corner
        rooms = (canvas[0] - self.height, canvas[1] - self.width)
        if not (0 <= top <= rooms[0] and 0 <= left <= rooms[1]):
            raise ValueError(
                f"an image of {self.height}×{self.width} pixels at {self.corner} is not within its canvas {canvas}"
            )
        if not all(0 <= level <= 255 for level in self.background):
            raise ValueError(f"a colour is three numbers from 0 to 255, got {self.background}")

    @property
    def geometry(self) -> Geometry:
        """What of it decides its layout."""
        size = (self.height, self.width)
        return Geometry(
            size=size,
            canvas=self.canvas or size,
            corner=self.corner,
            resized=self.resized,
            window=self.window,
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


def square_canvas(height: int, width: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return the canvas and corner with which LLaVA pads an image to a square before the resize.

    Source: transformers `LlavaImageProcessor.pad_to_square`; its colour is `int(mean * 255)` of each channel.
    """
    side = max(height, width)
    return (side, side), ((side - height) // 2, (side - width) // 2)


def plan(pictures: Sequence[Picture], filter: Filter, mode: Mode) -> Ragged:
    """Lay out a batch on the CPU; `Ragged.to` takes it to a GPU. An empty batch is one without launches."""
    layouts = [layout(picture.geometry, filter, mode) for picture in pictures]
    tables, places = _pack_tables([table for made in layouts for table in made.tables])
    images = np.array([made.fields for made in layouts], np.int64).reshape(-1, len(fields.NAMES))
    n_middle = np.cumsum([0, *(made.n_middle for made in layouts)])
    n_out = np.cumsum([0, *(made.n_out for made in layouts)])
    columns: dict[str, Sequence[int] | NDArray[np.int64]] = {
        "source": [picture.offset for picture in pictures],
        "first_table": places[::2],
        "second_table": places[1::2],
        "middle": n_middle[:-1],
        "out": n_out[:-1],
        "background": [_packed_color(picture.background) for picture in pictures],
    }
    for name, values in columns.items():
        images[:, COLUMN[name]] = values
    for row, picture in zip(images, pictures, strict=True):
        if picture.mark:
            row[_MARK] = _mark_fields(picture.mark)
    first = [made.first_group(picture.offset) for made, picture in zip(layouts, pictures, strict=True)]
    return Ragged(
        images=torch.from_numpy(images),
        tables=torch.from_numpy(tables),
        first=_launches(first, [made.first_tiles for made in layouts]),
        second=_launches([made.second_group for made in layouts], [made.second_tiles for made in layouts]),
        n_source=max((p.offset + 3 * p.height * p.width for p in pictures), default=0),
        n_masks=max((p.mark.offset + p.mark.height * p.mark.width for p in pictures if p.mark), default=0),
        n_middle=int(n_middle[-1]),
        n_out=int(n_out[-1]),
        windows=tuple(picture.window[2:] for picture in pictures),
    )


_MARK = slice(COLUMN["mask"], COLUMN["opacity"] + 1)


def _mark_fields(mark: Mark) -> tuple[int, ...]:
    return (mark.offset, mark.height, mark.width, mark.x, mark.y, _packed_color(mark.color), mark.opacity)


def _packed_color(color: tuple[int, int, int]) -> int:
    red, green, blue = color
    return red | green << 8 | blue << 16


def _pack_tables(tables: Sequence[PackedTable]) -> tuple[NDArray[np.int32], list[int]]:
    """Put tables one after the other, each once, and return where each begins."""
    offsets: dict[PackedTable, int] = {}
    n_values = 1  # so that the tensor is never empty
    for table in tables:
        if table not in offsets:
            offsets[table] = n_values
            n_values += table.values.size
    packed = np.concatenate([np.zeros(1, np.int32), *(table.values for table in offsets)])
    return packed, [offsets[table] for table in tables]


def _launches(groups: Sequence[tuple[int, int]], tiles: Sequence[NDArray[np.int32]]) -> tuple[Launch, ...]:
    """Join the tiles of images of one (axis, variant)."""
    launches = []
    for group in sorted(set(groups)):
        members = [i for i, own in enumerate(groups) if own == group and len(tiles[i])]
        if members:
            joined = np.concatenate([tiles[i] for i in members])
            joined[:, 0] = np.repeat(members, [len(tiles[i]) for i in members])
            launches.append(Launch(axis=group[0], variant=group[1], tiles=torch.from_numpy(joined)))
    return tuple(launches)
