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
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import dask
import torch
from distributed import Client

from mmextract.engine.cluster import SECONDS_WITHOUT_WORKERS, InFlight, describe_failure, installed, run_tasks
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
from mmextract.engine.versions import WorkerMismatchError, find_versions
from mmextract.engine.workers import (
    Job,
    JobPlugin,
    describe_facts,
    facts_task,
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

SECONDS_TO_SEE = 90.0
"""How long a commit of another machine may stay invisible: network file systems cache folders for up to a minute."""

ROWS_TO_MEASURE = 10_000
"""Rows of a task that looks for the longest prompt."""


class ShardsFailedError(ValueError):
    """Shards that could not be written, however often they were tried."""


def plan_distributed(
    spec: DumpSpec, client: Client, *, patience: float = SECONDS_WITHOUT_WORKERS
) -> DumpPlan:
    """Plan a run as `dump.plan_dump` does, with the model of a worker: the client loads none.

    patience: seconds that the cluster may be without workers; then ClusterLostError is raised.
    """
    spec = replace(spec, model=_absolute(spec.model))

    def ask(function: Callable[..., Any], arguments: Iterable[tuple[Any, ...]]) -> list[Any]:
        with InFlight[int](client, patience=patience, retries=0) as tasks:
            found = run_tasks(tasks, function, enumerate(arguments))
        return [found[index] for index in sorted(found)]

    facts: ModelFacts = ask(facts_task, [(spec.model,)])[0]
    if facts.torch_threads is not None:  # as many as this process would use, so that both give the same bytes
        facts = replace(facts, torch_threads=torch.get_num_threads())

    def measure(rows: Sequence[Row]) -> int:
        starts = range(0, len(rows), ROWS_TO_MEASURE)
        parts = ((spec.model, rows[at : at + ROWS_TO_MEASURE]) for at in starts)
        return max(map(int, ask(longest_task, parts)))

    return make_plan(spec, facts, measure)


def run_distributed(
    plan: DumpPlan,
    client: Client,
    place: str | Path | Objects,
    on_progress: Callable[[int], None] = lambda n_rows: None,
    on_notice: Callable[[str], None] = lambda text: None,
    *,
    patience: float = SECONDS_WITHOUT_WORKERS,
) -> DumpSummary:
    """Do as `dump.run_dump` does, on the workers of a cluster; they must see the store and the images by their paths.

    on_notice is told what a user wants to know while the run goes on. patience: seconds that the cluster may be without
    workers. Raises ShardsFailedError, once all other shards are written, for those that failed; WorkerMismatchError for
    a worker that would write other bytes; ClusterLostError if the scheduler, or all workers, are lost. Whatever stops
    it, a later call continues, with any number of workers.
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
        plugin = JobPlugin(job)
        with (
            # a shard of small states has many rows
            dask.config.set({"distributed.admin.large-graph-warning-threshold": "1GB"}),
            installed(client, plugin, plugin.name),
            InFlight[ShardRows](client, patience=patience, retries=RETRIES) as tasks,
        ):
            run = _Run(tasks, plugin.name, held, on_progress, on_notice)
            written = run.write(map(plan.shard_rows, shards))
        _wait_until_visible(writer, plan.layout.n_shards)
        writer.sweep(set(range(plan.layout.n_shards)) - set(shards))  # after workers that were killed
        return written

    return run_with(write, plan, place, on_progress)


class _Run:
    """The client's side of a run: what is in flight, what came back, what failed."""

    def __init__(
        self,
        tasks: InFlight[ShardRows],
        plugin: str,
        held: Lease,
        on_progress: Callable[[int], None],
        on_notice: Callable[[str], None],
    ) -> None:
        self._tasks = tasks
        self._plugin = plugin
        self._held = held
        self._on_progress = on_progress
        self._on_notice = on_notice
        self._written = Written()
        self._failed: dict[int, BaseException] = {}

    def write(self, shards: Iterator[ShardRows]) -> Written:
        """Have shards written. Raises ShardsFailedError for those that were not, when all others are."""
        while True:
            room = PER_WORKER * max(1, self._tasks.count_workers()) - len(self._tasks)
            for work in itertools.islice(shards, max(0, room)):
                self._tasks.submit(work, shard_task, self._plugin, work)
            if not self._tasks:
                break
            for work, outcome in self._tasks.ended():
                self._take(work, outcome)
            self._held.check()
        if self._failed:
            raise ShardsFailedError(self._explain())
        return self._written

    def _take(self, work: ShardRows, outcome: Written | BaseException) -> None:
        if isinstance(outcome, BaseException):
            self._fail(work.shard, outcome)
        else:
            self._written.add(outcome)
            self._on_progress(len(work.rows))

    def _fail(self, shard: int, cause: BaseException) -> None:
        if isinstance(cause, WorkerMismatchError):
            raise cause
        self._failed[shard] = cause
        self._on_notice(
            f"shard {shard} failed {RETRIES + 1} times and is left out: {describe_failure(cause)}"
        )
        if len(self._failed) >= MOST_FAILURES:
            raise ShardsFailedError(self._explain())

    def _explain(self) -> str:
        lines = [f"shard {shard}: {describe_failure(cause)}" for shard, cause in sorted(self._failed.items())]
        return (
            f"{len(lines)} shards could not be written; what is committed stays, and the same command again tries the "
            "others:\n  " + "\n  ".join(lines)
        )


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
