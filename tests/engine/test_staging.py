from __future__ import annotations

import threading
import time

import pytest
import torch

from mmextract.engine.staging import Slot, Staging


def staging(consume: object, n_slots: int = 2) -> Staging[int]:
    return Staging(
        consume,  # type: ignore[arg-type]
        shape=(4, 1, 1, 2),
        dtype=torch.float32,
        device=torch.device("cpu"),
        n_slots=n_slots,
    )


def fill(slot: Slot, value: float) -> Slot:
    slot.device.fill_(value)
    return slot


def test_everything_submitted_is_consumed_in_order_and_whole() -> None:
    seen: list[tuple[int, float, int]] = []

    def consume(tag: int, states: torch.Tensor | None) -> None:
        assert states is not None
        time.sleep(0.001)
        assert (states == states[0]).all()
        seen.append((tag, float(states[0, 0, 0, 0]), len(states)))

    with staging(consume) as ring:
        for i in range(50):
            ring.submit(fill(ring.acquire(), i), 1 + i % 4, i)
    assert seen == [(i, float(i), 1 + i % 4) for i in range(50)]


def test_a_full_ring_blocks_the_producer() -> None:
    release = threading.Event()
    with staging(lambda tag, states: release.wait(5), n_slots=2) as ring:
        for i in range(2):
            ring.submit(ring.acquire(), 1, i)
        threading.Timer(0.2, release.set).start()
        started = time.perf_counter()
        ring.acquire()
        assert time.perf_counter() - started > 0.1
        assert ring.seconds_waited > 0.1


def test_tags_keep_their_turn() -> None:
    seen: list[tuple[int, bool]] = []
    with staging(lambda tag, states: seen.append((tag, states is None))) as ring:
        ring.submit(ring.acquire(), 1, 0)
        ring.submit_tag(1)
        ring.submit(ring.acquire(), 1, 2)
    assert seen == [(0, False), (1, True), (2, False)]


def test_what_the_consumer_raises_reaches_the_producer_and_nothing_blocks() -> None:
    def consume(tag: int, states: torch.Tensor | None) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"), staging(consume) as ring:
        for i in range(20):
            ring.submit(ring.acquire(), 1, i)
    with pytest.raises(OSError, match="No space left"), staging(consume) as ring:
        ring.submit(ring.acquire(), 1, 0)


def test_leaving_by_an_exception_drops_what_waits() -> None:
    seen: list[int] = []
    started = threading.Event()

    def consume(tag: int, states: torch.Tensor | None) -> None:
        started.set()
        time.sleep(0.2)
        seen.append(tag)

    with pytest.raises(KeyboardInterrupt), staging(consume, n_slots=3) as ring:
        for i in range(3):
            ring.submit(ring.acquire(), 1, i)
        started.wait(5)
        raise KeyboardInterrupt
    assert seen == [0]
