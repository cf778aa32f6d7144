"""Section of `gpu.py`: whether the device gives the very numbers of Pillow, of torchvision, and of the processors.

Compared bit by bit on the host. Outputs are poisoned before each launch, so that what is not written is a difference.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import PIL
import torch
from PIL import Image

from gpu_images import Batch, Kind, Size, Uint8Array, kinds, lut_of, make_batch, mixed_sizes
from gpu_setup import Bench, Figure
from mmextract.kernels import reference
from mmextract.kernels.pool import Spans, pool
from mmextract.kernels.ragged import Mark, Picture, plan
from mmextract.kernels.resample import FILTERS, MODES, Filter, Mode
from mmextract.kernels.resize_first import resize_first
from mmextract.kernels.resize_second import resize_second

N_CASES = 2040
"""Random resizes, shared out evenly among filters and modes."""
POISON = 0xA5


def run(bench: Bench) -> Iterator[Figure]:
    """Yield how many values differ; every one of these must be 0."""
    pairs: list[tuple[Filter, Mode]] = [(filter, mode) for filter in FILTERS for mode in MODES]
    if bench.smoke:
        pairs = pairs[:: len(MODES) + 1]  # every filter and every mode in one of them
    n_cases = (len(pairs) if bench.smoke else N_CASES) // len(pairs)
    n_values = n_different = 0
    for seed, (filter, mode) in enumerate(pairs):
        different, values = random_cases(bench, filter, mode, n_cases, seed)
        n_different, n_values = n_different + different, n_values + values
    yield Figure(
        name=f"{n_cases * len(pairs)} random resizes, values that differ", value=n_different, unit="", goal=0
    )
    yield Figure(name="values compared", value=n_values, unit="")
    for kind in kinds(bench):
        yield from processors(bench, kind)
    yield Figure(name="pooled values that differ", value=pooling(bench), unit="", goal=0)


def random_cases(bench: Bench, filter: Filter, mode: Mode, n: int, seed: int) -> tuple[int, int]:
    """Resize n random images in one launch; return values that differ from the library's, and how many there are."""
    rng = np.random.default_rng([bench.seed, seed])
    side = 12 if bench.smoke else 300
    images, masks, pictures, offset, n_masks = [], [], [], 0, 0
    for _ in range(n):
        height, width = (int(rng.integers(1, rng.choice([2, 8, side, 4 * side]))) for _ in range(2))
        resized = (int(rng.integers(1, side)), int(rng.integers(1, side)))
        if rng.random() < 0.2:
            resized = (max(1, height + int(rng.integers(-1, 2))), max(1, width + int(rng.integers(-1, 2))))
        shape = (int(rng.integers(1, 30)), int(rng.integers(1, 60)))
        x, y = int(rng.integers(-shape[1], width + 1)), int(rng.integers(-shape[0], height + 1))
        mark = Mark(
            offset=n_masks, height=shape[0], width=shape[1], x=x, y=y, color=(9, 200, 77), opacity=180
        )
        masks.append(rng.integers(0, 256, shape, dtype=np.uint8))
        images.append(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        pictures.append(
            Picture(
                offset=offset,
                height=height,
                width=width,
                resized=resized,
                window=(0, 0, side, side),
                mark=mark,
            )
        )
        offset, n_masks = offset + images[-1].size, n_masks + masks[-1].size
    identity = torch.arange(256, dtype=torch.float32).repeat(3, 1)
    got = _launch(bench, images, masks, pictures, filter, mode, identity)
    wanted = []
    for image, mask, picture in zip(images, masks, pictures, strict=True):
        assert picture.mark is not None
        alpha = reference.scale_alpha(mask, picture.mark.opacity)
        marked = reference.composite_text(image, alpha, picture.mark.x, picture.mark.y, picture.mark.color)
        resized_image = by_library(marked, picture.resized, filter, mode)
        values = resized_image.transpose(2, 0, 1).astype(np.float32)
        wanted.append(reference.place(values, picture.window, np.zeros(3, np.float32)))
    return int((got != np.stack(wanted)).sum()), got.size


def by_library(image: Uint8Array, size: Size, filter: Filter, mode: Mode) -> Uint8Array:
    """Resize with the installed Pillow or torchvision if it has that mode and filter, else with the reference."""
    installed = "pillow13" if int(PIL.__version__.split(".")[0]) >= 13 else "pillow12"
    if mode == installed:
        return np.asarray(Image.fromarray(image).resize(size[::-1], Image.Resampling[filter.upper()]))
    if mode == "torchvision" and filter != "lanczos":  # which torchvision has from 0.27 on, but not before
        from torchvision.transforms import InterpolationMode
        from torchvision.transforms.v2 import functional

        pixels = torch.from_numpy(image).permute(2, 0, 1)
        interpolation = InterpolationMode[filter.upper()]
        resized: torch.Tensor = functional.resize(pixels, list(size), interpolation, antialias=True)
        return resized.permute(1, 2, 0).numpy()
    return reference.resize(image, size, filter, mode)


def _launch(
    bench: Bench,
    images: list[Uint8Array],
    masks: list[Uint8Array],
    pictures: list[Picture],
    filter: Filter,
    mode: Mode,
    lut: torch.Tensor,
) -> np.ndarray[Any, np.dtype[np.float32]]:
    ragged = plan(pictures, filter, mode).to(bench.device)
    packed, packed_masks = (
        torch.from_numpy(np.concatenate([array.ravel() for array in arrays])).to(bench.device)
        for arrays in (images, masks)
    )
    middle = torch.full((ragged.n_middle,), POISON, dtype=torch.uint8, device=bench.device)
    resize_first(packed, packed_masks, ragged, out=middle)
    shape = (len(pictures), 3, *pictures[0].window[2:])
    out = torch.full(shape, float("nan"), device=bench.device)
    lut = lut.to(bench.device)
    resize_second(middle, ragged, lut, lut[:, 0].contiguous(), out=out)
    return out.cpu().numpy()


def processors(bench: Bench, kind: Kind) -> Iterator[Figure]:
    """Compare a batch of real sizes with the processor on the host, and with the reference where marked."""
    lut, fill = (tensor.to(bench.device) for tensor in lut_of(kind, torch.float32))
    sizes = sorted(set(mixed_sizes(bench)))
    n_different = 0
    for marked in (False, True):
        batch = make_batch(bench, kind, sizes, marked=marked)
        got = _poisoned(batch, lut, fill)
        begin = 0
        for index, image in enumerate(batch.images):
            if marked:
                wanted = batch.reference(index, lut.cpu().numpy(), "torchvision")
            else:
                wanted = np.asarray(kind.processor(image, return_tensors="pt")["pixel_values"])
            wanted = wanted.reshape(-1, *got.shape[1:])
            n_different += int((got[begin : begin + len(wanted)] != wanted).sum())
            begin += len(wanted)
        assert begin == len(got)
    yield Figure(
        name=f"{kind.name}: pixel_values of {len(sizes)} sizes that differ from the processor's",
        value=n_different,
        unit="",
        goal=0,
    )


def _poisoned(batch: Batch, lut: torch.Tensor, fill: torch.Tensor) -> np.ndarray[Any, np.dtype[np.float32]]:
    middle = torch.full((batch.ragged.n_middle,), POISON, dtype=torch.uint8, device=lut.device)
    batch.first(middle)
    return batch.second(middle, lut, fill, out=batch.make_out(torch.float32)).cpu().numpy()


def pooling(bench: Bench) -> int:
    """Return how many pooled values differ from the reference's."""
    n_samples, n_tokens, n_hidden = (2, 9, 40) if bench.smoke else (8, 700, 3584)
    shape = (n_samples, n_tokens, n_hidden)
    states = torch.randn(shape, generator=bench.generator(), device=bench.device).to(torch.bfloat16)
    spans = make_spans(n_samples, n_tokens, bench.device)
    out = torch.full((3, n_samples, n_hidden), float("nan"), device=bench.device)
    counts = torch.zeros((n_samples, 2), dtype=torch.int32, device=bench.device)
    pool(states, spans, out=out, counts=counts)
    wanted = reference.pool(
        states.float().cpu().numpy(), spans.tokens.cpu().numpy(), spans.bounds.cpu().numpy()
    )
    return int((out.cpu().numpy() != wanted).sum()) + int(counts.sum())


def make_spans(n_samples: int, n_tokens: int, device: torch.device) -> Spans:
    """Return three positions: the last token, the mean of most tokens, the mean of the few after them."""
    most = n_tokens * 4 // 5
    bounds = torch.tensor([[n_tokens - 1, n_tokens], [0, most], [most, n_tokens]], dtype=torch.int32)
    return Spans(
        tokens=torch.arange(n_tokens, dtype=torch.int32, device=device),
        bounds=bounds[:, None].expand(3, n_samples, 2).contiguous().to(device),
    )
