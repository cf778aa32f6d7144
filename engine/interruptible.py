"""Wait for requests to servers so that the wait ends when this process is asked to leave.

A library that waits outside of Python keeps signals from being heard until it returns, which may be minutes. Here
a request runs on an event loop, in a thread of its own, and who made it waits in Python: a signal is heard at once, and
the request is cancelled. Other threads hear no signals; for them `leave_within` sets a moment after which every
request ends, so that they can be joined.

This module knows nothing about what is requested, nor about signals.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop

Result = TypeVar("Result")


class LeavingError(OSError):
    """This process was asked to leave, and waits for no server any more."""


class Requests:
    """Requests that share one event loop and one moment to leave; those of this process are `REQUESTS`."""

    def __init__(self) -> None:
        self._forget()

    def _forget(self) -> None:
        self._lock = threading.Lock()
        self._loop: AbstractEventLoop | None = None
        self._leave_at: float | None = None

    def wait_for(self, request: Callable[[], Coroutine[Any, Any, Result]]) -> Result:
        """Return what a request comes to, or raise its error; a signal's exception cancels it.

        Raises LeavingError if the moment to leave comes, or came, before. To be called from threads, not coroutines.
        """
        import asyncio
        from concurrent.futures import CancelledError

        future = asyncio.run_coroutine_threadsafe(self._begin(request), self._running_loop())
        try:
            return future.result()
        except CancelledError as error:
            raise _leaving() from error
        except BaseException:
            future.cancel()
            raise

    def leave_within(self, seconds: float) -> None:
        """Have every request end within so long, those too that are yet to come. Safe in a signal handler.

        Called again, it changes nothing: the first moment counts.
        """
        if self._leave_at is None:
            self._leave_at = time.monotonic() + seconds
            if self._loop is not None:
                self._loop.call_soon_threadsafe(self._plan_to_leave)

    async def _begin(self, request: Callable[[], Coroutine[Any, Any, Result]]) -> Result:
        if self._leave_at is not None and time.monotonic() >= self._leave_at:
            raise _leaving()
        return await request()

    def _running_loop(self) -> AbstractEventLoop:
        import asyncio

        with self._lock:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()  # before its thread, which looks for it
                self._loop.call_soon(self._plan_to_leave)  # if that was asked for before there was a loop
                threading.Thread(
                    target=self._loop.run_forever, name="mmextract-requests", daemon=True
                ).start()
            return self._loop

    def _plan_to_leave(self) -> None:
        """Cancel, when the moment comes, what is under way then; runs in the loop's thread, as all requests begin."""
        if self._leave_at is not None and self._loop is not None:
            self._loop.call_later(max(0.0, self._leave_at - time.monotonic()), self._cancel)

    def _cancel(self) -> None:
        import asyncio

        for task in asyncio.all_tasks(self._loop):
            task.cancel()


def _leaving() -> LeavingError:
    return LeavingError("this process was asked to leave, and waits for no server any more")


REQUESTS = Requests()
"""Those of this process."""

os.register_at_fork(after_in_child=REQUESTS._forget)  # a child has none of its parent's threads
