"""What the steps of an experiment left behind, read and taken together: one tidy table, one record.

This module knows nothing about how results are worded or drawn.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from mmextract.engine.experiment import BASE, CONTROL, MARKED, R0, Experiment, Run
from mmextract.engine.steps import FOLDER, Step, read_record
from mmextract.probes.experiment_steps import CELLS, LEGIBILITY, MEMORY, PUBLISHED
from mmextract.probes.experiment_table import Effect, Mean, SeedScores, combine, mean_over_seeds
from mmextract.probes.prompting import separate

CONFIDENCE = 0.95
MEMORISATION, POSITIVE, AUROC, READING, PAPER, TASK, PROMPT, WORDS, APART = (
    *("memorisation", "positive control", "seen/unseen", "legibility", "published protocol"),
    *("task accuracy", "prompt baseline", "control's answers", "separability"),
)
"""Measures of the table."""

SEPARABILITY = ("fisher_ratio", "silhouette")
"""Metrics of separability that are taken over; steps/probe-… have all."""


def _about(text: str, default: Any = None) -> Any:
    return field(default=default, metadata={"about": text})


@dataclass(frozen=True, kw_only=True)
class ExperimentRow:
    """One line of experiment.csv and .parquet; each field carries its description."""

    measure: str = _about("what is measured", "")
    condition: str = _about("base, r0-b16, r100-b16 (rate 100 %, batches of 16), control, …", "")
    kind: str = _about("base, r0, marked or control", "")
    rate: float = _about("share of the training images with a watermark", 0.0)
    repetitions: float | None = _about("training images that show one seen identity")
    batch_size: int = _about("of training; 0 of the base", 0)
    layer: int | None = _about("decoder block; -1 is the embedding; null where none is meant")
    position: str = _about("token or span of tokens", "")
    label: str = _about("what is read, asked or scored", "")
    metric: str = _about("unit of the value", "")
    value: float = _about("mean over seeds", float("nan"))
    low: float | None = _about("lower end of the 95 % interval")
    high: float | None = _about("upper end of it")
    over: str = _about("what the interval is over: seeds, or identities where there are fewer than three", "")
    identity_low: float | None = _about(
        "lower end of the interval over identities alone, fine-tunes as given"
    )
    identity_high: float | None = _about("upper end of it")
    chance: float | None = _about("what knowing nothing scores")
    p: float | None = _about("permutation p-value of this row alone, two-sided")
    p_corrected: float | None = _about("corrected for all layers, positions and conditions of the measure")
    detectable: float | None = _about("smallest true value found with probability 0.8 at that level")
    n_seeds: int = _about("seeds", 0)
    n_pairs: int | None = _about("pairs of identities of a seed")
    by_seed: str = _about("the seeds' values, as JSON", "[]")


COLUMNS = {f.name: f.metadata["about"] for f in fields(ExperimentRow)}


@dataclass(frozen=True, kw_only=True)
class ExperimentResults:
    """Everything that was found."""

    experiment: Experiment
    top: Path
    rows: Sequence[ExperimentRow]
    steps: Mapping[str, Mapping[str, Any]]
    """Name → fingerprint and seconds."""
    rejected: Mapping[str, int]
    """Step → samples that it rejected."""

    def select(self, measure: str, **wanted: Any) -> list[ExperimentRow]:
        """Return the rows of a measure whose fields have these values."""
        return [
            row
            for row in self.rows
            if row.measure == measure and all(getattr(row, k) == v for k, v in wanted.items())
        ]

    def is_found(self, row: ExperimentRow) -> bool:
        """Tell whether a row lies above what chance gives, everything looked at taken together."""
        above = row.value > (row.chance or 0.0)
        return above and row.p_corrected is not None and row.p_corrected <= 1 - CONFIDENCE + 1e-12


def collect(experiment: Experiment, top: Path, steps: Sequence[Step]) -> ExperimentResults:
    """Read all steps' results. They have to be done."""
    rows: list[ExperimentRow] = []
    for kind, measure in ((MARKED, MEMORISATION), (CONTROL, POSITIVE)):
        rows += _effects(experiment, top, kind, measure)
    rows += _by_layer(experiment, top)
    rows += _asked(experiment, top)
    records = {step.name: read_record(top / FOLDER / step.name) for step in steps}
    kept = {
        name: {"fingerprint": record["fingerprint"], "seconds": record["seconds"]}
        for name, record in records.items()
        if record is not None
    }
    return ExperimentResults(
        experiment=experiment, top=top, rows=rows, steps=kept, rejected=_rejected(top, steps)
    )


