"""From scores to tidy rows: each metric of each task, layer and position, with its intervals and p-values.

This module knows nothing about files, figures or sentences.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np

from mmextract.probes.design import Design
from mmextract.probes.evaluation import TaskScores
from mmextract.probes.intervals import (
    Interval,
    make_intervals,
    reach_by_correction,
    reach_by_permutations,
)
from mmextract.probes.metrics import FloatArray
from mmextract.probes.permutation import correct_for_discoveries, correct_for_maximum, detectable_at
from mmextract.probes.run import ProbePlan, Scores

WITH_INTERVALS = ("auroc", "accuracy", "balanced_accuracy")
"""Those of log-loss and Brier score would be too narrow, see `intervals`; the calibration error has a bias."""
SELECTIVE_METRICS = ("auroc", "accuracy", "balanced_accuracy")
TESTED_METRIC = "auroc"
BASELINES = ("majority", "random")
DIFFERENCES = ("selectivity", "difference")


def _about(text: str, default: Any = None) -> Any:
    """Make a field whose description is written into the outputs."""
    return field(default=default, metadata={"about": text})


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the tables: a metric of a task at a layer and position. Each field carries its description."""

    layer: int = field(metadata={"about": "decoder block; -1 is the embedding, the input of block 0"})
    position: str = field(metadata={"about": "token or span of tokens"})
    label: str = field(metadata={"about": "column of the store that gave the classes"})
    task: str = field(
        metadata={
            "about": "label; control: the same with shuffled labels; selectivity: label minus control; majority: "
            "predicts the class frequencies of the training set; random: mean of probes along random directions; "
            "other: the label in the store compared with; difference: label minus other"
        }
    )
    metric: str = field(
        metadata={
            "about": "auroc (of more than two classes: mean of one against the rest), accuracy, balanced_accuracy, "
            "log_loss (nats), brier (of two classes: squared error of the positive one's probability), ece "
            "(expected calibration error, 10 equal bins of the predicted class's probability)"
        }
    )
    value: float = field(metadata={"about": "mean over test folds and repeats"})
    error: float | None = _about(
        "standard error of the value; includes that other training sets give other probes"
    )
    low: float | None = _about(
        "lower end of the interval, by the jackknife over groups, calibrated by permutations; null for log_loss, "
        "brier and ece, of which none that we know covers what it promises"
    )
    high: float | None = _about("upper end of that interval")
    simultaneous_low: float | None = _about(
        "lower end of the interval that holds for all layers and positions of this task and metric at once"
    )
    simultaneous_high: float | None = _about("upper end of that interval")
    chance: float | None = _about("what knowing nothing but the classes' shares scores")
    baseline: bool = _about("whether this is a baseline: majority, random, or the embedding", False)
    p: float | None = _about(
        "permutation p-value of this layer and position alone: one-sided for label and other, two-sided for difference"
    )
    p_corrected: float | None = _about(
        "the same for all layers and positions looked at, by the maximum over them (Westfall-Young); decides the "
        "report's first sentence"
    )
    p_fdr: float | None = _about(
        "the same as a false discovery rate over layers and positions (Benjamini-Hochberg)"
    )
    detectable: float | None = _about(
        "smallest true value that has p_corrected at most 1 - confidence with a probability of 0.8"
    )
    n_permutations: int | None = _about("shuffles behind the p-values")
    n_samples: int = field(metadata={"about": "samples probed"})
    n_groups: int = field(metadata={"about": "groups they fall into"})
    n_classes: int = field(metadata={"about": "classes of the label"})
    c: float | None = _about("median over folds of the inverse penalty C that was chosen")
    solver: str = field(metadata={"about": "what fitted the probes"})
    n_fits: int = field(
        metadata={
            "about": "probes fitted for this task, layer and position, those for the choice of C included, those on "
            "shuffled labels not"
        }
    )
    n_unconverged: int = field(metadata={"about": "those of them that did not reach the optimum"})


COLUMNS: Mapping[str, str] = {f.name: f.metadata["about"] for f in fields(Row)}
"""What each column of the tables means."""


