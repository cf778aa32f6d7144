from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from mmextract.kernels.reference import Uint8Array, composite_text, divide_255


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
