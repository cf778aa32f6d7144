"""From scores to tidy rows: each metric of each task, layer and position, with its intervals.

This module knows nothing about files, figures or sentences.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from mmextract.probes.evaluation import TaskScores
from mmextract.probes.intervals import Interval, make_intervals
from mmextract.probes.metrics import FloatArray
from mmextract.probes.run import Cell, ProbePlan, Scores

BOUNDS: Mapping[str, tuple[float, float]] = {"log_loss": (0.0, np.inf)}
UNIT_BOUNDS = (0.0, 1.0)
SELECTIVE_METRICS = ("auroc", "accuracy", "balanced_accuracy")


def _about(text: str) -> Any:
    """Make a field whose description is written into the outputs."""
    return field(metadata={"about": text})


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the tables: a metric of a task at a layer and position. Each field carries its description."""

    layer: int = _about("decoder block; -1 is the embedding, the input of block 0")
    position: str = _about("token or span of tokens")
    label: str = _about("column of the store that gave the classes")
    task: str = _about(
        "label; control: the same with shuffled labels; selectivity: label minus control; majority: predicts "
        "the class frequencies of the training set"
    )
    metric: str = _about(
        "auroc (of more than two classes: mean of one against the rest), accuracy, balanced_accuracy, "
        "log_loss (nats)"
    )
    value: float = _about("mean over test folds and repeats")
    low: float | None = _about("lower end of the interval by bootstrap over groups")
    high: float | None = _about("upper end of that interval")
    simultaneous_low: float | None = _about(
        "lower end of the interval that holds for all layers and positions of this task and metric at once"
    )
    simultaneous_high: float | None = _about("upper end of that interval")
    n_samples: int = _about("samples probed")
    n_groups: int = _about("groups they fall into")
    n_classes: int = _about("classes of the label")
    c: float | None = _about("median over folds of the inverse penalty C that was chosen")
    solver: str = _about("what fitted the probes")
    n_fits: int = _about(
        "probes fitted for this task, layer and position, those for the choice of C included"
    )
    n_unconverged: int = _about("those of them that did not reach the optimum")


COLUMNS: Mapping[str, str] = {f.name: f.metadata["about"] for f in fields(Row)}
"""What each column of the tables means."""


def make_rows(plan: ProbePlan, by_cell: Scores) -> Iterator[Row]:
    """Yield the rows of the label, its control, its baselines, and its selectivity."""
    cells = list(by_cell)
    by_task = {task.task: [_find(by_cell[cell], task.task) for cell in cells] for task in by_cell[cells[0]]}
    for task, scores in by_task.items():
        for metric in scores[0].replicates:
            replicates = np.stack([score.replicates[metric] for score in scores])
            yield from _task_rows(
                plan, cells, scores, task, metric, replicates, BOUNDS.get(metric, UNIT_BOUNDS)
            )
    if "control" not in by_task:
        return
    label, control = by_task["label"], by_task["control"]
    for metric in SELECTIVE_METRICS:
        difference = np.stack(
            [a.replicates[metric] - b.replicates[metric] for a, b in zip(label, control, strict=True)]
        )
        blank = [TaskScores(task="selectivity", y=plan.design.y, replicates={})] * len(cells)
        yield from _task_rows(plan, cells, blank, "selectivity", metric, difference, (-1.0, 1.0))


def _find(scores: Sequence[TaskScores], task: str) -> TaskScores:
    return next(score for score in scores if score.task == task)


def _task_rows(
    plan: ProbePlan,
    cells: Sequence[Cell],
    scores: Sequence[TaskScores],
    task: str,
    metric: str,
    replicates: FloatArray,
    bounds: tuple[float, float],
) -> Iterator[Row]:
    if replicates.shape[1] == 1:
        intervals = [Interval(value=value) for value in replicates[:, 0].tolist()]
    else:
        intervals = make_intervals(
            replicates, folds=plan.settings.folds, confidence=plan.settings.confidence, bounds=bounds
        )
    for (layer, position), score, interval in zip(cells, scores, intervals, strict=True):
        yield Row(
            layer=layer,
            position=position,
            label=plan.design.label,
            task=task,
            metric=metric,
            **vars(interval),
            n_samples=plan.design.n_samples,
            n_groups=plan.design.n_groups,
            n_classes=len(plan.design.classes),
            c=float(np.median(score.penalties)) if score.penalties else None,
            solver=score.solver,
            n_fits=score.n_fits,
            n_unconverged=score.n_unconverged,
        )
