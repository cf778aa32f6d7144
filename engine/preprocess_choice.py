"""Which way images become pixel_values: the model's processor, its plan on the CPU, or the fused kernels on a GPU.

The last two are used only where they give what the processor gives, to the bit. That is found out when a model is
loaded, by making images of several sizes both ways: larger and smaller than what the model takes, odd, of the same
size, very wide, very high, and, for the kernels, with a watermark across an edge. So the choice never changes a
number, and a run may be continued by any of them. This module knows nothing about data sets, stores or decoders.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

from mmextract.engine.preprocess import ImagePlan, NoPlanError, derive_plan
from mmextract.engine.preprocess_device import DevicePath, Waiting
from mmextract.engine.preprocess_host import HostPath, make_host_path
from mmextract.engine.preprocess_text import Expander
from mmextract.engine.watermark import Stamp
from mmextract.kernels.reference import Uint8Array

Path = Literal["processor", "cpu", "kernels"]


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """The way that was chosen, and why not a quicker one."""

    path: Path
    expander: Expander | None = None
    host: HostPath | None = None
    device: DevicePath | None = None
    reason: str | None = None
    """Why the processor, or the CPU where there is a GPU, must do."""

    def describe(self) -> dict[str, Any]:
        """Return path, mode (whose resize it equals) and reason, JSON-able."""
        mode = self.host.plan.mode if self.host else None
        return {"path": self.path, "mode": mode, "reason": self.reason}


def choose(asked: str, processor: Any, device: torch.device, dtype: torch.dtype) -> Preprocessing:
    """Return the way to go; with `auto` the quickest one that is exact. Processes some small images.

    device, dtype: of the model. Raises ValueError, with the reason, if another way was asked for than is possible.
    """
    if asked == "processor":
        return Preprocessing(path="processor")
    try:
        host, expander = _make_exact(processor)
    except NoPlanError as error:
        return _fall_back(asked, Preprocessing(path="processor", reason=str(error)))
    on_cpu = Preprocessing(path="cpu", expander=expander, host=host)
    if asked == "cpu" or (asked == "auto" and device.type != "cuda"):
        return on_cpu
    try:
        on_device = DevicePath(host, device, dtype)
        _check_kernels(on_device, processor.image_processor)
    except NoPlanError as error:
        return _fall_back(asked, Preprocessing(path="cpu", expander=expander, host=host, reason=str(error)))
    return Preprocessing(path="kernels", expander=expander, host=host, device=on_device)


def _fall_back(asked: str, to: Preprocessing) -> Preprocessing:
    if asked != "auto":
        raise ValueError(
            f"--preprocess {asked} is not possible for this model: {to.reason}. Leave it out, to use {to.path}"
        )
    return to


def _make_exact(processor: Any) -> tuple[HostPath, Expander]:
    """Return a plan on the CPU that equals the processor. Raises NoPlanError if there is none."""
    plan = derive_plan(processor.image_processor)
    host, expander = make_host_path(plan, processor.image_processor), Expander(processor, plan)
    for number, size in enumerate(check_sizes(plan)):
        pixels = check_image(*size)
        text = f"{'What? ' * number}{processor.image_token}\nIt is {number}."
        output = plan.geometry(*size).window[2:]
        for special in (True, False) if number < 2 else (True,):
            ours: Mapping[str, Any] | None = expander.expand(text, (output[0], output[1]), special)
            if ours is None:
                raise NoPlanError(f"{type(processor).__name__} expands an image token in its own way")
            ours = {**ours, "pixel_values": host.pixel_values(pixels)}
            theirs = processor(
                text=[text],
                images=[Image.fromarray(pixels)],
                return_tensors="pt",
                padding=False,
                truncation=False,
                add_special_tokens=special,
            )
            _require_equal(type(processor).__name__, size, ours, theirs)
    return host, expander


def _require_equal(
    name: str, size: Sequence[int], ours: Mapping[str, Any], theirs: Mapping[str, Any]
) -> None:
    if ours.keys() != theirs.keys():
        raise NoPlanError(f"{name} gives {', '.join(theirs)}, and its plan {', '.join(ours)}")
    for key, value in theirs.items():
        mine = ours[key]
        same = isinstance(value, torch.Tensor) and mine.dtype == value.dtype and mine.shape == value.shape
        if not same or not torch.equal(mine, value):
            raise NoPlanError(
                f"{name} gives other {key} than its plan for an image of {size[0]}×{size[1]} pixels"
            )


def _check_kernels(path: DevicePath, image_processor: Any) -> None:
    """Raise NoPlanError unless the kernels give what the processor gives, each image with a watermark."""
    plan, name = path.host.plan, type(image_processor).__name__
    glyphs = np.random.default_rng(1).integers(0, 256, (9, 23), np.uint8)
    batches: dict[tuple[int, ...], list[tuple[Waiting, torch.Tensor]]] = {}
    for number, size in enumerate(check_sizes(plan)):
        places = [(0, 0), (-5, -2), (size[1] - 4, size[0] - 3)]
        x, y = places[number % len(places)]
        stamp = Stamp(alpha=glyphs[: size[0], : size[1]], x=x, y=y, color=(255, 240, 10))
        pixels = check_image(*size)
        waiting = path.wait(pixels, stamp)
        if waiting is None:
            raise NoPlanError(
                f"the kernels cannot take an image of {size[0]}×{size[1]} pixels as {name} does"
            )
        marked = Image.fromarray(stamp.on(pixels))
        theirs = image_processor(marked, return_tensors="pt")["pixel_values"].to(path.dtype)
        batches.setdefault(path.shape(waiting)[1:], []).append((waiting, theirs))
    for batch in batches.values():
        values = path.run(path.pack([waiting for waiting, _ in batch])).cpu()
        wanted = torch.cat([theirs for _, theirs in batch])
        if not torch.equal(values, wanted):
            raise NoPlanError(f"the kernels give other pixel_values than {name} on this device")


def check_sizes(plan: ImagePlan) -> list[tuple[int, int]]:
    """Return sizes that every branch of a resize is tried with, and that its processor takes."""
    side = _first_shrunk(plan)
    height, width = plan.geometry(side, side).window[2:]
    larger = [(side + 5, 3 * side // 2 + 2), (2 * side + 1, side // 2 + 3)]
    smaller = [(side // 5 + 3, side // 7 + 1), (2, 3)]
    narrow = [(side // 11 + 2, side), (side, side // 11 + 2)]
    near = [(height, width), (height + 1, max(width - 1, 1))]
    wanted = [*larger, *smaller, *narrow, *near]
    return [size for size in wanted if _is_taken(plan, size)]


def _first_shrunk(plan: ImagePlan) -> int:
    """Return the side of a square that comes out smaller than it was, if there is one of a few megapixels."""
    side = 32
    while side < 2048 and plan.geometry(side, side).resized[0] >= side:
        side += side // 4
    return side


def _is_taken(plan: ImagePlan, size: tuple[int, int]) -> bool:
    try:
        plan.geometry(*size)
    except ValueError:
        return False
    return True


def check_image(height: int, width: int) -> Uint8Array:
    """Return smooth colours under noise, so that a resize both averages and overshoots; uint8 [height, width, 3]."""
    rng = np.random.default_rng(height * 65536 + width)
    rows, columns = np.mgrid[:height, :width]
    smooth = 127 + 120 * np.sin(rows / 17)[..., None] * np.cos(columns[..., None] / (11 + np.arange(3) * 5))
    noise = rng.integers(-90, 91, (height, width, 3))
    speckled = np.clip(smooth + noise * (rng.random((height, width, 1)) < 0.5), 0, 255)
    levels: Uint8Array = speckled.astype(np.uint8)
    return levels
