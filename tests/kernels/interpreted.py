"""What the interpreting process runs: kernels over NumPy arrays, outputs poisoned before."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from mmextract.kernels.pool import Spans
from mmextract.kernels.pool import pool as kernels_pool
from mmextract.kernels.ragged import Picture, plan
from mmextract.kernels.reference import Uint8Array
from mmextract.kernels.resample import Filter, Mode, table
from mmextract.kernels.resize_first import resize_first
from mmextract.kernels.resize_second import Patches, resize_second
from mmextract.kernels.triton_support import INTERPRETED


def is_interpreting() -> bool:
    return INTERPRETED


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


def pool(
    states: torch.Tensor, spans: Spans, dtype: torch.dtype, n_extra: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pool into a poisoned view of a staging buffer [B, P + n_extra, D]; also return how often it was counted."""
    n_positions, n_samples = spans.bounds.shape[:2]
    buffer = torch.full((n_samples, n_positions + n_extra, states.shape[2]), -7.0, dtype=dtype)
    counts = torch.full((n_samples, 2), 1000, dtype=torch.int32)
    out = buffer[:, :n_positions].transpose(0, 1)
    returned, counted = kernels_pool(states, spans, out=out, counts=counts)
    assert returned.data_ptr() == buffer.data_ptr() and counted is counts
    return buffer, counts - 1000


def far_into_memory(image: Uint8Array, resized: tuple[int, int], offset: int) -> torch.Tensor:
    """Resize an image that begins at byte `offset`; memory before it is reserved and never touched."""
    packed = torch.empty(offset + image.size, dtype=torch.uint8)
    packed[offset:] = torch.from_numpy(image.ravel())
    height, width = image.shape[:2]
    picture = Picture(offset=offset, height=height, width=width, resized=resized, window=(0, 0, *resized))
    batch = plan([picture], "bicubic", "pillow13")
    middle = resize_first(packed, torch.empty(0, dtype=torch.uint8), batch)
    lut = torch.arange(256, dtype=torch.float32).repeat(3, 1)
    return resize_second(middle, batch, lut, lut[:, 0].contiguous())


def lowest_quarter(height: int, row: Uint8Array, mode: Mode) -> torch.Tensor:
    """Resize an image `height` rows high to 4 by nearest and return the last of them.

    Only the source row that it comes from is touched, and is `row` ([W, 3]).
    """
    packed = torch.empty(height * row.size, dtype=torch.uint8)
    begin = int(table("nearest", mode, height, 4).starts[3]) * row.size
    packed[begin : begin + row.size] = torch.from_numpy(row.ravel())
    width = len(row)
    picture = Picture(offset=0, height=height, width=width, resized=(4, width), window=(3, 0, 1, width))
    batch = plan([picture], "nearest", mode)
    middle = resize_first(packed, torch.empty(0, dtype=torch.uint8), batch)
    lut = torch.arange(256, dtype=torch.float32).repeat(3, 1)
    return resize_second(middle, batch, lut, lut[:, 0].contiguous())


def error_of(function: str, *args: object, **kwargs: object) -> str:
    """Return the message of the ValueError that a kernel's wrapper raises."""
    wrappers: dict[str, Callable[..., object]] = {
        "resize_first": resize_first,
        "resize_second": resize_second,
        "pool": kernels_pool,
    }
    try:
        wrappers[function](*args, **kwargs)
    except ValueError as error:
        return str(error)
    return ""


def _packed(arrays: Sequence[Uint8Array]) -> torch.Tensor:
    flat: list[NDArray[np.uint8]] = [np.zeros(0, np.uint8), *(array.ravel() for array in arrays)]
    return torch.from_numpy(np.concatenate(flat))
