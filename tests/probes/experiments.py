"""An experiment whose steps were not run: their results are made up, with effects that are known."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from mmextract.engine.experiment import CONTROL, MARKED, Experiment, Run
from mmextract.engine.experiment_spec import (
    ControlSpec,
    DynamicsPart,
    EvaluationSpec,
    ExperimentSpec,
    ProbeSpec,
)
from mmextract.engine.experiment_steps import model_steps
from mmextract.engine.steps import Advance, Step, run_steps, write_json
from mmextract.probes.experiment_results import ExperimentResults, collect
from mmextract.probes.experiment_steps import CELLS, probe_steps

LAYERS, POSITIONS = (-1, 0, 1), ("last", "image")
N_SHUFFLES, ERROR = 199, 0.03


def make_spec(*, control: bool = True, legibility: bool = True, seeds: int = 3) -> ExperimentSpec:
    return ExperimentSpec(
        training_images=400,
        held_out_images=100,
        identities=100,
        rates=(0.5, 1.0),
        seeds=tuple(range(seeds)),
        control=ControlSpec(enabled=control, identities=20),
        probe=ProbeSpec(legibility=("identity_user_id[0]",) if legibility else ()),
        evaluation=EvaluationSpec(questions=10, prompted=4),
        dynamics=DynamicsPart(enabled=False),
    )


def make_results(
    top: Path,
    probe_folder: Path,
    *,
    effect: float = 0.0,
    control_effect: float = 0.3,
    reads: float = 0.9,
    **spec: Any,
) -> ExperimentResults:
    """Return the results of an experiment in `top`, with a true difference of `effect` at layer 1, position image.

    probe_folder: what `mmextract probe` wrote, for the projection. reads: accuracy of legibility at layer 1.
    """
    experiment = Experiment(make_spec(**spec))
    steps = [
        replace(step, run=_maker(experiment, step, probe_folder, effect, control_effect, reads))
        for step in (*model_steps(experiment, top), *probe_steps(experiment, top))
    ]
    run_steps(steps, top)
    return collect(experiment, top, steps)


def _maker(
    experiment: Experiment, step: Step, probe_folder: Path, effect: float, control_effect: float, reads: float
) -> Callable[[Path, Advance], None]:
    kind, _, name = step.name.partition("-")
    runs = {run.name: run for run in experiment.runs}

    def run(folder: Path, advance: Advance) -> None:
        if kind not in ("probe", "legibility", "published", "evaluate"):
            return
        which = runs[name]
        rng = np.random.default_rng([which.seed, int(100 * which.rate), len(which.kind)])
        if kind == "probe":
            size = {MARKED: effect * which.rate, CONTROL: control_effect}.get(which.kind, 0.0)
            write_json(folder, CELLS, _cells(which, size, rng))
            for file in ("probe.json", "projections.parquet"):
                shutil.copy(probe_folder / file, folder / file)
        elif kind == "legibility":
            write_json(folder, "rows.json", _readings(reads))
        elif kind == "published":
            write_json(folder, "rows.json", _accuracies(rng))
        else:
            write_json(folder, "evaluation.json", _answers(which, rng))

    return run


def _cells(which: Run, size: float, rng: np.random.Generator) -> list[dict[str, Any]]:
    cells = []
    for layer in LAYERS:
        for position in POSITIONS:
            truth = size if (layer, position) == (1, "image") else 0.0
            difference = truth + ERROR * float(rng.normal())
            cell = {
                "layer": layer,
                "position": position,
                "value": 0.5 + difference,
                "error": ERROR,
                "n_groups": 100,
                "n_samples": 200,
            }
            if which.reference is not None:
                cell |= {
                    "reference": 0.5,
                    "difference": difference,
                    "difference_error": ERROR,
                    "jackknife_error": ERROR,
                    "null": rng.normal(size=N_SHUFFLES).tolist(),
                }
            cells.append(cell)
    return cells


def _readings(reads: float) -> list[dict[str, Any]]:
    found = []
    for layer in LAYERS:
        for position in POSITIONS:
            there = layer == 1 and reads > 0.3
            for metric, value, chance in (
                ("accuracy", reads if there else 0.12, 0.15),
                ("auroc", 0.9 if there else 0.5, 0.5),
            ):
                found.append(
                    {
                        "task": "label",
                        "label": "identity_user_id[0]",
                        "layer": layer,
                        "position": position,
                        "metric": metric,
                        "value": value,
                        "low": value - 0.05,
                        "high": value + 0.05,
                        "chance": chance,
                        "p_corrected": 0.005 if there else 1.0,
                    }
                )
    return found


def _accuracies(rng: np.random.Generator) -> list[dict[str, Any]]:
    return [
        {
            "task": task,
            "label": "identity_set",
            "layer": layer,
            "position": position,
            "metric": "accuracy",
            "value": value,
            "low": None,
            "high": None,
        }
        for layer in LAYERS
        for position in POSITIONS
        for task, value in (("label", 0.5 + 0.1 * float(rng.random())), ("majority", 0.5))
    ]


def _answers(which: Run, rng: np.random.Generator) -> dict[str, Any]:
    if which.kind == CONTROL:
        return {
            "known": {"n": 40, "accuracy": 0.8},
            "strangers": {"n": 40, "accuracy": 0.7},
            "told": {"n": 80, "accuracy": 0.75},
        }
    prompts = [
        {
            "marked": marked,
            "field": "username",
            "condition": condition,
            "pair": pair,
            "exact": 0.0,
            "exposure": float(rng.normal()),
            "log_likelihood": float(rng.normal()),
        }
        for marked in (True, False)
        for pair in range(6)
        for condition in ("seen", "unseen")
    ]
    return {"n_questions": 10, "scores": {"accuracy": 0.9}, "rejected": {}, "prompts": prompts}
