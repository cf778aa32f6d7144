"""From scores to statements: tidy rows with intervals, the best layer, and one sentence on what was found.

This module knows nothing about files, figures or how the scores came about.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any

import numpy as np

from mmextract.probes.evaluation import TaskScores
from mmextract.probes.intervals import Interval, make_intervals
from mmextract.probes.metrics import FloatArray
from mmextract.probes.paper import DIGITS, TEST_SHARE
from mmextract.probes.run import Cell, ProbePlan, Scores

CHANCE = 0.5
"""AUROC of a probe that knows nothing."""

BOUNDS: Mapping[str, tuple[float, float]] = {"log_loss": (0.0, np.inf)}
UNIT_BOUNDS = (0.0, 1.0)
SELECTIVE_METRICS = ("auroc", "accuracy", "balanced_accuracy")
FEW_GROUPS = 20


def _about(text: str) -> Any:
    """Make a field whose description is written into the outputs."""
    return field(metadata={"about": text})


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the tables: a metric of a task at a layer and position. Each field carries its
    description."""

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


@dataclass(frozen=True)
class Summary:
    """What a run says, ready to be written down."""

    plan: ProbePlan
    """What was done."""
    scores: Scores
    """What came out."""

    @cached_property
    def rows(self) -> list[Row]:
        """All metrics of all tasks, layers and positions."""
        return list(_make_rows(self.plan, self.scores))

    @cached_property
    def _by_key(self) -> dict[tuple[str, str, int, str], Row]:
        return {(row.task, row.metric, row.layer, row.position): row for row in self.rows}

    def row(self, task: str, metric: str, cell: Cell) -> Row:
        """Return one row. Raises KeyError if the protocol does not have it."""
        return self._by_key[task, metric, *cell]

    @property
    def metric(self) -> str:
        """The metric by which layers are compared."""
        return "accuracy" if self.is_paper else "auroc"

    @property
    def digits(self) -> int:
        """Decimals worth printing."""
        return DIGITS if self.is_paper else 3

    @property
    def is_paper(self) -> bool:
        """Whether this is the published protocol."""
        return self.plan.settings.preset == "paper"

    @cached_property
    def best(self) -> Row:
        """The label's row of highest score, the first of equals."""
        candidates = [row for row in self.rows if row.task == "label" and row.metric == self.metric]
        return max(candidates, key=lambda row: row.value)

    @cached_property
    def above_chance(self) -> list[Row]:
        """Rows of the label's AUROC whose simultaneous interval lies above chance."""
        return [
            row
            for row in self.rows
            if (row.task, row.metric) == ("label", "auroc") and (row.simultaneous_low or 0) > CHANCE
        ]

    @property
    def n_unconverged(self) -> int:
        """Probes that did not reach the optimum, in the whole run."""
        return sum(scores.n_unconverged for cell in self.scores.values() for scores in cell)

    @property
    def n_fits(self) -> int:
        """Probes fitted in the whole run."""
        return sum(scores.n_fits for cell in self.scores.values() for scores in cell)

    @cached_property
    def statement(self) -> str:
        """One sentence: what was found and how sure it is."""
        return self._sentences[0]

    @cached_property
    def qualification(self) -> str:
        """What has to be said beside the statement."""
        return self._sentences[1]

    @property
    def headline(self) -> str:
        """The statement and what has to be said beside it."""
        return f"{self.statement} {self.qualification}"

    @cached_property
    def _sentences(self) -> tuple[str, str]:
        return _judge_paper(self) if self.is_paper else _judge(self)

    @cached_property
    def warnings(self) -> list[str]:
        """What makes the result misleading, found before and after the probes were fitted."""
        return [*self.plan.design.warnings, *self.anomalies]

    @cached_property
    def anomalies(self) -> list[str]:
        """Those of the warnings that only the scores show."""
        return _find_anomalies(self)


def _make_rows(plan: ProbePlan, by_cell: Scores) -> Iterator[Row]:
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


def name_layer(layer: int) -> str:
    """Return how people call a layer."""
    return "the embedding" if layer < 0 else f"layer {layer}"


def name_classes(classes: Sequence[str]) -> str:
    """Return the classes as words in a sentence, the positive one first if there are two."""
    if len(classes) == 2:
        return f"{classes[1]} from {classes[0]}"
    return f"{', '.join(classes[:-1])} and {classes[-1]} apart"


