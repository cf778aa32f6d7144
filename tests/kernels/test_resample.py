"""The resize tables and the reference that uses them: equal to Pillow and to torchvision, to the bit."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import PIL
import pytest
import skimage.data
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as torchvision

from mmextract.kernels.reference import Uint8Array, resize
from mmextract.kernels.resample import FILTERS, MODES, Filter, Mode, table, vertical_first
from tests.kernels.matrix import PAIRS

N_CASES = 250
"""Pairs of sizes, each of which runs with every filter against both libraries: 2,000 resizes."""
INSTALLED: Mode = "pillow13" if int(PIL.__version__.split(".")[0]) >= 13 else "pillow12"
TORCHVISION_FILTERS = [filter for filter, mode in PAIRS if mode == "torchvision"]
Size = tuple[int, int]


def sizes(seed: int, n: int, most_pixels: int = 60_000) -> Iterator[tuple[Size, Size]]:
    """Draw source and target sizes: single pixels, a few, many, extremely long ones, and targets one off."""
    rng = np.random.default_rng(seed)
    while n:
        sides = [
            int(rng.integers(*rng.choice([(1, 2), (1, 8), (8, 64), (64, 300), (1, 1500)]))) for _ in range(4)
        ]
        source, target = (sides[0], sides[1]), (sides[2], sides[3])
        if rng.random() < 0.2:
            target = (
                max(1, source[0] + int(rng.integers(-1, 2))),
                max(1, source[1] + int(rng.integers(-1, 2))),
            )
        if max(source[0] * source[1], target[0] * target[1]) <= most_pixels:
            n -= 1
            yield source, target


def picture(size: Size, seed: int) -> Uint8Array:
    """Noise, in a third of the cases black and white, where overshooting filters are clipped most."""
    image = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    return (image // 128 * 255).astype(np.uint8) if seed % 3 == 0 else image


def by_pillow(image: Uint8Array, size: Size, filter: Filter) -> Uint8Array:
    return np.asarray(Image.fromarray(image).resize(size[::-1], Image.Resampling[filter.upper()]))


def by_torchvision(image: Uint8Array, size: Size, filter: Filter, contiguous: bool) -> Uint8Array:
    pixels = torch.from_numpy(image).permute(2, 0, 1)
    if contiguous and size != (1, 1):  # PyTorch 2.14 fails an assertion of its own on 1×1 outputs then
        pixels = pixels.contiguous()
    mode = InterpolationMode[filter.upper()]
    resized: torch.Tensor = torchvision.resize(pixels, list(size), interpolation=mode, antialias=True)
    return resized.permute(1, 2, 0).numpy()


@pytest.mark.parametrize("filter", FILTERS)
def test_every_value_is_that_of_the_installed_pillow(filter: Filter) -> None:
    for seed, (source, target) in enumerate(sizes(0, N_CASES)):
        image = picture(source, seed)
        different = resize(image, target, filter, INSTALLED) != by_pillow(image, target, filter)
        assert not different.any(), f"{different.sum()} values of {source} → {target}"


@pytest.mark.parametrize("filter", TORCHVISION_FILTERS)
def test_every_value_is_that_of_torchvision_on_a_cpu(filter: Filter) -> None:
    for seed, (source, target) in enumerate(sizes(1, N_CASES)):
        image = picture(source, seed)
        wanted = by_torchvision(image, target, filter, contiguous=seed % 2 == 0)
        different = resize(image, target, filter, "torchvision") != wanted
        assert not different.any(), f"{different.sum()} values of {source} → {target}"


@pytest.mark.parametrize("photo", ["astronaut", "chelsea", "coffee", "rocket"])
def test_photos_are_exact(photo: str) -> None:
    image: Uint8Array = getattr(skimage.data, photo)()
    for size in [(224, 224), (336, 504), (60, 448), (700, 21)]:
        for filter in FILTERS:
            assert np.array_equal(resize(image, size, filter, INSTALLED), by_pillow(image, size, filter))
            if filter not in TORCHVISION_FILTERS:
                continue
            wanted = by_torchvision(image, size, filter, contiguous=True)
            assert np.array_equal(resize(image, size, filter, "torchvision"), wanted)


@pytest.mark.parametrize("filter", FILTERS)
def test_pillow_12_is_pillow_with_the_rows_always_first(filter: Filter) -> None:
    for seed, (source, target) in enumerate(sizes(2, N_CASES // 4)):
        image = picture(source, seed)
        # one axis at a time leaves Pillow, of any version, no choice
        wanted = by_pillow(by_pillow(image, (source[0], target[1]), filter), target, filter)
        assert np.array_equal(resize(image, target, filter, "pillow12"), wanted), f"{source} → {target}"


def test_the_modes_differ_where_they_should() -> None:
    image = picture((120, 40), 1)
    results = [resize(image, (20, 30), "bicubic", mode) for mode in MODES]
    assert [vertical_first(mode, (120, 40), (20, 30)) for mode in MODES] == [False, True, False]
    assert not np.array_equal(results[0], results[1])
    assert not np.array_equal(results[0], results[2])


@pytest.mark.parametrize("filter", FILTERS)
@pytest.mark.parametrize("mode", MODES)
def test_a_table_never_starts_outside_nor_goes_back(filter: Filter, mode: Mode) -> None:
    for n_in, n_out in [(1, 1), (1, 9), (9, 1), (7, 8), (8, 7), (1000, 3), (3, 1000)]:
        made = table(filter, mode, n_in, n_out)
        assert made.weights.shape == (n_out, made.n_taps)
        assert made.starts.min() >= 0 and made.starts.max() < n_in and (np.diff(made.starts) >= 0).all()
        outside = made.starts[:, None] + np.arange(made.n_taps) >= n_in
        assert not made.weights[outside].any()
        assert np.abs(made.weights.sum(1) - (1 << made.bits)).max() <= made.n_taps


def test_unknown_filters_and_empty_axes_are_refused() -> None:
    with pytest.raises(ValueError, match="nearest, bilinear, bicubic, lanczos"):
        table("box", "pillow13", 3, 4)
    with pytest.raises(ValueError, match="at least one pixel, got 0"):
        table("bicubic", "pillow13", 0, 4)
