"""The default protocol for one layer and position: cross-validated probes on held-out groups, C chosen
inside.

Features are scaled by each training set's own statistics, and C minimises the log-loss over an inner grouped
split of that training set; no test sample takes part in either. This module knows nothing about stores,
layers or files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from mmextract.probes.groups import IntArray
from mmextract.probes.intervals import resample_groups
from mmextract.probes.metrics import FloatArray, FoldScores, mean_scores, score_fold
from mmextract.probes.settings import ProbeSettings
from mmextract.probes.solvers import Job, Solution, Solver
from mmextract.probes.tasks import FoldArray, Task


@dataclass(frozen=True, kw_only=True)
class TaskScores:
    """What probes of one task reached on one layer and position."""

    task: str
    """`label`, `control` or `majority`."""
    replicates: Mapping[str, FloatArray]
    """Metric → [1 + B]: the estimate, then its bootstrap replicates, if the protocol has any."""
    y: IntArray
    """[n] class of each sample, as this task has it."""
    decisions: FloatArray | None = None
    """[repeats, n, 1 or n_classes] logits of each sample from a probe that has not seen it; NaN where there
    is none."""
    folds: FoldArray | None = None
    """[repeats, n] fold in which each sample was tested; −1 where it was not."""
    penalties: tuple[float, ...] = ()
    """C of each fold's probe, repeat by repeat."""
    solver: str = ""
    """What fitted the outer probes."""
    n_fits: int = 0
    """Probes fitted, those of the inner splits included."""
    n_unconverged: int = 0
    """Those of them that did not reach the optimum."""
    worst_residual: float = 0.0
    """Largest KKT residual among them."""


@dataclass(kw_only=True)
class _FitLog:
    """Counts what was fitted; its last entry is that of an outer probe."""

    solver: str = ""
    n_fits: int = 0
    n_unconverged: int = 0
    worst_residual: float = 0.0

    def add(self, solution: Solution) -> None:
        self.solver = solution.method
        self.n_fits += 1
        self.n_unconverged += not solution.converged
        self.worst_residual = max(self.worst_residual, solution.residual)


def evaluate(
    x: FloatArray, groups: IntArray, tasks: Sequence[Task], solver: Solver, settings: ProbeSettings
) -> list[TaskScores]:
    """Score every task on features x [n, D] whose samples belong to groups [n]; the majority baseline comes
    last.

    The baseline gives every test sample the class frequencies of its training set.
    """
    fitted = _fit(x, tasks, solver, settings)
    majority = _predict_majority(tasks[0])
    scored = [
        _score(decisions, task, groups, settings)
        for (decisions, _, _), task in zip(fitted, tasks, strict=True)
    ]
    results = [
        TaskScores(
            task=task.name,
            y=task.y,
            replicates=replicates,
            decisions=decisions,
            folds=task.folds,
            penalties=penalties,
            **vars(log),
        )
        for task, replicates, (decisions, penalties, log) in zip(tasks, scored, fitted, strict=True)
    ]
    return [
        *results,
        TaskScores(task="majority", y=tasks[0].y, replicates=_score(majority, tasks[0], groups, settings)),
    ]


def _outer_splits(task: Task) -> list[tuple[int, int]]:
    return [(r, k) for r in range(len(task.folds)) for k in range(int(task.folds.max()) + 1)]


def _fit(
    x: FloatArray, tasks: Sequence[Task], solver: Solver, settings: ProbeSettings
) -> list[tuple[FloatArray, tuple[float, ...], _FitLog]]:
    """Return, for each task, out-of-fold decisions [repeats, n, outputs], the C of each probe and what it took.

    The solver is given the jobs of all tasks at once: those with the same folds share what does not depend on
    labels.
    """
    logs = [_FitLog() for _ in tasks]
    penalties = _choose_penalties(x, tasks, solver, settings, logs)
    decisions = [_make_decisions(task) for task in tasks]
    splits = [(at, r, k) for at, task in enumerate(tasks) for r, k in _outer_splits(task)]
    jobs = [
        _make_job(tasks[at].y, tasks[at].folds[r] != k, (c,))
        for (at, r, k), c in zip(splits, chain(*penalties), strict=True)
    ]
    for (at, r, k), (solution,) in zip(splits, solver.solve(x, jobs), strict=True):
        logs[at].add(solution)
        test = np.flatnonzero(tasks[at].folds[r] == k)
        decisions[at][r, test] = solution.decide(x[test])
    return list(zip(decisions, map(tuple, penalties), logs, strict=True))


