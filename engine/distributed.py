"""Shards as tasks of dask.distributed: each worker loads the model once and writes whole shards into the store.

A task carries the rows of its shard and nothing else; what all tasks share goes to each worker once, in a plugin,
which dask also gives to workers that come later. What comes back are small records: states never leave the worker.
A bounded window of futures is in flight and each is released as soon as it is done, for a scheduler that must
remember every task of a long run, and repeat it when a worker dies, never finishes.

dask may run a task twice, also at the same time (a worker that was only thought dead). That is harmless: a shard is
idempotent, written under names of its own and committed whole, and a worker commits only while the lease of the run
that sent the task stands.

This module knows nothing about how a cluster is started or found.
"""

from __future__ import annotations

import itertools
import queue
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import dask
import torch
from distributed import Client, Future, KilledWorker
from distributed.client import ClosedClientError

from mmextract.engine.dump import (
    DumpPlan,
    DumpSpec,
    DumpSummary,
    ModelFacts,
    find_torch_threads,
    make_plan,
    run_with,
)
from mmextract.engine.lease import Lease
from mmextract.engine.models import ModelSpec
from mmextract.engine.objects import Objects
from mmextract.engine.pipeline import ShardRows, Written
from mmextract.engine.rows import Row
from mmextract.engine.workers import (
    Job,
    JobPlugin,
    WorkerMismatchError,
    describe_facts,
    facts_task,
    find_versions,
    longest_task,
    shard_task,
)
from mmextract.engine.writer import StoreWriter

PER_WORKER = 2
"""Futures in flight a worker: one runs, one waits."""

RETRIES = 3
"""Times that dask repeats a shard that raised."""

MOST_FAILURES = 8
"""Failed shards after which a run gives up: what fails that often fails for all."""

SECONDS_WITHOUT_WORKERS = 300.0
"""How long a run waits for a worker when all have gone."""

ATTEMPTS_TO_TELL = 5
"""Times that something is told to all workers, which fails if one dies meanwhile."""

SECONDS_TO_FETCH = 5.0
"""How long the record of a shard that is done may take to arrive."""

SECONDS_TO_SEE = 90.0
"""How long a commit of another machine may stay invisible: network file systems cache folders for up to a minute."""

ROWS_TO_MEASURE = 10_000
"""Rows of a task that looks for the longest prompt."""


class ShardsFailedError(ValueError):
    """Shards that could not be written, however often they were tried."""


def plan_distributed(spec: DumpSpec, client: Client) -> DumpPlan:
    """Plan a run as `dump.plan_dump` does, with the model of a worker: the client loads none."""
    spec = replace(spec, model=_absolute(spec.model))
    facts: ModelFacts = _result(client.submit(facts_task, spec.model, pure=False))
    if facts.torch_threads is not None:  # as many as this process would use, so that both give the same bytes
        facts = replace(facts, torch_threads=torch.get_num_threads())

    def measure(rows: Sequence[Row]) -> int:
        starts = range(0, len(rows), ROWS_TO_MEASURE)
        tasks = (
            client.submit(longest_task, spec.model, rows[at : at + ROWS_TO_MEASURE], pure=False)
            for at in starts
        )
        return max(int(_result(future)) for future in tasks)

    return make_plan(spec, facts, measure)


def run_distributed(
    plan: DumpPlan,
    client: Client,
    place: str | Path | Objects,
    on_progress: Callable[[int], None] = lambda n_rows: None,
    on_notice: Callable[[str], None] = lambda text: None,
) -> DumpSummary:
    """Do as `dump.run_dump` does, on the workers of a cluster; they must see the store and the images by their paths.

    on_notice is told what a user wants to know while the run goes on. Raises ShardsFailedError, once all other shards
    are written, for those that failed; WorkerMismatchError for a worker that would write other bytes; OSError if the
    scheduler, or all workers, are lost. Whatever stops it, a later call continues, with any number of workers.
    """
    if isinstance(place, str | Path) and "://" not in str(place):
        place = Path(place).absolute()

    def write(
        writer: StoreWriter, shards: Sequence[int], held: Lease, on_progress: Callable[[int], None]
    ) -> Written:
        job = Job(
            owner=held.owner,
            url=writer.objects.url,
            recipe=plan.recipe,
            model=_absolute(plan.spec.model),
            facts=describe_facts(plan.attributes["run"]),
            torch_threads=find_torch_threads(writer),
            versions=find_versions(),
        )
        with (
            _installed(client, JobPlugin(job)) as name,
            _Run(client, name, held, on_progress, on_notice) as run,
        ):
            written = run.write(map(plan.shard_rows, shards))
        _wait_until_visible(writer, plan.layout.n_shards)
        writer.sweep(set(range(plan.layout.n_shards)) - set(shards))  # after workers that were killed
        return written

    return run_with(write, plan, place, on_progress)


