"""What a worker of a cluster does of a dump: it loads the model once, and writes the shard whose rows it is given.

A worker writes only if it is sure to write what the run would: it has the same versions, a model of the same
description and weights, and finds the lease of the run in the store. This module knows nothing about how tasks come
to workers, nor about the client.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from distributed import Worker, WorkerPlugin, get_worker
from transformers.utils.logging import disable_progress_bar

from mmextract.engine.dump import ModelFacts, find_facts, longest
from mmextract.engine.layout import to_plain
from mmextract.engine.lease import is_held
from mmextract.engine.models import Adapter, ModelSpec, load
from mmextract.engine.objects import locate
from mmextract.engine.pipeline import Recipe, ShardRows, Written, torch_threads, write_shards
from mmextract.engine.rows import Row
from mmextract.engine.versions import WorkerMismatchError, check_same, find_versions, list_differing
from mmextract.engine.writer import StoreWriter

_model_in_use = threading.Lock()
"""A worker may have several threads; hooks on a model are for one at a time."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What all tasks of a run share."""

    owner: str
    """Id of the lease under which the run writes."""
    url: str
    """Where the store is."""
    recipe: Recipe
    model: ModelSpec
    facts: Mapping[str, Any]
    """What the store says of the model and its device: a worker's must be equal."""
    torch_threads: int | None
    versions: Mapping[str, str]
    """The client's."""


class JobPlugin(WorkerPlugin):
    """Brings the job to a worker, and lets go of its model when the run has ended."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.name = f"mmextract-{job.owner}"

    def teardown(self, worker: Worker) -> None:
        """Free the model."""
        _load.cache_clear()


@lru_cache(maxsize=1)
def _load(spec: ModelSpec) -> Adapter:
    disable_progress_bar()
    return load(spec)


def facts_task(spec: ModelSpec) -> ModelFacts:
    """Load a model and say what a plan needs to know of it."""
    with _model_in_use:
        return find_facts(_load(spec))


def longest_task(spec: ModelSpec, rows: Sequence[Row]) -> int:
    """Return the number of tokens of the longest of some rows."""
    with _model_in_use:
        return longest(rows, _load(spec), threads=2)


def shard_task(plugin: str, work: ShardRows) -> Written:
    """Write one shard, as the job says that the plugin of that name brought. Raises WorkerMismatchError, OSError, …"""
    worker = get_worker()
    brought = worker.plugins[plugin]
    assert isinstance(brought, JobPlugin)
    job = brought.job
    objects = locate(job.url)

    def guard() -> None:
        if not is_held(objects, job.owner):
            raise WorkerMismatchError(
                f"worker {worker.address} finds no lease of this run in {job.url}: the run has ended, or the worker "
                "does not see the same storage under this path as the machine that started the run"
            )

    with _model_in_use, ThreadPoolExecutor(job.recipe.threads, "mmextract-cpu") as executor:
        guard()
        adapter = _checked(job, worker.address)
        writer = StoreWriter(layout=job.recipe.layout, objects=objects, executor=executor, guard=guard)
        with torch_threads(job.torch_threads):
            return write_shards(job.recipe, adapter, writer, [work])


def _checked(job: Job, address: str) -> Adapter:
    """Return the model, if it and this worker are those of the run; looks closely at the first task only."""
    check_same(job.versions, {address: find_versions()})
    adapter = _load(job.model)
    theirs = describe_facts({"model": adapter.describe(), "device": adapter.device.type})
    if theirs != job.facts:
        names = [f"model.{name}" for name in list_differing(job.facts["model"], theirs["model"])]
        names += [name for name in list_differing(job.facts, theirs) if name != "model"]
        raise WorkerMismatchError(
            f"worker {address} has another model than the run was planned with; what differs: {', '.join(names)}"
        )
    return adapter


def describe_facts(run: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a store's `run` says of model and device, as JSON gives it back."""
    return to_plain({"model": run["model"], "device": run["device"]})
