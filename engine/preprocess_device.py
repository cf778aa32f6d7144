"""A plan carried out by the fused kernels: raw pixels of many sizes go to the GPU, pixel_values come out there.

In threads: an image waits as it was decoded, with its watermark beside it; a batch's images are packed into one
buffer and its launches planned. In the thread that runs the model: one copy to the device, glyph masks that are not
there yet, two kernels. Nothing here knows about prompts, files or models, nor whether the plan is right.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from mmextract.engine.preprocess import Geometry, ImagePlan, NoPlanError
from mmextract.engine.preprocess_host import HostPath
from mmextract.engine.watermark import Stamp
from mmextract.kernels import fields
from mmextract.kernels.layout import layout
from mmextract.kernels.ragged import Mark, Picture, Ragged, plan
from mmextract.kernels.reference import Uint8Array
from mmextract.kernels.resample import Filter, Mode
from mmextract.kernels.resize_first import resize_first
from mmextract.kernels.resize_second import resize_second

ALIGNMENT = 16
"""Bytes at whose multiples an image begins, so that the kernels can load vectors."""
GLYPH_BYTES = 16 << 20
"""Room for glyph masks on a device: those of hundreds of identities."""


@dataclass(frozen=True, kw_only=True)
class Waiting:
    """An image that becomes pixel_values when its batch runs."""

    pixels: Uint8Array
    """uint8 [H, W, 3], as decoded: without its watermark, and without a canvas around it."""
    picture: Picture
    """Where it goes; offsets are those of the batch's first image and mask."""
    stamp: Stamp | None


@dataclass(frozen=True, kw_only=True)
class Packed:
    """A batch of images, on the host, with all that the kernels need to know of it."""

    pixels: torch.Tensor
    """uint8, flat; pinned if it goes to a GPU."""
    batch: Ragged
    """Where everything is, but for the masks."""
    stamps: tuple[tuple[int, Stamp], ...]
    """(image, its watermark), of the images that carry one."""


