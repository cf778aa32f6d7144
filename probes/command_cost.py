"""What the process takes that `mmextract probe` runs in, beside its workers: results, descriptions, tables, pictures.

Where there is little to do it is the only worker, too. Bytes are an upper bound, as in `planning`, and a test holds
the command between half of it and all of it. This module knows nothing about what is drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mmextract.probes.cka import MOST_SAMPLES
from mmextract.probes.planning import (
    AMPLE,
    BASE_BYTES,
    DOUBLE,
    N_METRICS,
    SINGLE,
    SLACK,
    available_bytes,
    choose_workers,
    count_cores,
    format_gib,
    plan_bytes,
    predict_task_bytes,
)
from mmextract.probes.rounds import list_rounds
from mmextract.probes.run import ProbePlan, choose_scheduler
from mmextract.probes.separability import LABELLINGS_AT_ONCE
from mmextract.probes.stream_cost import block_elements, shard_bytes

if TYPE_CHECKING:
    from mmextract.probes.description import DescriptionSettings

PICTURE_BYTES = 320 << 20
"""What figures and report take, whose number and size have bounds: 230 MiB with twelve projections, the most there are
in a figure, nearly all of it for their PDF."""

ROW_BYTES = 10 << 10
"""A row of results, as objects, in tables and as JSON; measured with 1,000 layers and positions."""

SELECTIVE = 4
"""Rows of selectivity, of a layer and position."""


def predict_command_bytes(
    plans: Sequence[ProbePlan], settings: DescriptionSettings, workers: int = 0, *, on_cluster: bool = False
) -> int:
    """Return the peak resident memory of the command's own process. plans: one a label; workers: as asked for."""
    kept = sum(plan_bytes(plan) + _kept_bytes(plan) for plan in plans)
    scoring = 0 if on_cluster else max(_scoring_bytes(plan, workers) for plan in plans)
    describing = max(
        (1 if on_cluster else choose_threads(plan, settings)) * describing_bytes(plan, settings)
        for plan in plans  # on a cluster CKA alone is computed here
    )
    return BASE_BYTES + kept + max(scoring, describing + PICTURE_BYTES)


def check_command(needed: int) -> None:
    """Raise ValueError if the command's own process needs more than is free, before hours are spent on scores."""
    free = available_bytes()
    if needed - BASE_BYTES > free:
        raise ValueError(
            f"the command itself will take {format_gib(needed)}, for scores, descriptions and pictures, and has "
            f"{format_gib(free)}: leave out --projections and separability (--projections none --no-separability), "
            "or take fewer layers, positions or samples at a time"
        )


def describe_command(needed: int) -> str:
    """Return the line of a dry run on this process, in the form of `planning.describe`."""
    return f"command    at most {format_gib(needed)} for its own process, which gathers scores, describes and draws"


def choose_threads(plan: ProbePlan, settings: DescriptionSettings) -> int:
    """Return how many layers and positions are described at a time: one a core, as far as memory is ample."""
    fitting = int(AMPLE * available_bytes()) // max(1, describing_bytes(plan, settings))
    return max(1, min(count_cores(), len(plan.cells), fitting))


def describing_bytes(plan: ProbePlan, settings: DescriptionSettings) -> int:
    """Return what describing one layer and position takes: its states, and what is made of them."""
    if not settings.separability and not settings.projections:
        return 0
    n, d = min(plan.design.n_samples, MOST_SAMPLES), plan.hidden_size
    reading = shard_bytes(plan) + (SINGLE + DOUBLE) * block_elements(plan, n)
    # centred states, their inner products, and distances; a few labellings, and products with these
    labelled = 3 * n * LABELLINGS_AT_ONCE * len(plan.design.classes)
    measuring = DOUBLE * (n * d + 4 * n * n + labelled) if settings.separability else 0
    projecting = DOUBLE * 3 * n * d if settings.projections else 0
    if settings.separability and plan.other is not None:  # CKA: the other's states, inner products of both
        measuring = max(measuring, DOUBLE * (2 * n * d + 6 * n * n))
    return int(SLACK * (DOUBLE * n * d + max(reading, measuring, projecting)))


def _scoring_bytes(plan: ProbePlan, workers: int) -> int:
    """Return what scoring takes in this process."""
    chosen = choose_workers(plan, workers, count_cores())
    return 0 if choose_scheduler(plan, chosen) == "processes" else predict_task_bytes(plan)


def _kept_bytes(plan: ProbePlan) -> int:
    """Return what scores take, of all layers and positions, until they are written down, and their rows."""
    n, repeats, n_outputs = plan.design.n_samples, len(plan.tasks[0].folds), list_rounds(plan)[0].n_outputs
    compared = plan.other is not None
    n_probed = len(plan.tasks) + compared
    # what probes say of each sample, in which fold, and its class
    decided = n_probed * n * (repeats * (DOUBLE * n_outputs + 2) + DOUBLE)
    n_scored = n_probed + 2 + compared  # baselines and difference
    moved = DOUBLE * N_METRICS * plan.design.n_groups * n_scored
    tested = DOUBLE * plan.settings.n_permutations * (1 + 2 * N_METRICS) * (3 if compared else 1)
    return len(plan.cells) * (decided + moved + tested + ROW_BYTES * (N_METRICS * n_scored + SELECTIVE))