def _rejected(top: Path, steps: Sequence[Step]) -> dict[str, int]:
    found = {}
    for step in steps:
        path = top / FOLDER / step.name / "summary.json"
        if path.is_file() and (rejected := json.loads(path.read_text("utf-8"))["rejected"]):
            found[step.name] = len(rejected)
    return found


def _read(top: Path, kind: str, run: Run, name: str) -> Any:
    return json.loads((top / FOLDER / f"{kind}-{run.name}" / name).read_text("utf-8"))


def _conditions(experiment: Experiment, kinds: Sequence[str]) -> dict[str, list[Run]]:
    """Return the runs of each condition, a seed each."""
    found: dict[str, list[Run]] = {}
    for run in experiment.runs:
        if run.kind in kinds:
            found.setdefault(run.condition, []).append(run)
    return found


def _about_run(experiment: Experiment, run: Run) -> dict[str, Any]:
    spec = experiment.spec
    times: float | None = None
    if run.kind == MARKED:
        times = run.repetitions or spec.marked_images(run.rate) / spec.identities
    elif run.kind == CONTROL:
        times = spec.control.exposures
    return {
        "condition": run.condition,
        "kind": run.kind,
        "rate": run.rate,
        "repetitions": times,
        "batch_size": run.batch_size,
    }


def _effects(experiment: Experiment, top: Path, kind: str, measure: str) -> Iterator[ExperimentRow]:
    """Yield the differences to r0 of every condition, tested as one family."""
    conditions = _conditions(experiment, [kind])
    cells = {name: [_read(top, MEMORY, run, CELLS) for run in runs] for name, runs in conditions.items()}
    if not cells:
        return
    scores = {name: [_seed_scores(of_seed) for of_seed in seeds] for name, seeds in cells.items()}
    for name, effects in combine(scores, confidence=CONFIDENCE).items():
        runs = conditions[name]
        for cell, effect in zip(cells[name][0], effects, strict=True):
            yield _effect_row(measure, _about_run(experiment, runs[0]), cell, effect, len(runs))


def _seed_scores(cells: Sequence[Mapping[str, Any]]) -> SeedScores:
    def column(name: str) -> Any:
        return np.array([cell[name] for cell in cells], np.float64)

    return SeedScores(
        values=column("value"),
        references=column("reference"),
        errors=column("difference_error"),
        raw_errors=column("jackknife_error"),
        null=column("null"),
    )


def _effect_row(
    measure: str, about: Mapping[str, Any], cell: Mapping[str, Any], effect: Effect, n_seeds: int
) -> ExperimentRow:
    return ExperimentRow(
        measure=measure,
        **about,
        layer=cell["layer"],
        position=cell["position"],
        label="identity_set",
        metric="difference of AUROC to r0",
        value=effect.value,
        low=effect.low,
        high=effect.high,
        over=effect.over,
        identity_low=effect.identity_low,
        identity_high=effect.identity_high,
        chance=0.0,
        p=effect.p,
        p_corrected=effect.p_corrected,
        detectable=effect.detectable,
        n_seeds=n_seeds,
        n_pairs=cell["n_groups"],
        by_seed=json.dumps([round(value, 6) for value in effect.by_seed]),
    )


def _by_layer(experiment: Experiment, top: Path) -> Iterator[ExperimentRow]:
    """Yield AUROC itself, legibility and the published accuracy of every condition."""
    for runs in _conditions(experiment, (BASE, R0, MARKED, CONTROL)).values():
        about = _about_run(experiment, runs[0])
        cells = [_read(top, MEMORY, run, CELLS) for run in runs]
        for place, cell in enumerate(cells[0]):
            values = [of_seed[place]["value"] for of_seed in cells]
            mean = mean_over_seeds(values, confidence=CONFIDENCE)
            where = {"layer": cell["layer"], "position": cell["position"], "n_pairs": cell["n_groups"]}
            yield _mean_row(AUROC, about | where, "identity_set", "AUROC", mean, 0.5)
        yield from _separability(about, [_read(top, MEMORY, run, "probe.json") for run in runs])
        if runs[0].kind == CONTROL:
            continue
        for measure, kind in ((READING, LEGIBILITY), (PAPER, PUBLISHED)):
            if measure == READING and not experiment.spec.probe.legibility:
                continue
            yield from _rows_of(measure, about, [_read(top, kind, run, "rows.json") for run in runs])


