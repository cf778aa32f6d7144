"""The steps of an experiment that read hidden states: probes, legibility, the published protocol.

What is kept of a probe is what `mmextract report` needs to draw it, and what the experiment needs to take several seeds
together: each cell's difference to r0 and the same of every shuffle. This module trains nothing and draws nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from mmextract.engine.experiment import CONTROL, Experiment, Run
from mmextract.engine.identities import FIELDS, Identity
from mmextract.engine.rows import make_rows
from mmextract.engine.steps import Advance, Step, write_json
from mmextract.probes.comparison import add_character
from mmextract.probes.description import DescriptionSettings, describe
from mmextract.probes.outputs import make_record, write_data
from mmextract.probes.projections import parse_wishes
from mmextract.probes.run import plan_probe, run_probe
from mmextract.probes.settings import ProbeSettings
from mmextract.probes.summary import Summary

CELLS = "cells.json"
"""For each layer and position: value, value in r0, difference, its standard error, and those of shuffled labels."""

FEWEST_OF_A_CLASS = 4
"""Groups of each class that a probe needs, whatever its folds."""

MEMORY, LEGIBILITY, PUBLISHED = "probe", "legibility", "published"


def probe_steps(experiment: Experiment, top: Path) -> Iterator[Step]:
    """Yield the steps of every run, in order; `top` is the experiment's folder.

    Raises ValueError, before anything is trained, for what could not be probed afterwards.
    """
    _check(experiment)
    for run in experiment.runs:
        yield _memory(experiment, run, top)
        if experiment.reads(run):
            yield _legibility(experiment, run, top)
        if run.kind != CONTROL:
            yield _published(experiment, run, top)


def _check(experiment: Experiment) -> None:
    """Raise ValueError for too few identities for the folds, or for a field that tells too few of them apart."""
    spec = experiment.spec
    least = max(spec.probe.folds, FEWEST_OF_A_CLASS)
    for number, seed in enumerate(spec.seeds):
        marking = experiment.marking(seed)
        shown = sorted({row.pair for row in make_rows(experiment.held_out, marking)})
        controlled = spec.control.enabled and number < spec.control.seeds
        wanted = {"": spec.identities, "control.": spec.control.identities if controlled else spec.identities}
        for where, n in wanted.items():
            if (n_shown := sum(pair < n for pair in shown)) < least:
                raise ValueError(
                    f"{n_shown} of {n} pairs of identities are on held-out images (seed {seed}), and the probe needs "
                    f"{least}: raise {where}identities or held_out_images, or lower probe.folds"
                )
        if spec.probe.legibility:
            shown_people = {row.person for row in make_rows(*experiment.reading(seed)) if row.person}
            for label in spec.probe.legibility:
                _check_label(label, sorted(shown_people, key=lambda person: person.user_id), least)


def _check_label(label: str, people: Sequence[Identity], least: int) -> None:
    columns = {f"identity_{name}": np.array([getattr(p, name) for p in people], object) for name in FIELDS}
    values = add_character(columns, label, least=least).get(label)
    if values is None:
        raise ValueError(
            f"probe.legibility: there is no column {label!r}; there are {', '.join(columns)}, and [0] behind one of "
            "them takes its first character"
        )
    counts = Counter(value for value in values if value)
    if len(counts) < 2 or min(counts.values()) < least:
        raise ValueError(
            f"probe.legibility: {label} of {len(people)} people does not give two classes of {least}, as the folds "
            "need: raise probe.legibility_images, or choose another field"
        )


def _settings(experiment: Experiment, label: str, seed: int, **others: Any) -> ProbeSettings:
    probe = experiment.spec.probe
    return ProbeSettings(
        label=label,
        folds=probe.folds,
        repeats=probe.repeats,
        permutations=probe.permutations,
        penalties=probe.penalties,
        seed=seed,
        **others,
    )


def _decisive(settings: ProbeSettings) -> dict[str, Any]:
    """Return the settings that results depend on: with permutations given, as here, it is none where states are."""
    assert settings.permutations is not None
    return {name: value for name, value in asdict(settings).items() if name != "stream"}


def _memory(experiment: Experiment, which: Run, top: Path) -> Step:
    """Tell seen from unseen, identities held out, and hold it against r0."""
    only = f"pair < {experiment.spec.control.identities}" if which.kind == CONTROL else None
    settings = _settings(experiment, "identity_set", which.seed, where=only)
    reference = which.reference
    wishes = parse_wishes(experiment.spec.probe.projections)

    def run(folder: Path, advance: Advance) -> None:
        other = None if reference is None else experiment.store(reference, top)
        plan = plan_probe(experiment.store(which, top), settings, compare_with=other)
        summary = Summary(plan, run_probe(plan, on_progress=advance))
        best = (summary.best.layer, summary.best.position)
        description = describe(plan, DescriptionSettings(projections=wishes), best, other=other)
        write_data(summary, make_record(summary, "mmextract experiment", description), folder, description)
        write_json(folder, CELLS, list(_cells(summary)))

    needs = (f"dump-{which.name}",) + (() if reference is None else (f"dump-{reference.name}",))
    decision = {"settings": _decisive(settings), "projections": experiment.spec.probe.projections}
    return _step(experiment, f"{MEMORY}-{which.name}", decision, needs, run, 1 if reference is None else 2)


def _cells(summary: Summary) -> Iterator[dict[str, Any]]:
    """Yield what a seed adds to the whole, of each layer and position."""
    for (layer, position), scores in summary.scores.items():
        row = summary.row("label", "auroc", (layer, position))
        cell: dict[str, Any] = {
            "layer": layer,
            "position": position,
            "value": row.value,
            "error": row.error,
            "n_groups": row.n_groups,
            "n_samples": row.n_samples,
        }
        if summary.has("difference"):
            difference = summary.row("difference", "auroc", (layer, position))
            deviations = scores.find("difference").deviations["auroc"]
            test = scores.tests["difference"]
            cell |= {
                "reference": summary.row("other", "auroc", (layer, position)).value,
                "difference": difference.value,
                "difference_error": difference.error,
                "jackknife_error": float((deviations**2).sum() ** 0.5),
                "null": test.nulls["auroc"].distances(is_share=False).tolist(),
            }
        yield cell


def _legibility(experiment: Experiment, which: Run, top: Path) -> Step:
    """Read a field of people in no set, whom no model was trained on; each is in one fold alone."""
    labels = experiment.spec.probe.legibility
    settings = [_settings(experiment, label, which.seed, group="identity") for label in labels]

    def run(folder: Path, advance: Advance) -> None:
        rows: list[dict[str, Any]] = []
        for chosen in settings:
            plan = plan_probe(experiment.strangers_store(which, top), chosen)
            summary = Summary(plan, run_probe(plan, on_progress=advance))
            kept = ("auroc", "accuracy")
            rows += [asdict(row) for row in summary.rows if row.task == "label" and row.metric in kept]
        write_json(folder, "rows.json", rows)

    decision = {"settings": [_decisive(chosen) for chosen in settings]}
    name = f"{LEGIBILITY}-{which.name}"
    return _step(experiment, name, decision, (f"strangers-{which.name}",), run, len(labels))


def _published(experiment: Experiment, which: Run, top: Path) -> Step:
    """Do as the published protocol does, on the same states."""
    settings = ProbeSettings(preset="paper")

    def run(folder: Path, advance: Advance) -> None:
        plan = plan_probe(experiment.store(which, top), settings)
        summary = Summary(plan, run_probe(plan, on_progress=advance))
        rows = [asdict(row) for row in summary.rows if row.metric == "accuracy"]
        write_json(folder, "rows.json", rows)

    decision = {"preset": "paper"}
    return _step(experiment, f"{PUBLISHED}-{which.name}", decision, (f"dump-{which.name}",), run, 1)


def _step(
    experiment: Experiment, name: str, decision: dict[str, Any], needs: tuple[str, ...], run: Any, times: int
) -> Step:
    kind = name.partition("-")[0]
    text = experiment.costs.config.get("text_config", experiment.costs.config)
    n_layers = int(text.get("num_hidden_layers", 32)) + 1
    return Step(
        name=name,
        kind=kind,
        decision=decision,
        needs=needs,
        run=run,
        units=times * n_layers * len(experiment.spec.positions),
        unit="probes",
        unit_seconds={MEMORY: 2.0, LEGIBILITY: 3.0}.get(kind, 0.3),
    )
