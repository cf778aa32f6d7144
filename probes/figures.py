"""Figures for paper: curves, differences, the map of layers × positions, separability and projections.

The same results give the same bytes, as PNG, SVG and PDF. This module knows nothing about files.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from textwrap import fill

import matplotlib as mpl
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from mmextract.probes.panels import (
    COLOURS,
    FIGURE_METRICS,
    METRIC_NAMES,
    SERIES,
    SERIES_MARKERS,
    Line,
    Panel,
    curve_panels,
    difference_panels,
    heat_map,
    legend_of,
    name_layers,
    separability_panels,
)
from mmextract.probes.projections import METHODS
from mmextract.probes.results import Results

FORMATS = ("png", "svg", "pdf")
INK, GRID = "#333333", "#e4e4e4"
MOST_COLUMNS = 3
NAME_WIDTH = 22
"""Letters that stand beside a row of panels before its name is broken."""
MOST_TICKS = 12
MOST_MAPS = 12
"""Layers of which a projection is drawn in the figure: the report has all."""
MARKERS = {"circle": "o", "square": "s", "diamond": "D", "triangle-up": "^", "cross": "P", "x": "X"}
DASHES = {
    "solid": "-",
    "dash": (0, (4, 3)),
    "dot": (0, (1, 1.6)),
    "dashdot": (0, (5, 2, 1, 2)),
    "longdash": (0, (8, 3)),
}


def save(figure: Figure, kind: str) -> bytes:
    """Return a figure as one of FORMATS; the same figure gives the same bytes."""
    if isinstance(figure.get_layout_engine(), ConstrainedLayoutEngine):
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # laid out once for all formats: it takes longer than the drawing
    out = io.BytesIO()
    # without dates, and with shapes in place of letters: no reader has to have the fonts
    metadata = {"svg": {"Date": None}, "pdf": {"CreationDate": None}, "png": None}[kind]
    with mpl.rc_context({"svg.hashsalt": "mmextract", "svg.fonttype": "path", "pdf.fonttype": 42}):
        figure.savefig(out, format=kind, dpi=200, metadata=metadata)
    return out.getvalue()


def draw_curves(results: Results) -> Figure:
    """Draw the label with its intervals, control and baselines: a column a position, a row a metric."""
    metrics = [metric for metric in FIGURE_METRICS if metric in results.metrics]
    rows = [(METRIC_NAMES[metric], curve_panels(results, metric)) for metric in metrics]
    return draw_rows(rows, results.layers)


def draw_differences(results: Results) -> Figure | None:
    """Draw how much better the label is told apart than in the other store; None if nothing was compared."""
    rows = [
        (f"{METRIC_NAMES[metric]} less the other’s", difference_panels(results, metric))
        for metric in FIGURE_METRICS
    ]
    rows = [(name, panels) for name, panels in rows if panels]
    return draw_rows(rows, results.layers) if rows else None


def draw_separability(results: Results) -> Figure | None:
    """Draw separability without a probe, a panel a metric; None if it was not measured."""
    panels = separability_panels(results)
    return draw_rows([("", panels)], results.layers) if panels else None


def draw_rows(rows: Sequence[tuple[str, list[Panel]]], layers: Sequence[int]) -> Figure:
    """Draw rows of panels over the same layers, with one legend; a row's name stands at its left."""
    grid = _wrap(rows)
    n_rows, n_columns = len(grid), max(len(panels) for _, panels in grid)
    size = (max(6.4, 0.6 + 3.3 * n_columns), 0.95 + 2.6 * n_rows)
    figure = Figure(figsize=size, layout="constrained", facecolor="white")
    axes = figure.subplots(n_rows, n_columns, squeeze=False)
    for (row, column), ax in np.ndenumerate(axes):
        name, panels = grid[row]
        if column >= len(panels):
            ax.set_visible(False)
            continue
        _draw_panel(ax, panels[column], layers)
        ax.set_title(_plain(_shorten(panels[column].title, 40)), fontsize=10, color=INK)
        if column == 0:
            ax.set_ylabel(fill(name, NAME_WIDTH), fontsize=10, color=INK)
        if row == n_rows - 1 or column >= len(grid[row + 1][1]):
            ax.set_xlabel("layer", fontsize=10, color=INK)
    _add_legend(figure, axes, [panel for _, panels in grid for panel in panels])
    return figure


def _wrap(rows: Sequence[tuple[str, list[Panel]]]) -> list[tuple[str, list[Panel]]]:
    """Break rows of too many panels, so that those of the same position stand under one another."""
    longest = max(len(panels) for _, panels in rows)
    width = 2 if longest == 4 else MOST_COLUMNS
    starts = range(0, longest, width)
    return [(name, panels[s : s + width]) for s in starts for name, panels in rows if panels[s : s + width]]


