"""Batches of decoded images as they come from real data, packed on the device, and what two processors make of them.

The numbers are random, never zeros or constant: constant images compress, and zeros draw less power.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray

from gpu_setup import Bench
from mmextract.kernels.ragged import Mark, Picture, Ragged, plan
from mmextract.kernels.reference import composite_text, normalize, patchify, place, resize, scale_alpha
from mmextract.kernels.resample import Filter, Mode
from mmextract.kernels.resize_first import resize_first
from mmextract.kernels.resize_second import Patches, resize_second

hf: Any = transformers

Size = tuple[int, int]
Uint8Array = NDArray[np.uint8]
SIZES: tuple[tuple[Size, int], ...] = (
    ((224, 224), 6),
    ((480, 640), 14),
    ((640, 427), 10),
    ((333, 500), 8),
    ((768, 1024), 8),
    ((1080, 1920), 8),
    ((2448, 3264), 4),
    ((3000, 4000), 4),
    ((4000, 3000), 2),
)
"""(height, width) and how many of them: data sets of the web, screens, and cameras up to 12 megapixels."""
SMOKE_SIZES: tuple[tuple[Size, int], ...] = (((20, 31), 1), ((40, 12), 1))
MASK = (48, 400)
"""Height and width of a watermark's mask, before it is cut to its image."""


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A model family's way of preparing images."""

    name: str
    processor: Any
    """transformers' image processor, whose backend is torchvision."""
    side: int
    """What a shortest edge becomes, and the crop; or, with `patches`, the square root of the most pixels."""
    patches: Patches | None

    def target(self, size: Size) -> tuple[Size, tuple[int, int, int, int]]:
        """Return what an image is resized to, and the window of it that is kept."""
        if self.patches is not None:
            from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

            factor = self.patches.patch * self.patches.merge
            height, width = smart_resize(*size, factor, factor**2, self.side**2)
            return (height, width), (0, 0, height, width)
        long = int(self.side * max(size) / min(size))
        height, width = (self.side, long) if size[0] <= size[1] else (long, self.side)
        window = ((height - self.side) // 2, (width - self.side) // 2, self.side, self.side)
        return (height, width), window


def clip(side: int = 336) -> Kind:
    """LLaVA-1.5's and CLIP's: shortest edge, bicubic, centre crop."""
    processor = hf.CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    return Kind(name="LLaVA", processor=processor, side=side, patches=None)


def qwen(side: int = 1008) -> Kind:
    """Qwen2-VL's: its own resolution in multiples of 28, at most `side`² pixels, cut into patches."""
    processor = hf.Qwen2VLImageProcessor(size={"shortest_edge": 28**2, "longest_edge": side**2})
    return Kind(name="Qwen2-VL", processor=processor, side=side, patches=Patches())


def lut_of(kind: Kind, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Return [3, 256] and [3]: what the processor makes of each level, and of padding, by running it."""
    levels = torch.arange(256, dtype=torch.uint8)
    if kind.patches is None:
        image = levels.repeat(3, 1).reshape(3, 16, 16)
        values = kind.processor(image, do_resize=False, do_center_crop=False, return_tensors="pt")
        lut = values["pixel_values"].reshape(3, 256)
    else:  # one block of patches a level
        step = kind.patches.patch * kind.patches.merge
        image = levels.repeat_interleave(step)[None, :, None].repeat(3, 1, step)
        values = kind.processor(image, do_resize=False, return_tensors="pt")
        lut = values["pixel_values"].reshape(256, kind.patches.merge**2, 3, -1)[:, 0, :, 0].T.contiguous()
    return lut.to(dtype), lut[:, 0].to(dtype).contiguous()


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Images in one packed buffer on the device, with their watermarks."""

    images: list[Uint8Array]
    """On the host, as long as the process wants to compare."""
    masks: list[Uint8Array]
    packed: torch.Tensor
    packed_masks: torch.Tensor
    pictures: list[Picture]
    ragged: Ragged
    """On the device."""
    kind: Kind

    @property
    def n_source(self) -> int:
        """Bytes of all pixels."""
        return len(self.packed)

    def make_out(self, dtype: torch.dtype) -> torch.Tensor:
        """Return room for pixel_values, full of NaN."""
        cut, ragged = self.kind.patches, self.ragged
        shape: tuple[int, ...] = (len(self.pictures), 3, *self.pictures[0].window[2:])
        if cut is not None:
            shape = (ragged.n_out // cut.patch**2, cut.size)
        return torch.full(shape, float("nan"), dtype=dtype, device=self.packed.device)

    def first(self, out: torch.Tensor) -> torch.Tensor:
        """Run the first pass."""
        return resize_first(self.packed, self.packed_masks, self.ragged, out=out)

    def second(
        self, middle: torch.Tensor, lut: torch.Tensor, fill: torch.Tensor, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Run the second pass."""
        return resize_second(middle, self.ragged, lut, fill, patches=self.kind.patches, out=out)

    def run(self, lut: torch.Tensor, fill: torch.Tensor) -> torch.Tensor:
        """From packed pixels to pixel_values."""
        middle = torch.empty(self.ragged.n_middle, dtype=torch.uint8, device=self.packed.device)
        return self.second(self.first(middle), lut, fill)

    def reference(self, index: int, lut: NDArray[np.float32], mode: Mode) -> NDArray[np.float32]:
        """Return the pixel_values of one image by the reference."""
        picture, image = self.pictures[index], self.images[index]
        if picture.mark is not None:
            mark = picture.mark
            image = composite_text(
                image, scale_alpha(self.masks[index], mark.opacity), mark.x, mark.y, mark.color
            )
        resized = resize(image, picture.resized, "bicubic", mode)
        values = place(normalize(resized, lut), picture.window, np.ascontiguousarray(lut[:, 0]))
        cut = self.kind.patches
        return values if cut is None else patchify(values, cut.patch, cut.merge, cut.frames)


def make_batch(
    bench: Bench,
    kind: Kind,
    sizes: Sequence[Size],
    *,
    marked: bool = True,
    filter: Filter = "bicubic",
    mode: Mode = "torchvision",
) -> Batch:
    """Make random images of these sizes, each with a watermark that may cross an edge, and pack them."""
    rng = np.random.default_rng(bench.seed)
    images = [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]
    masks: list[Uint8Array] = []
    pictures: list[Picture] = []
    offset = n_masks = 0
    for height, width in sizes:
        shape = (min(MASK[0], height), min(MASK[1], width))
        mark = Mark(
            offset=n_masks,
            height=shape[0],
            width=shape[1],
            x=int(rng.integers(-shape[1] // 2, width)),
            y=int(rng.integers(-shape[0] // 2, height)),
            color=(255, 40, 10),
            opacity=150,
        )
        masks.append(rng.integers(0, 256, shape, dtype=np.uint8))
        resized, window = kind.target((height, width))
        pictures.append(
            Picture(
                offset=offset,
                height=height,
                width=width,
                resized=resized,
                window=window,
                mark=mark if marked else None,
            )
        )
        offset += 3 * height * width
        n_masks += shape[0] * shape[1]
    return Batch(
        images=images,
        masks=masks,
        packed=torch.from_numpy(np.concatenate([image.ravel() for image in images])).to(bench.device),
        packed_masks=torch.from_numpy(np.concatenate([mask.ravel() for mask in masks])).to(bench.device),
        pictures=pictures,
        ragged=plan(pictures, filter, mode).to(bench.device),
        kind=kind,
    )


def kinds(bench: Bench) -> tuple[Kind, Kind]:
    """Return both families' ways at the size of this run."""
    return (clip(12), qwen(28)) if bench.smoke else (clip(), qwen())


def mixed_sizes(bench: Bench) -> list[Size]:
    """Return the sizes of a batch of real data, in random order."""
    counted = SMOKE_SIZES if bench.smoke else SIZES
    sizes = [size for size, n in counted for _ in range(n)]
    order = np.random.default_rng(bench.seed).permutation(len(sizes))
    return [sizes[index] for index in order]