def _separability(about: Mapping[str, Any], seeds: Sequence[Mapping[str, Any]]) -> Iterator[ExperimentRow]:
    """Yield how far apart seen and unseen lie without a probe."""
    for rows in zip(*((record.get("separability") or {"rows": ()})["rows"] for record in seeds), strict=True):
        if rows[0]["metric"] not in SEPARABILITY or any(row["value"] is None for row in rows):
            continue
        own = [(row["low"], row["high"]) if row["low"] is not None else None for row in rows]
        mean = mean_over_seeds([row["value"] for row in rows], own, confidence=CONFIDENCE)
        nulls = [row["null_mean"] for row in rows if row["null_mean"] is not None]
        where = {"layer": rows[0]["layer"], "position": rows[0]["position"], "n_pairs": rows[0]["n_groups"]}
        chance = float(np.mean(nulls)) if nulls else None
        yield _mean_row(APART, {**about, **where}, "identity_set", rows[0]["metric"], mean, chance)


def _rows_of(
    measure: str, about: Mapping[str, Any], seeds: Sequence[Sequence[Mapping[str, Any]]]
) -> Iterator[ExperimentRow]:
    """Yield the means of rows that probes wrote, one list a seed, in the same order."""
    for rows in zip(*seeds, strict=True):
        first = rows[0]
        if first["task"] != "label":
            continue
        own = [(row["low"], row["high"]) if row.get("low") is not None else None for row in rows]
        mean = mean_over_seeds([row["value"] for row in rows], own, confidence=CONFIDENCE)
        corrected = [row["p_corrected"] for row in rows if row.get("p_corrected") is not None]
        where = {"layer": first["layer"], "position": first["position"]}
        # read in every seed: the largest of the seeds' p-values is a valid one for all of them
        p = max(corrected) if len(corrected) == len(rows) else None
        chance = first.get("chance")
        if measure == PAPER:
            majority = [row["value"] for of_seed in seeds for row in of_seed if row["task"] == "majority"]
            chance = float(np.mean(majority)) if majority else None
        yield _mean_row(
            measure, {**about, **where, "p_corrected": p}, first["label"], first["metric"], mean, chance
        )


def _mean_row(
    measure: str, about: Mapping[str, Any], label: str, metric: str, mean: Mean, chance: float | None
) -> ExperimentRow:
    return ExperimentRow(
        measure=measure,
        **about,
        label=label,
        metric=metric,
        value=mean.value,
        low=mean.low,
        high=mean.high,
        over="" if mean.low is None else "seeds" if len(mean.by_seed) > 2 else "identities",
        chance=chance,
        n_seeds=len(mean.by_seed),
        by_seed=json.dumps([round(value, 6) for value in mean.by_seed]),
    )


def _asked(experiment: Experiment, top: Path) -> Iterator[ExperimentRow]:
    """Yield what the models' answers tell: of the task, of private fields, of the control's words."""
    if experiment.spec.evaluation.enabled:
        for runs in _conditions(experiment, (BASE, R0, MARKED)).values():
            about = _about_run(experiment, runs[0])
            found = [_read(top, "evaluate", run, "evaluation.json") for run in runs]
            accuracies = [entry["scores"]["accuracy"] for entry in found if entry["scores"]]
            if accuracies:
                yield _mean_row(TASK, about, "task", "accuracy", mean_over_seeds(accuracies), None)
            yield from _prompted(about, [entry["prompts"] for entry in found])
    for runs in _conditions(experiment, (CONTROL,)).values():
        about = _about_run(experiment, runs[0])
        found = [_read(top, "evaluate", run, "evaluation.json") for run in runs]
        for group, chance in (("known", None), ("strangers", None), ("told", 0.5)):
            values = [entry[group]["accuracy"] for entry in found]
            if None not in values:
                yield _mean_row(WORDS, about, group, "accuracy", mean_over_seeds(values), chance)


def _prompted(
    about: Mapping[str, Any], seeds: Sequence[Sequence[Mapping[str, Any]]]
) -> Iterator[ExperimentRow]:
    """Yield how well answers and likelihoods tell seen from unseen, on marked images and on bare ones."""
    if not seeds[0]:
        return
    for marked in (True, False):
        for name in dict.fromkeys(row["field"] for row in seeds[0]):
            for score in ("exact", "exposure", "log_likelihood"):
                found = []
                for rows in seeds:
                    of = [row for row in rows if row["marked"] == marked and row["field"] == name]
                    values = [np.nan if row[score] is None else row[score] for row in of]
                    found.append(
                        separate(values, [r["condition"] == "seen" for r in of], [r["pair"] for r in of])
                    )
                if any(np.isnan(entry.auroc) for entry in found):
                    continue
                mean = mean_over_seeds(
                    [entry.auroc for entry in found], [(entry.low, entry.high) for entry in found]
                )
                place = "on the image" if marked else "not on the image"
                yield _mean_row(PROMPT, about, f"{name} by {score}, {place}", "AUROC", mean, 0.5)


def as_table(rows: Sequence[ExperimentRow]) -> list[dict[str, Any]]:
    """Return the rows as dictionaries."""
    return [asdict(row) for row in rows]
