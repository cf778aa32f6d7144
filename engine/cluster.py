"""Tasks on the workers of a cluster, which may come, go and die, and what is said when none is left.

What all tasks share goes to each worker once, in a plugin, which dask also gives to workers that come later: nothing
is lost with the worker that held it. This module knows nothing about what is computed.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Generic, TypeVar

if TYPE_CHECKING:
    from distributed import Client, Future, WorkerPlugin

Work = TypeVar("Work")
Result = TypeVar("Result")

SECONDS_WITHOUT_WORKERS = 300.0
"""How long a run waits, unless told otherwise, when there are no workers."""

ATTEMPTS_TO_TELL = 5
"""Times that something is told to all workers, which fails if one dies meanwhile."""

SECONDS_TO_FETCH = 20.0
"""How long the result of a task that is done may take to arrive; its worker may have died with it."""

SECONDS_TO_REMOVE = 10.0, 3.0
"""How long it is waited for that workers forget what a run shared, after it and after what stopped it."""

logger = logging.getLogger(__name__)


class ClusterLostError(OSError):
    """The scheduler is not there any more, or no worker was for too long."""


class InFlight(Generic[Work]):
    """Tasks that were submitted, each for some work. One that has ended is released, and forgotten by dask.

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
        self._lost: list[Future[Any]] = []
        """Those whose workers died with the result: dask has them computed again."""

    def __enter__(self) -> InFlight[Work]:
        return self

    def __exit__(self, *_: object) -> None:
        for future in self._pending:
            future.release()

    def __len__(self) -> int:
        return len(self._pending)

    def submit(self, work: Work, function: Callable[..., Any], *arguments: Any) -> None:
        """Have function(*arguments) computed for a work; dask repeats it if it raises or its worker dies.

        Raises ClusterLostError if there is no scheduler.
        """
        from distributed.client import ClosedClientError

        try:
            future = self._client.submit(function, *arguments, pure=False, retries=self._retries)
        except ClosedClientError as error:
            raise _scheduler_lost() from error
        self._pending[future] = work
        future.add_done_callback(self._done.put)

    def count_workers(self) -> int:
        """Return how many workers there are. Raises ClusterLostError if there were none too long, or no scheduler."""
        n_workers = _count_workers(self._client)
        if n_workers:
            self._seen_worker = time.monotonic()
        elif time.monotonic() - self._seen_worker > self._patience:
            raise ClusterLostError(
                f"no worker is left, and none came for {self._patience:g} s: start workers and run the same command "
                "again, or let it wait longer (--wait-for-workers)"
            )
        return n_workers

    def ended(self, seconds: float = 1.0) -> Iterator[tuple[Work, Any]]:
        """Yield works whose tasks have ended, with what each returned or the exception it failed with.

        seconds: how long to wait for the first of them. Raises ClusterLostError as `count_workers`.
        """
        self.count_workers()
        for future in self._list_ended(seconds):
            try:
                outcome = _take(future)
            except TimeoutError:
                self._lost.append(future)
                continue
            work = self._pending.pop(future)
            future.release()
            yield work, outcome

    def _list_ended(self, seconds: float) -> list[Future[Any]]:
        futures = [future for future in self._lost if future.done()]
        self._lost = [future for future in self._lost if not future.done()]
        try:
            futures.append(self._done.get(timeout=0 if futures else seconds))
        except queue.Empty:
            return futures
        while not self._done.empty():
            futures.append(self._done.get_nowait())
        return futures


def _count_workers(client: Client) -> int:
    from distributed.client import ClosedClientError

    try:
        return int(client.scheduler_info(n_workers=0)["n_workers"])
    except (KeyError, OSError, TimeoutError, AttributeError, ClosedClientError) as error:  # it has closed
        raise _scheduler_lost() from error


def _take(future: Future[Any]) -> Any:
    """Return what a task that ended returned or failed with. Raises TimeoutError if its result does not arrive."""
    if future.status == "finished":
        try:
            return future.result(timeout=SECONDS_TO_FETCH)
        except TimeoutError:
            raise
        except (
            Exception
        ) as error:  # its worker had died, and it was computed again, or the scheduler was lost
            if str(future.status) != "error":
                raise _scheduler_lost() from error
    if future.status == "error":
        return future.exception()
    if future.status == "cancelled":
        raise _scheduler_lost()
    raise TimeoutError


def run_tasks(
    tasks: InFlight[Work],
    function: Callable[..., Result],
    works: Iterable[tuple[Work, tuple[Any, ...]]],
    on_done: Callable[[Work], None] = lambda work: None,
) -> dict[Work, Result]:
    """Return function(*arguments) of each work, all submitted at once. Raises what the first to fail failed with.

    Raises OSError if workers died of one, and ClusterLostError as `InFlight.ended` does.
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

    That it is removed again is tried, and what goes wrong with that is logged: it costs the workers memory and nothing
    else. Raises ClusterLostError if it cannot be brought there.
    """
    _install(client, plugin, name)
    long, short = SECONDS_TO_REMOVE
    try:
        yield
    except ClusterLostError:
        raise
    except BaseException:
        _remove(client, name, short)  # a worker that was stopped does not answer
        raise
    _remove(client, name, long)


def _install(client: Client, plugin: WorkerPlugin, name: str) -> None:
    for attempts_left in reversed(range(ATTEMPTS_TO_TELL)):
        try:
            client.register_plugin(plugin, name=name)
            return
        except OSError as error:
            if not attempts_left:
                raise _scheduler_lost() from error
            time.sleep(1)
        except AttributeError as error:
            if client.scheduler is not None:
                raise
            raise _scheduler_lost() from error  # it was lost before this began


def _remove(client: Client, name: str, seconds: float) -> None:
    def remove() -> None:
        try:
            client.unregister_worker_plugin(name)
        except Exception as error:  # workers died, or came, just then
            logger.warning("workers may still hold what a run shared: %r", error)

    thread = threading.Thread(target=remove, name="mmextract-remove", daemon=True)
    thread.start()
    thread.join(seconds)


def describe_failure(cause: BaseException) -> str:
    """Return what ended a task, for people."""
    from distributed import KilledWorker

    if isinstance(cause, KilledWorker):
        return (
            f"{cause.allowed_failures + 1} workers died one after the other while they had it, the last one "
            f"{cause.last_worker.address}: what it works on may end the process, its memory may not suffice, or "
            "somebody kills workers; their logs say which"
        )
    return f"{type(cause).__name__}: {cause}"


def _scheduler_lost() -> ClusterLostError:
    return ClusterLostError(
        "the connection to the scheduler was lost: start a scheduler and run the same command again; a dump continues "
        "with what is not committed yet, a probe begins anew"
    )
