"""From the device to the writer: a bounded ring of host buffers and one thread that empties them.

The ring is what bounds memory: when all its buffers wait to be written, the producer waits. On CUDA the copy runs on
a side stream into pinned memory, and the writer waits on its event; on the CPU the states are captured straight into
the buffer. This module knows nothing about models, and of stores only that somebody consumes what is staged.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Generic, Self, TypeVar

import torch

Tag = TypeVar("Tag")


@dataclass(kw_only=True)
class Slot:
    """One buffer of the ring."""

    device: torch.Tensor
    """[B, L, P, D] on the model's device: capture writes here."""
    host: torch.Tensor
    """[B, L, P, D] on the host; the same memory as `device` when that is the CPU."""
    copied: torch.cuda.Event | None = field(default=None)
    """Recorded when `host` holds what `device` held."""


class Staging(Generic[Tag]):
    """A context manager; inside, `acquire` a slot, fill `slot.device`, `submit` it with a tag.

    consume(tag, states) is called in one thread, in the order of submission; states is [B, L, P, D] on the host, valid
    until it returns, or None where only a tag was submitted. What it raises is raised again by the next `acquire`, or
    on leaving the context. Leaving by an exception drops what has not been consumed yet.
    """

    def __init__(
        self,
        consume: Callable[[Tag, torch.Tensor | None], None],
        *,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        n_slots: int = 3,
    ) -> None:
        self._consume = consume
        self._free: queue.Queue[Slot] = queue.Queue()
        self._filled: queue.Queue[tuple[Tag, Slot | None, int] | None] = queue.Queue()
        self._error: BaseException | None = None
        self._dropping = threading.Event()
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        for _ in range(n_slots):
            host = torch.empty(shape, dtype=dtype, pin_memory=device.type == "cuda")
            on_device = host if device.type == "cpu" else torch.empty(shape, dtype=dtype, device=device)
            self._free.put(Slot(device=on_device, host=host))
        self._thread = threading.Thread(target=self._run, name="mmextract-writer", daemon=True)
        self.seconds_waited = 0.0
        """Time that the producer spent waiting for a free slot: the writer was the bottleneck."""

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._dropping.set()
        self._filled.put(None)
        self._thread.join()
        if kind is None:
            self._raise_error()

    def acquire(self) -> Slot:
        """Return a free slot, waiting for one if all are in use."""
        started = time.perf_counter()
        slot = self._free.get()
        self.seconds_waited += time.perf_counter() - started
        self._raise_error()
        return slot

    def submit(self, slot: Slot, n_rows: int, tag: Tag) -> None:
        """Hand over the first `n_rows` of a slot; it must not be touched afterwards."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(slot.device.device))
            with torch.cuda.stream(self._stream):
                slot.host[:n_rows].copy_(slot.device[:n_rows], non_blocking=True)
                slot.copied = torch.cuda.Event()
                slot.copied.record(self._stream)
        elif slot.host is not slot.device:
            slot.host[:n_rows].copy_(slot.device[:n_rows])
        self._filled.put((tag, slot, n_rows))

    def submit_tag(self, tag: Tag) -> None:
        """Tell the consumer something, in its turn."""
        self._filled.put((tag, None, 0))

    def _run(self) -> None:
        while (item := self._filled.get()) is not None:
            tag, slot, n_rows = item
            try:
                if self._error is None and not self._dropping.is_set():
                    if slot is not None and slot.copied is not None:
                        slot.copied.synchronize()
                    self._consume(tag, None if slot is None else slot.host[:n_rows])
            except BaseException as error:  # kept, and raised in the producer's thread
                self._error = error
            finally:
                if slot is not None:
                    self._free.put(slot)

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error
