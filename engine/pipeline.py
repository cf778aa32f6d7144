"""From rows to shards: decode, watermark and encode in threads → forward and capture → staging → shards written.

A shard is the unit of work, of commit and of retry. Its batches are a function of its rows alone, so that whoever
writes it, in whatever order, alone or among others, writes the same bytes. This module knows nothing about how a run
is planned, nor about where its shards are computed.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from mmextract.engine import watermark
from mmextract.engine.assembly import Assembler, Done
from mmextract.engine.capture import Capture
from mmextract.engine.images import RejectedSample, decode
from mmextract.engine.layout import Layout
from mmextract.engine.memory import Parts
from mmextract.engine.models import Adapter, Encoded
from mmextract.engine.preprocess_device import Packed
from mmextract.engine.rows import Row
from mmextract.engine.selection import Position
from mmextract.engine.staging import Staging
from mmextract.engine.watermark import Stamp, WatermarkSpec
from mmextract.engine.writer import StoreWriter

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All that makes states of rows, but the model and the rows: small, and the same for every shard."""

    layout: Layout
    positions: tuple[Position, ...]
    watermark: WatermarkSpec | None
    """How watermarks look, if there are any."""
    batch_size: int
    """Most samples of a forward pass; all have the same number of tokens."""
    threads: int
    """Threads that decode and encode."""
    kernel_pooling: bool = False
    """Whether the pooling kernel takes the states, rather than torch."""


@dataclass(frozen=True, kw_only=True)
class ShardRows:
    """One shard's work."""

    shard: int
    rows: Sequence[Row]
    """In the order of the store."""


@dataclass(kw_only=True)
class Written:
    """What was done for some shards: a small record, that adds up."""

    bytes_written: int = 0
    """Bytes of encoded states."""
    n_nonfinite: int = 0
    """Samples that hold a NaN or an infinity."""
    nonfinite_layers: Counter[int] = field(default_factory=Counter)
    """Of these, how many do at a layer."""
    n_split: int = 0
    """Batches that the GPU had no room for, and that ran in parts."""
    stage_seconds: dict[str, float] = field(default_factory=dict)
    """How long was waited for each stage."""

    def add(self, other: Written) -> None:
        """Add what was done for other shards."""
        self.bytes_written += other.bytes_written
        self.n_nonfinite += other.n_nonfinite
        self.nonfinite_layers += other.nonfinite_layers
        self.n_split += other.n_split
        for stage, seconds in other.stage_seconds.items():
            self.stage_seconds[stage] = self.stage_seconds.get(stage, 0.0) + seconds


@dataclass(frozen=True, kw_only=True)
class _Ready:
    """A row that is ready for the model."""

    place: int
    encoded: Encoded
    record: Mapping[str, int]


@dataclass(frozen=True, kw_only=True)
class _Refused:
    """A row that has no states, and why."""

    place: int
    reason: str


def write_shards(
    recipe: Recipe,
    adapter: Adapter,
    writer: StoreWriter,
    shards: Iterable[ShardRows],
    on_progress: Callable[[int], None] = lambda n_rows: None,
) -> Written:
    """Compute, write and commit shards, one after the other, the next begun while the last is being written.

    on_progress is called from a thread with the number of rows done since the last call; what it raises ends the
    run. Raises OSError if the store cannot be written, ValueError for states that its dtype cannot hold.
    """
    layout = recipe.layout
    most = min(recipe.batch_size, layout.shard_samples)  # a batch never holds samples of two shards
    shape = (most, len(layout.layers), len(layout.positions), layout.hidden_size)
    dtype = getattr(torch, layout.dtype)
    started = time.perf_counter()
    forward_seconds = 0.0
    parts = Parts(recipe.batch_size)
    with (
        Assembler(writer, on_progress) as assembler,
        Capture(adapter, layout.layers, recipe.positions, with_kernel=recipe.kernel_pooling) as capture,
        Staging(assembler.consume, shape=shape, dtype=dtype, device=adapter.device) as staging,
    ):
        for shard, batch, packed in _packed(recipe, adapter, shards, writer.executor):
            places = tuple(item.place for item in batch)
            refusals = [item.reason for item in batch if isinstance(item, _Refused)]
            if refusals:
                staging.submit_tag(Done(shard=shard, rows=places, reasons=tuple(refusals)))
                continue
            ready = [item for item in batch if isinstance(item, _Ready)]
            slot = staging.acquire()
            before = time.perf_counter()
            nonfinite, overflow = _capture(capture, parts, ready, packed, slot.device)
            done = Done(
                shard=shard,
                rows=places,
                records=tuple(item.record for item in ready),
                nonfinite=nonfinite,
                overflow=overflow,
            )
            staging.submit(slot, len(ready), done)
            forward_seconds += time.perf_counter() - before
        fed = time.perf_counter()
    finished = time.perf_counter()
    stage_seconds = {
        "decode and preprocess": fed - started - forward_seconds - staging.seconds_waited,
        "forward": forward_seconds,
        "encode and write": staging.seconds_waited + finished - fed,
    }
    return Written(
        bytes_written=assembler.bytes_written,
        n_nonfinite=assembler.n_nonfinite,
        nonfinite_layers=assembler.nonfinite_layers,
        n_split=parts.n_split,
        stage_seconds=stage_seconds,
    )


