"""From an experiment's table to sentences: what was found, how sure, and whether a null would mean anything.

This module knows nothing about files or figures.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from mmextract.probes.experiment_results import (
    CONFIDENCE,
    MEMORISATION,
    POSITIVE,
    READING,
    WORDS,
    ExperimentResults,
    ExperimentRow,
)
from mmextract.probes.summary import name_layer

LEARNT = 0.65
"""Balanced accuracy with which the control's answers tell seen from unseen on held-out images if it was learnt."""


@dataclass(frozen=True)
class Verdict:
    """The results in words."""

    results: ExperimentResults

    @cached_property
    def effects(self) -> list[ExperimentRow]:
        """The memorisation scores."""
        return self.results.select(MEMORISATION)

    @cached_property
    def found(self) -> list[ExperimentRow]:
        """Those that stand out."""
        return [row for row in self.effects if self.results.is_found(row)]

    @cached_property
    def lower(self) -> list[ExperimentRow]:
        """Those that lie as clearly below zero: seen and unseen told apart less well than in r0."""
        level = 1 - CONFIDENCE + 1e-12
        return [
            r for r in self.effects if r.value < 0 and r.p_corrected is not None and r.p_corrected <= level
        ]

    @cached_property
    def best(self) -> ExperimentRow:
        """The largest memorisation score, of those that stand out if any do."""
        return max(self.found or self.effects, key=lambda row: row.value)

    @cached_property
    def is_legible(self) -> bool | None:
        """Whether every label was read at some layer of base and r0; None if it was not tried."""
        rows = self.results.select(READING, metric="auroc")
        if not rows:
            return None
        read = [row for row in rows if self.results.is_found(row)]
        pairs = {(row.label, row.condition) for row in rows if row.kind in ("base", "r0")}
        return pairs <= {(row.label, row.condition) for row in read}

    @cached_property
    def best_control(self) -> ExperimentRow | None:
        """The control's largest score, None without a control."""
        return max(self.results.select(POSITIVE), key=lambda row: row.value, default=None)

    @cached_property
    def is_learnt(self) -> bool | None:
        """Whether the model learnt the positive control."""
        rows = self.results.select(WORDS, label="told")
        return None if not rows else rows[0].value >= LEARNT

    @cached_property
    def is_control_found(self) -> bool | None:
        """Whether the probe found the positive control."""
        rows = self.results.select(POSITIVE)
        return None if not rows else any(self.results.is_found(row) for row in rows)

    @property
    def is_sensitive(self) -> bool:
        """Whether a null would mean something: the text can be read, and what is learnt of identities is found."""
        return bool(self.is_legible and self.is_control_found)

    @cached_property
    def statement(self) -> str:
        """What was found and how sure it is; and of a null that proves nothing, that it does."""
        row, where = self.best, self._where(self.best)
        if self.found:
            return (
                f"After fine-tuning {self._condition(row)}, the hidden states tell identities that were seen from "
                f"others better than after fine-tuning without watermarks: AUROC {_signed(row.value)} at {where} "
                f"({self._interval(row)}; corrected p = {row.p_corrected:.2g})."
            )
        if not self.is_sensitive:
            return f"Nothing was found, and that says nothing about memory: {self._why_insensitive()}."
        above = [1.0 if row.p_corrected is None else row.p_corrected for row in self.effects if row.value > 0]
        return (
            "No sign that the model remembers whom it saw: nowhere do hidden states tell seen identities from others "
            "better than after fine-tuning without watermarks "
            f"({f'smallest corrected p of a gain = {min(above):.2g}' if above else 'no difference is a gain'}), "
            "though text can be read and the positive control was found."
        )

    def _why_insensitive(self) -> str:
        reasons = []
        if self.is_legible is None:
            reasons.append("it was not tested whether the watermarks can be read")
        elif not self.is_legible:
            reasons.append("the watermarks could not be read from the states")
        if self.is_control_found is None:
            reasons.append("there was no positive control")
        elif not self.is_control_found:
            learnt = "though the model learnt it" if self.is_learnt else "which the model did not learn"
            reasons.append(f"the positive control, {learnt}, was not found either")
        return " and ".join(reasons)

    @cached_property
    def qualification(self) -> str:
        """What has to be said beside the statement."""
        row = self.best
        n_cells = len({(r.layer, r.position) for r in self.effects})
        n_conditions = len({r.condition for r in self.effects})
        family = f"{n_cells} layers and positions" + (
            f" in {n_conditions} conditions" if n_conditions > 1 else ""
        )
        parts = []
        if self.found:
            parts.append(
                f"So corrected, it is above zero in {len(self.found)} of {len(self.effects)} ({family})."
            )
            if not self.is_sensitive:
                parts.append(f"Beware: {self._why_insensitive()}.")
        else:
            parts.append(
                f"The largest difference is {_signed(row.value)} ({self._interval(row)}) at {self._where(row)}, "
                f"{self._condition(row)}, of {family}; a true difference of {_size(row.detectable)} there would "
                "have been found with a probability of 0.8."
            )
        if self.lower:
            least = min(self.lower, key=lambda row: row.value)
            parts.append(
                f"It is below zero, so corrected, in {len(self.lower)} of {len(self.effects)}, the lowest "
                f"{_signed(least.value)} ({self._interval(least)}; corrected p = {least.p_corrected:.2g}) at "
                f"{self._where(least)}, {self._condition(least)}: there they are told apart less well than in r0."
            )
        parts.append(self._say_seeds(row))
        return " ".join(parts)

    def _say_seeds(self, row: ExperimentRow) -> str:
        spec = self.results.experiment.spec
        people = "the same identities" if spec.seen else "identities of its own"
        if row.over == "seeds":
            return f"Intervals are over {row.n_seeds} seeds, each with {people}."
        several = "One seed" if row.n_seeds == 1 else f"{row.n_seeds} seeds"
        return (
            f"{several} of training: intervals are over the {row.n_pairs} pairs of identities and say nothing about "
            "what another fine-tune would give."
        )

    def _where(self, row: ExperimentRow) -> str:
        assert row.layer is not None
        return f"{name_layer(row.layer)}, position {row.position}"

    def _condition(self, row: ExperimentRow) -> str:
        return f"at {name_condition(row)}"

    def _interval(self, row: ExperimentRow) -> str:
        return f"{CONFIDENCE * 100:g} % interval {_signed(row.low)} to {_signed(row.high)}"

    @cached_property
    def sensitivity(self) -> list[str]:
        """What stands behind `is_sensitive`, in sentences."""
        found = []
        for label in dict.fromkeys(row.label for row in self.results.select(READING)):
            rows = self.results.select(READING, label=label, metric="accuracy")
            best = max(rows, key=lambda row: row.value)
            found.append(
                f"Legibility: {name_label(label)} is read, of people that neither model nor probe saw, with up to "
                f"{best.value:.0%} accuracy ({self._where(best)}, {name_condition(best)}), where always naming the "
                f"most frequent one gives {best.chance or 0:.0%}."
            )
        known, strange, told = (
            self.results.select(WORDS, label=name) for name in ("known", "strangers", "told")
        )
        if known and strange and told and self.best_control is not None:
            row = self.best_control
            score = f"{_signed(row.value)} ({self._interval(row)}; corrected p = {row.p_corrected:.2g})"
            found.append(
                "Positive control: where the identity decides the answer, held-out images of the seen identities are "
                f"answered as trained in {known[0].value:.0%}, those of others in {strange[0].value:.0%} (balanced "
                f"accuracy {told[0].value:.0%}, chance 50%); the probe tells seen from unseen better than in r0 by "
                f"{score} at {self._where(row)}: {'found' if self.is_control_found else 'not found'}."
            )
        return found

    @cached_property
    def warnings(self) -> list[str]:
        """What a reader must know before believing anything."""
        found = []
        if not self.is_sensitive:
            found.append(f"{self._why_insensitive()}: a null of this experiment is no evidence")
        found += [f"left out: {text}" for text in self.results.experiment.spec.left_out]
        found += [f"{n} samples were rejected in step {name}" for name, n in self.results.rejected.items()]
        return found


def name_condition(row: ExperimentRow) -> str:
    """Return what people call a condition."""
    if row.kind == "base":
        return "the base"
    if row.kind == "control":
        return "the positive control"
    batches = f"batches of {row.batch_size}"
    if row.kind == "r0":
        return f"r0, {batches}"
    images = "1 image" if row.repetitions == 1 else f"{row.repetitions:.3g} images"
    return f"rate {row.rate:.0%}, {images} an identity, {batches}"


def name_label(label: str) -> str:
    """Return what people call a label, as in "… is read off an image"."""
    name, _, at = label.removeprefix("identity_").partition("[")
    name = name.replace("_", " ")
    if not at:
        return f"the {name}"
    number, _, limit = at.partition("]")
    kind = "digit" if "id" in name.split() else "letter"
    place = "first" if number == "0" else f"{int(number) + 1}th"
    whole = f"the {place} {kind} of the {name}"
    return f"whether {whole} comes before {limit[1:]}" if limit else whole


def _signed(value: float | None) -> str:
    return "–" if value is None else f"{value:+.2f}".replace("-", "−")


def _size(value: float | None) -> str:
    return "any size" if value is None else f"{value:.2f}"