def _draw_panel(ax: Axes, panel: Panel, layers: Sequence[int]) -> None:
    for order, line in enumerate(reversed(panel.lines)):
        _draw_line(ax, line, order)
    if panel.logarithmic:
        ax.set_yscale("log")
    ax.set_ylim(panel.limits)
    _style(ax, layers)


def _draw_line(ax: Axes, line: Line, order: int) -> None:
    x = np.arange(len(line.y), dtype=np.float64)
    only = len(x) == 1  # a curve of one point would be invisible
    x = np.array([-0.3, 0.3]) if only else x

    def widen(values: np.ndarray) -> np.ndarray:
        return np.repeat(values, 2) if only else values

    colour = COLOURS[line.colour][0]
    strong = bool(line.bands)
    for band in line.bands:
        ax.fill_between(
            x,
            widen(band.low),
            widen(band.high),
            color=colour,
            alpha=band.alpha,
            linewidth=0,
            label=_plain(band.name),
        )
    ax.plot(
        x,
        widen(line.y),
        linestyle=DASHES[line.dash],
        marker=None if only or not line.marker else MARKERS[line.marker],
        markersize=4.5 if strong else 3.4,
        markerfacecolor=colour if not line.found else "white",
        linewidth=2 if strong else 1.2,
        color=colour,
        label=_plain(_shorten(line.name, 60)),
        zorder=3 + order,
    )
    found = np.flatnonzero(line.found)
    if len(found) and not only:
        ax.plot(
            x[found],
            line.y[found],
            marker=MARKERS[line.marker or "circle"],
            linestyle="none",
            markersize=5.5,
            color=colour,
            label="stands out, all at once",
            zorder=4 + order,
        )


def _style(ax: Axes, layers: Sequence[int]) -> None:
    _name_ticks(ax.xaxis, name_layers(layers), MOST_TICKS)
    ax.set_xlim(-0.4, len(layers) - 0.6)
    ax.tick_params(which="both", colors=INK, labelsize=9, length=0)
    ax.grid(axis="y", color=GRID, linewidth=0.8)
    ax.set_axisbelow(True)
    ax.spines[["top", "right", "left"]].set_visible(False)
    ax.spines["bottom"].set_color(GRID)


def _add_legend(figure: Figure, axes: np.ndarray, panels: Sequence[Panel]) -> None:
    found: dict[str, Artist] = {}
    for ax in axes.flat:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    lines = [_plain(_shorten(name, 60)) for name in legend_of(panels)]
    names = [*(name for name in lines if name in found), *(name for name in found if name not in lines)]
    figure.legend(
        [found[name] for name in names],
        names,
        loc="outside lower center",
        ncols=_n_columns(figure, names),
        fontsize=9,
        frameon=False,
        labelcolor=INK,
    )


def _n_columns(figure: Figure, names: Sequence[str]) -> int:
    """Return how many columns of a legend find room, with letters of 9 points that are 5.5 wide on average."""
    room = figure.get_figwidth() * 72
    return max(1, min(4, len(names), int(room / (5.5 * max(map(len, names)) + 40))))


def draw_map(results: Results) -> Figure | None:
    """Draw the scores of all layers and positions, chance in the middle of the scale; None with one position."""
    if len(results.positions) < 2:
        return None
    scores = heat_map(results, results.metric)
    n_layers, n_positions = scores.values.shape
    size = (min(9.0, 3.6 + 0.3 * n_positions), min(9.0, 1.6 + 0.2 * max(n_layers, 6)))
    figure = Figure(figsize=size, layout="constrained", facecolor="white")
    ax = figure.subplots()
    image = ax.imshow(scores.values, aspect="auto", origin="lower", cmap="PuOr_r")
    image.set_clim(scores.centre - scores.reach, scores.centre + scores.reach)
    _name_ticks(ax.xaxis, [_plain(_shorten(position)) for position in results.positions], 16)
    if max(map(len, results.positions)) > 6:
        ax.tick_params(axis="x", rotation=35)
    _name_ticks(ax.yaxis, name_layers(results.layers), 2 * MOST_TICKS)
    ax.set_xlabel("position", color=INK)
    ax.set_ylabel("layer", color=INK)
    ax.tick_params(colors=INK, labelsize=9, length=0)
    ax.spines[:].set_visible(False)
    bar = figure.colorbar(image, ax=ax, label=f"{METRIC_NAMES[scores.metric]}, chance in the middle")
    bar.ax.tick_params(colors=INK, labelsize=9)
    bar.ax.yaxis.label.set_color(INK)
    bar.outline.set_visible(False)
    if n_positions * n_layers <= 120:
        _write_values(ax, scores.values, scores.centre, scores.reach)
    return figure