def make_rows(plan: ProbePlan, by_cell: Scores) -> Iterator[Row]:
    """Yield the rows of the label, its control, its baselines, its selectivity and what it is compared with."""
    cells = list(by_cell)
    by_task = {
        scores.task: [by_cell[cell].find(scores.task) for cell in cells] for scores in by_cell[cells[0]].tasks
    }
    for task, scores in by_task.items():
        for metric in scores[0].values:
            rows = _make_rows(plan, by_cell, task, metric, scores)
            yield from _add_tests(plan, by_cell, task, rows) if metric == TESTED_METRIC else rows
    if "control" in by_task:
        pairs = zip(by_task["label"], by_task["control"], strict=True)
        selectivity = [label.minus(control, "selectivity") for label, control in pairs]
        for metric in SELECTIVE_METRICS:
            yield from _make_rows(plan, by_cell, "selectivity", metric, selectivity)


def _make_rows(
    plan: ProbePlan, by_cell: Scores, task: str, metric: str, scores: Sequence[TaskScores]
) -> list[Row]:
    intervals = _find_intervals(plan, by_cell, task, metric, scores)
    chance = 0.0 if task in DIFFERENCES else find_chance(plan.design, metric)
    return [
        Row(
            layer=layer,
            position=position,
            label=plan.design.label,
            task=task,
            metric=metric,
            **vars(interval),
            chance=chance,
            baseline=task in BASELINES or layer < 0,
            n_samples=plan.design.n_samples,
            n_groups=plan.design.n_groups,
            n_classes=len(plan.design.classes),
            c=float(np.median(score.penalties)) if score.penalties else None,
            solver=score.solver,
            n_fits=score.n_fits,
            n_unconverged=score.n_unconverged,
        )
        for (layer, position), score, interval in zip(by_cell, scores, intervals, strict=True)
    ]


def _find_intervals(
    plan: ProbePlan, by_cell: Scores, task: str, metric: str, scores: Sequence[TaskScores]
) -> list[Interval]:
    """Return an interval a cell. Tasks without a test of their own are calibrated by the label's."""
    values = [score.values[metric] for score in scores]
    if metric not in WITH_INTERVALS or metric not in scores[0].deviations:
        return [Interval(value=value) for value in values]
    deviations = np.stack([score.deviations[metric] for score in scores])
    tests = [cell.tests.get(task) or cell.tests.get("label") for cell in by_cell.values()]
    settings, is_share = plan.settings, task not in DIFFERENCES
    if all(test is not None for test in tests):
        distances = np.stack(
            [test.nulls[metric].distances(is_share=is_share) for test in tests if test is not None]
        )
        reach = reach_by_permutations(distances, settings.confidence)
    else:
        reach = reach_by_correction(deviations, settings.folds, settings.confidence, settings.seed)
    return make_intervals(
        values,
        _length(deviations),
        reach,
        confidence=settings.confidence,
        n_groups=plan.design.n_groups,
        bounds=(0.0, 1.0) if is_share else (-1.0, 1.0),
        is_share=is_share,
    )


def _length(deviations: FloatArray) -> FloatArray:
    return np.asarray(np.sqrt((deviations**2).sum(1)))


def _add_tests(plan: ProbePlan, by_cell: Scores, task: str, rows: Sequence[Row]) -> Iterator[Row]:
    """Yield the rows of the tested metric with their p-values, if there is a test of the task."""
    tests = [cell.tests[task] for cell in by_cell.values() if task in cell.tests]
    if not tests:
        yield from rows
        return
    alpha = plan.settings.alpha
    at = detectable_at(tests, alpha)
    if task == "difference":  # its statistic counts standard errors
        errors = _length(
            np.stack([by_cell[r.layer, r.position].find(task).deviations[r.metric] for r in rows])
        )
        at = (np.array(at) * errors).tolist()
    columns = zip(rows, tests, correct_for_maximum(tests), correct_for_discoveries(tests), at, strict=True)
    for row, test, corrected, discovery, detectable in columns:
        yield replace(
            row,
            p=test.p_value,
            p_corrected=corrected,
            p_fdr=discovery,
            detectable=min(detectable, 1.0),
            n_permutations=len(test.null),
        )


def find_chance(design: Design, metric: str) -> float:
    """Return what a probe scores that knows the classes' shares and nothing else."""
    share = np.bincount(design.y, minlength=len(design.classes)) / design.n_samples
    return {
        "auroc": 0.5,
        "accuracy": float(share.max()),
        "balanced_accuracy": 1 / len(share),
        "log_loss": float(-(share * np.log(share)).sum()),
        "brier": float(1 - (share**2).sum()) / (2 if len(share) == 2 else 1),
        "ece": 0.0,
    }[metric]
