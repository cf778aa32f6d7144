"""The writer's side of a dump: rows that arrive in any order within a shard become one shard, written and committed.

This module knows nothing about models or images.
"""

from __future__ import annotations

import queue
from collections import Counter, deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray

from mmextract.engine.allocation import keep_freed_memory
from mmextract.engine.writer import StoreWriter

WRITERS = 3
"""Shards that are on their way at the same time: one is encoded, by all threads, while others wait for the disk.

Chunks are encoded in the order in which shards were filled, so that where there are more chunks than threads no two
shards are ready for the disk at once.
"""

BUFFERS = 3
"""Shards in memory; then one waits until another has been read: to touch fresh memory costs as much as to encode."""


@dataclass(frozen=True, kw_only=True)
class Done:
    """Rows that are finished: captured, or rejected."""

    shard: int
    """Which shard they are of."""
    rows: tuple[int, ...]
    """Their places in it."""
    records: tuple[Mapping[str, int], ...] = ()
    """What was found out about each: field → value. Empty for rejected rows."""
    nonfinite: torch.Tensor | None = None
    """int [B, L]: how many values of each are NaN or infinite, by layer. None for rejected rows."""
    overflow: torch.Tensor | None = None
    """int [B]: how many of these are finite in the model, but too large for the store's dtype."""
    reasons: tuple[str, ...] = ()
    """Why each was rejected. Empty for captured rows."""


@dataclass(kw_only=True)
class _Open:
    """A shard that is being filled."""

    states: NDArray[Any]
    records: NDArray[np.int64]
    n_left: int
    rejected: dict[int, str] = field(default_factory=dict)


class Assembler:
    """Fills shards from what `consume` is given and writes each as soon as its last row is there.

    A context manager; leaving it waits for the shards being written and raises what went wrong with them.
    """

    def __init__(self, writer: StoreWriter, on_progress: Callable[[int], None]) -> None:
        self._writer = writer
        self._on_progress = on_progress
        self._open: dict[int, _Open] = {}
        self._writing: deque[Future[int]] = deque()
        self._free: queue.SimpleQueue[NDArray[Any]] = queue.SimpleQueue()
        self._n_buffers = 0
        self._pool = ThreadPoolExecutor(WRITERS, "mmextract-shards")
        self.bytes_written = 0
        """Bytes of encoded states so far."""
        self.nonfinite_layers: Counter[int] = Counter()
        """Samples so far that hold a NaN or an infinity at a layer."""
        self.n_nonfinite = 0
        """Samples so far that hold a NaN or an infinity."""

    def __enter__(self) -> Self:
        keep_freed_memory()  # of the encoded chunks
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            while kind is None and self._writing:
                self._finish_one()
        finally:
            self._pool.shutdown(cancel_futures=True)

    def consume(self, done: Done, states: torch.Tensor | None) -> None:
        """Take finished rows; states is [B, L, P, D] in the store's dtype, None for rejected rows."""
        shard = self._open.get(done.shard) or self._begin(done.shard)
        if states is None:
            shard.rejected.update(zip(done.rows, done.reasons, strict=True))
            shard.states[:, list(done.rows)] = self._writer.layout.nan
        else:
            self._fill(shard, done, states)
        shard.n_left -= len(done.rows)
        if shard.n_left == 0:
            self._write(done.shard)
        self._on_progress(len(done.rows))

    def _write(self, index: int) -> None:
        while self._writing and (len(self._writing) >= WRITERS or self._writing[0].done()):
            self._finish_one()  # bounds the memory, and raises soon what went wrong
        self._writing.append(self._pool.submit(self._encode_and_commit, index, self._open.pop(index)))

    def _encode_and_commit(self, index: int, shard: _Open) -> int:
        with ExitStack() as in_use:
            in_use.callback(self._free.put, shard.states)
            encoded = self._writer.encode(shard.states, shard.records, shard.rejected)
            if self._writer.layout.codec != "none":  # otherwise what is written are views of the states
                in_use.close()
            return self._writer.commit(index, encoded, on_read=in_use.close)

    def _finish_one(self) -> None:
        self.bytes_written += self._writing.popleft().result()

    def _fill(self, shard: _Open, done: Done, states: torch.Tensor) -> None:
        assert done.nonfinite is not None and done.overflow is not None
        dtype = self._writer.layout.dtype
        if int(done.overflow.sum()):
            raise ValueError(
                f"hidden states are too large for {dtype} (row {done.rows[int(done.overflow.argmax())]} of shard "
                f"{done.shard}): nothing of this shard was written; use --store-dtype float32 or bfloat16"
            )
        counts = done.nonfinite.sum(1).tolist()
        if any(counts):
            self.n_nonfinite += sum(count > 0 for count in counts)
            with_any = (done.nonfinite > 0).sum(0).tolist()
            self.nonfinite_layers += Counter(dict(zip(self._writer.layout.layers, with_any, strict=True)))
        shard.states[:, _index(done.rows)] = to_numpy(states).swapaxes(0, 1)
        for row, record, count in zip(done.rows, done.records, counts, strict=True):
            known = {**record, "n_nonfinite": count}
            shard.records[row] = [known.get(name, -1) for name in self._writer.layout.record_fields]

    def _begin(self, index: int) -> _Open:
        layout = self._writer.layout
        n_rows = len(layout.rows(index))
        states = self._take_buffer()
        states[:, n_rows:] = layout.nan
        shard = _Open(states=states, records=layout.empty_records(), n_left=n_rows)
        self._open[index] = shard
        return shard

    def _take_buffer(self) -> NDArray[Any]:
        """Return memory for a shard: of one that was read; if there are BUFFERS, wait for that."""
        may_come = self._n_buffers > len(self._open)  # otherwise all are being filled
        try:
            return self._free.get(block=may_come and self._n_buffers >= BUFFERS)
        except queue.Empty:
            self._n_buffers += 1
            return self._writer.layout.empty_shard()


def _index(rows: tuple[int, ...]) -> slice | list[int]:
    """Return rows as a slice if they follow each other, which NumPy copies faster."""
    contiguous = rows == tuple(range(rows[0], rows[0] + len(rows)))
    return slice(rows[0], rows[0] + len(rows)) if contiguous else list(rows)


def to_numpy(states: torch.Tensor) -> NDArray[Any]:
    """Return the same bits as a NumPy array; bfloat16 becomes uint16."""
    if states.dtype == torch.bfloat16:
        return states.view(torch.int16).numpy().view(np.uint16)
    return states.numpy()
