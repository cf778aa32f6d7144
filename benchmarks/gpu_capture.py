"""Part of section `dump` of `gpu.py`: capture of all layers behind the kernels, into a sink that keeps nothing.

What a dump does on the device and on the way to the host, from packed pixels on: copy to the device, watermark,
preprocessing, forward pass with capture, staging, the states in the model's own dtype. Nothing of the host is in it:
no file, decoding, codec or store. So it needs no zarr, and is the least that a dump can take; its goals are the dump's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch

from gpu_images import Batch, Kind, Size, lut_of, make_batch
from gpu_setup import Bench, Figure
from mmextract.engine import pooling
from mmextract.engine.capture import Capture
from mmextract.engine.models import Adapter, Encoded
from mmextract.engine.samples import IMAGE_SLOT, Turn
from mmextract.engine.selection import parse_positions
from mmextract.engine.staging import Staging

POSITIONS = {"pooled": ("last", "image"), "all tokens": ("all",)}
GOALS = {"pooled": 1.03, "all tokens": 1.10}
N_SLOTS = 3
"""Buffers of the ring."""
BATCH_SIZES: tuple[Size, ...] = ((480, 640), (768, 1024), (640, 427), (1080, 1920))
"""One size a batch, as only samples of equally many tokens share one."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """One batch: pixels on the host, their layout, and what the processor made of the prompts."""

    images: Batch
    pinned: torch.Tensor
    encoded: list[Encoded]
    """Without pixel_values, which the kernels make anew each time."""


def measure(bench: Bench, kind: Kind, adapter: Adapter, model: str) -> Iterator[Figure]:
    """Yield the figures of one model, which the table calls `model`."""
    works = [_work(bench, kind, adapter, size, bench.smoke) for size in batch_sizes(bench)]
    lut, fill = (tensor.to(bench.device) for tensor in lut_of(kind, adapter.dtype))
    ready = [_with_pixels(work, work.images.run(lut, fill)) for work in works]
    loaded = [
        {name: value.to(bench.device) for name, value in adapter.collate(batch).items()} for batch in ready
    ]

    def forward() -> None:
        for inputs in loaded:
            adapter.forward(inputs)

    n_images = sum(len(work.encoded) for work in works)
    forward_peak = bench.peak_memory(forward)
    for name, positions in POSITIONS.items():
        sink = Sink(bench, adapter, works, positions, lut, fill)
        with sink:
            found = bench.seconds({"forward": forward, "capture": sink.run}, repeats=min(bench.repeats, 3))
            peak = bench.peak_memory(sink.run)
        title = f"{model}, {name}"
        ratio = found["capture"] / found["forward"]
        yield Figure(name=f"{title}: capture ÷ bare forward", value=ratio, unit="×", goal=GOALS[name])
        yield Figure(name=f"{title}: capture", value=n_images / found["capture"], unit="images/s")
        yield Figure(
            name=f"{title}: capture, to the host", value=sink.n_bytes / found["capture"] / 1e9, unit="GB/s"
        )
        yield Figure(
            name=f"{title}: capture, peak memory beyond the forward's",
            value=(peak - forward_peak) / 1e6,
            unit="MB",
        )
        yield Figure(name=f"{title}: capture, buffers beside it", value=sink.ring_bytes / 1e6, unit="MB")
    yield Figure(name=f"{model}: bare forward beside it", value=n_images / found["forward"], unit="images/s")


def question(bench: Bench) -> str:
    """Return what is asked of each image."""
    if bench.smoke:
        return "What?"  # the interpreter takes its time for every token
    return "What is written on the sign, and who took this photograph of it at the station last week?"


def batch_sizes(bench: Bench) -> Sequence[Size]:
    """Return the sizes of images that are dumped, in turn."""
    return ((20, 31), (40, 12)) if bench.smoke else BATCH_SIZES


def _work(bench: Bench, kind: Kind, adapter: Adapter, size: Size, smoke: bool) -> Work:
    n_images = 1 if smoke else 8
    images = make_batch(bench, kind, [size] * n_images)
    text = adapter.render([Turn(role="user", text=f"{IMAGE_SLOT}\n{question(bench)}")])
    encoded = adapter.encode(text, images.images[0])
    host = images.packed.cpu()
    return Work(
        images=images, pinned=host if smoke else host.pin_memory(), encoded=[encoded for _ in range(n_images)]
    )


def _with_pixels(work: Work, values: torch.Tensor) -> list[Encoded]:
    """Give each sample its pixel_values, in place of the image that the adapter would make them of."""
    shares = values.chunk(len(work.encoded))
    return [
        replace(encoded, inputs={**encoded.inputs, "pixel_values": share}, waiting=None, pixel_shape=None)
        for encoded, share in zip(work.encoded, shares, strict=True)
    ]


class Sink:
    """A context manager; inside, `run` captures all batches into a ring whose consumer drops them."""

    def __init__(
        self,
        bench: Bench,
        adapter: Adapter,
        works: Sequence[Work],
        positions: Sequence[str],
        lut: torch.Tensor,
        fill: torch.Tensor,
    ) -> None:
        self._bench, self._works, self._lut, self._fill = bench, works, lut, fill
        names = parse_positions(list(positions))
        self._n_positions = [
            work.encoded[0].n_tokens if positions == ("all",) else len(positions) for work in works
        ]
        with_kernel = pooling.serves(bench.device, adapter.dtype)  # as a dump decides it
        self._capture = Capture(adapter, range(adapter.n_layers), names, with_kernel=with_kernel)
        row = (adapter.n_layers, max(self._n_positions), adapter.hidden_size)
        shape = (max(len(work.encoded) for work in works), *row)
        self._staging = Staging[int](
            self._drop, shape=shape, dtype=adapter.dtype, device=bench.device, n_slots=N_SLOTS
        )
        self._side: Any = None if bench.smoke else torch.cuda.Stream()
        self.n_bytes = sum(
            len(work.encoded) * row[0] * row[1] * row[2] * adapter.dtype.itemsize for work in works
        )
        """What one `run` copies to the host."""
        self.ring_bytes = N_SLOTS * math.prod(shape) * adapter.dtype.itemsize
        """Device memory of the buffers that states are captured into."""

    def __enter__(self) -> Sink:
        self._staging.__enter__()
        self._capture.__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        self._capture.__exit__(*raised)
        self._staging.__exit__(*raised)

    def run(self) -> None:
        """Capture every batch once, the next one's pixels being made ready beside the current one's forward pass."""
        coming = self._prepare(self._works[0])
        for index, work in enumerate(self._works):
            values = coming
            if self._side is not None:
                torch.cuda.current_stream().wait_stream(self._side)
                values.record_stream(torch.cuda.current_stream())
            if index + 1 < len(self._works):
                coming = self._prepare(self._works[index + 1])
            slot = self._staging.acquire()
            self._capture.run(_with_pixels(work, values), out=slot.device[: len(work.encoded)])
            self._staging.submit(slot, len(work.encoded), index)

    def _prepare(self, work: Work) -> torch.Tensor:
        with nullcontext() if self._side is None else torch.cuda.stream(self._side):
            packed = work.pinned.to(self._bench.device, non_blocking=True)
            return replace(work.images, packed=packed).run(self._lut, self._fill)

    def _drop(self, index: int, states: torch.Tensor | None) -> None:
        assert states is not None
