"""The default protocol for one layer and position: cross-validated probes on held-out groups, C chosen
inside.

Features are scaled by each training set's own statistics, and C minimises the log-loss over an inner grouped
split of that training set; no test sample takes part in either. This module knows nothing about stores,
layers or files, nor where states are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from mmextract.probes.groups import IntArray
from mmextract.probes.metrics import METRICS, Estimate, FloatArray, mean_log_loss, score
from mmextract.probes.settings import ProbeSettings
from mmextract.probes.solvers import Job, Solution
from mmextract.probes.states import States
from mmextract.probes.tasks import FoldArray, Task, weigh_classes

N_DIRECTIONS = 8
"""Random directions whose scores are averaged."""


@dataclass(frozen=True, kw_only=True)
class TaskScores:
    """What probes of one task reached on one layer and position."""

    task: str
    """`label`, `control`, `majority`, `random`; `other` and `difference` if two stores are compared."""
    values: Mapping[str, float]
    """Metric → mean over test folds and repeats."""
    y: IntArray
    """[n] class of each sample, as this task has it."""
    deviations: Mapping[str, FloatArray] = field(default_factory=dict)
    """Metric → [k] how far each group moves the value (see `metrics.Estimate`); of no metric where the protocol
    has no intervals."""
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

    def renamed(self, task: str) -> TaskScores:
        """Return the same, as a task of that name."""
        return replace(self, task=task)

    def minus(self, other: TaskScores, task: str) -> TaskScores:
        """Return the difference, as a task of that name."""
        return TaskScores(
            task=task,
            values={metric: value - other.values[metric] for metric, value in self.values.items()},
            deviations={
                metric: moved - other.deviations[metric] for metric, moved in self.deviations.items()
            },
            y=self.y,
        )


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
    states: States, groups: IntArray, tasks: Sequence[Task], settings: ProbeSettings
) -> list[TaskScores]:
    """Score every task on states [n, D] whose samples belong to groups [n]."""
    results = []
    for task, (decisions, penalties, log) in zip(tasks, _fit(states, tasks, settings), strict=True):
        scored = score(decisions[None], task.y[None], task.folds, groups)
        results.append(
            TaskScores(
                task=task.name,
                y=task.y,
                values=_values(scored),
                deviations=_deviations(scored),
                decisions=decisions,
                folds=task.folds,
                penalties=penalties,
                **vars(log),
            )
        )
    return results


def evaluate_baselines(states: States, groups: IntArray, label: Task, seed: int) -> list[TaskScores]:
    """Return the scores of the majority class and of random directions.

    The first gives every test sample the class frequencies of its training set. The second projects the features on
    N_DIRECTIONS directions drawn at random, fits on each the two or more normal distributions of equal width that the
    training set has there, and averages the scores: what any one direction tells about the label.
    """
    majority = score(_predict_majority(label)[None], label.y[None], label.folds, groups)
    y = np.broadcast_to(label.y, (N_DIRECTIONS, len(label.y)))
    random = score(_decide_at_random(states, label, seed), y, label.folds, groups)
    return [
        TaskScores(task="majority", y=label.y, values=_values(majority), deviations=_deviations(majority)),
        TaskScores(
            task="random",
            y=label.y,
            values={metric: float(random[metric].values.mean()) for metric in METRICS},
            deviations={metric: random[metric].deviations.mean(0) for metric in METRICS},
        ),
    ]


def _values(estimates: Mapping[str, Estimate]) -> dict[str, float]:
    return {metric: float(estimate.values[0]) for metric, estimate in estimates.items()}


def _deviations(estimates: Mapping[str, Estimate]) -> dict[str, FloatArray]:
    return {metric: estimate.deviations[0] for metric, estimate in estimates.items()}


def _outer_splits(task: Task) -> list[tuple[int, int]]:
    return [(r, k) for r in range(len(task.folds)) for k in range(int(task.folds.max()) + 1)]


def _fit(
    states: States, tasks: Sequence[Task], settings: ProbeSettings
) -> list[tuple[FloatArray, tuple[float, ...], _FitLog]]:
    """Return, for each task, out-of-fold decisions [repeats, n, outputs], the C of each probe and what it took.

    The solver is given the jobs of all tasks at once: those with the same folds share what does not depend on
    labels.
    """
    logs = [_FitLog() for _ in tasks]
    penalties = _choose_penalties(states, tasks, settings, logs)
    decisions = [_make_decisions(task) for task in tasks]
    splits = [(at, r, k) for at, task in enumerate(tasks) for r, k in _outer_splits(task)]
    jobs = [
        _make_job(tasks[at].y, tasks[at].folds[r] != k, (c,), settings)
        for (at, r, k), c in zip(splits, chain(*penalties), strict=True)
    ]
    tests = (np.flatnonzero(tasks[at].folds[r] == k) for at, r, k in splits)
    for (at, r, k), ((solution,), (decided,)) in zip(splits, states.fit(jobs, tests), strict=True):
        logs[at].add(solution)
        decisions[at][r, tasks[at].folds[r] == k] = decided
    return list(zip(decisions, map(tuple, penalties), logs, strict=True))


def _make_job(
    y: IntArray, train: NDArray[np.bool_], penalties: tuple[float, ...], settings: ProbeSettings
) -> Job:
    rows = np.flatnonzero(train)
    weights = weigh_classes(y[rows], settings.class_weight)
    return Job(rows=rows, y=y[rows], penalties=penalties, class_weights=weights)


def _make_decisions(task: Task) -> FloatArray:
    n_classes = int(task.y.max()) + 1
    return np.full((*task.folds.shape, 1 if n_classes == 2 else n_classes), np.nan)


def _choose_penalties(
    states: States, tasks: Sequence[Task], settings: ProbeSettings, logs: Sequence[_FitLog]
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
            _make_job(tasks[outer[number][0]].y, (folds[number] >= 0) & (folds[number] != k), grid, settings)
            for number, k in splits
        ]
        losses: list[list[list[float]]] = [[] for _ in outer]
        tests = (np.flatnonzero(folds[number] == k) for number, k in splits)
        for (number, k), (solutions, decided) in zip(splits, states.fit(jobs, tests), strict=True):
            at = outer[number][0]
            y = tasks[at].y[folds[number] == k]
            for solution in solutions:
                logs[at].add(solution)
            losses[number].append([mean_log_loss(logits, y) for logits in decided])
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


def _project_at_random(states: States, task: Task, seed: int) -> Iterator[FloatArray]:
    """Yield, for each outer split, the states [n, N_DIRECTIONS] along random directions, scaled as in training."""
    directions = np.random.default_rng([seed, 4]).normal(size=(states.shape[1], N_DIRECTIONS))
    scales = states.deviations(np.flatnonzero(task.folds[r] != k) for r, k in _outer_splits(task))
    return states.project(directions / scale[:, None] for scale in scales)


def _decide_at_random(states: States, task: Task, seed: int) -> FloatArray:
    """Return [N_DIRECTIONS, repeats, n, outputs]: logits of linear discriminants on random projections."""
    n_classes = int(task.y.max()) + 1
    decisions = np.empty((N_DIRECTIONS, *task.folds.shape, n_classes))
    for (r, k), along in zip(_outer_splits(task), _project_at_random(states, task, seed), strict=True):
        train, test = task.folds[r] != k, task.folds[r] == k
        y = task.y[train]
        means = np.stack([along[train][y == c].mean(0) for c in range(n_classes)])  # [class, direction]
        width = ((along[train] - means[y]) ** 2).mean(0)
        width = np.where(width > 0, width, 1.0)
        prior = np.log(np.bincount(y, minlength=n_classes) / len(y))
        logits = (along[test][:, :, None] * means.T - means.T**2 / 2) / width[:, None] + prior
        decisions[:, r, test] = logits.swapaxes(0, 1)
    return decisions[..., 1:] - decisions[..., :1] if n_classes == 2 else decisions