class DevicePath:
    """A plan on a device. `wait` and `pack` may be called by many threads; `run` by one at a time.

    Raises NoPlanError, with the reason, for a plan or a machine that the kernels cannot serve.
    """

    def __init__(self, host: HostPath, device: torch.device, dtype: torch.dtype) -> None:
        _require(host, device)
        assert host.plan.filter is not None
        self.host = host
        self._filter: Filter = host.plan.filter
        self._mode: Mode = host.plan.mode
        self._device = device
        self._lut = host.lut.to(device, dtype)
        self._fill = self._lut[:, 0].contiguous()  # a crop that reaches beyond the image is of level 0
        self._glyphs = GlyphCache(device)
        self.dtype = dtype
        """Of pixel_values: the model's own, to which they would be cast anyway."""

    def wait(self, pixels: Uint8Array, stamp: Stamp | None) -> Waiting | None:
        """Return an image in waiting; None for one that only the CPU can preprocess, such as a very wide one.

        Raises ValueError, in the processor's words, for one that the processor refuses.
        """
        geometry = self.host.plan.geometry(*pixels.shape[:2])
        try:
            picture = _picture(self.host.plan, geometry, pixels, stamp)
            layout(picture.geometry, self._filter, self._mode)  # kept, so that packing a batch finds it made
        except ValueError:
            return None
        return Waiting(pixels=pixels, picture=picture, stamp=stamp)

    def shape(self, waiting: Waiting) -> tuple[int, ...]:
        """Return the shape of its pixel_values."""
        patches, (height, width) = self.host.plan.patches, waiting.picture.window[2:]
        return (height * width // patches.patch**2, patches.size) if patches else (1, 3, height, width)

    def pack(self, images: Sequence[Waiting]) -> Packed:
        """Lay images of any sizes one after the other, and plan the kernels' launches."""
        sizes = [-(-image.pixels.size // ALIGNMENT) * ALIGNMENT for image in images]
        ends = np.cumsum([0, *sizes])
        flat = torch.empty(int(ends[-1]), dtype=torch.uint8, pin_memory=self._device.type == "cuda")
        pictures = []
        for image, start in zip(images, ends[:-1].tolist(), strict=True):
            flat.numpy()[start : start + image.pixels.size] = image.pixels.reshape(-1)
            pictures.append(replace(image.picture, offset=start))
        stamps = tuple((n, image.stamp) for n, image in enumerate(images) if image.stamp is not None)
        return Packed(pixels=flat, batch=plan(pictures, self._filter, self._mode), stamps=stamps)

    def run(self, packed: Packed) -> torch.Tensor:
        """Return pixel_values, on the device, of a packed batch whose outputs share a shape.

        Raises torch.OutOfMemoryError if the device has no room for it.
        """
        batch = packed.batch
        masks, offsets = self._glyphs.hold([stamp.alpha for _, stamp in packed.stamps])
        images = batch.images.clone()
        for (image, _), offset in zip(packed.stamps, offsets, strict=True):
            images[image, _MASK] = offset
        moved = replace(batch, images=images, n_masks=len(masks)).to(self._device)
        pixels = packed.pixels.to(self._device, non_blocking=True)
        middle = resize_first(pixels, masks, moved)
        return resize_second(middle, moved, self._lut, self._fill, patches=self.host.plan.patches)


_MASK = fields.NAMES.index("mask")


@dataclass
class GlyphCache:
    """Alpha masks on a device, each copied there once, as long as there is room for them."""

    device: torch.device
    room: int = GLYPH_BYTES
    """Bytes of all masks; more if one batch alone needs more."""
    _masks: torch.Tensor = field(init=False)
    _places: dict[int, tuple[int, Uint8Array]] = field(default_factory=dict)
    """id of an array → its offset, and the array, so that no other one gets its id."""
    _used: int = 0

    def __post_init__(self) -> None:
        self._masks = torch.empty(0, dtype=torch.uint8, device=self.device)

    def hold(self, alphas: Sequence[Uint8Array]) -> tuple[torch.Tensor, list[int]]:
        """Return all masks, uint8, flat, on the device, and where in it each of `alphas` (uint8 [h, w]) begins.

        The arrays must not change. The offsets hold until the next call.
        """
        if self._used + self._size_of_missing(alphas) > len(self._masks):
            self._clear(alphas)
        for alpha in alphas:
            if id(alpha) not in self._places:
                end = self._used + alpha.size
                flat = torch.from_numpy(np.array(alpha).reshape(-1))
                self._masks[self._used : end].copy_(flat)
                self._places[id(alpha)] = (self._used, alpha)
                self._used = end
        return self._masks, [self._places[id(alpha)][0] for alpha in alphas]

    def _size_of_missing(self, alphas: Sequence[Uint8Array]) -> int:
        return sum({id(a): a.size for a in alphas if id(a) not in self._places}.values())

    def _clear(self, alphas: Sequence[Uint8Array]) -> None:
        """Begin anew; a launch that still reads the old masks is before us on the stream."""
        self._places.clear()
        self._used = 0
        needed = self._size_of_missing(alphas)
        if needed > len(self._masks):
            self._masks = torch.empty(max(self.room, needed), dtype=torch.uint8, device=self.device)


def _require(host: HostPath, device: torch.device) -> None:
    from mmextract.kernels.triton_support import INTERPRETED, tl

    if tl is None:
        raise NoPlanError("Triton is not installed: pip install 'mmextract[triton]' (Linux only)")
    if device.type != "cuda" and not INTERPRETED:
        raise NoPlanError(f"the kernels run on a GPU, and the model is on {device}")
    if host.plan.filter is None:
        raise NoPlanError(f"the kernels have no filter like Pillow's number {host.plan.resample}")
    if not host.lut.is_floating_point():
        raise NoPlanError(f"the processor gives {host.lut.dtype}, not floating point numbers")


def _picture(plan_: ImagePlan, geometry: Geometry, pixels: Uint8Array, stamp: Stamp | None) -> Picture:
    mark = None
    if stamp is not None:
        height, width = stamp.alpha.shape
        mark = Mark(offset=0, height=height, width=width, x=stamp.x, y=stamp.y, color=stamp.color)
    height, width = pixels.shape[:2]
    return Picture(
        offset=0,
        height=height,
        width=width,
        resized=geometry.resized,
        window=geometry.window,
        mark=mark,
        canvas=geometry.canvas,
        corner=geometry.corner,
        background=plan_.background or (0, 0, 0),
    )
