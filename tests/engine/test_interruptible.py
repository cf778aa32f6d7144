from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import FrameType

import pytest

from mmextract.engine.interruptible import LeavingError, Requests


@contextmanager
def signalled_after(seconds: float) -> Iterator[None]:
    """Have the main thread interrupted by a signal after so long."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Hanging:
    """A request that nobody answers."""

    def __init__(self) -> None:
        self.begun, self.cancelled = threading.Event(), threading.Event()

    async def __call__(self) -> None:
        self.begun.set()
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            self.cancelled.set()
            raise


async def answer() -> int:
    return 7


async def fail() -> None:
    raise FileNotFoundError("gone")


def test_a_request_gives_its_result_or_its_error() -> None:
    requests = Requests()
    assert requests.wait_for(answer) == 7
    with pytest.raises(FileNotFoundError, match="gone"):
        requests.wait_for(fail)


def test_a_signal_ends_the_wait_at_once_and_cancels_the_request() -> None:
    hanging, started = Hanging(), time.monotonic()
    with signalled_after(0.2), pytest.raises(KeyboardInterrupt):
        Requests().wait_for(hanging)
    assert time.monotonic() - started < 2
    assert hanging.cancelled.wait(2)


def test_other_threads_end_their_waits_when_the_process_is_to_leave() -> None:
    requests, hanging = Requests(), Hanging()
    with ThreadPoolExecutor(1) as executor:
        waiting = executor.submit(requests.wait_for, hanging)
        assert hanging.begun.wait(5)
        requests.leave_within(0.3)
        assert requests.wait_for(answer) == 7, "until then, requests are made"
        with pytest.raises(LeavingError, match="asked to leave"):
            waiting.result(5)
        with pytest.raises(LeavingError, match="asked to leave"):
            requests.wait_for(answer)
    assert hanging.cancelled.is_set()


def test_a_process_that_is_to_leave_before_its_first_request_waits_no_longer_for_that() -> None:
    requests, hanging = Requests(), Hanging()
    requests.leave_within(0.2)
    requests.leave_within(60)
    with pytest.raises(LeavingError):
        requests.wait_for(hanging)
    assert hanging.cancelled.is_set()


def test_a_forked_process_has_requests_of_its_own() -> None:
    from mmextract.engine.interruptible import REQUESTS

    assert REQUESTS.wait_for(answer) == 7
    child = os.fork()
    if child == 0:
        os._exit(REQUESTS.wait_for(answer))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
