"""From rows to statements: the best layer, what is above chance, and one sentence on what was found.

This module knows nothing about files, figures or how the scores came about.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from mmextract.probes.paper import DIGITS, TEST_SHARE
from mmextract.probes.permutation import POWER, can_shuffle
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
    def tasks(self) -> frozenset[str]:
        """Names of the tasks that there are rows of."""
        return frozenset(row.task for row in self.rows)

    def has(self, task: str) -> bool:
        """Whether there are rows of that task."""
        return task in self.tasks

    @cached_property
    def is_tested(self) -> bool:
        """Whether there are p-values."""
        return any(row.p is not None for row in self.rows)

    def select(self, task: str, metric: str | None = None) -> list[Row]:
        """Return the rows of a task, one a layer and position, in the metric by which layers are compared if not
        given."""
        return [row for row in self.rows if row.task == task and row.metric == (metric or self.metric)]

    @cached_property
    def best(self) -> Row:
        """The label's row of highest score, the first of equals; of those above chance if there are any."""
        return max(self.above_chance or self.select("label"), key=lambda row: row.value)

    @cached_property
    def above_chance(self) -> list[Row]:
        """Rows of the label's AUROC that are above chance, with all layers and positions allowed for."""
        return [row for row in self.select("label", "auroc") if self.is_found(row)]

    def is_found(self, row: Row) -> bool:
        """Whether a row lies above chance: by its corrected p-value if it has one, else by its simultaneous
        interval."""
        if row.p_corrected is not None:
            return row.p_corrected <= self.plan.settings.alpha
        return (
            row.chance is not None and row.simultaneous_low is not None and row.simultaneous_low > row.chance
        )

    @cached_property
    def different(self) -> list[Row]:
        """Rows of the difference between two stores that is not zero, with all layers and positions allowed for."""
        return [row for row in self.select("difference") if self._excludes_zero(row)]

    def _excludes_zero(self, row: Row) -> bool:
        if row.p_corrected is not None:
            return row.p_corrected <= self.plan.settings.alpha
        assert row.simultaneous_low is not None and row.simultaneous_high is not None
        return row.simultaneous_low > 0 or row.simultaneous_high < 0

    @property
    def n_unconverged(self) -> int:
        """Probes that did not reach the optimum, in the whole run."""
        return sum(scores.n_unconverged for cell in self.scores.values() for scores in cell.tasks)

    @property
    def n_fits(self) -> int:
        """Probes fitted in the whole run."""
        return sum(scores.n_fits for cell in self.scores.values() for scores in cell.tasks)

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
        if self.is_paper:
            return _judge_paper(self)
        return _judge_difference(self) if self.has("difference") else _judge(self)

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
    best, beware = summary.best, _beware(summary)
    subject, several = _name_subject(summary), f"{len(summary.scores)} layers and positions"
    where = f"{name_layer(best.layer)}, position {best.position}"
    if summary.above_chance and len(summary.scores) == 1:
        return (
            f"The hidden states tell {subject}: AUROC {best.value:.2f} at {where} ({_evidence(summary, best)}).",
            f"{beware}Chance is 0.50.",
        )
    if summary.above_chance:
        return (
            f"The hidden states tell {subject}: AUROC {best.value:.2f} at {where} ({_evidence(summary, best)}).",
            f"{beware}So corrected, AUROC lies above chance (0.50) in {len(summary.above_chance)} of {several}."
            f"{_embedding(summary, best)}",
        )
    no_more = "higher than shuffled labels reach" if summary.is_tested else "clear of chance"
    one = len(summary.scores) == 1
    found = f"at {where} AUROC is not {no_more}" if one else f"in none of {several} is AUROC {no_more}"
    p = f" ({_name_p(summary, best)})" if summary.is_tested else ""
    highest = "AUROC" if one else "The highest AUROC"
    return (
        f"No sign that the hidden states tell {subject}: {found}{p}.",
        f"{beware}{highest} is {best.value:.2f} ({_interval(summary, best)}) at {where}, where 0.50 is chance; "
        f"{_not_ruled_out(best, 'an AUROC')}.",
    )


