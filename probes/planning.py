"""What a probe run will cost, from shapes alone: fits, memory of a worker, and how many workers the machine holds.

Peak memory is that of one process that scores one layer and position. It is an upper bound: arrays are counted
where the code makes them, temporaries included, and a test holds a worker's resident memory between half of it
and all of it. On a GPU the same arrays lie in its memory, and the process needs as much again for CUDA, which
was not measured. `stream_cost` counts those of states that are streamed. This module knows nothing about labels'
meaning or scores.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import psutil

from mmextract.engine.store import open_store
from mmextract.probes.kept_cost import kept_bytes
from mmextract.probes.rounds import Round, find_solver, list_rounds, list_tests
from mmextract.probes.stream_cost import count_passes, streamed_task_bytes

if TYPE_CHECKING:
    from distributed import Client

    from mmextract.probes.run import ProbePlan

BASE_BYTES = 760 << 20
"""A process that has loaded torch, scikit-learn and dask, and its BLAS's buffers: 680 MiB with torch 2.14 for
processors on Linux."""

SLACK, SLACK_BYTES = 1.15, 16 << 20
"""What the allocator keeps beyond the arrays that are counted, and libraries at their first call: without them
the figures were up to 13 % and 11 MiB short."""

AMPLE = 0.8
"""Share of the free memory that is taken where less would do, with more passes over a store."""

DOUBLE, SINGLE = 8, 4
N_METRICS = 6
"""Scores of a task, each with a deviation a group (`metrics`)."""


def predict_task_bytes(plan: ProbePlan) -> int:
    """Return what scoring one layer and position takes at its peak, above what the process has anyway."""
    if plan.streamed_elements:
        return int(SLACK * streamed_task_bytes(plan)) + SLACK_BYTES
    n, d = plan.design.n_samples, plan.hidden_size
    held = DOUBLE * n * d * (1 if plan.other is None else 2)
    reading = SINGLE * d * (plan.n_stored + n) + _chunk_bytes(plan)
    tests = list_tests(plan)
    rounds = max(_solving_bytes(plan, one) + _result_bytes(one, d) for one in (*list_rounds(plan), *tests))
    return int(SLACK * (held + max(reading, rounds, _scoring_bytes(plan)))) + SLACK_BYTES


def _chunk_bytes(plan: ProbePlan) -> int:
    """Return what shards take while they are read: each thread decodes all positions of a layer's chunk."""
    states = open_store(plan.store).hidden_states
    assert states.shards is not None
    threads = min(os.cpu_count() or 1, -(-states.shape[0] // states.shards[0]))
    return 3 * threads * states.dtype.itemsize * states.shards[0] * states.shape[2] * states.shape[3]


def predict_bytes(plan: ProbePlan) -> int:
    """Return the peak resident memory of a worker process, in bytes."""
    return BASE_BYTES + plan_bytes(plan) + predict_task_bytes(plan)


def plan_bytes(plan: ProbePlan) -> int:
    """Return what the plan itself takes: splits and the samples' names, and these once more on their way there."""
    splits = sum(task.folds.nbytes + task.inner_folds.nbytes + task.y.nbytes for task in plan.tasks)
    return 2 * (splits + 400 * plan.design.n_samples)


def _result_bytes(one: Round, d: int) -> int:
    """Return what jobs and solutions take: those of a round are held until its last one is there."""
    rows = 2 * DOUBLE * one.n_sets * one.n_labels * one.n_rows
    return rows + DOUBLE * one.n_fits * one.n_outputs * (d + 64)


def _solving_bytes(plan: ProbePlan, one: Round) -> int:
    from mmextract.probes import dual, primal
    from mmextract.probes.batches import LIVE_LOGITS

    m, d, q = one.n_rows, plan.hidden_size, one.n_columns
    n = plan.design.n_samples
    solver = find_solver(plan, m)
    if solver in ("sklearn", "cuml"):
        return DOUBLE * (6 * m * d + 4 * m * min(m, d))
    weights = 6 * one.n_labels * one.n_outputs * d
    if solver == "primal":
        size = 2 * d * d + LIVE_LOGITS * n * q
        n_together = max(1, min(one.n_sets, primal.MOST_ELEMENTS["cpu"] // size))
        # moments, their eigenvectors and LAPACK's workspace; logits; a Hessian with its features, if one is needed
        hessian = 2 * n * d + 3 * (d * one.n_outputs) ** 2
        return DOUBLE * (n_together * (5 * d * d + LIVE_LOGITS * n * q + weights) + 3 * d * d + hessian)
    if one.n_outputs == 1 and one.n_labels <= dual.FEW_LABELS:
        return DOUBLE * (2 * m * d + 3 * m * m + LIVE_LOGITS * m * q + weights)
    size = m * (m + d + LIVE_LOGITS * q)
    n_together = max(1, min(one.n_sets, dual.MOST_ELEMENTS["cpu"] // size))
    return DOUBLE * (n_together * (m * d + 2 * m * m + LIVE_LOGITS * m * q + weights) + 5 * m * m + m * d)


def _scoring_bytes(plan: ProbePlan) -> int:
    """Return what scores take: decisions of all labels of a batch, and deviations by group of all shuffles."""
    tests = list_tests(plan)
    if not tests:
        return 0
    decisions = tests[0].n_labels * tests[0].n_penalties * tests[0].n_outputs * plan.design.n_samples
    deviations = (1 + plan.settings.n_permutations) * plan.design.n_groups
    return DOUBLE * (3 * decisions + 3 * N_METRICS * deviations)


def count_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def available_bytes() -> int:
    """Return the memory that this process and its children may still take, a container's limit respected."""
    from distributed.system import MEMORY_LIMIT

    return int(min(psutil.virtual_memory().available, MEMORY_LIMIT))


def fits(plan: ProbePlan, client: Client | None = None) -> bool:
    """Whether one worker fits into what is free; of a cluster, whether every worker has memory for a probe.

    For states that are streamed a worker of a cluster must have memory for a probe in each of its threads.
    """
    if client is None:
        return _most_workers(plan) >= 1
    one = predict_bytes(plan)
    return all(
        limit <= 0 or (needed if plan.streamed_elements else one) <= limit
        for _, _, limit, needed in list_workers(plan, client, predict_task_bytes(plan))
    )


def fits_amply(plan: ProbePlan) -> bool:
    """Whether one worker per core, or per layer and position, fits into the AMPLE part of what is free here."""
    n_workers = min(count_cores(), len(plan.cells))
    return n_workers * predict_bytes(plan) <= AMPLE * available_bytes()


def _most_workers(plan: ProbePlan) -> int:
    """Return how many workers fit into what is free, beside what this process keeps: scores, a plan for each."""
    return max(0, available_bytes() - kept_bytes(plan)) // (predict_bytes(plan) + plan_bytes(plan))


def choose_workers(plan: ProbePlan, workers: int, cores: int) -> int:
    """Return the number of worker processes: `workers`, or for 0 one a core, as far as memory suffices.

    Raises ValueError if not one of them fits, or not as many as were asked for, saying what would.
    """
    most = _most_workers(plan)
    if most < max(1, workers):
        raise ValueError(
            f"{max(1, workers)} workers of {format_gib(predict_bytes(plan))} each, and {format_gib(kept_bytes(plan))} "
            f"of scores, do not fit into the {format_gib(available_bytes())} of memory that are free: "
            + (f"give --workers {most}" if most else f"{_advise(plan)} or on a larger machine")
        )
    return min(workers or min(cores, most), len(plan.cells))


def check_cluster(plan: ProbePlan, client: Client) -> None:
    """Raise ValueError if a worker of the cluster has less memory than its tasks need, at one task a thread."""
    for address, n_threads, limit, needed in list_workers(plan, client, predict_task_bytes(plan)):
        if 0 < limit < needed:
            raise ValueError(
                f"the worker {address} may use {format_gib(limit)}, and {n_threads} probes at a time take "
                f"{format_gib(needed)}: {_advise(plan)} or start it with --nthreads 1, or a larger --memory-limit"
            )


def list_workers(plan: ProbePlan, client: Client, task: int) -> list[tuple[str, int, int, int]]:
    """Return the address of each worker of a cluster, its threads, the bytes it may use, and those it needs.

    task: bytes that a task takes at its peak.
    """
    workers: Mapping[str, Mapping[str, Any]] = client.scheduler_info(n_workers=-1)["workers"]
    base = BASE_BYTES + plan_bytes(plan)
    return [
        (address, int(w["nthreads"]), int(w["memory_limit"]), base + int(w["nthreads"]) * task)
        for address, w in workers.items()
    ]


def _advise(plan: ProbePlan) -> str:
    """Return what may be done about states that do not fit, short of the machine."""
    if plan.streamed_elements:
        return "probe fewer samples (--where),"
    if not plan.settings.why_held:
        return (
            "let states be read from the store in each pass (--stream always), probe fewer samples (--where),"
        )
    return f"probe fewer samples (--where), choose what can be streamed ({plan.settings.why_held}),"


def describe(plan: ProbePlan, workers: int, seconds: float, client: Client | None = None) -> str:
    """Return what would be done and what it would cost, for people. seconds: of one core. client: of a cluster."""
    cores = count_cores()
    rounds = list_rounds(plan)
    solvers = " and ".join(dict.fromkeys(find_solver(plan, one.n_rows) for one in rounds))
    n_fits, n_tests = (sum(one.n_fits for one in some) for some in (rounds, list_tests(plan)))
    if client is None:
        chosen = choose_workers(plan, workers, cores)
        at_once = min(chosen, cores)
        size = format_gib(chosen * predict_bytes(plan))
        where = f"{chosen}: {size} of {format_gib(available_bytes())} that are free"
    else:
        check_cluster(plan, client)
        at_once = sum(n_threads for _, n_threads, _, _ in list_workers(plan, client, 0))
        where = f"{at_once} of the cluster"
    layers = ", ".join("embed" if layer < 0 else str(layer) for layer in plan.layers)
    d, n = plan.hidden_size, plan.design.n_samples
    lines = [
        f"samples    {n:,} in {plan.design.n_groups:,} groups, {d:,} features, "
        f"{len(plan.design.classes)} classes of {plan.design.label}",
        f"layers     {layers}",
        f"positions  {', '.join(plan.positions)}",
        f"tasks      {', '.join(task.name for task in plan.tasks)}",
        f"fits       {(n_fits + n_tests) * len(plan.cells):,}: {n_fits:,} for the scores and {n_tests:,} for the "
        f"permutations, at each of {len(plan.cells):,} layers × positions",
        f"solver     {solvers}, training sets of {', '.join(f'{one.n_rows:,}' for one in rounds)} samples",
        f"states     {describe_states(plan)}",
        f"memory     at most {format_gib(predict_bytes(plan))} a worker, "
        f"{format_gib(predict_task_bytes(plan))} of it for the probes",
        f"workers    {where}",
        f"time       about {_duration(seconds / max(1, at_once))}",
    ]
    return "\n".join(lines)


def describe_states(plan: ProbePlan) -> str:
    """Return where states are while probes are fitted, and what a worker takes, for people."""
    size = format_gib(predict_bytes(plan))
    if not plan.streamed_elements:
        return f"held in memory, {size} a worker"
    return (
        f"read from the store in each of some {count_passes(plan):,} passes a layer and position, {size} a worker; "
        f"held in memory they would take {format_gib(plan.held_bytes)}"
    )


def format_gib(size: int) -> str:
    """Return a size for people."""
    return f"{size / 2**30:.2f} GiB"


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