def _make_job(y: IntArray, train: NDArray[np.bool_], penalties: tuple[float, ...]) -> Job:
    rows = np.flatnonzero(train)
    return Job(rows=rows, y=y[rows], penalties=penalties)


def _make_decisions(task: Task) -> FloatArray:
    n_classes = int(task.y.max()) + 1
    return np.full((*task.folds.shape, 1 if n_classes == 2 else n_classes), np.nan)


def _choose_penalties(
    x: FloatArray, tasks: Sequence[Task], solver: Solver, settings: ProbeSettings, logs: Sequence[_FitLog]
) -> list[list[float]]:
    """Return, for each task, the C of each outer training set: of least mean log-loss over its inner split, the
    smallest of equals."""
    grid = tuple(sorted(settings.penalties))
    outer = [(at, r, f) for at, task in enumerate(tasks) for r, f in _outer_splits(task)]
    chosen = [grid[0]] * len(outer)
    if len(grid) > 1:
        folds = [tasks[at].inner_folds[r, f] for at, r, f in outer]
        splits = [(number, k) for number, fold in enumerate(folds) for k in range(int(fold.max()) + 1)]
        jobs = [
            _make_job(tasks[outer[number][0]].y, (folds[number] >= 0) & (folds[number] != k), grid)
            for number, k in splits
        ]
        losses: list[list[list[float]]] = [[] for _ in outer]
        for (number, k), solutions in zip(splits, solver.solve(x, jobs), strict=True):
            at = outer[number][0]
            test = np.flatnonzero(folds[number] == k)
            held_out, y = x[test], tasks[at].y[test]
            for solution in solutions:
                logs[at].add(solution)
            losses[number].append([float(score_fold(s.decide(held_out), y).loss.mean()) for s in solutions])
        chosen = [grid[int(np.argmin(np.mean(loss, axis=0)))] for loss in losses]
    return [
        [c for (number, _, _), c in zip(outer, chosen, strict=True) if number == at]
        for at in range(len(tasks))
    ]


def _predict_majority(task: Task) -> FloatArray:
    """Return [repeats, n, outputs]: the logits of the class frequencies in each training set."""
    n_classes = int(task.y.max()) + 1
    decisions = np.empty((len(task.folds), len(task.y), n_classes))
    for r, k in _outer_splits(task):
        train, test = task.folds[r] != k, task.folds[r] == k
        decisions[r, test] = np.log(np.bincount(task.y[train], minlength=n_classes) / train.sum())
    return decisions[:, :, 1:] - decisions[:, :, :1] if n_classes == 2 else decisions


def _score(
    decisions: FloatArray, task: Task, groups: IntArray, settings: ProbeSettings
) -> dict[str, FloatArray]:
    """Return metric → [1 + B]: means over the test folds, as they are and for each resampling of the groups."""
    tests = [(r, np.flatnonzero(task.folds[r] == k)) for r, k in _outer_splits(task)]
    prepared: list[FoldScores] = [score_fold(decisions[r, test], task.y[test]) for r, test in tests]
    blocks = [
        mean_scores(
            [fold.weigh(draws[:, groups[test]]) for fold, (_, test) in zip(prepared, tests, strict=True)]
        )
        for draws in resample_groups(int(groups.max()) + 1, settings.resamples, settings.seed)
    ]
    return {metric: np.concatenate([block[metric] for block in blocks]) for metric in blocks[0]}
