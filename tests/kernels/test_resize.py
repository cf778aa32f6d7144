"""The fused image kernels under Triton's interpreter: equal to the reference, to the bit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from mmextract.kernels.ragged import Mark, Picture
from mmextract.kernels.reference import Uint8Array, composite_text, normalize, patchify, place, resize, scale_alpha
from mmextract.kernels.resample import FILTERS, MODES, Filter, Mode
from mmextract.kernels.resize_second import Patches
from tests.kernels import interpreted

Interpreter = Callable[..., Any]
Window = tuple[int, int, int, int]
LUT = np.random.default_rng(7).normal(size=(3, 256)).astype(np.float32)
FILL = np.array([-1.5, 0.25, 9.0], np.float32)


class Case:
    """A batch in the making: images, masks and pictures that refer to them."""

    def __init__(self, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        self.images: list[Uint8Array] = []
        self.masks: list[Uint8Array] = []
        self.pictures: list[Picture] = []

    def add(
        self,
        size: tuple[int, int],
        resized: tuple[int, int],
        window: Window | None = None,
        mask: tuple[int, int] | None = None,
        at: tuple[int, int] = (0, 0),
        opacity: int = 255,
    ) -> Case:
        mark = None
        if mask:
            offset = sum(m.size for m in self.masks)
            self.masks.append(self.rng.integers(0, 256, mask, dtype=np.uint8))
            color = (250, 3, 120)
            mark = Mark(offset=offset, height=mask[0], width=mask[1], x=at[0], y=at[1], color=color, opacity=opacity)
        self.pictures.append(
            Picture(
                offset=sum(image.size for image in self.images),
                height=size[0],
                width=size[1],
                resized=resized,
                window=window or (0, 0, *resized),
                mark=mark,
            )
        )
        self.images.append(self.rng.integers(0, 256, (*size, 3), dtype=np.uint8))
        return self

    def expected(self, filter: Filter, mode: Mode) -> list[np.ndarray[Any, np.dtype[np.float32]]]:
        out, masks = [], iter(self.masks)
        for image, picture in zip(self.images, self.pictures, strict=True):
            if picture.mark:
                mark = picture.mark
                image = composite_text(image, scale_alpha(next(masks), mark.opacity), mark.x, mark.y, mark.color)
            resized = resize(image, picture.resized, filter, mode)
            out.append(place(normalize(resized, LUT), picture.window, FILL))
        return out

    def run(self, interpreter: Interpreter, filter: Filter, mode: Mode, patches: Patches | None = None) -> Any:
        lut, fill = torch.from_numpy(LUT), torch.from_numpy(FILL)
        args = (self.images, self.masks, self.pictures, filter, mode, lut, fill, patches)
        return interpreter(interpreted.preprocess, *args).numpy()

    def check(self, interpreter: Interpreter, filter: Filter = "bicubic", mode: Mode = "pillow13") -> None:
        got = self.run(interpreter, filter, mode)
        assert np.array_equal(got, np.stack(self.expected(filter, mode)))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("filter", FILTERS)
def test_every_filter_and_mode_equals_the_reference(interpreter: Interpreter, filter: Filter, mode: Mode) -> None:
    case = Case()
    for size in [(50, 31), (90, 20), (9, 11), (1, 1), (1, 70), (13, 12)]:  # (90, 20): the columns go first
        case.add(size, (13, 12), mask=(7, 9), at=(2, 3), opacity=128)
    case.check(interpreter, filter, mode)
