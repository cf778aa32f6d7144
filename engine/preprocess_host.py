"""A plan carried out on the CPU: the processor's own resize, then one table of 3 × 256 numbers.

The resize is the very call that the processor makes, on pixels as they lie in memory rather than on a copy of them by
channel. What follows it (rescale, normalise, in whatever dtype and order) is a function of channel and level, so it
is 768 numbers, which the processor computes once. Nothing here knows about prompts, batches, watermarks or GPUs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from mmextract.engine.preprocess import Geometry, ImagePlan, NoPlanError
from mmextract.kernels.reference import Uint8Array

Affine = tuple[torch.Tensor, torch.Tensor]
"""(mean, standard deviation), float32 [3]."""


@dataclass(frozen=True, kw_only=True)
class HostPath:
    """A plan with its numbers. May be used by many threads at once."""

    plan: ImagePlan
    lut: torch.Tensor
    """[3, 256] in the dtype of pixel_values: what each level of each channel becomes."""
    affine: Affine | None
    """Numbers with which `(level - mean) / std` in float32 gives every entry of `lut` to the bit, if there are any:
    two vector operations are quicker than 768 look-ups."""

    def pixel_values(self, pixels: Uint8Array) -> torch.Tensor:
        """Return what the processor makes of uint8 [H, W, 3]: [1, 3, h, w], or patches [n, size of one].

        Raises ValueError, in the processor's words, for an image that it refuses.
        """
        return self.finish(levels(self.plan, pixels))

    def finish(self, found: Uint8Array) -> torch.Tensor:
        """Turn the levels of one image (see `levels`) into pixel_values."""
        patches = self.plan.patches
        if patches is None:
            return self._numbers(found, axis=0)[None]
        once = self._numbers(found, axis=1).view(len(found), 3, 1, -1)
        repeated = torch.empty((len(found), 3, patches.frames, once.shape[-1]), dtype=once.dtype)
        repeated[:] = once
        return repeated.view(len(found), patches.size)

    def _numbers(self, found: Uint8Array, axis: int) -> torch.Tensor:
        """Return the numbers of levels whose channels are along `axis`, as a contiguous tensor."""
        out = torch.empty(found.shape, dtype=self.lut.dtype)
        if self.affine is not None:
            np.copyto(out.numpy(), found)
            shape = [3 if number == axis else 1 for number in range(found.ndim)]
            mean, std = (value.view(shape) for value in self.affine)
            return out.sub_(mean).div_(std)
        by_channel = np.moveaxis(out.numpy(), axis, 0)
        for channel, plane in enumerate(np.moveaxis(found, axis, 0)):
            by_channel[channel] = np.take(self.lut[channel].numpy(), plane, mode="clip")
        return out


def make_host_path(plan: ImagePlan, image_processor: Any) -> HostPath:
    """Let the processor fill the table. Raises NoPlanError if what it does to a level is no function of it."""
    lut = _fill_table(plan, image_processor)
    return HostPath(plan=plan, lut=lut, affine=_find_affine(lut, image_processor))


def levels(plan: ImagePlan, pixels: Uint8Array) -> Uint8Array:
    """Return the levels that become pixel_values, uint8 [3, h, w] of any strides, or patches [n, 3, patch²].

    Raises ValueError, in the processor's words, for an image that it refuses.
    """
    height, width = pixels.shape[:2]
    geometry = plan.geometry(height, width)
    image = _on_canvas(plan, geometry, pixels)
    if geometry.resized != geometry.canvas:
        image = _resize(plan, geometry, image)
    return _patchify(plan, _window(geometry, image))


def _on_canvas(plan: ImagePlan, geometry: Geometry, pixels: Uint8Array) -> Uint8Array:
    """Lay uint8 [H, W, 3] on its canvas; it is returned as it is if that is the image itself."""
    if geometry.canvas == pixels.shape[:2]:
        return pixels
    canvas = np.empty((*geometry.canvas, 3), np.uint8)
    canvas.reshape(len(canvas), -1)[:] = np.tile(np.array(plan.background, np.uint8), geometry.canvas[1])
    top, left = geometry.corner
    canvas[top : top + pixels.shape[0], left : left + pixels.shape[1]] = pixels
    return canvas


def _resize(plan: ImagePlan, geometry: Geometry, image: Uint8Array) -> Uint8Array:
    height, width = geometry.resized
    if plan.backend == "pillow":
        return np.asarray(Image.fromarray(image).resize((width, height), plan.resample))
    from torchvision.transforms.v2 import functional
    from transformers.image_utils import pil_torch_interpolation_mapping

    writeable = image if image.flags.writeable else image.copy()  # torch warns of any other
    view = torch.from_numpy(writeable).permute(2, 0, 1)[None]
    mode = pil_torch_interpolation_mapping[plan.resample]
    resized = functional.resize(view, [height, width], interpolation=mode, antialias=True)
    made: Uint8Array = resized[0].permute(1, 2, 0).numpy()
    return made


def _window(geometry: Geometry, image: Uint8Array) -> Uint8Array:
    """Cut the window out of uint8 [H, W, 3], by channel; beyond the image there is level 0."""
    top, left, height, width = geometry.window
    bottom, right = min(top + height, image.shape[0]), min(left + width, image.shape[1])
    shown = image[max(top, 0) : bottom, max(left, 0) : right].transpose(2, 0, 1)
    if shown.shape[1:] == (height, width):
        return shown
    out = np.zeros((3, height, width), np.uint8)
    out[:, max(-top, 0) : bottom - top, max(-left, 0) : right - left] = shown
    return out


def _patchify(plan: ImagePlan, image: Uint8Array) -> Uint8Array:
    """Cut uint8 [3, H, W] into Qwen2-VL's patches [n, 3, patch²], block by block, if the plan has any."""
    if plan.patches is None:
        return image
    size, merge = plan.patches.patch, plan.patches.merge
    rows, columns = image.shape[1] // (size * merge), image.shape[2] // (size * merge)
    if image.shape[1:] != (rows * size * merge, columns * size * merge):
        raise ValueError(f"patches need multiples of {size * merge} pixels, got {image.shape[1:]}")
    # a patch's row of bytes is moved as one item
    lines = np.ascontiguousarray(image).view(f"V{size}")
    cut = lines.reshape(3, rows, merge, size, columns, merge).transpose(1, 4, 2, 5, 0, 3)
    return np.ascontiguousarray(cut).view(np.uint8).reshape(-1, 3, size * size)