def _write_values(ax: Axes, values: np.ndarray, centre: float, reach: float) -> None:
    for (layer, position), value in np.ndenumerate(values):
        if np.isfinite(value):
            ink = "white" if abs(value - centre) > 0.65 * reach else INK
            ax.text(position, layer, f"{value:.2f}", ha="center", va="center", fontsize=8, color=ink)


def draw_projection(results: Results, method: str, position: str) -> Figure:
    """Draw a projection, a panel a layer, of up to MOST_MAPS layers spread over the model, the best among them."""
    maps = results.maps[method, position]
    layers = choose_layers(sorted(maps), results.best[0], MOST_MAPS)
    n_columns = min(4, len(layers))
    n_rows = -(-len(layers) // n_columns)
    figure = Figure(
        figsize=(1.0 + 2.4 * n_columns, 0.9 + 2.4 * n_rows), layout="constrained", facecolor="white"
    )
    axes = figure.subplots(n_rows, n_columns, squeeze=False)
    for ax, layer in zip(axes.flat, layers, strict=False):
        table = maps[layer]
        x, y, names = (np.asarray(table[name].to_pylist()) for name in ("x", "y", "class"))
        for number, name in enumerate(results.classes):
            here = names == name
            ax.scatter(
                x[here],
                y[here],
                s=9 if len(x) < 500 else 5,
                marker=MARKERS[SERIES_MARKERS[number % len(SERIES)]],
                color=COLOURS[SERIES[number % len(SERIES)]][0],
                alpha=0.6,
                linewidths=0,
                rasterized=True,
                label=_plain(_shorten(name)),
            )
        ax.set_title("embed" if layer < 0 else f"layer {layer}", fontsize=10, color=INK)
        _frame(ax, results.shares(method, (layer, position)))
    for ax in axes.flat[len(layers) :]:
        ax.set_visible(False)
    handles, labels = axes.flat[0].get_legend_handles_labels()
    legend = figure.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=_n_columns(figure, labels),
        fontsize=9,
        frameon=False,
        labelcolor=INK,
        markerscale=2,
    )
    for handle in legend.legend_handles:
        if handle is not None:
            handle.set_alpha(1.0)
    title = f"{METHODS[method]}, position {position}"
    figure.suptitle(_plain(_shorten(title, 60)), fontsize=11, color=INK)
    return figure


def _frame(ax: Axes, shares: tuple[float, float] | None) -> None:
    ax.set_xticks([])
    ax.set_yticks([])
    ax.spines[:].set_color(GRID)
    ax.set_aspect("equal", adjustable="datalim")
    if shares:
        ax.set_xlabel(f"PC1, {shares[0]:.0%}", fontsize=8, color=INK)
        ax.set_ylabel(f"PC2, {shares[1]:.0%}", fontsize=8, color=INK)


def choose_layers(layers: Sequence[int], best: int, most: int) -> list[int]:
    """Return up to `most` layers, evenly spread, first, last and best among them."""
    if len(layers) <= most:
        return list(layers)
    spread = [layers[i] for i in np.linspace(0, len(layers) - 1, most).round().astype(int)]
    if best in layers and best not in spread:
        spread[min(range(1, most - 1), key=lambda i: abs(spread[i] - best))] = best
    return spread


def draw_all(results: Results) -> dict[str, Figure]:
    """Return every figure that the results give, by the stem of its file name."""
    single: dict[str, Callable[[Results], Figure | None]] = {
        "curves": draw_curves,
        "map": draw_map,
        "differences": draw_differences,
        "separability": draw_separability,
    }
    made = {name: draw(results) for name, draw in single.items()}
    figures = {name: figure for name, figure in made.items() if figure is not None}
    for method, position in results.figure_maps:
        figures[f"{method}-{position}"] = draw_projection(results, method, position)
    return figures


def _name_ticks(axis: Axis, names: list[str], most: int) -> None:
    ticks = range(0, len(names), -(-len(names) // most))
    axis.set_ticks(list(ticks), [names[tick] for tick in ticks])


def _shorten(text: str, most: int = 24) -> str:
    return text if len(text) <= most else text[: most - 2] + "…"


def _plain(text: str) -> str:
    """Return text that matplotlib does not take for mathematics, nor hides from a legend."""
    text = text.replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text
