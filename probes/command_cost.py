"""What the process takes that `mmextract probe` runs in, beside its workers: results, descriptions, tables, pictures.

Where there is little to do it is the only worker, too. Bytes are an upper bound, as in `planning`, and a test holds
the command between half of it and all of it. This module knows nothing about what is drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mmextract.engine.store import open_store
from mmextract.probes.cka import MOST_SAMPLES
from mmextract.probes.kept_cost import kept_bytes
from mmextract.probes.planning import (
    AMPLE,
    BASE_BYTES,
    DOUBLE,
    SINGLE,
    SLACK,
    available_bytes,
    choose_workers,
    count_cores,
    format_gib,
    list_workers,
    plan_bytes,
    predict_task_bytes,
)
from mmextract.probes.run import ProbePlan, choose_scheduler
from mmextract.probes.separability import LABELLINGS_AT_ONCE
from mmextract.probes.stream_cost import block_elements, shard_bytes

if TYPE_CHECKING:
    from distributed import Client

    from mmextract.probes.description import DescriptionSettings

PICTURE_BYTES = 320 << 20
"""What figures and report take, whose number and size have bounds: 230 MiB with twelve projections, the most there are
in a figure, nearly all of it for their PDF."""

POINT_BYTES, NAME_BYTES = 300, 400
"""A sample in a projection, as a row of a table and as Python's objects; a sample's columns, and where it is found."""

ADVICE = "leave it out (--no-separability --projections none)"


def predict_command_bytes(
    plans: Sequence[ProbePlan],
    settings: DescriptionSettings,
    workers: int = 0,
    *,
    on_cluster: bool = False,
    threads: int | None = None,
) -> int:
    """Return the peak resident memory of the command's own process, in bytes.

    plans: one a label. workers: as asked for. on_cluster: whether scoring and describing are done elsewhere. threads:
    layers and positions described at a time; None for `choose_threads`. Raises ValueError as `planning.choose_workers`.
    """
    resident = sum(plan_bytes(plan) + kept_bytes(plan) + _points_bytes(plan, settings) for plan in plans)
    scoring = 0 if on_cluster else max(_scoring_bytes(plan, workers) for plan in plans)
    describing = max(_describing_bytes(plan, settings, on_cluster, threads) for plan in plans)
    return BASE_BYTES + resident + max(scoring, describing + PICTURE_BYTES)


def check_command(
    plans: Sequence[ProbePlan],
    settings: DescriptionSettings,
    workers: int = 0,
    *,
    client: Client | None = None,
) -> None:
    """Raise ValueError if memory will not do for what comes after hours of scoring; see `predict_command_bytes`.

    client: of a cluster, whose workers describe; each must have memory for as many tasks as it has threads.
    """
    needed = predict_command_bytes(plans, settings, workers, on_cluster=client is not None, threads=1)
    needed -= BASE_BYTES + sum(map(plan_bytes, plans))  # this process has that already
    free = available_bytes()
    if needed > free:
        raise ValueError(
            f"the command itself will take {format_gib(needed)} more, for scores, descriptions and pictures, and "
            f"{format_gib(free)} are free: take fewer layers, positions or samples at a time; or, if it is describing "
            f"states that takes so much, {ADVICE}"
        )
    for plan in plans if client is not None else ():
        assert client is not None
        for address, n_threads, limit, taken in list_workers(plan, client, describing_bytes(plan, settings)):
            if 0 < limit < taken:
                raise ValueError(
                    f"the worker {address} may use {format_gib(limit)}, and to describe states of {n_threads} layers "
                    f"and positions at a time takes {format_gib(taken)}: {ADVICE}, start it with --nthreads 1, or a "
                    "larger --memory-limit"
                )


def describe_command(needed: int) -> str:
    """Return the line of a dry run on this process, in the form of `planning.describe`."""
    return f"command    at most {format_gib(needed)} for its own process, which gathers scores, describes and draws"


def choose_threads(plan: ProbePlan, settings: DescriptionSettings, kept: int = 0) -> int:
    """Return how many layers and positions are described at a time: one a core, as far as memory is ample.

    kept: bytes that other things take until then.
    """
    free = int(AMPLE * available_bytes()) - kept - PICTURE_BYTES
    fitting = free // max(1, describing_bytes(plan, settings))
    return max(1, min(count_cores(), len(plan.cells), fitting))


def describing_bytes(plan: ProbePlan, settings: DescriptionSettings) -> int:
    """Return what describing one layer and position takes: its states, and what is made of them; CKA apart."""
    if not settings.separability and not settings.projections:
        return 0
    store = open_store(plan.store)
    n, d = min(plan.design.n_samples, MOST_SAMPLES), plan.hidden_size
    reading = shard_bytes(store) + (SINGLE + 2 * DOUBLE) * block_elements(store, n)
    # centred states, their inner products, and distances; a few labellings, and products with these
    labelled = 3 * n * LABELLINGS_AT_ONCE * len(plan.design.classes)
    measuring = DOUBLE * (n * d + 4 * n * n + labelled) if settings.separability else 0
    projecting = DOUBLE * 3 * n * d if settings.projections else 0
    return int(SLACK * (DOUBLE * n * d + max(reading, measuring, projecting)))


def _describing_bytes(
    plan: ProbePlan, settings: DescriptionSettings, on_cluster: bool, threads: int | None
) -> int:
    """Return what describing takes in this process."""
    comparing = _comparing_bytes(plan) if settings.separability and plan.other is not None else 0
    if on_cluster:
        return comparing
    at_once = threads or choose_threads(plan, settings, kept_bytes(plan))
    return max(comparing, at_once * describing_bytes(plan, settings))


def _comparing_bytes(plan: ProbePlan) -> int:
    """Return what CKA takes: both stores' states, copied, one of them centred; inner products; samples by name."""
    assert plan.other is not None
    stores = open_store(plan.store), open_store(plan.other.place)
    n, d = min(plan.design.n_samples, MOST_SAMPLES), max(store.hidden_size for store in stores)
    reading = max(shard_bytes(store) + SINGLE * block_elements(store, n) for store in stores)
    names = NAME_BYTES * sum(store.n_samples for store in stores)
    return int(SLACK * (DOUBLE * (5 * n * d + 6 * n * n) + reading)) + names


def _scoring_bytes(plan: ProbePlan, workers: int) -> int:
    """Return what scoring takes in this process: all of it, or a plan for each worker."""
    chosen = choose_workers(plan, workers, count_cores())
    if choose_scheduler(plan, chosen) == "processes":
        return chosen * plan_bytes(plan)
    return predict_task_bytes(plan)


def _points_bytes(plan: ProbePlan, settings: DescriptionSettings) -> int:
    """Return what projections take."""
    maps = sum(1 if wish.best_only else len(plan.cells) for wish in settings.projections)
    return POINT_BYTES * maps * min(plan.design.n_samples, MOST_SAMPLES)
