"""What an experiment's figures and charts show: panels over the layers, from its table.

This module knows nothing about matplotlib, plotly or HTML.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from mmextract.probes.experiment_results import (
    APART,
    AUROC,
    MEMORISATION,
    PAPER,
    POSITIVE,
    READING,
    SEPARABILITY,
    ExperimentResults,
    ExperimentRow,
)
from mmextract.probes.experiment_summary import name_condition, name_label
from mmextract.probes.metrics import FloatArray
from mmextract.probes.panels import METRIC_NAMES, SERIES, SERIES_MARKERS, Band, Line, Panel

Panels = dict[str, list[tuple[str, list[Panel]]]]
"""Figure → rows of panels, each with what its vertical axis is."""

KIND_COLOURS = {"base": "other", "r0": "control", "control": "random"}
KIND_MARKERS = {"base": "diamond", "r0": "square", "control": "x"}
MARGIN = 0.02


def find_layers(results: ExperimentResults) -> list[int]:
    """Return the layers that were probed, in order."""
    return sorted({row.layer for row in results.select(AUROC) if row.layer is not None})


def make_panels(results: ExperimentResults) -> Panels:
    """Return all figures that the results give."""
    figures: Panels = {
        "memorisation": [
            ("AUROC less that of r0", _per_position(results, MEMORISATION, "no difference", 0.0))
        ],
        "auroc": [("AUROC, seen/unseen", _per_position(results, AUROC, "chance", 0.5))],
        "positive-control": [
            ("AUROC less that of r0", _per_position(results, POSITIVE, "no difference", 0.0))
        ],
        "legibility": list(_legibility(results)),
        "separability": [
            (METRIC_NAMES[metric], _per_position(results, APART, "shuffled labels", None, metric=metric))
            for metric in SEPARABILITY
        ],
        "published": [("accuracy", _per_position(results, PAPER, "majority class", None))],
    }
    shown = {name: [(title, panels) for title, panels in rows if panels] for name, rows in figures.items()}
    return {name: rows for name, rows in shown.items() if rows}


def _legibility(results: ExperimentResults) -> Iterator[tuple[str, list[Panel]]]:
    for label in dict.fromkeys(row.label for row in results.select(READING)):
        name = f"accuracy, {name_label(label).removeprefix('the ')}"
        yield name, _per_position(results, READING, "most frequent", None, label=label, metric="accuracy")


def _per_position(
    results: ExperimentResults, measure: str, zero: str, chance: float | None, **wanted: str
) -> list[Panel]:
    """Return a panel a position, a line a condition; chance None takes the rows' own."""
    rows = results.select(measure, **wanted)
    layers = find_layers(results)
    found = []
    for position in dict.fromkeys(row.position for row in rows):
        here = [row for row in rows if row.position == position]
        lines = [_line(results, name, of, layers) for name, of in _by_condition(here)]
        level = chance if chance is not None else next((r.chance for r in here if r.chance is not None), None)
        if level is not None:
            lines.append(Line(name=zero, colour="chance", y=np.full(len(layers), level), dash="dash"))
        found.append((position, tuple(_recolour(lines))))
    limits = _limits([line for _, lines in found for line in lines])
    return [
        Panel(title=f"position {position}", metric=measure, lines=lines, limits=limits)
        for position, lines in found
    ]


def _by_condition(rows: Sequence[ExperimentRow]) -> Iterator[tuple[str, list[ExperimentRow]]]:
    for condition in dict.fromkeys(row.condition for row in rows):
        of = [row for row in rows if row.condition == condition]
        yield name_condition(of[0]), of


def _line(
    results: ExperimentResults, name: str, rows: Sequence[ExperimentRow], layers: Sequence[int]
) -> Line:
    by_layer = {row.layer: row for row in rows}

    def column(get: Callable[[ExperimentRow], float | None]) -> FloatArray:
        values = [get(by_layer[layer]) if layer in by_layer else None for layer in layers]
        return np.array([np.nan if value is None else value for value in values], np.float64)

    low, high = column(lambda row: row.low), column(lambda row: row.high)
    over = next((row.over for row in rows if row.over), "")
    band = Band(name=f"95 % interval over {over}", low=low, high=high, alpha=0.14)
    tested = any(row.p_corrected is not None for row in rows)
    found = tuple(layer in by_layer and results.is_found(by_layer[layer]) for layer in layers)
    kind = rows[0].kind
    return Line(
        name=name,
        colour=KIND_COLOURS.get(kind, "probe"),
        y=column(lambda row: row.value),
        marker=KIND_MARKERS.get(kind, "circle"),
        dash="solid" if kind not in KIND_COLOURS else "dashdot",
        bands=() if np.isnan(low).all() else (band,),
        found=found if tested else (),
    )


def _recolour(lines: Sequence[Line]) -> list[Line]:
    """Give the watermarked conditions colours and marks of their own."""
    out, number = [], 0
    free = [k for k in range(len(SERIES)) if k not in (1, 5)]  # those two look like r0 and the base
    for line in lines:
        if line.colour == "probe":
            k = free[number % len(free)]
            out.append(
                Line(
                    **{
                        **vars(line),
                        "colour": SERIES[k],
                        "marker": SERIES_MARKERS[number % len(SERIES_MARKERS)],
                    }
                )
            )
            number += 1
        else:
            out.append(line)
    return out


def _limits(lines: Sequence[Line]) -> tuple[float, float]:
    parts = [
        part for line in lines for part in (line.y, *(end for b in line.bands for end in (b.low, b.high)))
    ]
    values = np.concatenate(parts) if parts else np.array([0.0, 1.0])
    values = values[np.isfinite(values)]
    low, high = (float(values.min()), float(values.max())) if len(values) else (0.0, 1.0)
    reach = max(0.05 * (high - low), MARGIN)
    return low - reach, high + reach
