"""What is drawn, before it is drawn: the lines of each panel, with their bands, names and colours.

Figures for paper and charts for the screen are made from the same panels, so that they show the same. This module knows
nothing about matplotlib, plotly or HTML.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from mmextract.probes.metrics import FloatArray
from mmextract.probes.results import Results

METRIC_NAMES = {
    "auroc": "AUROC",
    "accuracy": "Accuracy",
    "balanced_accuracy": "Balanced accuracy",
    "log_loss": "Log-loss",
    "brier": "Brier score",
    "ece": "Calibration error",
    "fisher_ratio": "Fisher ratio",
    "silhouette": "Silhouette",
    "class_mean_cosine": "Cosine of class means",
    "effective_dimension": "Effective dimension",
    "cka": "CKA with the other store",
    "cka_debiased": "CKA, debiased",
}
FIGURE_METRICS = ("auroc", "accuracy")
"""Rows of panels in the figure; the report shows the others on request."""

LOG_METRICS = ("fisher_ratio", "effective_dimension")
"""Those whose layers differ by orders of magnitude."""

COLOURS = {
    "probe": ("#0072b2", "#56b4e9"),
    "control": ("#d55e00", "#e69f00"),
    "embed": ("#009e73", "#2fcf9f"),
    "random": ("#a8588c", "#d99ac0"),
    "pixels": ("#8a6d00", "#d9c04a"),
    "other": ("#4b4b4b", "#c4c4c4"),
    "chance": ("#777777", "#9a9a9a"),
    "series0": ("#0072b2", "#56b4e9"),
    "series1": ("#d55e00", "#ff9a4d"),
    "series2": ("#009e73", "#2fcf9f"),
    "series3": ("#a8588c", "#d99ac0"),
    "series4": ("#8a6d00", "#d9c04a"),
    "series5": ("#4b4b4b", "#c4c4c4"),
}
"""On white and on black. Made from Okabe and Ito's palette (jfly.uni-koeln.de/color), which colour-blind readers can
tell apart; markers and dashes differ as well."""
SERIES = tuple(name for name in COLOURS if name.startswith("series"))

MARKERS = {"probe": "circle", "control": "square", "other": "diamond"}
SERIES_MARKERS = ("circle", "square", "diamond", "triangle-up", "cross", "x")
DASHES = {"chance": "dash", "random": "dot", "embed": "dashdot", "pixels": "longdash", "other": "solid"}


@dataclass(frozen=True, kw_only=True)
class Band:
    """A range around a line."""

    name: str
    low: FloatArray
    high: FloatArray
    alpha: float


@dataclass(frozen=True, kw_only=True)
class Line:
    """A curve over the layers."""

    name: str
    """In the legend."""
    colour: str
    """A key of COLOURS."""
    y: FloatArray
    """[L]; NaN where there is no value."""
    marker: str | None = None
    """As plotly names it; None for a line without."""
    dash: str = "solid"
    """As plotly names it."""
    bands: tuple[Band, ...] = ()
    """The widest first."""
    found: tuple[bool, ...] = ()
    """[L] where it stands out, with all layers and positions taken together."""


@dataclass(frozen=True, kw_only=True)
class Panel:
    """A plot of lines over the layers."""

    title: str
    metric: str
    """A key of METRIC_NAMES."""
    lines: tuple[Line, ...]
    logarithmic: bool = False
    limits: tuple[float, float] = field(default=(0.0, 1.0))
    """Of the vertical axis: the same for all panels of a metric that should be compared."""


def curve_panels(results: Results, metric: str) -> list[Panel]:
    """Return a panel a position: the label with its bands, its control and baselines."""
    panels = [(position, _curve_lines(results, metric, position)) for position in results.shown_positions]
    return _with_common_limits(panels, metric, 0.02)


def _curve_lines(results: Results, metric: str, position: str) -> tuple[Line, ...]:
    def line(task: str, name: str, colour: str) -> Line | None:
        y = results.curve(task, metric, position)
        if task not in results.tasks or np.isnan(y).all():
            return None
        return Line(
            name=name, colour=colour, y=y, marker=MARKERS.get(colour), dash=DASHES.get(colour, "solid")
        )

    probe = Line(
        name="probe",
        colour="probe",
        y=results.curve("label", metric, position),
        marker=MARKERS["probe"],
        bands=_bands(results, "label", metric, position),
        found=_mark(results, "label", metric, position),
    )
    lines = [
        probe,
        line("other", "probe, other store", "other"),
        line("control", "control: shuffled labels", "control"),
        line("random", "random directions", "random"),
        line("pixels", "pixels", "pixels"),
        _embed_line(probe, results.layers),
        line("majority", "chance: majority class", "chance"),
    ]
    return tuple(entry for entry in lines if entry)


def _mark(results: Results, task: str, metric: str, position: str) -> tuple[bool, ...]:
    """Return where a curve stands out [L]; nothing for a metric that does not decide, or has no intervals."""
    rows = [results.row(task, metric, (layer, position)) for layer in results.layers]
    if metric != results.metric or results.is_paper:
        return ()
    return tuple(row is not None and results.is_found(row) for row in rows)


def _embed_line(probe: Line, layers: Sequence[int]) -> Line | None:
    """The embedding's score as a baseline under all layers."""
    if -1 not in layers or len(layers) == 1:
        return None
    value = probe.y[list(layers).index(-1)]
    return Line(name="embedding", colour="embed", y=np.full(len(layers), value), dash=DASHES["embed"])


