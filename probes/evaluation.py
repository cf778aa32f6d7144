"""The default protocol for one layer and position: cross-validated probes on held-out groups, C chosen
inside.

Features are scaled by each training set's own statistics, and C minimises the log-loss over an inner grouped
split of that training set; no test sample takes part in either. This module knows nothing about stores,
layers or files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

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
    fitted = [_fit(x, task, solver, settings) for task in tasks]
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
    x: FloatArray, task: Task, solver: Solver, settings: ProbeSettings
) -> tuple[FloatArray, tuple[float, ...], _FitLog]:
    """Return out-of-fold decisions [repeats, n, outputs], the C of each probe and what it took."""
    log = _FitLog()
    penalties = _choose_penalties(x, task, solver, settings, log)
    splits = _outer_splits(task)
    trains = [np.flatnonzero(task.folds[r] != k) for r, k in splits]
    jobs = [Job(rows=t, y=task.y[t], penalties=(c,)) for t, c in zip(trains, penalties, strict=True)]
    n_classes = int(task.y.max()) + 1
    decisions = np.full((len(task.folds), len(x), 1 if n_classes == 2 else n_classes), np.nan)
    for (r, k), (solution,) in zip(splits, solver.solve(x, jobs), strict=True):
        log.add(solution)
        test = np.flatnonzero(task.folds[r] == k)
        decisions[r, test] = solution.decide(x[test])
    return decisions, tuple(penalties), log


def _choose_penalties(
    x: FloatArray, task: Task, solver: Solver, settings: ProbeSettings, log: _FitLog
) -> list[float]:
    """Return the C of each outer training set: of least mean log-loss over its inner split, the smallest of equals."""
    grid = tuple(sorted(settings.penalties))
    splits = _outer_splits(task)
    if len(grid) == 1:
        return [grid[0]] * len(splits)
    inner = [
        (at, k) for at, (r, f) in enumerate(splits) for k in range(int(task.inner_folds[r, f].max()) + 1)
    ]
    folds = [task.inner_folds[r, f] for r, f in splits]
    trains = [np.flatnonzero((folds[at] >= 0) & (folds[at] != k)) for at, k in inner]
    jobs = [Job(rows=t, y=task.y[t], penalties=grid) for t in trains]
    losses: list[list[list[float]]] = [[] for _ in splits]
    for (at, k), solutions in zip(inner, solver.solve(x, jobs), strict=True):
        test = np.flatnonzero(folds[at] == k)
        for solution in solutions:
            log.add(solution)
        losses[at].append([float(score_fold(s.decide(x[test]), task.y[test]).loss.mean()) for s in solutions])
    return [grid[int(np.argmin(np.mean(loss, axis=0)))] for loss in losses]


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