def _judge_difference(summary: Summary) -> tuple[str, str]:
    """Say what two stores differ in; which of them knows more is for the sign."""
    rows = summary.different or summary.select("difference")
    best = max(rows, key=lambda row: abs(row.value))
    subject, several = _name_subject(summary), f"{len(summary.scores)} layers and positions"
    cell = (best.layer, best.position)
    where = f"{name_layer(best.layer)}, position {best.position}"
    here, there = (summary.row(task, "auroc", cell).value for task in ("label", "other"))
    beware = _beware(summary)
    both = f"AUROC {here:.2f} here and {there:.2f} there at {where}"
    if summary.different:
        more = "better" if best.value > 0 else "worse"
        return (
            f"The hidden states tell {subject} {more} than those compared with: {both}, a difference of "
            f"{_signed(best.value)} ({_evidence(summary, best)}).",
            f"{beware}So corrected, they differ in {len(summary.different)} of {several}.",
        )
    p = f" ({_name_p(summary, best)})" if summary.is_tested else ""
    return (
        f"No sign that the hidden states tell {subject} better or worse than those compared with{p}.",
        f"{beware}The largest difference is {_signed(best.value)} ({_interval(summary, best)}): {both}; "
        f"{_not_ruled_out(best, 'a difference')}.",
    )


def _embedding(summary: Summary, best: Row) -> str:
    """Say so if what is found is there before the first layer."""
    found = [row for row in summary.above_chance if row.layer < 0]
    if not found or best.layer < 0:
        return ""
    most = max(found, key=lambda row: row.value)
    return f" The embedding, which is no work of the layers, reaches {most.value:.2f} at position {most.position}."


def _name_subject(summary: Summary) -> str:
    design = summary.plan.design
    return f"{name_classes(design.classes)} for {name_held_out(design.group)} the probe never saw"


def _beware(summary: Summary) -> str:
    return "See the warnings before believing it. " if summary.plan.design.warnings else ""


def _interval(summary: Summary, row: Row) -> str:
    """Return the interval in words: the simultaneous one, if several layers and positions were looked at."""
    percent = f"{summary.plan.settings.confidence * 100:g} % interval"
    if len(summary.scores) == 1:
        return f"{percent} {_range(row.low, row.high)}"
    allowing = f"allowing for the {len(summary.scores)} layers and positions looked at"
    return f"{percent} {_range(row.simultaneous_low, row.simultaneous_high)}, {allowing}"


def _name_p(summary: Summary, row: Row) -> str:
    if len(summary.scores) == 1:
        return f"p = {row.p:.2g}"
    smallest = min(r.p_corrected for r in summary.select(row.task) if r.p_corrected is not None)
    return f"smallest corrected p = {smallest:.2g}"


def _evidence(summary: Summary, row: Row) -> str:
    if row.p_corrected is None:
        return _interval(summary, row)
    p = f"p = {row.p:.2g}" if len(summary.scores) == 1 else f"corrected p = {row.p_corrected:.2g}"
    return f"{_interval(summary, row)}; {p}"


def _not_ruled_out(row: Row, what: str) -> str:
    """Say how null a null is."""
    if row.detectable is None:
        return "an effect in that range is not ruled out"
    size = "1.00, and no smaller one," if row.detectable >= 1 else f"{row.detectable:.2f}"
    return f"{what} of {size} would have been found with a probability of {POWER:g}, a smaller one is not ruled out"


def _signed(value: float) -> str:
    return f"{value:+.2f}".replace("-", "−")


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
    below = [row for row in summary.select("label", "auroc") if (row.simultaneous_high or 1) < CHANCE]
    if below:
        found.append(
            f"AUROC lies below chance in {len(below)} of {len(summary.scores)} layers and positions, which "
            "held-out groups do not explain: something about a test sample is in the training set with the "
            "opposite label. Check --group."
        )
    control = [row for row in summary.select("control", "auroc") if (row.simultaneous_low or 0) > CHANCE]
    if control:
        found.append(
            f"shuffled labels are told apart, too, in {len(control)} of {len(summary.scores)} layers and "
            "positions: the grouping leaves something in common between training and test"
        )
    if plan.design.n_groups < FEW_GROUPS:
        found.append(f"there are only {plan.design.n_groups} groups: the intervals are rough")
    if plan.settings.n_permutations and not can_shuffle(plan.design):
        found.append(
            f"no p-values: some groups ({plan.design.group}) hold one class of {plan.design.label!r} and some hold "
            "several, so its labels cannot be shuffled as if they said nothing; leave one of the two kinds out with "
            "--where"
        )
    return found
