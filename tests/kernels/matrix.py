"""Random resizes by the kernels, many in one launch, against the libraries themselves.

Runs in the interpreting process, images, expectation and all, so that only the differences travel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version

import numpy as np
import PIL
import skimage.data
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as torchvision

from mmextract.kernels.ragged import Mark, Picture
from mmextract.kernels.reference import Uint8Array, place
from mmextract.kernels.resample import FILTERS, MODES, Filter, Mode
from tests.kernels.interpreted import preprocess

Size = tuple[int, int]
INSTALLED: Mode = "pillow13" if int(PIL.__version__.split(".")[0]) >= 13 else "pillow12"
HAS_LANCZOS = tuple(map(int, version("torchvision").split(".")[:2])) >= (0, 27)
PAIRS: tuple[tuple[Filter, Mode], ...] = tuple(
    (filter, mode)
    for filter in FILTERS
    for mode in MODES
    if HAS_LANCZOS or (filter, mode) != ("lanczos", "torchvision")
)
"""Filters and modes that the installed libraries have."""
WINDOW = 24
"""Side of every output in `random_cases`: what is less is padded, what is more is cut."""
INK = (250, 3, 120)
PHOTOS = ("astronaut", "chelsea", "coffee", "rocket")


@dataclass(frozen=True, kw_only=True)
class Case:
    """One image with its watermark, and what becomes of it."""

    image: Uint8Array
    mask: Uint8Array
    at: tuple[int, int]
    """(x, y) of the mask in the image."""
    opacity: int
    resized: Size
    window: tuple[int, int, int, int]


def random_cases(filter: Filter, mode: Mode, seed: int, n: int) -> list[str]:
    """Return descriptions of those of n random cases in which any value differs from the library's."""
    rng = np.random.default_rng([seed, hash_of(filter), hash_of(mode)])
    return differing([_draw(rng) for _ in range(n)], filter, mode)


def photo_cases(filter: Filter, mode: Mode, photo: str) -> list[str]:
    """Return descriptions of differing cases: a photo's watermark crosses every edge and corner, and lies within."""
    whole: Uint8Array = getattr(skimage.data, photo)()
    image = np.ascontiguousarray(whole[60:100, 80:140])
    mask = np.random.default_rng(0).integers(0, 256, (15, 25), dtype=np.uint8)
    places = [(x, y) for x in (-10, 20, 50) for y in (-5, 10, 32)]
    sizes = [(28, 28), (28, 42), (39, 61), (10, 55), (50, 12), (40, 60), (7, 41), (20, 30), (1, 13)]
    cases = [
        Case(image=image, mask=mask, at=at, opacity=200, resized=size, window=(0, 0, 30, 30))
        for at, size in zip(places, sizes, strict=True)
    ]
    return differing(cases, filter, mode)


def hash_of(text: str) -> int:
    """Return a number that is the same in every process."""
    return int.from_bytes(text.encode()[:8], "little")


def _draw(rng: np.random.Generator) -> Case:
    """Draw single pixels, a few, extremely long sides, enlargements, and sizes that change by one or not at all."""
    longest = ((1, 2), (1, 6), (6, 40), (1, 300))
    size = (int(rng.integers(*longest[rng.integers(4)])), int(rng.integers(*longest[rng.integers(3)])))
    resized = (int(rng.integers(1, 40)), int(rng.integers(1, 40)))
    if rng.random() < 0.25:
        resized = (max(1, size[0] + int(rng.integers(-1, 2))), max(1, size[1] + int(rng.integers(-1, 2))))
    if rng.random() < 0.5:
        size, resized = size[::-1], resized[::-1]
    image = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
    if rng.random() < 0.3:  # black and white, where overshooting filters are clipped most
        image = (image // 128 * 255).astype(np.uint8)
    shape = (int(rng.integers(1, 20)), int(rng.integers(1, 30)))
    starts = [int(rng.integers(-3, max(n - WINDOW, 0) + 1)) for n in resized]
    return Case(
        image=image,
        mask=rng.integers(0, 256, shape, dtype=np.uint8),
        at=(int(rng.integers(-shape[1], size[1] + 1)), int(rng.integers(-shape[0], size[0] + 1))),
        opacity=int(rng.integers(0, 256)),
        resized=resized,
        window=(starts[0], starts[1], WINDOW, WINDOW),
    )


def differing(cases: Sequence[Case], filter: Filter, mode: Mode) -> list[str]:
    """Run all cases in one launch of each pass and describe those that do not equal the library's result."""
    levels = torch.arange(256, dtype=torch.float32).repeat(3, 1)
    fill = torch.tensor([-1.0, -2.0, -3.0])
    pictures = _pictures(cases)
    images, masks = [case.image for case in cases], [case.mask for case in cases]
    got = preprocess(images, masks, pictures, filter, mode, levels, fill).numpy()
    wrong = []
    for case, values in zip(cases, got, strict=True):
        resized = by_library(by_pillows_compositing(case), case.resized, filter, mode)
        wanted = place(resized.transpose(2, 0, 1).astype(np.float32), case.window, fill.numpy())
        if n := int((values != wanted).sum()):
            wrong.append(f"{n} values of {case.image.shape} → {case.resized}, mask at {case.at}")
    return wrong


def _pictures(cases: Sequence[Case]) -> list[Picture]:
    pictures, offset, n_masks = [], 0, 0
    for case in cases:
        (height, width), (x, y) = case.mask.shape, case.at
        mark = Mark(offset=n_masks, height=height, width=width, x=x, y=y, color=INK, opacity=case.opacity)
        height, width = case.image.shape[:2]
        pictures.append(
            Picture(
                offset=offset,
                height=height,
                width=width,
                resized=case.resized,
                window=case.window,
                mark=mark,
            )
        )
        offset, n_masks = offset + case.image.size, n_masks + case.mask.size
    return pictures


def by_pillows_compositing(case: Case) -> Uint8Array:
    """Lay the watermark on with Pillow alone: `paste` through the mask, then `alpha_composite`."""
    size = case.image.shape[1::-1]
    alpha = Image.new("L", size, 0)
    alpha.paste(case.opacity, case.at, Image.fromarray(case.mask))
    ink = Image.merge("RGBA", [*(Image.new("L", size, level) for level in INK), alpha])
    return np.asarray(Image.alpha_composite(Image.fromarray(case.image).convert("RGBA"), ink).convert("RGB"))


def by_library(image: Uint8Array, size: Size, filter: Filter, mode: Mode) -> Uint8Array:
    """Resize with torchvision, or with the installed Pillow, for the other version's order one axis at a time."""
    if mode == "torchvision":
        pixels = torch.from_numpy(image.copy()).permute(2, 0, 1)
        interpolation = InterpolationMode[filter.upper()]
        out: torch.Tensor = torchvision.resize(
            pixels, list(size), interpolation=interpolation, antialias=True
        )
        return out.permute(1, 2, 0).numpy()
    sampling, picture = Image.Resampling[filter.upper()], Image.fromarray(image)
    if mode == "pillow12" and INSTALLED == "pillow13":
        picture = picture.resize((size[1], image.shape[0]), sampling)
    elif mode != INSTALLED:
        rows_lost, columns_lost = image.shape[0] - size[0], image.shape[1] - size[1]
        if rows_lost > 0 and rows_lost > 2 * columns_lost:
            picture = picture.resize((image.shape[1], size[0]), sampling)
    return np.asarray(picture.resize(size[::-1], sampling))
