"""How long a run takes, roughly, and what follows from that.

The figures are for choosing, not for promising; `stream_cost` has those of states that are streamed. This module
knows nothing about stores.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from mmextract.probes.rounds import Round, find_solver, list_rounds
from mmextract.probes.stream_cost import EIGEN_SECONDS, streamed_permutation_seconds, streamed_seconds

if TYPE_CHECKING:
    from mmextract.probes.run import ProbePlan

MOST_PERMUTATIONS = 200
"""So many let a corrected p-value fall to 0.005."""

LEAST_PERMUTATIONS = 39
"""Enough for a p-value of 0.025."""

CELL_SECONDS = 0.04
"""Of one core, for what any layer and position takes beside its fits: reading, baselines, scores."""

PERMUTATION_SECONDS = 3600.0
"""Seconds of one core that permutations may take where their number is left open."""


def predict_seconds(plan: ProbePlan) -> float:
    """Return roughly how long one core takes.

    scikit-learn: each fit 3 ms, and its arithmetic at 20 GFLOP/s over some five steps. For our own solvers see
    `_round_seconds`.
    """
    settings, n, d = plan.settings, plan.design.n_samples, plan.hidden_size
    tests = settings.n_permutations * predict_permutation(plan)
    if plan.streamed_elements:
        return len(plan.cells) * streamed_seconds(plan) + tests
    theirs = [] if plan.other is None else list_rounds(plan, plan.tasks[:1])  # of the other, the label alone
    rounds = (*list_rounds(plan), *theirs)
    if settings.preset == "paper" or settings.solver in ("sklearn", "cuml"):
        scores = sum(one.n_fits for one in rounds) * (3e-3 + 5e-10 * n * min(n, d) ** 2)
    else:
        scores = CELL_SECONDS + sum(_round_seconds(plan, one) for one in rounds)
    return len(plan.cells) * scores + tests


def _round_seconds(plan: ProbePlan, one: Round) -> float:
    """Return roughly how long our own solvers take for a round on states that are held.

    Fitted to what `benchmarks/bench_cost.py` measures, shapes of 60 to 10,000 samples × 16 to 4096 features with flat
    and steep spectra, two and three classes: 0.4 to 1.6 of that, 1.0 in the median (`probe_cost.json`).
    """
    n, d, m = plan.design.n_samples, plan.hidden_size, one.n_rows
    fits = one.n_fits * one.n_outputs
    by_set = 1e-8 * n * d  # to gather, to centre and to scale
    if find_solver(plan, m) == "dual" and one.n_outputs == 1:  # inner products, a factor a label, its use
        by_set += 2e-11 * m * m * d + 1.7e-11 * one.n_labels * m**3
        by_fit = 3.5e-9 * m * m
    else:  # inner products or second moments, their eigenvectors, and products of all samples with these
        k = min(m, d)
        by_set += 2e-11 * m * k * d + EIGEN_SECONDS * k**3
        by_fit = 4e-9 * n * k
    return one.n_sets * by_set + fits * (2.8e-4 + by_fit)


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
