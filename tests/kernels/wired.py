"""What the interpreting process runs: whole models, with the kernels where a GPU would have them."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmextract.engine.capture import Capture
from mmextract.engine.images import RejectedSample
from mmextract.engine.models import Adapter, Encoded, ModelSpec, load
from mmextract.engine.pooling import find_objection
from mmextract.engine.preprocess_device import GlyphCache
from mmextract.engine.selection import parse_positions
from mmextract.engine.watermark import Stamp
from mmextract.kernels.reference import Uint8Array

Sample = tuple[str, Uint8Array, Stamp | None]


@lru_cache
def adapter_of(folder: Path, preprocess: str) -> Adapter:
    return load(ModelSpec(model=str(folder), device="cpu", preprocess=preprocess))


def collated(folder: Path, preprocess: str, samples: list[Sample]) -> list[dict[str, torch.Tensor]]:
    """Encode samples, and join neighbours that can share a forward pass."""
    adapter = adapter_of(folder, preprocess)
    assert adapter.preprocessing.path == preprocess
    encoded = [adapter.encode(*sample) for sample in samples]
    groups: dict[Any, list[Encoded]] = {}
    for one in encoded:
        groups.setdefault(one.batch_key, []).append(one)
    assert all((one.waiting is not None) == (preprocess == "kernels") for one in encoded)
    return [adapter.collate(batch, adapter.pack(batch)) for batch in groups.values()]


def with_one_on_the_cpu(folder: Path, samples: list[Sample]) -> torch.Tensor:
    """Join images in waiting with one that was preprocessed on the CPU, as one too large for the kernels is."""
    adapter = adapter_of(folder, "kernels")
    batch = [adapter.encode(*sample) for sample in samples]
    batch[1] = adapter_of(folder, "cpu").encode(*samples[1])
    return adapter.collate(batch)["pixel_values"]


def refusal(folder: Path, preprocess: str, sample: Sample) -> str:
    try:
        adapter_of(folder, preprocess).encode(*sample)
    except RejectedSample as error:
        return str(error)
    return ""


def waits_when_wide(folder: Path, width: int) -> bool:
    """Say whether an image of one row of so many pixels is left to the kernels."""
    device = adapter_of(folder, "kernels").preprocessing.device
    assert device is not None
    return device.wait(np.broadcast_to(np.zeros(3, np.uint8), (1, width, 3)), None) is not None


def packed_bytes(folder: Path, pixels: Uint8Array) -> int:
    """Return how many bytes go to the device for one image."""
    device = adapter_of(folder, "kernels").preprocessing.device
    assert device is not None
    waiting = device.wait(pixels, None)
    assert waiting is not None
    return device.pack([waiting]).pixels.numel()


def pooled(
    folder: Path, samples: list[Sample], positions: list[str], with_kernel: bool, n_extra: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Capture every layer, and how many values are not finite."""
    adapter = adapter_of(folder, "cpu")
    assert find_objection(adapter.device, adapter.dtype, torch.float32) is None
    batch = [adapter.encode(*sample) for sample in samples]
    n_positions = batch[0].n_tokens + n_extra if positions == ["all"] else len(positions)
    out = torch.full((len(batch), adapter.n_layers, n_positions, adapter.hidden_size), -7.0)
    layers = range(adapter.n_layers)
    with Capture(adapter, layers, parse_positions(positions), with_kernel=with_kernel) as capture:
        capture.run(batch, out=out)
    return out, torch.stack([capture.nonfinite, capture.overflow])


def cached_glyphs(room: int, batches: list[list[Uint8Array]]) -> list[tuple[list[Uint8Array], int]]:
    """Hold masks batch after batch; return what lies where they are said to be, and how much room there is."""
    cache = GlyphCache(torch.device("cpu"), room=room)
    found = []
    for alphas in batches:
        masks, offsets = cache.hold(alphas)
        there = [
            masks[o : o + a.size].numpy().reshape(a.shape).copy()
            for o, a in zip(offsets, alphas, strict=True)
        ]
        found.append((there, len(masks)))
    return found
