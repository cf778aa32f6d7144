from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont
from transformers import CLIPImageProcessor, LlavaImageProcessor, Qwen2VLImageProcessor

from mmextract.kernels.ragged import square_canvas
from mmextract.kernels.reference import (
    Uint8Array,
    composite_text,
    divide_255,
    normalize,
    pad,
    patchify,
    place,
    pool,
    scale_alpha,
)


def by_pillow(
    image: Uint8Array, alpha: Uint8Array, x: int, y: int, color: tuple[int, int, int]
) -> Uint8Array:
    layer = Image.new("RGBA", (image.shape[1], image.shape[0]), (*color, 0))
    ink = Image.merge(
        "RGBA", [*(Image.new("L", alpha.shape[::-1], c) for c in color), Image.fromarray(alpha)]
    )
    layer.paste(ink, (x, y))
    return np.asarray(Image.alpha_composite(Image.fromarray(image).convert("RGBA"), layer).convert("RGB"))


@pytest.mark.parametrize("source", [0, 1, 77, 128, 254, 255])
def test_composite_equals_pillow_for_every_destination_and_alpha(source: int) -> None:
    under = np.repeat(np.arange(256, dtype=np.uint8)[:, None], 256, axis=1)  # row: destination
    alpha = np.repeat(np.arange(256, dtype=np.uint8)[None], 256, axis=0)  # column: alpha
    image = np.stack([under] * 3, axis=-1)
    color = (source, source, source)
    assert np.array_equal(composite_text(image, alpha, 0, 0, color), by_pillow(image, alpha, 0, 0, color))


@pytest.mark.parametrize(("x", "y"), [(0, 0), (-3, -2), (14, 9), (-40, 0), (5, 40), (3, -2), (16, 11)])
def test_a_mask_may_cross_any_edge(x: int, y: int) -> None:
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (12, 17, 3), dtype=np.uint8)
    alpha = rng.integers(0, 256, (5, 7), dtype=np.uint8)
    before = image.copy()
    assert np.array_equal(
        composite_text(image, alpha, x, y, (9, 200, 31)), by_pillow(image, alpha, x, y, (9, 200, 31))
    )
    assert np.array_equal(image, before)


def test_divide_255_rounds_to_nearest() -> None:
    value = np.arange(255 * 255 + 1, dtype=np.uint32)
    assert np.array_equal(divide_255(value + np.uint32(128)), np.floor(value / 255 + 0.5).astype(np.uint32))


@pytest.mark.parametrize("opacity", [0, 1, 77, 128, 254, 255])
def test_a_mask_scaled_by_an_opacity_is_pillows_text_in_that_opacity(opacity: int) -> None:
    drawn = []
    for fill in (255, opacity):
        mask = Image.new("L", (180, 30), 0)
        ImageDraw.Draw(mask).text((2, 2), "username: jane7", font=ImageFont.load_default(17), fill=fill)
        drawn.append(np.asarray(mask))
    assert len(np.unique(drawn[0])) > 50
    assert np.array_equal(scale_alpha(drawn[0], opacity), drawn[1])


@pytest.mark.parametrize("size", [(31, 45), (8, 60), (20, 9), (24, 24), (25, 23)], ids=str)
def test_the_table_and_a_window_are_clips_own_normalisation_and_centre_crop(size: tuple[int, int]) -> None:
    processor = CLIPImageProcessor(do_resize=False, crop_size={"height": 24, "width": 24})
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    levels = np.repeat(np.arange(256, dtype=np.uint8).reshape(16, 16, 1), 3, axis=2)
    lut = np.asarray(processor(levels, do_center_crop=False)["pixel_values"][0]).reshape(3, 256)
    # what is missing is padded by half, rounded down, on top; what is too much is cut by half, rounded down
    top, left = (-((24 - n) // 2) if n < 24 else (n - 24) // 2 for n in size)
    got = place(normalize(image, lut), (top, left, 24, 24), lut[:, 0])
    assert np.array_equal(got, np.asarray(processor(image)["pixel_values"][0]))


@pytest.mark.parametrize("size", [(31, 45), (60, 8), (24, 25), (24, 24), (1, 6)], ids=str)
def test_a_square_canvas_is_llavas_own_padding(size: tuple[int, int]) -> None:
    mean = [0.48145466, 0.4578275, 0.40821073]
    options = {"do_resize": False, "do_center_crop": False, "do_rescale": False, "do_normalize": False}
    processor = LlavaImageProcessor(do_pad=True, image_mean=mean, **options)
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    wanted = np.asarray(processor(Image.fromarray(image))["pixel_values"][0]).transpose(1, 2, 0)
    canvas, corner = square_canvas(*size)
    red, green, blue = (int(level * 255) for level in mean)
    assert np.array_equal(pad(image, canvas, corner, (red, green, blue)), wanted)


@pytest.mark.parametrize(("patch", "merge", "frames"), [(14, 2, 2), (16, 2, 2), (4, 3, 1)])
def test_patches_are_qwen2_vls_own(patch: int, merge: int, frames: int) -> None:
    processor = Qwen2VLImageProcessor(
        patch_size=patch,
        merge_size=merge,
        temporal_patch_size=frames,
        do_resize=False,
        do_rescale=False,
        do_normalize=False,
    )
    shape = (3 * patch * merge, 2 * patch * merge, 3)
    image = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    wanted = processor(image, return_tensors="pt")["pixel_values"]
    got = patchify(image.transpose(2, 0, 1), patch, merge, frames)
    assert torch.equal(torch.from_numpy(got), wanted)


def test_patches_of_a_size_that_is_no_multiple_are_refused() -> None:
    with pytest.raises(ValueError, match=r"multiples of 28 pixels, got \(28, 30\)"):
        patchify(np.zeros((3, 28, 30), np.float32), 14, 2, 2)


def test_pooling_takes_a_token_as_it_is_and_means_many() -> None:
    states = np.random.default_rng(0).normal(size=(2, 5, 3)).astype(np.float32)
    tokens = np.array([4, 0, 3, 1], np.int32)
    got = pool(states, tokens, np.array([[[0, 1], [1, 4]], [[2, 2], [0, 2]]], np.int32))
    assert np.array_equal(got[0, 0], states[0, 4])
    np.testing.assert_allclose(got[0, 1], states[1, [0, 3, 1]].mean(0), rtol=1e-6)
    assert np.isnan(got[1, 0]).all()
