"""One layer and position: its states, held in memory or streamed, through every task, test and comparison.

This is the unit of work of a run. It knows nothing about what other layers gave.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from mmextract.engine.store import Store, open_store
from mmextract.probes.blocks import not_finite
from mmextract.probes.choice import find_device, make_solver, one_thread
from mmextract.probes.evaluation import TaskScores, evaluate, evaluate_baselines
from mmextract.probes.groups import IntArray
from mmextract.probes.metrics import FloatArray
from mmextract.probes.paper import evaluate_paper
from mmextract.probes.permutation import PermutationTest, Shuffled, can_shuffle, compare, run_test
from mmextract.probes.states import ArrayStates, States, stream

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
    store, rows = open_store(plan.store), plan.design.rows
    if plan.settings.preset == "paper":
        x = read_states(store, layer, position, rows)
        return CellScores(tasks=evaluate_paper(x, plan.tasks[0]))
    states = _open_states(plan, store, layer, position, rows)
    if plan.other is None:
        return score_states(plan, states)
    theirs, rows = open_store(plan.other.place), plan.other.rows[rows]
    return score_states(plan, states, _open_states(plan, theirs, layer, position, rows))


def score_states(plan: ProbePlan, states: States, other: States | None = None) -> CellScores:
    """Score every task on states [n, D]; with those of another checkpoint, [n, D'], the difference, too."""
    groups, label = plan.design.groups, plan.tasks[0]
    with one_thread():
        tasks = evaluate(states, groups, plan.tasks, plan.settings)
        test = _test(plan, states, tasks[0])
        tasks += evaluate_baselines(states, groups, label, plan.settings.seed)
        tests = {"label": test[0]} if test else {}
        if other is not None:
            (scores,) = evaluate(other, groups, [label], plan.settings)
            tasks += [scores.renamed("other"), tasks[0].minus(scores, "difference")]
            theirs = _test(plan, other, scores)
            if test and theirs:
                tests |= {"other": theirs[0], "difference": compare(tasks[-1], test[1], theirs[1])}
    return CellScores(tasks=tasks, tests=tests)


def _test(plan: ProbePlan, states: States, label: TaskScores) -> tuple[PermutationTest, Shuffled] | None:
    if not plan.settings.n_permutations or not can_shuffle(plan.design):
        return None
    return run_test(states, plan.design, plan.tasks[0], plan.settings, label.penalties)


def _open_states(plan: ProbePlan, store: Store, layer: int, position: str, rows: IntArray) -> States:
    """Return the states of those rows: held, or streamed if the plan says so."""
    if plan.streamed_elements:
        return stream(
            store, layer, position, rows, device=find_device(), most_elements=plan.streamed_elements
        )
    return hold_states(plan, read_states(store, layer, position, rows))


def hold_states(plan: ProbePlan, x: FloatArray) -> ArrayStates:
    """Return states x [n, D] with the solver that the plan asks for."""
    return ArrayStates(x, make_solver(plan.settings.solver))


def read_states(store: Store, layer: int, position: str, rows: IntArray) -> FloatArray:
    """Return float64 [n, D]: the states of those rows. Raises ValueError if any is not finite."""
    states = store.read(layer, position)[rows].astype(np.float64)
    bad = np.flatnonzero(~np.isfinite(states).all(1))
    if len(bad):
        raise not_finite(store, layer, position, rows, len(bad), int(bad[0]))
    return states
