"""What the scores of a run take in the process that gathers them, from shapes alone, until they are written down.

This module knows nothing about how they are computed or drawn.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmextract.probes.metrics import METRICS
from mmextract.probes.permutation import can_shuffle
from mmextract.probes.rounds import list_rounds
from mmextract.probes.separability import METRICS as SEPARABILITY

if TYPE_CHECKING:
    from mmextract.probes.run import ProbePlan

DOUBLE, SHORT = 8, 2

ROW_BYTES = 10 << 10
"""A row of results, as objects, in tables and as JSON; measured with 1,000 layers and positions."""


def kept_bytes(plan: ProbePlan) -> int:
    """Return what scores take of all layers and positions, with the rows that are made of them."""
    return len(plan.cells) * (_decided_bytes(plan) + _moved_bytes(plan) + _row_bytes(plan))


def count_deviations(plan: ProbePlan) -> int:
    """Return the numbers that tell how far groups move a score; see `metrics.combine_repeats`."""
    repeats = len(plan.tasks[0].folds)
    return plan.design.n_groups * (1 if repeats == 1 else 1 + repeats)


def _decided_bytes(plan: ProbePlan) -> int:
    """Return what probes say of each sample, in which fold, and its class."""
    n, repeats, n_outputs = plan.design.n_samples, len(plan.tasks[0].folds), list_rounds(plan)[0].n_outputs
    return _count_probed(plan) * n * (repeats * (DOUBLE * n_outputs + SHORT) + DOUBLE)


def _moved_bytes(plan: ProbePlan) -> int:
    """Return how far groups move each score, and what shuffles scored."""
    settings = plan.settings
    if settings.preset == "paper":
        return 0
    moved = len(METRICS) * _count_scored(plan) * count_deviations(plan)
    n_tests = (1 if plan.other is None else 3) if can_shuffle(plan.design) else 0
    return DOUBLE * (moved + n_tests * settings.n_permutations * (1 + 2 * len(METRICS)))


def _row_bytes(plan: ProbePlan) -> int:
    if plan.settings.preset == "paper":
        return ROW_BYTES * (2 + len(SEPARABILITY))
    return ROW_BYTES * (len(METRICS) * _count_scored(plan) + len(SEPARABILITY) + 2)  # and CKA's two


def _count_probed(plan: ProbePlan) -> int:
    return len(plan.tasks) + (plan.other is not None)


def _count_scored(plan: ProbePlan) -> int:
    """Return the tasks that are scored: those probed, two baselines, selectivity, and the difference."""
    return _count_probed(plan) + 3 + (plan.other is not None)