def _fill_table(plan: ImagePlan, image_processor: Any) -> torch.Tensor:
    """Have the processor number an image that shows every level in each channel and is not resized."""
    step = plan.patches.patch * plan.patches.merge if plan.patches else 1
    side = step * -(-16 // step)
    shown = np.arange(side * side).astype(np.uint8).reshape(side, side, 1).repeat(3, 2)
    off = {"do_resize": False, "do_center_crop": False, "do_pad": False}
    switches = {name: value for name, value in off.items() if hasattr(image_processor, name)}
    values = image_processor(Image.fromarray(shown), return_tensors="pt", **switches)["pixel_values"]
    found = torch.from_numpy(_patchify(plan, shown.transpose(2, 0, 1)).astype(np.int64))
    if plan.patches:
        found = found[:, :, None].expand(-1, -1, plan.patches.frames, -1)
    if values.numel() != found.numel():
        raise NoPlanError(f"{type(image_processor).__name__} gives pixel_values {list(values.shape)}")
    values = values.reshape(found.shape)
    channel = 1 if plan.patches else 0
    lut = torch.empty((3, 256), dtype=values.dtype)
    for number in range(3):
        lut[number, found.select(channel, number).ravel()] = values.select(channel, number).ravel()
        again = lut[number, found.select(channel, number)]
        if not torch.equal(again, values.select(channel, number)):
            raise NoPlanError(f"{type(image_processor).__name__} gives one level several values")
    return lut


def _find_affine(lut: torch.Tensor, image_processor: Any) -> Affine | None:
    """Return mean and deviation as torchvision's backend fuses them, if they give the whole table to the bit."""
    names = ("image_mean", "image_std", "rescale_factor")
    mean, std, scale = (getattr(image_processor, name, None) for name in names)
    if mean is None or std is None or scale is None or lut.dtype != torch.float32:
        return None
    mean, std = (torch.tensor(value) * (1.0 / scale) for value in (mean, std))
    if mean.shape != (3,) or std.shape != (3,):
        return None
    tried = torch.arange(256).float().expand(3, 256).clone().sub_(mean[:, None]).div_(std[:, None])
    return (mean, std) if torch.equal(tried, lut) else None
