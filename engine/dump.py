"""The whole run: rows → decode, watermark, encode → forward and capture → staging → shards of a store.

A shard is the unit of work, of commit and of retry. Its batches are a function of its rows alone, so that a resumed
run writes the very bytes of an uninterrupted one. This module composes the others; it draws nothing on a screen.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from mmextract.engine import watermark
from mmextract.engine.assembly import Assembler, Done
from mmextract.engine.capture import Capture
from mmextract.engine.images import RejectedSample, decode, measure
from mmextract.engine.layout import Layout
from mmextract.engine.models import Adapter, Encoded, ModelSpec
from mmextract.engine.objects import Objects
from mmextract.engine.rows import Marking, Row, describe_marking, make_columns, make_rows
from mmextract.engine.samples import Dataset
from mmextract.engine.selection import Position, parse_layers, parse_positions
from mmextract.engine.staging import Staging
from mmextract.engine.watermark import WatermarkSpec
from mmextract.engine.writer import StoreWriter, open_writer

Item = TypeVar("Item")
Result = TypeVar("Result")

SHARD_BYTES = 64 << 20
"""Size of a shard's states before compression, unless its number of samples is given."""

IMAGE_RECORD_FIELDS = ("n_tokens", "n_nonfinite", "image_hash", "image_height", "image_width")
TEXT_RECORD_FIELDS = ("n_tokens", "n_nonfinite")
WATERMARK_RECORD_FIELDS = ("watermark_x", "watermark_y", "watermark_font_px")