class _Run:
    """The client's side of a run: what is in flight, what came back, what failed."""

    def __init__(
        self,
        client: Client,
        plugin: str,
        held: Lease,
        on_progress: Callable[[int], None],
        on_notice: Callable[[str], None],
    ) -> None:
        self._client = client
        self._plugin = plugin
        self._held = held
        self._on_progress = on_progress
        self._on_notice = on_notice
        self._pending: dict[Future[Written], ShardRows] = {}
        self._done: queue.Queue[Future[Written]] = queue.Queue()
        self._written = Written()
        self._failed: dict[int, BaseException] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for future in self._pending:
            future.release()

    def write(self, shards: Iterator[ShardRows]) -> Written:
        """Have shards written. Raises ShardsFailedError for those that were not, when all others are."""
        seen_worker = time.monotonic()
        while True:
            n_workers = self._count_workers()
            if n_workers:
                seen_worker = time.monotonic()
            elif time.monotonic() - seen_worker > SECONDS_WITHOUT_WORKERS:
                raise OSError(
                    f"no worker is left, and none came for {SECONDS_WITHOUT_WORKERS:.0f} s: start workers and run "
                    "the same command again to continue"
                )
            room = PER_WORKER * max(1, n_workers) - len(self._pending)
            for work in itertools.islice(shards, max(0, room)):
                self._submit(work)
            if not self._pending:
                break
            for future in self._finished():
                self._take(future)
            self._held.check()
        if self._failed:
            raise ShardsFailedError(self._explain())
        return self._written

    def _count_workers(self) -> int:
        try:
            return int(self._client.scheduler_info(n_workers=0)["n_workers"])
        except (OSError, TimeoutError, AttributeError, ClosedClientError) as error:  # no scheduler, or closed
            raise _scheduler_lost() from error

    def _submit(self, work: ShardRows) -> None:
        future = self._client.submit(shard_task, self._plugin, work, pure=False, retries=RETRIES)
        self._pending[future] = work
        future.add_done_callback(self._done.put)

    def _finished(self, seconds: float = 1.0) -> Iterable[Future[Written]]:
        """Return what has ended by now, waiting for one at most so long."""
        try:
            ended = [self._done.get(timeout=seconds)]
        except queue.Empty:
            return []
        while not self._done.empty():
            ended.append(self._done.get_nowait())
        return ended

    def _take(self, future: Future[Written]) -> None:
        work = self._pending[future]
        if future.status == "cancelled":
            raise _scheduler_lost()
        if future.status == "error":
            self._fail(work.shard, future.exception())
        else:
            try:
                self._written.add(future.result(timeout=SECONDS_TO_FETCH))
            except TimeoutError:  # its worker died with the record, and dask has the shard written again
                future.add_done_callback(self._done.put)
                return
            except CancelledError as error:
                raise _scheduler_lost() from error
            self._on_progress(len(work.rows))
        del self._pending[future]
        future.release()

    def _fail(self, shard: int, cause: BaseException) -> None:
        if isinstance(cause, WorkerMismatchError):
            raise cause
        self._failed[shard] = cause
        self._on_notice(f"shard {shard} failed {RETRIES + 1} times and is left out: {_describe(cause)}")
        if len(self._failed) >= MOST_FAILURES:
            raise ShardsFailedError(self._explain())

    def _explain(self) -> str:
        lines = [f"shard {shard}: {_describe(cause)}" for shard, cause in sorted(self._failed.items())]
        return (
            f"{len(lines)} shards could not be written; what is committed stays, and the same command again tries the "
            "others:\n  " + "\n  ".join(lines)
        )


def _describe(cause: BaseException) -> str:
    if isinstance(cause, KilledWorker):
        return (
            f"{cause.allowed_failures + 1} workers died one after the other while they had it, the last one "
            f"{cause.last_worker.address}: the sample may end the process, its memory may not suffice, or somebody "
            "kills workers; their logs say which"
        )
    return f"{type(cause).__name__}: {cause}"


def _result(future: Future[Any]) -> Any:
    try:
        return future.result()
    except (CancelledError, TimeoutError) as error:
        raise _scheduler_lost() from error
    except KilledWorker as error:
        raise OSError(f"the model could not be loaded: {_describe(error)}") from error


def _scheduler_lost() -> OSError:
    return OSError(
        "the connection to the scheduler was lost; what is committed stays: start a scheduler and run the same "
        "command again to continue"
    )


@contextmanager
def _installed(client: Client, plugin: JobPlugin) -> Iterator[str]:
    """Have a plugin on all workers inside, those that come later too.

    Leaving by an exception leaves it there: a worker that is stopped would not answer.
    """
    _tell_workers(client, lambda: client.register_plugin(plugin, name=plugin.name))
    # a shard of small states has many rows
    with dask.config.set({"distributed.admin.large-graph-warning-threshold": "1GB"}):
        yield plugin.name
    _tell_workers(client, lambda: client.unregister_worker_plugin(plugin.name))


def _tell_workers(client: Client, tell: Callable[[], object]) -> None:
    """Call what is broadcast to all workers, again if one of them dies just then."""
    for attempts_left in reversed(range(ATTEMPTS_TO_TELL)):
        try:
            tell()
            return
        except OSError as error:
            if not attempts_left:
                raise _scheduler_lost() from error
            time.sleep(1)
        except AttributeError as error:
            if client.scheduler is not None:
                raise
            raise _scheduler_lost() from error  # it was lost before this began


def _wait_until_visible(writer: StoreWriter, n_shards: int) -> None:
    deadline = time.monotonic() + SECONDS_TO_SEE
    while (n_seen := len(writer.committed())) < n_shards:
        if time.monotonic() > deadline:
            raise OSError(
                f"the workers report {n_shards} shards, and {writer.objects.url} shows {n_seen} of them here: it must "
                "lie where this machine and all workers see the same files"
            )
        time.sleep(0.5)


def _absolute(spec: ModelSpec) -> ModelSpec:
    """Return the spec with local folders as absolute paths: workers have other working directories."""

    def absolute(name: str | None) -> str | None:
        return str(Path(name).absolute()) if name is not None and Path(name).exists() else name

    return replace(spec, model=absolute(spec.model) or spec.model, adapter=absolute(spec.adapter))
