"""One layer and position: its states, read from the store, through every task, test and comparison.

This is the unit of work of a run. It knows nothing about what other layers gave.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from mmextract.engine.store import Store, open_store
from mmextract.probes.choice import make_solver, one_thread
from mmextract.probes.evaluation import TaskScores, evaluate, evaluate_baselines
from mmextract.probes.groups import IntArray
from mmextract.probes.metrics import FloatArray
from mmextract.probes.paper import evaluate_paper
from mmextract.probes.permutation import PermutationTest, Shuffled, can_shuffle, compare, run_test
from mmextract.probes.solvers import Solver

if TYPE_CHECKING:
    from mmextract.probes.run import ProbePlan


@dataclass(frozen=True, kw_only=True)
class CellScores:
    """What came out on one layer and position."""

    tasks: Sequence[TaskScores]
    """The label, its control and its baselines; the other store's label and the difference, if two are compared."""
    tests: Mapping[str, PermutationTest] = field(default_factory=dict)
    """By task: of the label, of the other store's, of their difference."""

    def find(self, task: str) -> TaskScores:
        """Return the scores of a task. Raises KeyError if there are none."""
        for scores in self.tasks:
            if scores.task == task:
                return scores
        raise KeyError(task)


def score_cell(plan: ProbePlan, layer: int, position: str) -> CellScores:
    """Read one layer and position from the store, and the other's if one is compared with, and score every task."""
    x = read_states(open_store(plan.store), layer, position, plan.design.rows)
    if plan.settings.preset == "paper":
        return CellScores(tasks=evaluate_paper(x, plan.tasks[0]))
    if plan.other is None:
        return score_states(plan, x)
    rows = plan.other.rows[plan.design.rows]
    return score_states(plan, x, read_states(open_store(plan.other.place), layer, position, rows))


def score_states(plan: ProbePlan, x: FloatArray, x_other: FloatArray | None = None) -> CellScores:
    """Score every task on states x [n, D]; with those of another checkpoint, [n, D'], the difference, too."""
    groups, label = plan.design.groups, plan.tasks[0]
    with one_thread():
        solver = make_solver(plan.settings.solver)
        tasks = evaluate(x, groups, plan.tasks, solver, plan.settings)
        test = _test(plan, x, tasks[0], solver)
        tasks += evaluate_baselines(x, groups, label, plan.settings.seed)
        tests = {"label": test[0]} if test else {}
        if x_other is not None:
            (scores,) = evaluate(x_other, groups, [label], solver, plan.settings)
            tasks += [scores.renamed("other"), tasks[0].minus(scores, "difference")]
            other = _test(plan, x_other, scores, solver)
            if test and other:
                tests |= {"other": other[0], "difference": compare(tasks[-1], test[1], other[1])}
    return CellScores(tasks=tasks, tests=tests)


def _test(
    plan: ProbePlan, x: FloatArray, label: TaskScores, solver: Solver
) -> tuple[PermutationTest, Shuffled] | None:
    if not plan.settings.n_permutations or not can_shuffle(plan.design):
        return None
    return run_test(x, plan.design, plan.tasks[0], solver, plan.settings, label.penalties)


def read_states(store: Store, layer: int, position: str, rows: IntArray) -> FloatArray:
    """Return float64 [n, D]: the states of those rows. Raises ValueError if any is not finite."""
    states = store.read(layer, position)[rows].astype(np.float64)
    bad = np.flatnonzero(~np.isfinite(states).all(1))
    if len(bad):
        first = store.columns["sample"][rows[bad[0]]]
        raise ValueError(
            f"{store.url}, layer {layer}, position {position}: {len(bad)} of {len(states)} samples hold NaN or "
            f"infinite states (the first is {first}): leave them out with --where, or this layer or position out"
        )
    return states