@dataclass(frozen=True, kw_only=True)
class DumpSpec:
    """What to dump. Everything here but `threads` decides the store's bytes."""

    dataset: Dataset
    """Samples."""
    model: ModelSpec
    """What `adapter` was loaded from."""
    marking: Marking | None = None
    """Watermarks to put on the images, if any."""
    layers: str = "all"
    """See `selection.parse_layers`."""
    positions: tuple[str, ...] = ("last",)
    """See `selection.parse_positions`."""
    dtype: str = "auto"
    """`float32`, `float16`, `bfloat16`; auto is float16 for a float16 model and float32 for any other."""
    batch_size: int = 16
    """Most samples of a forward pass; all have the same number of tokens."""
    shard_samples: int | None = None
    """Samples of a shard; None chooses by SHARD_BYTES."""
    codec: str = "lz4"
    """See `shards.CODECS`."""
    max_tokens: int | None = None
    """Length of the position axis with `all`; None measures the longest sample first."""
    threads: int = field(default_factory=lambda: max(2, os.cpu_count() or 2))
    """Threads that decode and encode."""

    def __post_init__(self) -> None:
        for name, value in (("batch size", self.batch_size), ("threads", self.threads)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.shard_samples is not None and self.shard_samples < 1:
            raise ValueError(f"a shard needs at least 1 sample, got {self.shard_samples}")


@dataclass(frozen=True, kw_only=True)
class DumpPlan:
    """A run, planned to the last shape; see `plan_dump`."""

    spec: DumpSpec
    rows: Sequence[Row]
    layout: Layout
    positions: tuple[Position, ...]
    attributes: Mapping[str, Any]

    @property
    def bytes_per_sample(self) -> int:
        """Bytes of one sample's states before compression."""
        layout = self.layout
        width = 4 if layout.dtype == "float32" else 2
        return len(layout.layers) * len(layout.positions) * layout.hidden_size * width

    @property
    def spec_of_watermark(self) -> WatermarkSpec | None:
        """How watermarks look, if there are any."""
        return self.spec.marking.spec if self.spec.marking else None


@dataclass(kw_only=True)
class DumpSummary:
    """What a run did."""

    n_samples: int
    """Rows of the store."""
    n_resumed: int = 0
    """Rows that an earlier run had committed."""
    bytes_written: int = 0
    """Bytes of encoded states."""
    seconds: float = 0.0
    """Wall time, the model's loading not included."""
    rejected: dict[str, str] = field(default_factory=dict)
    """Sample id → why it has no states, for the whole store."""
    n_nonfinite: int = 0
    """Samples of this run that hold a NaN or an infinity."""
    stage_seconds: dict[str, float] = field(default_factory=dict)
    """How long the run waited for each stage."""

    @property
    def bottleneck(self) -> str:
        """The stage that the run waited for longest."""
        return max(self.stage_seconds, key=lambda name: self.stage_seconds[name], default="none")


def plan_dump(spec: DumpSpec, adapter: Adapter) -> DumpPlan:
    """Work out rows, shapes and attributes of a run; reads image headers only if positions are `all`.

    Raises ValueError or LookupError for what cannot be done with this model and these samples.
    """
    rows = make_rows(spec.dataset, spec.marking)
    positions = parse_positions(spec.positions)
    layers = parse_layers(spec.layers, adapter.n_layers)
    has_images = any(row.sample.image is not None for row in rows)
    if has_images and not adapter.has_vision:
        raise ValueError(
            f"{spec.model.model} takes no images, but the samples have them: drop the image column"
        )
    names = tuple(position.name for position in positions)
    if names == ("all",):
        with ThreadPoolExecutor(spec.threads) as executor:
            longest = spec.max_tokens or _longest(rows, adapter, executor)
        names = tuple(str(index) for index in range(longest))
    dtype = spec.dtype
    if dtype == "auto":
        dtype = "float16" if adapter.dtype == torch.float16 else "float32"
    width = 4 if dtype == "float32" else 2
    per_sample = len(layers) * len(names) * adapter.hidden_size * width
    fields = IMAGE_RECORD_FIELDS if has_images else TEXT_RECORD_FIELDS
    layout = Layout(
        n_samples=len(rows),
        layers=layers,
        positions=names,
        hidden_size=adapter.hidden_size,
        dtype=dtype,
        shard_samples=min(spec.shard_samples or max(1, SHARD_BYTES // per_sample), len(rows)),
        codec=spec.codec,
        record_fields=fields + (WATERMARK_RECORD_FIELDS if spec.marking else ()),
    )
    data = dict(spec.dataset.describe())
    source = data.pop("source")  # the same data under another path is the same run
    run = {
        "data": data,
        "model": adapter.describe(),
        "watermark": describe_marking(spec.marking),
        "layers": list(layers),
        "positions": list(spec.positions),
        "dtype": dtype,
        "codec": spec.codec,
        "batch_size": spec.batch_size,
        "shard_samples": layout.shard_samples,
        "device": adapter.device.type,
    }
    return DumpPlan(
        spec=spec, rows=rows, layout=layout, positions=positions, attributes={"run": run, "source": source}
    )


def run_dump(
    plan: DumpPlan,
    adapter: Adapter,
    place: str | Path | Objects,
    on_progress: Callable[[int], None] = lambda n_rows: None,
) -> DumpSummary:
    """Write what is missing of the store at `place`, and finalise it.

    on_progress is called with the number of rows done since the last call. Raises `store.OtherRunError` if another
    run made the store, OSError if it cannot be written. Whatever stops it, a later call continues.
    """
    started = time.perf_counter()
    with ThreadPoolExecutor(plan.spec.threads, "mmextract-cpu") as executor:
        columns = make_columns(plan.rows, plan.spec.marking)
        writer = open_writer(place, plan.layout, columns, plan.attributes, executor)
        committed = writer.committed()
        missing = [shard for shard in range(plan.layout.n_shards) if shard not in committed]
        summary = DumpSummary(n_samples=len(plan.rows))
        summary.n_resumed = sum(len(plan.layout.rows(shard)) for shard in committed)
        on_progress(summary.n_resumed)
        if missing:
            _write_shards(plan, adapter, writer, missing, executor, summary, on_progress)
        if missing or not writer.finalised():
            writer.finalise()
    reasons = writer.rejected()
    summary.rejected = {plan.rows[row].id: reason for row, reason in reasons.items()}
    summary.seconds = time.perf_counter() - started
    return summary


@dataclass(frozen=True, kw_only=True)
class _Ready:
    """A row that is ready for the model."""

    row: int
    encoded: Encoded
    record: Mapping[str, int]


@dataclass(frozen=True, kw_only=True)
class _Refused:
    """A row that has no states, and why."""

    row: int
    reason: str


def _write_shards(
    plan: DumpPlan,
    adapter: Adapter,
    writer: StoreWriter,
    missing: Sequence[int],
    executor: ThreadPoolExecutor,
    summary: DumpSummary,
    on_progress: Callable[[int], None],
) -> None:
    assembler = Assembler(writer, on_progress)
    layout, spec = plan.layout, plan.spec
    dtype = getattr(torch, layout.dtype)
    shape = (spec.batch_size, len(layout.layers), len(layout.positions), layout.hidden_size)
    started = time.perf_counter()
    forward_seconds = 0.0
    with (
        Capture(adapter, layout.layers, plan.positions) as capture,
        Staging(assembler.consume, shape=shape, dtype=dtype, device=adapter.device) as staging,
    ):
        for shard, batch in _batches(plan, adapter, missing, executor):
            places = tuple(item.row - layout.rows(shard).start for item in batch)
            refusals = [item.reason for item in batch if isinstance(item, _Refused)]
            if refusals:
                staging.submit_tag(Done(shard=shard, rows=places, reasons=tuple(refusals)))
                continue
            ready = [item for item in batch if isinstance(item, _Ready)]
            slot = staging.acquire()
            before = time.perf_counter()
            capture.run([item.encoded for item in ready], out=slot.device[: len(ready)])
            records = tuple(item.record for item in ready)
            done = Done(
                shard=shard,
                rows=places,
                records=records,
                nonfinite=capture.nonfinite.sum(1),
                overflow=capture.overflow.sum(1),
            )
            staging.submit(slot, len(ready), done)
            forward_seconds += time.perf_counter() - before
    total = time.perf_counter() - started
    summary.bytes_written = assembler.bytes_written
    summary.n_nonfinite = assembler.n_nonfinite
    summary.stage_seconds = {
        "decode and preprocess": total - forward_seconds - staging.seconds_waited,
        "forward": forward_seconds,
        "encode and write": staging.seconds_waited,
    }


def _batches(
    plan: DumpPlan, adapter: Adapter, missing: Sequence[int], executor: ThreadPoolExecutor
) -> Iterator[tuple[int, Sequence[_Ready | _Refused]]]:
    """Yield (shard, rows that go through the model together); refused rows come alone.

    Within a shard a batch is full when it has `batch_size` rows of the same number of tokens; what is left when the
    shard ends makes smaller ones. So no padding is ever needed, and the batches depend on the shard's rows alone.
    """
    waiting = _in_order(
        executor,
        lambda row: _prepare(plan, adapter, row),
        (row for shard in missing for row in plan.layout.rows(shard)),
        window=max(2 * plan.spec.batch_size, 4 * plan.spec.threads),
    )
    for shard in missing:
        buckets: dict[Hashable, list[_Ready]] = {}
        for item in islice(waiting, len(plan.layout.rows(shard))):
            if isinstance(item, _Refused):
                yield shard, [item]
                continue
            bucket = buckets.setdefault(item.encoded.batch_key, [])
            bucket.append(item)
            if len(bucket) == plan.spec.batch_size:
                yield shard, buckets.pop(item.encoded.batch_key)
        yield from ((shard, bucket) for bucket in buckets.values())


def _in_order(
    executor: ThreadPoolExecutor, work: Callable[[Item], Result], items: Iterator[Item], window: int
) -> Iterator[Result]:
    """Map in threads, in order, with at most `window` items begun and not yet yielded."""
    begun: deque[Future[Result]] = deque()
    try:
        for item in items:
            begun.append(executor.submit(work, item))
            if len(begun) >= window:
                yield begun.popleft().result()
        while begun:
            yield begun.popleft().result()
    finally:
        for future in begun:
            future.cancel()


def _prepare(plan: DumpPlan, adapter: Adapter, index: int) -> _Ready | _Refused:
    """Decode, watermark and encode one row; a row that cannot be had is refused with its reason."""
    row = plan.rows[index]
    record: dict[str, int] = {}
    try:
        pixels = None
        if row.sample.image is not None:
            decoded = decode(row.sample.image)
            pixels = decoded.pixels
            record["image_hash"] = int(np.uint64(decoded.hash).astype(np.int64))
            record["image_height"], record["image_width"] = pixels.shape[:2]
        if row.text is not None and pixels is not None:
            pixels = _mark(plan, row, pixels, record)
        encoded = adapter.encode(adapter.render(row.sample.turns), pixels)
        for position in plan.positions:
            position.check(encoded)
        if len(plan.layout.positions) < encoded.n_tokens and plan.positions[0].name == "all":
            raise RejectedSample(
                f"it has {encoded.n_tokens} tokens, and the store has room for {len(plan.layout.positions)}: "
                "raise --max-tokens"
            )
    except RejectedSample as refusal:
        return _Refused(row=index, reason=str(refusal))
    record["n_tokens"] = encoded.n_tokens
    return _Ready(row=index, encoded=encoded, record=record)


def _mark(plan: DumpPlan, row: Row, pixels: NDArray[np.uint8], record: dict[str, int]) -> NDArray[np.uint8]:
    spec = plan.spec_of_watermark
    assert spec is not None and row.text is not None
    height, width = pixels.shape[:2]
    try:
        placement = watermark.place(spec, row.sample.id, width, height, row.texts_to_fit)
    except ValueError as error:
        raise RejectedSample(str(error)) from error
    record["watermark_x"], record["watermark_y"] = placement.x, placement.y
    record["watermark_font_px"] = placement.font_px
    return watermark.apply(pixels, spec, row.text, placement)


def _longest(rows: Sequence[Row], adapter: Adapter, executor: ThreadPoolExecutor) -> int:
    """Return the number of tokens of the longest sample: exact, from its text and a blank image of its size."""

    @lru_cache(maxsize=1 << 20)
    def n_tokens(text: str, size: tuple[int, int] | None) -> int:
        blank = None if size is None else np.zeros((size[1], size[0], 3), np.uint8)
        return adapter.encode(text, blank).n_tokens

    def measured(row: Row) -> int:
        image = row.sample.image
        try:
            return n_tokens(adapter.render(row.sample.turns), None if image is None else measure(image))
        except RejectedSample:
            return 0  # it will be refused again, and then recorded, when its turn comes

    return max(1, *_in_order(executor, measured, iter(rows), window=64))