def _bands(results: Results, task: str, metric: str, position: str) -> tuple[Band, ...]:
    bands = []
    for part, alpha, name in (
        ("simultaneous_", 0.14, f"{results.percent} interval, all at once"),
        ("", 0.24, f"{results.percent} interval"),
    ):
        low, high = (results.curve(task, metric, position, f"{part}{end}") for end in ("low", "high"))
        if not np.isnan(low).all():
            bands.append(Band(name=name, low=low, high=high, alpha=alpha))
    return tuple(bands)


def difference_panels(results: Results, metric: str) -> list[Panel]:
    """Return a panel a position: the label's score less that in the other store; none if nothing was compared."""
    panels = []
    for position in results.shown_positions if "difference" in results.tasks else ():
        y = results.curve("difference", metric, position)
        if np.isnan(y).all():
            continue
        line = Line(
            name="this store less the other",
            colour="probe",
            y=y,
            marker=MARKERS["probe"],
            bands=_bands(results, "difference", metric, position),
            found=_mark(results, "difference", metric, position),
        )
        zero = Line(name="no difference", colour="chance", y=np.zeros(len(y)), dash=DASHES["chance"])
        panels.append((position, (line, zero)))
    return _with_common_limits(panels, metric, 0.02)


def separability_panels(results: Results) -> list[Panel]:
    """Return a panel a metric of separability, with a line a position and what shuffled labels give."""
    panels = []
    for metric in results.separability_metrics:
        lines = []
        for number, position in enumerate(results.shown_positions):
            y, low, high, null_low, null_high = (
                results.separability_curve(metric, position, part)
                for part in ("value", "low", "high", "null_low", "null_high")
            )
            bands = [
                Band(name=name, low=a, high=b, alpha=alpha)
                for name, a, b, alpha in (
                    ("95 % interval", low, high, 0.18),
                    ("95 % of shuffled labels", null_low, null_high, 0.10),
                )
                if not np.isnan(a).all()
            ]
            lines.append(
                Line(
                    name=f"position {position}",
                    colour=SERIES[number],
                    y=y,
                    marker=SERIES_MARKERS[number],
                    bands=tuple(bands),
                )
            )
        logarithmic = metric in LOG_METRICS and _spans_decades(lines)
        panels.append(
            Panel(
                title=METRIC_NAMES[metric],
                metric=metric,
                lines=tuple(lines),
                logarithmic=logarithmic,
                limits=_limits(lines, 0.0, logarithmic),
            )
        )
    return panels


def _spans_decades(lines: Sequence[Line]) -> bool:
    """Tell whether values are positive and the largest is at least ten times the smallest."""
    values = np.concatenate([line.y for line in lines])
    values = values[np.isfinite(values)]
    return bool(len(values) and values.min() > 0 and values.max() >= 10 * values.min())


def _with_common_limits(
    panels: Sequence[tuple[str, tuple[Line, ...]]], metric: str, margin: float
) -> list[Panel]:
    limits = _limits([line for _, lines in panels for line in lines], margin)
    return [
        Panel(title=f"position {position}", metric=metric, lines=lines, limits=limits)
        for position, lines in panels
    ]


def _limits(lines: Sequence[Line], margin: float, logarithmic: bool = False) -> tuple[float, float]:
    """Return the range of all values and bands, with a margin of at least `margin`."""
    shown = [
        part for line in lines for part in (line.y, *(end for b in line.bands for end in (b.low, b.high)))
    ]
    values = np.concatenate(shown) if shown else np.array([0.0, 1.0])
    values = values[np.isfinite(values) & ((values > 0) | (not logarithmic))]
    if not len(values):
        return (0.1, 1.0) if logarithmic else (0.0, 1.0)
    low, high = float(values.min()), float(values.max())
    if logarithmic:
        return low / 1.3, high * 1.3
    reach = max(0.04 * (high - low), margin, 1e-9 + 0.01 * abs(high))
    return low - reach, high + reach


@dataclass(frozen=True, kw_only=True)
class HeatMap:
    """Scores by layer and position."""

    metric: str
    values: FloatArray
    """[L, P]."""
    centre: float
    """Chance: the middle of the scale."""
    reach: float
    """From there to either end."""


def heat_map(results: Results, metric: str) -> HeatMap:
    """Return the label's scores at all positions."""
    values = np.stack([results.curve("label", metric, p) for p in results.positions], axis=1)
    row = results.row("label", metric, results.best) or {"task": "label"}
    centre = (
        results.chance(row) if metric == results.metric or row.get("chance") is not None else _median(values)
    )
    reach = float(np.nanmax(np.abs(values - centre), initial=0.05))
    return HeatMap(metric=metric, values=values, centre=centre, reach=reach)


def _median(values: FloatArray) -> float:
    return float(np.nanmedian(values))


def name_layers(layers: Sequence[int]) -> list[str]:
    """Return what axes call the layers."""
    return ["embed" if layer < 0 else str(layer) for layer in layers]


def legend_of(panels: Sequence[Panel]) -> Mapping[str, Line]:
    """Return the lines of a set of panels, each name once."""
    found: dict[str, Line] = {}
    for line in (line for panel in panels for line in panel.lines):
        found.setdefault(line.name, line)
    return found
