"""The fused image kernels under Triton's interpreter: equal to the reference, to the bit."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from mmextract.kernels.layout import tap_class
from mmextract.kernels.ragged import Mark, Picture, plan, square_canvas
from mmextract.kernels.reference import (
    Uint8Array,
    composite_text,
    normalize,
    pad,
    patchify,
    place,
    resize,
    scale_alpha,
)
from mmextract.kernels.resample import FILTERS, MODES, Filter, Mode, vertical_first
from mmextract.kernels.resize_first import resize_first
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
        **canvas: Any,
    ) -> Case:
        mark = None
        if mask:
            offset = sum(m.size for m in self.masks)
            self.masks.append(self.rng.integers(0, 256, mask, dtype=np.uint8))
            color = (250, 3, 120)
            mark = Mark(
                offset=offset, height=mask[0], width=mask[1], x=at[0], y=at[1], color=color, opacity=opacity
            )
        self.pictures.append(
            Picture(
                offset=sum(image.size for image in self.images),
                height=size[0],
                width=size[1],
                resized=resized,
                window=window or (0, 0, *resized),
                mark=mark,
                **canvas,
            )
        )
        self.images.append(self.rng.integers(0, 256, (*size, 3), dtype=np.uint8))
        return self

    def expected(self, filter: Filter, mode: Mode) -> list[np.ndarray[Any, np.dtype[np.float32]]]:
        out, masks = [], iter(self.masks)
        for image, picture in zip(self.images, self.pictures, strict=True):
            if picture.mark:
                mark = picture.mark
                image = composite_text(
                    image, scale_alpha(next(masks), mark.opacity), mark.x, mark.y, mark.color
                )
            if picture.canvas:
                image = pad(image, picture.canvas, picture.corner, picture.background)
            resized = resize(image, picture.resized, filter, mode)
            out.append(place(normalize(resized, LUT), picture.window, FILL))
        return out

    def run(
        self, interpreter: Interpreter, filter: Filter, mode: Mode, patches: Patches | None = None
    ) -> Any:
        lut, fill = torch.from_numpy(LUT), torch.from_numpy(FILL)
        args = (self.images, self.masks, self.pictures, filter, mode, lut, fill, patches)
        return interpreter(interpreted.preprocess, *args).numpy()

    def check(self, interpreter: Interpreter, filter: Filter = "bicubic", mode: Mode = "pillow13") -> None:
        got = self.run(interpreter, filter, mode)
        assert np.array_equal(got, np.stack(self.expected(filter, mode)))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("filter", FILTERS)
def test_every_filter_and_mode_equals_the_reference(
    interpreter: Interpreter, filter: Filter, mode: Mode
) -> None:
    case = Case()
    for size in [(50, 31), (90, 20), (9, 11), (1, 1), (1, 70), (13, 12)]:  # (90, 20): the columns go first
        case.add(size, (13, 12), mask=(7, 9), at=(2, 3), opacity=128)
    case.check(interpreter, filter, mode)


@pytest.mark.parametrize(
    "at", [(-4, -3), (10, -3), (-4, 16), (11, 17), (3, 3), (-30, 0), (0, 50), (14, 0)], ids=str
)
@pytest.mark.parametrize("resized", [(7, 6), (7, 13)], ids=["rows first", "columns first"])
def test_a_watermark_may_cross_any_edge(
    interpreter: Interpreter, at: tuple[int, int], resized: tuple[int, int]
) -> None:
    case = Case().add((20, 14), resized, mask=(8, 9), at=at, opacity=200)
    assert vertical_first("pillow13", (20, 14), resized) == (resized[1] == 13)
    case.check(interpreter)


@pytest.mark.parametrize("resized", [(5, 6), (5, 14)], ids=["rows first", "columns first"])
def test_a_mask_may_be_larger_than_its_image(interpreter: Interpreter, resized: tuple[int, int]) -> None:
    Case().add((12, 10), resized, mask=(40, 33), at=(-11, -17)).check(interpreter)


def test_images_of_one_batch_keep_their_own_masks_colours_and_places(interpreter: Interpreter) -> None:
    case = Case()
    case.add((9, 33), (8, 8)).add((40, 9), (8, 8), mask=(5, 4), at=(1, 30)).add((8, 8), (8, 8), mask=(2, 2))
    case.add((70, 8), (8, 8), mask=(1, 8), at=(0, 69), opacity=7).check(interpreter)


@pytest.mark.parametrize(
    "window", [(1, 2, 5, 7), (-3, 4, 12, 4), (2, -5, 3, 19), (-2, -2, 20, 20), (30, 0, 4, 4)], ids=str
)
@pytest.mark.parametrize("size", [(13, 40), (60, 22)], ids=["rows first", "columns first"])
def test_a_window_crops_and_pads(interpreter: Interpreter, size: tuple[int, int], window: Window) -> None:
    Case().add(size, (10, 11), window=window, mask=(30, 30), at=(2, 2)).check(interpreter)


@pytest.mark.parametrize(
    ("filter", "mode"),
    [("bicubic", "pillow13"), ("bilinear", "torchvision"), ("nearest", "pillow12"), ("lanczos", "pillow12")],
)
def test_an_image_on_a_canvas_is_resized_as_if_it_were_padded(
    interpreter: Interpreter, filter: Filter, mode: Mode
) -> None:
    case = Case(1)
    color = (7, 255, 93)
    for size in [(20, 31), (31, 20), (1, 60), (60, 1), (40, 3), (9, 9), (12, 10)]:
        canvas, corner = square_canvas(*size)
        mask: dict[str, Any] = {"mask": (9, 8), "at": (size[1] - 4, -3), "opacity": 180}
        case.add(size, (11, 13), **mask, canvas=canvas, corner=corner, background=color)
    for corner in [(0, 0), (13, 7), (30, 50), (30, 0)]:  # padding on all sides, and on two
        case.add((10, 15), (11, 13), canvas=(40, 65), corner=corner, background=color)
    case.add((10, 15), (11, 30), (-1, 4, 11, 13), canvas=(140, 16), corner=(3, 1), background=color)
    case.check(interpreter, filter, mode)


def test_a_canvas_smaller_than_its_image_is_refused() -> None:
    size: dict[str, Any] = {"offset": 0, "height": 5, "width": 6, "resized": (4, 4), "window": (0, 0, 4, 4)}
    with pytest.raises(ValueError, match=r"at \(1, 0\) is not within its canvas \(5, 9\)"):
        Picture(**size, canvas=(5, 9), corner=(1, 0))
    with pytest.raises(ValueError, match="0 to 255, got"):
        Picture(**size, canvas=(9, 9), background=(0, 256, 0))


@pytest.mark.parametrize("source", [(600, 9), (9, 600), (3, 2)], ids=str)
def test_many_taps_and_few_pixels_are_exact(interpreter: Interpreter, source: tuple[int, int]) -> None:
    Case().add(source, (4, 3)).check(interpreter, "lanczos")


def test_rows_that_begin_at_whole_vectors_are_exact(interpreter: Interpreter) -> None:
    case = Case().add((50, 48), (8, 40), mask=(4, 4), at=(20, 10))
    batch = plan(case.pictures, "bicubic", "pillow13")
    assert [(launch.axis, launch.variant) for launch in batch.first] == [(0, 1)]
    case.check(interpreter)


def test_patches_are_those_of_the_reference_for_every_size(interpreter: Interpreter) -> None:
    case = Case().add((20, 31), (12, 24), mask=(9, 9)).add((7, 7), (12, 12)).add((90, 20), (24, 12))
    got = case.run(interpreter, "bicubic", "torchvision", Patches(patch=3, merge=2, frames=2))
    wanted = [patchify(values, 3, 2, 2) for values in case.expected("bicubic", "torchvision")]
    assert np.array_equal(got, np.concatenate(wanted))


def test_an_empty_batch_gives_an_empty_tensor(interpreter: Interpreter) -> None:
    assert Case().run(interpreter, "bicubic", "pillow13").shape == (0, 3, 0, 0)
    assert Case().run(interpreter, "bicubic", "pillow13", Patches()).shape == (0, 1176)


def test_an_image_beyond_the_reach_of_32_bits_is_read_where_it_is(interpreter: Interpreter) -> None:
    image = np.random.default_rng(3).integers(0, 256, (20, 9, 3), dtype=np.uint8)
    for resized in [(5, 4), (5, 9)]:  # rows first, columns first
        got = interpreter(interpreted.far_into_memory, image, resized, 2**32 + 12345).numpy()
        assert np.array_equal(got[0].transpose(1, 2, 0), resize(image, resized, "bicubic", "pillow13"))


@pytest.mark.parametrize("mode", ["pillow12", "pillow13"], ids=["rows first", "columns first"])
def test_an_image_of_more_bytes_than_32_bits_count_is_read_at_its_end(
    interpreter: Interpreter, mode: Mode
) -> None:
    row = np.arange(9, dtype=np.uint8).reshape(3, 3) + 100
    got = interpreter(interpreted.lowest_quarter, 2**29, row, mode).numpy()
    assert np.array_equal(got[0, :, 0].T, row)


def test_what_does_not_fit_is_refused_with_what_was_expected(interpreter: Interpreter) -> None:
    batch = plan(Case().add((6, 6), (4, 4)).add((6, 6), (5, 4)).pictures, "bicubic", "pillow13")
    none, packed = torch.empty(0, dtype=torch.uint8), torch.zeros(216, dtype=torch.uint8)
    lut, fill = torch.from_numpy(LUT), torch.from_numpy(FILL)
    middle = torch.zeros(batch.n_middle, dtype=torch.uint8)
    assert "at least 216 bytes" in interpreter(
        interpreted.error_of, "resize_first", packed[:215], none, batch
    )
    assert "uint8" in interpreter(interpreted.error_of, "resize_first", packed.int(), none, batch)
    assert "[(4, 4), (5, 4)]" in interpreter(interpreted.error_of, "resize_second", middle, batch, lut, fill)
    assert "[3, 256]" in interpreter(interpreted.error_of, "resize_second", middle, batch, lut[:2], fill)
    patches = Patches(patch=2, merge=1)
    message = interpreter(interpreted.error_of, "resize_second", middle, batch, lut, fill, patches=patches)
    assert "multiples of 2 pixels, got (5, 4)" in message
    with pytest.raises(ValueError, match="at least one pixel"):
        Picture(offset=0, height=0, width=5, resized=(4, 4), window=(0, 0, 4, 4))
    with pytest.raises(ValueError, match="wider than the kernels can address"):
        Picture(offset=0, height=1, width=2**25, resized=(4, 4), window=(0, 0, 4, 4))
    with pytest.raises(ValueError, match="more than one image may have"):
        Picture(offset=0, height=1, width=1, resized=(2**15, 2**15), window=(0, 0, 2**15, 2**15))
    with pytest.raises(ValueError, match="0 to 255, got 256"):
        Mark(offset=0, height=1, width=1, x=0, y=0, color=(0, 0, 0), opacity=256)


def test_a_plan_does_not_depend_on_what_was_planned_before() -> None:
    case = (
        Case().add((50, 48), (8, 40), mask=(4, 4), at=(20, 10)).add((30, 20), (8, 9)).add((50, 48), (8, 40))
    )
    alone = plan(case.pictures, "bicubic", "pillow13")
    plan(case.add((30, 20), (8, 9), mask=(3, 3)).pictures[::-1], "bicubic", "pillow13")
    again = plan(case.pictures[:3], "bicubic", "pillow13")
    assert torch.equal(alone.images, again.images) and torch.equal(alone.tables, again.tables)
    for launches in ("first", "second"):
        for old, new in zip(getattr(alone, launches), getattr(again, launches), strict=True):
            assert (old.axis, old.variant) == (new.axis, new.variant) and torch.equal(old.tiles, new.tiles)
    assert [launch.tiles[:, 0].unique().tolist() for launch in alone.first] == [[2], [0], [1]]


def test_tap_classes_hold_their_taps_and_waste_little() -> None:
    for n_taps in range(1, 3000):
        assert n_taps <= tap_class(n_taps) <= max(n_taps, 1.25 * n_taps)
    assert len({tap_class(n_taps) for n_taps in range(1, 129)}) == 24


def test_on_a_cpu_without_the_interpreter_a_launch_says_what_to_do() -> None:
    batch = plan(Case().add((6, 6), (4, 4)).pictures, "bicubic", "pillow13")
    packed = torch.zeros(108, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"TRITON_INTERPRET=1 .* mmextract\.kernels\.reference"):
        resize_first(packed, packed, batch)


def test_without_triton_kernels_import_and_a_launch_says_what_is_missing() -> None:
    script = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch\n"
        "from mmextract.kernels import pool, ragged, resize_second\n"
        "from mmextract.kernels.resize_first import resize_first\n"
        "picture = ragged.Picture(offset=0, height=6, width=6, resized=(4, 4), window=(0, 0, 4, 4))\n"
        "batch = ragged.plan([picture], 'bicubic', 'pillow13')\n"
        "packed = torch.zeros(108, dtype=torch.uint8)\n"
        "try: resize_first(packed, packed, batch)\n"
        "except ModuleNotFoundError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "pip install 'mmextract[triton]'" in done.stdout
