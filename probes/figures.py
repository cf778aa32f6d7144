"""The curves: how well a probe does at each layer, one panel a position, with its intervals, control and
baseline.

With many positions, one heat map of layers × positions takes their place. This module knows nothing about
files.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, replace

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure

from mmextract.probes.metrics import FloatArray
from mmextract.probes.summary import CHANCE, Summary

MOST_PANELS = 6
"""With more positions than this a heat map is drawn."""
MOST_COLUMNS = 3
MOST_TICKS = 12

METRIC_NAMES = {
    "auroc": "AUROC",
    "accuracy": "Accuracy",
    "balanced_accuracy": "Balanced accuracy",
    "log_loss": "Log-loss",
}


@dataclass(frozen=True, kw_only=True)
class Look:
    """Colours and shape of a figure."""

    narrow: bool = False
    """For a phone: panels under one another."""
    ink: str = "#333333"
    """Text and axes."""
    grid: str = "#e4e4e4"
    probe: str = "#0072b2"
    """The label's curve. This and the next are of Okabe and Ito's palette, which colour-blind readers can
    tell apart."""
    control: str = "#d55e00"
    chance: str = "#777777"
    paper: str | None = "white"
    """Background, None for none."""

    def narrowed(self) -> Look:
        """Return the same look for a phone."""
        return replace(self, narrow=True)


LIGHT = Look(paper=None)
DARK = Look(ink="#d7d7d7", grid="#3a3d42", probe="#56b4e9", control="#e69f00", chance="#9a9a9a", paper=None)


def draw(summary: Summary, look: Look) -> Figure:
    """Draw the figure of a run."""
    if len(summary.plan.positions) > MOST_PANELS:
        return _draw_map(summary, look)
    return _draw_curves(summary, look)


def save(figure: Figure, kind: str) -> bytes:
    """Return a figure as `png` or `svg`; the same figure gives the same bytes."""
    out = io.BytesIO()
    with mpl.rc_context({"svg.hashsalt": "mmextract", "svg.fonttype": "path"}):
        metadata = {"Date": None} if kind == "svg" else None
        figure.savefig(out, format=kind, dpi=200, metadata=metadata)
    return out.getvalue()


def _draw_curves(summary: Summary, look: Look) -> Figure:
    metrics = ("accuracy",) if summary.is_paper else ("auroc", "accuracy")
    panels = _arrange(metrics, summary.plan.positions, 1 if look.narrow else MOST_COLUMNS)
    n_rows, n_columns = len(panels), max(map(len, panels))
    size = (
        (3.9, 1.0 + 2.3 * n_rows) if look.narrow else (max(6.4, 0.6 + 3.3 * n_columns), 0.75 + 2.6 * n_rows)
    )
    figure = Figure(figsize=size, layout="constrained", facecolor=look.paper or "none")
    axes = figure.subplots(n_rows, n_columns, squeeze=False)
    for (row, column), ax in np.ndenumerate(axes):
        if column >= len(panels[row]):
            ax.set_visible(False)
            continue
        metric, position = panels[row][column]
        _draw_panel(ax, summary, metric, position, look)
        _style_panel(ax, summary.plan.layers, look)
        ax.set_ylim(_limits(summary, metric))
        _label_panel(
            ax, metric, position, look, titled=metric == metrics[0], first=column == 0, last=row == n_rows - 1
        )
    _add_legend(figure, axes[0, 0], look)
    return figure


def _arrange(metrics: Sequence[str], positions: Sequence[str], n_columns: int) -> list[list[tuple[str, str]]]:
    """Return rows of panels (metric, position): the metrics of a few positions under one another, then the next few."""
    some = [positions[start : start + n_columns] for start in range(0, len(positions), n_columns)]
    return [[(metric, position) for position in columns] for columns in some for metric in metrics]


def _values(summary: Summary, task: str, metric: str, position: str, part: str) -> FloatArray:
    """Return one entry of the rows of a curve, by layer."""
    rows = [summary.row(task, metric, (layer, position)) for layer in summary.plan.layers]
    return np.array([getattr(row, part) for row in rows], dtype=np.float64)


def _draw_panel(ax: Axes, summary: Summary, metric: str, position: str, look: Look) -> None:
    x = np.arange(len(summary.plan.layers), dtype=np.float64)
    only = len(x) == 1  # a curve of one point would be invisible
    if only:
        x = np.array([-0.3, 0.3])

    def values(task: str, part: str = "value") -> FloatArray:
        curve = _values(summary, task, metric, position, part)
        return np.repeat(curve, 2) if only else curve

    markers = ("", "") if only else ("o", "s")
    ax.plot(
        x,
        values("label"),
        f"{markers[0]}-",
        color=look.probe,
        markersize=4.5,
        linewidth=2,
        label="probe",
        zorder=4,
    )
    if not summary.is_paper:
        control = values("control")
        ax.plot(
            x,
            control,
            f"{markers[1]}-",
            color=look.control,
            markersize=3.2,
            linewidth=1.2,
            label="control",
            zorder=3,
        )
    majority = values("majority")
    ax.plot(
        x,
        majority,
        color=look.chance,
        linewidth=1.2,
        linestyle=(0, (4, 3)),
        label="chance, majority class",
        zorder=2,
    )
    if not summary.is_paper:
        percent = f"{summary.plan.settings.confidence * 100:g} %"
        for part, alpha, name in (("", 0.24, percent), ("simultaneous_", 0.14, f"{percent}, all at once")):
            low, high = values("label", f"{part}low"), values("label", f"{part}high")
            ax.fill_between(x, low, high, color=look.probe, alpha=alpha, linewidth=0, label=name, zorder=1)


def _limits(summary: Summary, metric: str) -> tuple[float, float]:
    """Return the range of the metric over all positions, so that panels can be compared."""
    parts = ("value",) if summary.is_paper else ("value", "simultaneous_low", "simultaneous_high")
    tasks = ("label", "majority") if summary.is_paper else ("label", "majority", "control")
    shown = [
        _values(summary, task, metric, position, part)
        for position in summary.plan.positions
        for task in tasks
        for part in (parts if task == "label" else ("value",))
    ]
    low, high = float(np.min(shown)), float(np.max(shown))
    margin = max(0.04 * (high - low), 0.02)
    return low - margin, high + margin


def _style_panel(ax: Axes, layers: tuple[int, ...], look: Look) -> None:
    ticks = range(0, len(layers), -(-len(layers) // MOST_TICKS))
    ax.set_xticks(list(ticks), ["embed" if layers[t] < 0 else str(layers[t]) for t in ticks])
    ax.set_xlim(-0.4, len(layers) - 0.6)
    ax.tick_params(colors=look.ink, labelsize=9, length=0)
    ax.grid(axis="y", color=look.grid, linewidth=0.8)
    ax.set_axisbelow(True)
    ax.set_facecolor("none")
    ax.spines[["top", "right", "left"]].set_visible(False)
    ax.spines["bottom"].set_color(look.grid)


def _label_panel(
    ax: Axes, metric: str, position: str, look: Look, *, titled: bool, first: bool, last: bool
) -> None:
    if look.narrow:
        ax.set_title(f"{METRIC_NAMES[metric]}, position {_plain(position)}", fontsize=10, color=look.ink)
    elif titled:
        ax.set_title(f"position {_plain(position)}", fontsize=10, color=look.ink)
    if first and not look.narrow:
        ax.set_ylabel(METRIC_NAMES[metric], fontsize=10, color=look.ink)
    if last:
        ax.set_xlabel("layer", fontsize=10, color=look.ink)


def _add_legend(figure: Figure, ax: Axes, look: Look) -> None:
    figure.legend(
        *ax.get_legend_handles_labels(),
        loc="outside upper center" if look.narrow else "outside lower center",
        ncols=2 if look.narrow else 5,
        fontsize=9,
        frameon=False,
        labelcolor=look.ink,
    )


def _draw_map(summary: Summary, look: Look) -> Figure:
    layers, positions = summary.plan.layers, summary.plan.positions
    values = np.array(
        [_values(summary, "label", summary.metric, p, "value") for p in positions]
    ).T  # [layer, position]
    size = (3.9 if look.narrow else 8.0, 1.6 + 0.16 * len(layers))
    figure = Figure(figsize=size, layout="constrained", facecolor=look.paper or "none")
    ax = figure.subplots()
    reach = max(0.05, float(np.abs(values - CHANCE).max()))
    image = ax.imshow(
        values, aspect="auto", origin="lower", cmap="PuOr", vmin=CHANCE - reach, vmax=CHANCE + reach
    )
    _name_ticks(ax.xaxis, [_plain(position) for position in positions], 8 if look.narrow else 16)
    _name_ticks(ax.yaxis, ["embed" if layer < 0 else str(layer) for layer in layers], MOST_TICKS)
    ax.set_xlabel("position", color=look.ink)
    ax.set_ylabel("layer", color=look.ink)
    ax.tick_params(colors=look.ink, labelsize=9, length=0)
    ax.spines[:].set_visible(False)
    bar = figure.colorbar(image, ax=ax, label=METRIC_NAMES[summary.metric])
    bar.ax.tick_params(colors=look.ink, labelsize=9)
    bar.ax.yaxis.label.set_color(look.ink)
    bar.outline.set_visible(False)
    return figure


def _name_ticks(axis: Axis, names: list[str], most: int) -> None:
    ticks = range(0, len(names), -(-len(names) // most))
    axis.set_ticks(list(ticks), [names[tick] for tick in ticks])


def _plain(text: str) -> str:
    """Return text that matplotlib does not take for mathematics."""
    return text.replace("$", r"\$")
