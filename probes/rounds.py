"""What a probe run fits at one layer and position, in the rounds in which a solver is given it, from shapes alone.

This module knows nothing about memory or time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from mmextract.probes import permutation
from mmextract.probes.choice import choose

if TYPE_CHECKING:
    from mmextract.probes.run import ProbePlan
    from mmextract.probes.tasks import Task


@dataclass(frozen=True, kw_only=True)
class Round:
    """Fits that a solver is given at once."""

    n_rows: int
    """Samples of a training set."""
    n_sets: int
    """Training sets."""
    n_folds: int
    """Those of one split, each of which lacks another part of its samples."""
    n_outside: int
    """Samples that take no part in a split."""
    n_labels: int
    """Label vectors of each."""
    n_penalties: int
    """Values of C."""
    n_outputs: int
    """Logits of a sample."""

    @property
    def n_fits(self) -> int:
        """Probes fitted."""
        return self.n_sets * self.n_labels * self.n_penalties

    @property
    def n_columns(self) -> int:
        """Logits of a training set's sample, over all its labels."""
        return self.n_labels * self.n_outputs


def list_rounds(plan: ProbePlan, tasks: Sequence[Task] | None = None) -> list[Round]:
    """Return what one layer and position takes: the probes that are scored, and the choice of C if there is one.

    tasks: of the plan, if not all of them.
    """
    settings, n, tasks = plan.settings, plan.design.n_samples, tasks or plan.tasks
    n_classes = len(plan.design.classes)
    n_outputs = 1 if n_classes == 2 else n_classes
    first_split = tasks[0].folds[0]
    n_repeats, folds = len(tasks[0].folds), int(first_split.max()) + 1
    n_labels = _count_sharing(tasks)
    n_sets = len(tasks) // n_labels * n_repeats * folds
    n_rows = n - int(np.bincount(first_split[first_split >= 0]).min())
    first = Round(
        n_rows=n_rows,
        n_sets=n_sets,
        n_folds=folds,
        n_outside=0,
        n_labels=n_labels,
        n_penalties=1,
        n_outputs=n_outputs,
    )
    rounds = [first]
    if len(settings.penalties) > 1 and settings.preset != "paper":
        inner = settings.inner_folds
        rounds.append(
            replace(
                first,
                n_rows=n_rows - n_rows // inner,
                n_sets=n_sets * inner,
                n_folds=inner,
                n_outside=n - n_rows,
                n_penalties=len(settings.penalties),
            )
        )
    return rounds


def _count_sharing(tasks: Sequence[Task]) -> int:
    """Return how many tasks share their training sets: all, where labels leave a split no choice, or one.

    Splits are stratified by each task's own label; where every group has the same classes, they come out the same.
    """
    first = tasks[0]
    shared = all(
        np.array_equal(task.folds, first.folds) and np.array_equal(task.inner_folds, first.inner_folds)
        for task in tasks[1:]
    )
    return len(tasks) if shared else 1


def list_tests(plan: ProbePlan) -> list[Round]:
    """Return what the permutation tests of one layer and position take: a round a training set and batch of labels."""
    settings, design = plan.settings, plan.design
    if settings.preset == "paper" or not settings.n_permutations or not permutation.can_shuffle(design):
        return []
    first = list_rounds(plan)[0]
    penalties = len(settings.test_penalties)
    size = penalties * first.n_outputs * (design.n_samples + plan.hidden_size)
    most = max(1, permutation.MOST_ELEMENTS // size)
    labels = 1 + settings.n_permutations
    batches = [min(most, labels - start) for start in range(0, labels, most)]
    n_sets = int(plan.tasks[0].folds.max()) + 1
    return [
        replace(first, n_sets=1, n_labels=batch, n_penalties=penalties)
        for batch in batches
        for _ in range(n_sets)
    ]


def find_solver(plan: ProbePlan, n_rows: int) -> str:
    """Return the name of the solver of training sets of that size."""
    if plan.streamed_elements:
        return "primal"
    if plan.settings.preset == "paper":
        return "sklearn"
    if plan.settings.solver != "auto":
        return plan.settings.solver
    return choose(n_rows, plan.hidden_size, "cpu")
