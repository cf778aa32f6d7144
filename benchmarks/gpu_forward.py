"""Section `dump` of `gpu.py`: what a dump adds to the bare forward passes of two models of the size of 7B.

The whole of it where what a store needs is installed, and in any case the part of it on the device.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch

import gpu_capture
from gpu_images import kinds
from gpu_models import llava, qwen2vl
from gpu_setup import Bench, Figure

STORE_NEEDS = frozenset({"zarr", "numcodecs", "google_crc32c", "xxhash"})
"""Packages that a store is written with and a kernel is not."""


def run(bench: Bench) -> Iterator[Figure]:
    """Yield both models' figures; one model is in memory at a time."""
    measures = [gpu_capture.measure]
    try:
        import gpu_dump
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in STORE_NEEDS:
            raise
        print(
            f"dump ÷ bare forward is not measured, as {missing} is missing: "
            "capture ÷ bare forward is the part of it on the device",
            file=sys.stderr,
        )
    else:
        measures.insert(0, gpu_dump.measure)
    for kind, build in zip(kinds(bench), (llava, qwen2vl), strict=True):
        adapter = build(bench, kind)
        model = f"tiny {kind.name}" if bench.smoke else f"{kind.name}-7B"
        for measure in measures:
            yield from measure(bench, kind, adapter, model)
        del adapter
        if not bench.smoke:
            torch.cuda.empty_cache()
