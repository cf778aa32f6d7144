"""What an experiment leaves in its folder: the table, the record, figures, and a report that needs no network.

This module knows nothing about how results came about.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2
import pyarrow as pa
from markupsafe import Markup

from mmextract.engine.steps import FOLDER
from mmextract.probes.charts import PALETTE, make_projections, option
from mmextract.probes.experiment_panels import Panels, find_layers, make_panels
from mmextract.probes.experiment_results import (
    AUROC,
    COLUMNS,
    MEMORISATION,
    PAPER,
    POSITIVE,
    PROMPT,
    READING,
    TASK,
    WORDS,
    ExperimentResults,
    ExperimentRow,
    as_table,
)
from mmextract.probes.experiment_steps import MEMORY
from mmextract.probes.experiment_summary import Verdict, name_condition, name_label
from mmextract.probes.figures import draw_projection, draw_rows, save
from mmextract.probes.outputs import PACKAGES, replace_all, to_csv, to_parquet
from mmextract.probes.report import NARROW_PX, data_uri, json_for_html, plotly_text, read_resource, style
from mmextract.probes.results import load_results

TEMPLATE = "experiment.html.j2"
FORMAT = 1
RECORD, REPORT = "experiment.json", "report.html"
FIGURE_FORMATS = ("png", "svg")


def write_report(results: ExperimentResults, command: str) -> list[Path]:
    """Write experiment.json, .csv and .parquet, figures and report.html into the experiment's folder.

    Returns their paths, the report first. Raises OSError if it cannot be written; then no file was replaced.
    """
    verdict = Verdict(results)
    record = make_record(verdict, command)
    panels, layers = make_panels(results), find_layers(results)
    drawn = {name: draw_rows(rows, layers) for name, rows in panels.items()}
    shown = load_results(results.top / FOLDER / f"{MEMORY}-{results.experiment.strongest.name}")
    if shown.maps:
        drawn["projection"] = draw_projection(shown, *shown.figure_maps[0])
    files = {
        f"{name}.{kind}": save(figure, kind) for name, figure in drawn.items() for kind in FIGURE_FORMATS
    }
    images = {name: files[f"{name}.svg"] for name in drawn}
    dynamics = results.top / FOLDER / "dynamics" / "dynamics.svg"
    if results.experiment.spec.dynamics.enabled:
        images["dynamics"] = dynamics.read_bytes()
        files |= {
            "dynamics.svg": images["dynamics"],
            "dynamics.png": dynamics.with_suffix(".png").read_bytes(),
        }
    charts = {
        "palette": PALETTE,
        "best": shown.best[0],
        "groups": _groups(panels, layers),
        "projections": make_projections(shown),
    }
    table = pa.Table.from_pylist(as_table(results.rows), schema=_SCHEMA)
    page = render(verdict, record, images, charts).encode()
    contents = {
        **files,
        "experiment.csv": to_csv(table),
        "experiment.parquet": to_parquet(table),
        RECORD: (json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode(),
        REPORT: page,
    }
    paths = replace_all(results.top, contents)
    return [paths[-1], *paths[:-1]]


_KINDS = {"str": pa.string(), "int": pa.int64(), "int | None": pa.int64()}
_SCHEMA = pa.schema(
    [
        pa.field(name, _KINDS.get(str(kind), pa.float64()), metadata={"about": COLUMNS[name]})
        for name, kind in ExperimentRow.__annotations__.items()
    ]
)


def make_record(verdict: Verdict, command: str) -> dict[str, Any]:
    """Return everything about the experiment, JSON-able: what was found, from what, how, with which versions."""
    results = verdict.results
    return {
        "format": FORMAT,
        "statement": verdict.statement,
        "qualification": verdict.qualification,
        "sensitive": verdict.is_sensitive,
        "legible": verdict.is_legible,
        "control": {"learnt": verdict.is_learnt, "found": verdict.is_control_found},
        "sensitivity": verdict.sensitivity,
        "warnings": verdict.warnings,
        "best": _finite(asdict(verdict.best)),
        "command": command,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {
            "python": platform.python_version(),
            **{
                name: importlib.metadata.version(name)
                for name in (*PACKAGES, "torch", "transformers", "peft")
            },
        },
        "settings": asdict(results.experiment.spec),
        "steps": dict(results.steps),
        "columns": dict(COLUMNS),
        "rows": [_finite(row) for row in as_table(results.rows)],
    }


def _finite(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the row with null for what JSON cannot say."""
    return {k: None if isinstance(v, float) and v != v else v for k, v in row.items()}


def _groups(panels: Panels, layers: list[int]) -> dict[str, Any]:
    return {
        name: {
            "label": "Show",
            "options": [option(title, row, layers) for title, row in rows if row],
        }
        for name, rows in panels.items()
    }


