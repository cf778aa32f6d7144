"""Tasks on the workers of a cluster, which may come, go and die, and what is said when none is left.

What all tasks share goes to each worker once, in a plugin, which dask also gives to workers that come later: nothing
is lost with the worker that held it. This module knows nothing about what is computed.
"""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Generic, TypeVar

if TYPE_CHECKING:
    from distributed import Client, Future, WorkerPlugin

Work = TypeVar("Work")
Result = TypeVar("Result")

PATIENCE = 300.0
"""Seconds that a run waits, unless told otherwise, when there are no workers."""

ATTEMPTS_TO_TELL = 5
"""Times that something is told to all workers, which fails if one dies meanwhile."""

SECONDS_TO_FETCH = 20.0
"""How long the result of a task that is done may take to arrive; its worker may have died with it."""


class InFlight(Generic[Work]):
    """Tasks that were submitted, each for some work. A task that returned is released, and forgotten by dask.

    A context manager, which releases what is left.
    """

    def __init__(self, client: Client, *, patience: float, retries: int) -> None:
        """patience: seconds that the cluster may be without workers. retries: of a task that raised."""
        self._client = client
        self._retries = retries
        self._patience = patience
        self._seen_worker = time.monotonic()
        self._pending: dict[Future[Any], Work] = {}
        self._done: queue.SimpleQueue[Future[Any]] = queue.SimpleQueue()

    def __enter__(self) -> InFlight[Work]:
        return self

    def __exit__(self, *_: object) -> None:
        for future in self._pending:
            future.release()

    def __len__(self) -> int:
        return len(self._pending)

    def submit(self, work: Work, function: Callable[..., Any], *arguments: Any) -> None:
        """Have function(*arguments) computed for a work; dask repeats it if it raises or its worker dies."""
        future = self._client.submit(function, *arguments, pure=False, retries=self._retries)
        self._pending[future] = work
        future.add_done_callback(self._done.put)

    def count_workers(self) -> int:
        """Return how many workers there are. Raises OSError if there were none for too long, or no scheduler."""
        from distributed.client import ClosedClientError

        try:
            n_workers = int(self._client.scheduler_info(n_workers=0)["n_workers"])
        except (OSError, TimeoutError, AttributeError, ClosedClientError) as error:  # no scheduler, or closed
            raise scheduler_lost() from error
        if n_workers:
            self._seen_worker = time.monotonic()
        elif time.monotonic() - self._seen_worker > self._patience:
            raise OSError(
                f"no worker is left, and none came for {self._patience:g} s: start workers and run the same command "
                "again, or let it wait longer (--wait-for-workers)"
            )
        return n_workers

    def ended(self, seconds: float = 1.0) -> Iterator[tuple[Work, Any]]:
        """Yield works whose tasks have ended, with what each returned or the exception it failed with.

        Waits so long for one at most. Raises OSError as `count_workers`.
        """
        self.count_workers()
        try:
            futures = [self._done.get(timeout=seconds)]
        except queue.Empty:
            return
        while not self._done.empty():
            futures.append(self._done.get_nowait())
        for future in futures:
            try:
                outcome = _take(future)
            except TimeoutError:  # its worker died with the result, and dask has it computed again
                future.add_done_callback(self._done.put)
                continue
            work = self._pending.pop(future)
            future.release()
            yield work, outcome


def _take(future: Future[Any]) -> Any:
    """Return what a task that ended returned or failed with. Raises TimeoutError if its result does not arrive."""
    if future.status == "cancelled":
        raise scheduler_lost()
    if future.status == "error":
        return future.exception()
    try:
        return future.result(timeout=SECONDS_TO_FETCH)
    except CancelledError as error:
        raise scheduler_lost() from error


def run_tasks(
    tasks: InFlight[Work],
    function: Callable[..., Result],
    works: Iterable[tuple[Work, tuple[Any, ...]]],
    on_done: Callable[[Work], None] = lambda work: None,
) -> dict[Work, Result]:
    """Return function(*arguments) of each work, all submitted at once. Raises what the first to fail failed with.

    Raises OSError if workers died of one, as well as `InFlight.ended` does.
    """
    from distributed import KilledWorker

    for work, arguments in works:
        tasks.submit(work, function, *arguments)
    results: dict[Work, Result] = {}
    while tasks:
        for work, outcome in tasks.ended():
            if isinstance(outcome, KilledWorker):
                raise OSError(describe_failure(outcome)) from outcome
            if isinstance(outcome, BaseException):
                raise outcome
            results[work] = outcome
            on_done(work)
    return results


@contextmanager
def installed(client: Client, plugin: WorkerPlugin, name: str) -> Iterator[None]:
    """Have a plugin under a name on all workers inside, those that come later too.

    An interrupt, or a cluster that was lost, leaves it there: a worker that is stopped would not answer.
    """
    import dask

    def remove() -> None:
        _tell_workers(client, lambda: client.unregister_worker_plugin(name))

    _tell_workers(client, lambda: client.register_plugin(plugin, name=name))
    try:
        # a shard of small states has many rows
        with dask.config.set({"distributed.admin.large-graph-warning-threshold": "1GB"}):
            yield
    except OSError:
        raise
    except Exception:
        remove()
        raise
    remove()


def describe_failure(cause: BaseException) -> str:
    """Return what ended a task, for people."""
    from distributed import KilledWorker

    if isinstance(cause, KilledWorker):
        return (
            f"{cause.allowed_failures + 1} workers died one after the other while they had it, the last one "
            f"{cause.last_worker.address}: the sample may end the process, its memory may not suffice, or somebody "
            "kills workers; their logs say which"
        )
    return f"{type(cause).__name__}: {cause}"


def scheduler_lost() -> OSError:
    """Return the error of a scheduler that is not there any more."""
    return OSError(
        "the connection to the scheduler was lost; what is committed stays: start a scheduler and run the same "
        "command again to continue"
    )


def _tell_workers(client: Client, tell: Callable[[], object]) -> None:
    """Call what is broadcast to all workers, again if one of them dies just then."""
    for attempts_left in reversed(range(ATTEMPTS_TO_TELL)):
        try:
            tell()
            return
        except OSError as error:
            if not attempts_left:
                raise scheduler_lost() from error
            time.sleep(1)
        except AttributeError as error:
            if client.scheduler is not None:
                raise
            raise scheduler_lost() from error  # it was lost before this began
