"""Which tokens the pooling kernel sums, and whether it may be used on a device.

What is one token comes out of the kernel to the bit as it went in, or rounded as torch rounds it. A mean is summed
in float32, token after token, on whatever device; torch sums in an order of its own, so that the last bits of a mean
depend on which of them pools, and a store whose positions are means says so. This module knows nothing about models.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray

from mmextract.kernels.pool import DTYPES, Spans, pool


def make_spans(tokens: Sequence[Sequence[NDArray[np.int64]]], device: torch.device) -> Spans:
    """Return, on `device`, what to pool. tokens: of each position, of each sample, the numbers of its tokens."""
    flat = [own for samples in tokens for own in samples]
    ends = np.cumsum([0, *(len(own) for own in flat)])
    bounds = np.stack([ends[:-1], ends[1:]], 1).reshape(len(tokens), -1, 2)
    return _spans(np.concatenate([np.zeros(0, np.int64), *flat]), bounds, device)


def every_token(n_samples: int, n_tokens: int, n_positions: int, device: torch.device) -> Spans:
    """Each of `n_tokens` is a position of its own; positions beyond them have none, and become NaN."""
    starts = np.minimum(np.arange(n_positions), n_tokens)
    ends = np.minimum(np.arange(n_positions) + 1, n_tokens)
    bounds = np.stack([starts, ends], 1)[:, None].repeat(n_samples, 1)
    return _spans(np.arange(n_tokens), bounds, device)


def _spans(tokens: NDArray[np.int64], bounds: NDArray[np.int64], device: torch.device) -> Spans:
    parts = (torch.from_numpy(part.astype(np.int32)).to(device) for part in (tokens, bounds))
    return Spans(tokens=next(parts), bounds=next(parts))


def serves(device: torch.device, states: torch.dtype) -> bool:
    """Say whether the kernel pools states of this dtype on a device, into whatever dtype a store may have."""
    return not any(find_objection(device, states, stored) for stored in DTYPES)


@lru_cache(maxsize=64)
def find_objection(device: torch.device, states: torch.dtype, stored: torch.dtype) -> str | None:
    """Return why the kernel cannot pool there, None if it can: it is tried on states of a few samples.

    What is one token must equal what torch gives; a mean must be as near to the mean in float64 as float32 allows.
    """
    from mmextract.kernels.triton_support import INTERPRETED, tl

    if tl is None or (device.type != "cuda" and not INTERPRETED):
        return "no GPU with Triton"
    if states not in DTYPES or stored not in DTYPES:
        return f"states of {states} stored as {stored}"
    generator = torch.Generator().manual_seed(0)
    tried = torch.randn((2, 37, 531), generator=generator).to(device, states)
    single, some = [np.array([36]), np.array([3])], [np.arange(37), np.arange(5, 16)]
    out, _ = pool(tried, make_spans([single, some], device), dtype=stored)
    last = torch.stack([tried[0, 36], tried[1, 3]]).to(stored)
    means = torch.stack([tried[0].double().mean(0), tried[1, 5:16].double().mean(0)])
    near = torch.allclose(out[1].double(), means, rtol=2 * torch.finfo(stored).eps, atol=1e-6)
    return None if torch.equal(out[0], last) and near else f"it is not exact on {device}"