def _capture(
    capture: Capture, parts: Parts, ready: Sequence[_Ready], packed: Packed | None, out: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Fill the first rows of `out` with states; return how many are not finite, int32 [B, L], and overflow, [B]."""
    batch = [item.encoded for item in ready]

    def run(rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        is_whole = rows == slice(0, len(batch))
        capture.run(batch[rows], out=out[rows], packed=packed if is_whole else None)
        return capture.nonfinite.clone(), capture.overflow.sum(1)

    found = parts.run(batch[0].batch_key, len(batch), run)
    nonfinite, overflow = zip(*found, strict=True)
    return torch.cat(nonfinite), torch.cat(overflow)


@contextmanager
def torch_threads(n_threads: int | None) -> Iterator[None]:
    """Have torch compute in so many threads inside, for they decide the last bits of what a CPU computes.

    None leaves it as it is.
    """
    before = torch.get_num_threads()
    if n_threads is not None:
        torch.set_num_threads(n_threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def in_order(
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


def _packed(
    recipe: Recipe, adapter: Adapter, shards: Iterable[ShardRows], executor: ThreadPoolExecutor
) -> Iterator[tuple[int, Sequence[_Ready | _Refused], Packed | None]]:
    """Yield what `_batches` does, the images that the device is to preprocess laid out in threads."""

    def pack(
        work: tuple[int, Sequence[_Ready | _Refused]],
    ) -> tuple[int, Sequence[_Ready | _Refused], Packed | None]:
        shard, batch = work
        return shard, batch, adapter.pack([item.encoded for item in batch if isinstance(item, _Ready)])

    batches = _batches(recipe, adapter, shards, executor)
    if adapter.preprocessing.device is None:
        return map(pack, batches)  # which finds nothing to do
    return in_order(executor, pack, batches, window=2)


def _batches(
    recipe: Recipe, adapter: Adapter, shards: Iterable[ShardRows], executor: ThreadPoolExecutor
) -> Iterator[tuple[int, Sequence[_Ready | _Refused]]]:
    """Yield (shard, rows that go through the model together); refused rows come alone.

    Within a shard a batch is full when it has `batch_size` rows of the same number of tokens; what is left when the
    shard ends makes smaller ones. So no padding is ever needed, and the batches depend on the shard's rows alone.
    """
    prepared = in_order(
        executor,
        lambda work: (work[0], _prepare(recipe, adapter, work[1], work[2])),
        ((shard, place, row) for shard in shards for place, row in enumerate(shard.rows)),
        window=max(2 * recipe.batch_size, 4 * recipe.threads),
    )
    buckets: dict[Hashable, list[_Ready]] = {}
    for shard, item in prepared:
        if isinstance(item, _Refused):
            yield shard.shard, [item]
        else:
            bucket = buckets.setdefault(item.encoded.batch_key, [])
            bucket.append(item)
            if len(bucket) == recipe.batch_size:
                yield shard.shard, buckets.pop(item.encoded.batch_key)
        if item.place == len(shard.rows) - 1:
            yield from ((shard.shard, bucket) for bucket in buckets.values())
            buckets.clear()


def _prepare(recipe: Recipe, adapter: Adapter, place: int, row: Row) -> _Ready | _Refused:
    """Decode, watermark and encode one row; a row that cannot be had is refused with its reason."""
    record: dict[str, int] = {}
    n_positions = len(recipe.layout.positions)
    try:
        pixels = stamp = None
        if row.sample.image is not None:
            decoded = decode(row.sample.image)
            pixels = decoded.pixels
            record["image_hash"] = int(np.uint64(decoded.hash).astype(np.int64))
            record["image_height"], record["image_width"] = pixels.shape[:2]
        if row.text is not None and pixels is not None:
            stamp = _stamp(recipe.watermark, row, pixels, record)
        encoded = adapter.encode(adapter.render(row.sample.turns), pixels, stamp)
        for position in recipe.positions:
            position.check(encoded)
        if n_positions < encoded.n_tokens and recipe.positions[0].name == "all":
            raise RejectedSample(
                f"it has {encoded.n_tokens} tokens, and the store has room for {n_positions}: raise --max-tokens"
            )
    except RejectedSample as refusal:
        return _Refused(place=place, reason=str(refusal))
    record["n_tokens"] = encoded.n_tokens
    return _Ready(place=place, encoded=encoded, record=record)


def _stamp(spec: WatermarkSpec | None, row: Row, pixels: NDArray[np.uint8], record: dict[str, int]) -> Stamp:
    assert spec is not None and row.text is not None
    height, width = pixels.shape[:2]
    try:
        placement = watermark.place(spec, row.sample.id, width, height, row.texts_to_fit)
    except ValueError as error:
        raise RejectedSample(str(error)) from error
    record["watermark_x"], record["watermark_y"] = placement.x, placement.y
    record["watermark_font_px"] = placement.font_px
    return watermark.make_stamp(spec, row.text, placement)