def render(
    verdict: Verdict, record: Mapping[str, Any], images: Mapping[str, bytes], charts: Mapping[str, Any]
) -> str:
    """Return the page. images: figures as SVG, by the stem of their file names."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    results = verdict.results
    large = ("rows", "columns", "steps")
    return environment.from_string(read_resource(TEMPLATE)).render(
        verdict=verdict,
        record=record,
        spec=results.experiment.spec,
        style=Markup(style()),
        narrow_px=NARROW_PX,
        images={name: data_uri(svg) for name, svg in images.items()},
        effects=_effect_table(verdict),
        answers=_answer_table(results),
        published=_say_published(results),
        made=_how(results),
        seconds=sum(step["seconds"] for step in results.steps.values()),
        steps=results.steps,
        charts=json_for_html(charts),
        charts_projection=charts["projections"] is not None and "projection" in images,
        strongest=results.experiment.strongest.name,
        heads=EFFECT_HEADS,
        data=json_for_html({name: value for name, value in record.items() if name not in large}),
        plotly=Markup(plotly_text()),
        script=Markup(read_resource("report.js")),
    )


CONTROL_NAMES = {"known": "seen identities", "strangers": "others", "told": "balanced accuracy"}
EFFECT_HEADS = (
    "layer",
    "position",
    "AUROC",
    "in r0",
    "difference",
    "interval",
    "p",
    "corrected",
    "detectable",
)


def _effect_table(verdict: Verdict) -> dict[str, list[tuple[bool, list[str]]]]:
    """Return condition → lines of (stands out, cells)."""
    found: dict[str, list[tuple[bool, list[str]]]] = {}
    results = verdict.results
    for row in (*results.select(MEMORISATION), *results.select(POSITIVE)):
        (own,) = results.select(AUROC, condition=row.condition, layer=row.layer, position=row.position)
        cells = [
            "embed" if row.layer == -1 else str(row.layer),
            row.position,
            f"{own.value:.3f}",
            f"{own.value - row.value:.3f}",
            _signed(row.value),
            f"{_signed(row.low)} to {_signed(row.high)}",
            f"{row.p:.3f}",
            f"{row.p_corrected:.3f}",
            f"{row.detectable:.3f}",
        ]
        found.setdefault(name_condition(row), []).append((results.is_found(row), cells))
    return found


def _answer_table(results: ExperimentResults) -> tuple[list[str], list[list[str]]]:
    """Return heads and lines: what was asked, and a column a model."""
    rows = [*results.select(TASK), *results.select(PROMPT), *results.select(WORDS)]
    names = list(dict.fromkeys(name_condition(row) for row in rows))
    lines = []
    for measure, label in dict.fromkeys((row.measure, row.label) for row in rows):
        of = {name_condition(r): r for r in rows if (r.measure, r.label) == (measure, label)}
        control = f"control’s answer, {CONTROL_NAMES.get(label, label)}"
        title = {TASK: "task, accuracy", WORDS: control}.get(measure, f"{label}, AUROC")
        lines.append([title, *(_cell(of.get(name)) for name in names)])
    return ["", *names], lines


def _cell(row: ExperimentRow | None) -> str:
    if row is None:
        return ""
    if row.metric == "accuracy":
        return f"{row.value:.1%}"
    interval = "" if row.low is None else f" ({row.low:.2f} to {row.high:.2f})"
    return f"{row.value:.2f}{interval}"


def _say_published(results: ExperimentResults) -> list[str]:
    """Return what the published protocol would have said of each condition."""
    found = []
    for condition in dict.fromkeys(row.condition for row in results.select(PAPER)):
        rows = results.select(PAPER, condition=condition)
        best = max(rows, key=lambda row: row.value)
        layer = "the embedding" if best.layer == -1 else f"layer {best.layer}"
        found.append(
            f"{name_condition(best)}: accuracy {best.value:.3f} at {layer}, position {best.position}; the majority "
            f"class gives {best.chance or 0:.3f}"
        )
    return [text[0].upper() + text[1:] for text in found]


def _how(results: ExperimentResults) -> dict[str, str]:
    """Return what was done, a line each."""
    spec, experiment = results.experiment.spec, results.experiment
    conditions = {run.condition for run in experiment.runs if run.kind == "marked"}
    settings = experiment.finetune_spec(experiment.strongest)
    lora = "all weights" if settings.full else f"LoRA of rank {settings.rank}"
    lines = {
        "Model": f"{spec.model}, fine-tuned by {lora}, learning rate {settings.learning_rate:g}",
        "Training": f"{len(experiment.training.samples):,} images of {experiment.training.source}, "
        f"{settings.n_steps(len(experiment.training.samples)):,} steps; {len(conditions)} watermarked conditions and "
        f"r0, seeds {', '.join(map(str, spec.seeds))}",
        "Held out": f"{len(experiment.held_out.samples):,} images, each with a seen and an unseen identity at the same "
        f"place; {spec.identities} pairs of identities a seed; prompt “{spec.prompt}”",
        "Probe": f"one L2 logistic probe a layer and position, both identities of a pair held out together, "
        f"{spec.probe.folds} folds, C chosen inside the training folds, {spec.probe.permutations} shuffles",
        "Legibility": "; ".join(
            name_label(r) for r in dict.fromkeys(x.label for x in results.select(READING))
        ),
    }
    return {name: text for name, text in lines.items() if text}


def _signed(value: float | None) -> str:
    return "–" if value is None else f"{value:+.3f}".replace("-", "−")
