"""From rows to statements: the best layer, what is above chance, and one sentence on what was found.

This module knows nothing about files, figures or how the scores came about.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from mmextract.probes.paper import DIGITS, TEST_SHARE
from mmextract.probes.rows import Row, make_rows
from mmextract.probes.run import Cell, ProbePlan, Scores

CHANCE = 0.5
"""AUROC of a probe that knows nothing."""

FEW_GROUPS = 20


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
        return list(make_rows(self.plan, self.scores))

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
    held_out = "Nothing is held out by group."
    if "seen" in summary.plan.design.classes:
        held_out = "Nothing is held out by identity: reading a watermark is enough to score."
    return (
        f"By the published protocol the probe's accuracy is highest at {name_layer(best.layer)}, position "
        f"{best.position}: {best.value:.4f}, against {share:.4f} for the majority class.",
        f"It rests on one split with {n_test} test samples, so chance alone moves it by ±{spread:.2f}, and "
        f"it is the highest of {len(summary.scores)}. {held_out}",
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
