"""How long a run takes, roughly, and what follows from that.

The figures are for choosing, not for promising; `stream_cost` has those of states that are streamed. This module
knows nothing about stores.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from mmextract.probes.stream_cost import streamed_permutation_seconds, streamed_seconds

if TYPE_CHECKING:
    from mmextract.probes.run import ProbePlan

MOST_PERMUTATIONS = 200
"""So many let a corrected p-value fall to 0.005."""

LEAST_PERMUTATIONS = 39
"""Enough for a p-value of 0.025."""

PERMUTATION_SECONDS = 3600.0
"""Seconds of one core that permutations may take where their number is left open."""


def predict_seconds(plan: ProbePlan) -> float:
    """Return roughly how long one core takes.

    scikit-learn: each fit 3 ms, and its arithmetic at 20 GFLOP/s over some five steps. Our own solvers: the
    moments of a training set and their eigenvectors, then some 25 products a fit (measured at 800 samples ×
    3584 features).
    """
    settings, n, d = plan.settings, plan.design.n_samples, plan.hidden_size
    searching = len(settings.penalties) > 1
    inner = settings.inner_folds * len(settings.penalties) if searching else 0
    n_outer = 1 if settings.preset == "paper" else settings.folds * settings.repeats
    k = min(n, d)
    if settings.preset == "paper" or settings.solver in ("sklearn", "cuml"):
        task = n_outer * (inner + 1) * (3e-3 + 5e-10 * n * k**2)
    else:
        n_sets = n_outer * (settings.inner_folds * searching + 1)
        task = n_sets * (3e-11 * n * d * k + 3e-10 * k**3) + n_outer * (inner + 1) * (5e-4 + 1.2e-8 * n * k)
    n_stores = 1 if plan.other is None else 2
    tests = settings.n_permutations * predict_permutation(plan)
    if plan.streamed_elements:
        return len(plan.cells) * streamed_seconds(plan) + tests
    return len(plan.cells) * n_stores * len(plan.tasks) * task + tests


def predict_permutation(plan: ProbePlan) -> float:
    """Return roughly how long one core takes for one shuffle of the label, at all layers and positions.

    Measured with 200 shuffles, 5 folds and 3 values of C: 3.5 s at 500 samples × 1024 features, 11.5 s at 1,000 × 3584.
    """
    if plan.streamed_elements:
        return len(plan.cells) * streamed_permutation_seconds(plan)
    n, n_stores = plan.design.n_samples, 1 if plan.other is None else 2
    fit = 5e-4 + 4e-9 * n * min(n, plan.hidden_size)
    return len(plan.cells) * n_stores * len(plan.settings.test_penalties) * plan.settings.folds * fit


def choose_permutations(plan: ProbePlan) -> ProbePlan:
    """Return the plan with a number of permutations, if it was left open, and a note if it is not the usual one.

    MOST_PERMUTATIONS if they take no more than PERMUTATION_SECONDS of one core; as many as do, if those are at
    least LEAST_PERMUTATIONS; else none.
    """
    if plan.settings.preset == "paper" or plan.settings.permutations is not None:
        return plan
    seconds = predict_permutation(plan)
    n = min(MOST_PERMUTATIONS, int(PERMUTATION_SECONDS / seconds))
    n = n if n >= LEAST_PERMUTATIONS else 0
    notes = plan.design.notes
    if n < MOST_PERMUTATIONS:
        notes += (
            f"{n or 'no'} permutations instead of {MOST_PERMUTATIONS}, because each takes some {seconds:.0f} s of "
            f"a core{'' if n else ', and so no p-values'}; --permutations chooses otherwise",
        )
    return replace(
        plan,
        settings=replace(plan.settings, permutations=n),
        design=replace(plan.design, notes=notes),
    )
