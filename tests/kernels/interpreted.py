"""What the interpreting process runs: kernels over NumPy arrays, outputs poisoned before."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from mmextract.kernels.ragged import Mark, Picture, plan
from mmextract.kernels.reference import Uint8Array
from mmextract.kernels.resample import Filter, Mode
from mmextract.kernels.resize_first import resize_first
from mmextract.kernels.resize_second import Patches, resize_second


def is_interpreting() -> bool:
    from triton import knobs

    return bool(knobs.runtime.interpret)


def preprocess(
    images: Sequence[Uint8Array],
    masks: Sequence[Uint8Array],
    pictures: Sequence[Picture],
    filter: Filter,
    mode: Mode,
    lut: torch.Tensor,
    fill: torch.Tensor,
    patches: Patches | None = None,
) -> torch.Tensor:
    """Run both passes over images packed one after the other, into buffers full of poison."""
    batch = plan(pictures, filter, mode)
    middle = torch.full((batch.n_middle,), 0xA5, dtype=torch.uint8)
    resize_first(_packed(images), _packed(masks), batch, out=middle)
    values = resize_second(middle, batch, lut, fill, patches=patches)
    poisoned = torch.full_like(values, float("nan"))
    return resize_second(middle, batch, lut, fill, patches=patches, out=poisoned)


def _packed(arrays: Sequence[Uint8Array]) -> torch.Tensor:
    flat: list[NDArray[np.uint8]] = [np.zeros(0, np.uint8), *(array.ravel() for array in arrays)]
    return torch.from_numpy(np.concatenate(flat))