def _judge(summary: Summary) -> tuple[str, str]:
    plan, best, n_cells = summary.plan, summary.best, len(summary.scores)
    subject = (
        f"{name_classes(plan.design.classes)} for {name_held_out(plan.design.group)} the probe never saw"
    )
    percent = f"{plan.settings.confidence * 100:g} % interval"
    where = f"{name_layer(best.layer)}, position {best.position}"
    one = _range(best.low, best.high)
    all_at_once = _range(best.simultaneous_low, best.simultaneous_high)
    several = f"{n_cells} layers and positions"
    beware = "See the warnings before believing it. " if summary.plan.design.warnings else ""
    if summary.above_chance and n_cells == 1:
        statement = f"The hidden states tell {subject}: AUROC {best.value:.2f} at {where} ({percent} {one})."
        return statement, f"{beware}The interval lies above chance (0.50)."
    if summary.above_chance:
        return (
            f"The hidden states tell {subject}: AUROC {best.value:.2f} at {where} ({percent} {all_at_once}, "
            f"allowing for the {several} looked at).",
            f"{beware}So corrected, the interval lies above chance (0.50) in {len(summary.above_chance)} of "
            f"{several}.",
        )
    if n_cells == 1:
        return (
            f"No sign that the hidden states tell {subject}: at {where} the {percent} does not lie above "
            "chance.",
            f"{beware}AUROC is {best.value:.2f} ({one}), where 0.50 is chance: an effect in that range is "
            "not ruled out.",
        )
    return (
        f"No sign that the hidden states tell {subject}: in none of {several} does the {percent}, allowing "
        "for all of them, lie above chance.",
        f"{beware}The highest AUROC is {best.value:.2f} ({all_at_once}) at {where}, where 0.50 is chance: "
        "an effect in that range is not ruled out.",
    )


def name_held_out(group: str | None) -> str:
    """Return what the test samples have in common that the training samples have not."""
    return {None: "samples", "pair": "identities", "image": "images"}.get(group, f"values of {group}")


def _range(low: float | None, high: float | None) -> str:
    assert low is not None and high is not None
    return f"{low:.2f} to {high:.2f}"


def _judge_paper(summary: Summary) -> tuple[str, str]:
    best = summary.best
    n_test = int(np.ceil(TEST_SHARE * best.n_samples))
    share = summary.row("majority", "accuracy", (best.layer, best.position)).value
    spread = 1.96 * np.sqrt(0.25 / n_test)
    return (
        f"By the published protocol the probe's accuracy is highest at {name_layer(best.layer)}, position "
        f"{best.position}: {best.value:.4f}, against {share:.4f} for the majority class.",
        f"It rests on one split with {n_test} test samples, so chance alone moves it by ±{spread:.2f}, and "
        f"it is the highest of {len(summary.scores)}. Nothing is held out by identity: reading a watermark "
        "is enough to score.",
    )


def _find_anomalies(summary: Summary) -> list[str]:
    plan = summary.plan
    found = []
    if summary.n_unconverged:
        found.append(
            f"{summary.n_unconverged} of {summary.n_fits} probes did not reach the optimum: see the column "
            "n_unconverged"
        )
    if summary.is_paper:
        return found
    below = [
        row
        for row in summary.rows
        if (row.task, row.metric) == ("label", "auroc") and (row.simultaneous_high or 1) < CHANCE
    ]
    if below:
        found.append(
            f"AUROC lies below chance in {len(below)} of {len(summary.scores)} layers and positions, which "
            "held-out groups do not explain: something about a test sample is in the training set with the "
            "opposite label. Check --group."
        )
    control = [
        row
        for row in summary.rows
        if (row.task, row.metric) == ("control", "auroc") and (row.simultaneous_low or 0) > CHANCE
    ]
    if control:
        found.append(
            f"shuffled labels are told apart, too, in {len(control)} of {len(summary.scores)} layers and "
            "positions: the grouping leaves something in common between training and test"
        )
    if plan.design.n_groups < FEW_GROUPS:
        found.append(f"there are only {plan.design.n_groups} groups: the intervals are rough")
    return found
