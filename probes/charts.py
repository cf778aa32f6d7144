"""Charts for the screen, as plotly reads them: the panels of the figures, and projections to move through.

Colours are names (`@probe`, `@ink`) that the page puts in for its light or dark scheme; texts are escaped for
plotly, which reads some HTML. This module knows nothing about the page they stand on.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from mmextract.probes.panels import (
    COLOURS,
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

Spec = dict[str, Any]

PALETTE = {
    **COLOURS,
    "ink": ("#1d2126", "#e4e7eb"),
    "soft": ("#5b6470", "#9aa4b0"),
    "line": ("#dfe3e8", "#343a42"),
    "paper": ("#ffffff", "#16191d"),
}
"""Names that charts use → colours on white and on black."""

HEIGHT = 300
MOST_POINTS = 200_000
"""Of all projections on the page together, which keeps them under 2.2 MB; the Parquet file has every one."""
LEAST_POINTS = 100
"""Of a projection, however many there are."""
MOST_TICKS = 9


def make_charts(results: Results) -> Spec:
    """Return everything that the page draws: groups of panels by name, and the projections."""
    return {
        "palette": PALETTE,
        "best": results.best[0],
        "groups": {
            name: group
            for name, group in (
                ("curves", _group(results, curve_panels, results.metrics)),
                ("map", _map_group(results)),
                ("differences", _group(results, difference_panels, results.metrics)),
                ("separability", _separability_group(results)),
            )
            if group["options"]
        },
        "projections": make_projections(results),
    }


def _group(results: Results, make: Callable[[Results, str], list[Panel]], metrics: Sequence[str]) -> Spec:
    """Return what can be chosen from, here the metrics, and the panels of each."""
    options = []
    for metric in metrics:
        panels = make(results, metric)
        if panels:
            options.append(option(METRIC_NAMES.get(metric, metric), panels, results.layers))
    return {"label": "Metric", "options": options}


def _separability_group(results: Results) -> Spec:
    panels = separability_panels(results)
    return {"label": "", "options": [option("", panels, results.layers)] if panels else []}


def option(name: str, panels: list[Panel], layers: Sequence[int]) -> Spec:
    """Return one choice of a group: a name, a legend and panels over the same layers."""
    legend = [
        {
            "name": line.name,
            "colour": line.colour,
            "dash": line.dash,
            "bands": [{"name": band.name, "alpha": band.alpha} for band in line.bands],
        }
        for line in legend_of(panels).values()
    ]
    return {
        "name": name,
        "legend": legend,
        "panels": [_panel(panel, layers) for panel in panels],
    }


def _panel(panel: Panel, layers: Sequence[int]) -> Spec:
    names = name_layers(layers)
    traces = [trace for line in reversed(panel.lines) for trace in _traces(line, names)]
    limits = np.log10(panel.limits) if panel.logarithmic else np.array(panel.limits)
    step = -(-len(names) // MOST_TICKS)
    layout = _layout(
        xaxis={
            "title": {"text": "layer", "standoff": 6},
            "tickvals": list(range(0, len(names), step)),
            "ticktext": names[::step],
            "range": [-0.5, len(names) - 0.5],
            "showgrid": False,
        },
        yaxis={
            "range": limits.tolist(),
            "type": "log" if panel.logarithmic else "linear",
            "gridcolor": "@line",
            **({"dtick": 1, "exponentformat": "power"} if panel.logarithmic else {}),
        },
        hovermode="x unified",
    )
    return {"title": panel.title, "data": traces, "layout": layout}


def _traces(line: Line, names: Sequence[str]) -> list[Spec]:
    only = len(line.y) == 1  # a curve of one point would have no bands
    index = [0, 0] if only else list(range(len(line.y)))
    x = [-0.3, 0.3] if only else list(map(float, index))
    colour = f"@{line.colour}"
    bands = [
        {
            "type": "scatter",
            "x": [*x, *reversed(x)],
            "y": _numbers([*band.high[index], *band.low[index][::-1]]),
            "fill": "toself",
            "fillcolor": f"{colour}:{band.alpha}",
            "line": {"width": 0},
            "mode": "lines",
            "hoverinfo": "skip",
            "name": _text(band.name),
        }
        for band in line.bands
    ]
    mode = "lines+markers" if line.marker and not only else "lines"
    main = {
        "type": "scatter",
        "x": x,
        "y": _numbers(line.y[index]),
        "mode": mode,
        "name": _text(line.name),
        "line": {"color": colour, "width": 2.5 if line.bands else 1.4, "dash": line.dash},
        "marker": {
            "color": [colour if mark else "@paper" for mark in line.found] if line.found else colour,
            "symbol": line.marker or "circle",
            "size": 7 if line.bands else 5,
            "line": {"color": colour, "width": 1.5},
        },
        "text": [_hover(line, at, names) for at in index],
        "hovertemplate": "%{text}",
    }
    return [*bands, main]


def _hover(line: Line, index: int, names: Sequence[str]) -> str:
    parts = [f"layer {names[index]}: " if names[index] != "embed" else "embed: ", f"{line.y[index]:.4g}"]
    parts += [f" [{band.low[index]:.4g}, {band.high[index]:.4g}], {band.name}" for band in line.bands]
    return _text("".join(parts))


def _map_group(results: Results) -> Spec:
    options: list[Spec] = []
    for metric in results.metrics if len(results.positions) > 1 else []:
        scores = heat_map(results, metric)
        trace = {
            "type": "heatmap",
            "z": [_numbers(row) for row in scores.values],
            "zmin": scores.centre - scores.reach,
            "zmax": scores.centre + scores.reach,
            # PuOr of ColorBrewer, which colour-blind readers can tell apart
            "colorscale": [
                [0, "#542788"],
                [0.25, "#998ec3"],
                [0.5, "#f7f7f7"],
                [0.75, "#f1a340"],
                [1, "#b35806"],
            ],
            "colorbar": {"thickness": 12, "outlinewidth": 0},
            "hovertemplate": "layer %{y}, position %{x}: %{z:.4f}<extra></extra>",
        }
        layers, positions = name_layers(results.layers), results.positions
        layout = _layout(
            xaxis=_ticks("position", [_text(_shorten(position)) for position in positions], 16),
            yaxis=_ticks("layer", layers, 16),
            height=max(HEIGHT, min(700, 120 + 16 * len(layers))),
        )
        trace |= {"hovertext": [[_text(f"layer {y}, position {x}") for x in positions] for y in layers]}
        trace["hovertemplate"] = "%{hovertext}: %{z:.4f}<extra></extra>"
        title = f"{METRIC_NAMES.get(metric, metric)} by layer and position"
        panel = {"title": title, "data": [trace], "layout": layout}
        options.append({"name": METRIC_NAMES.get(metric, metric), "legend": [], "panels": [panel]})
    return {"label": "Metric", "options": options}


def _ticks(title: str, names: Sequence[str], most: int) -> Spec:
    step = -(-len(names) // most)
    return {
        "title": {"text": title, "standoff": 6},
        "tickvals": list(range(0, len(names), step)),
        "ticktext": list(names[::step]),
        "showgrid": False,
    }


def _layout(**more: Any) -> Spec:
    axis = {"zeroline": False, "linecolor": "@line", "automargin": True, "fixedrange": False}
    for name in ("xaxis", "yaxis"):
        more[name] = {**axis, **more[name]}
    base = {
        "height": HEIGHT,
        "margin": {"l": 44, "r": 8, "t": 8, "b": 40},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"color": "@ink", "size": 12, "family": "system-ui, sans-serif"},
        "hoverlabel": {"bgcolor": "@paper", "bordercolor": "@line", "font": {"color": "@ink"}},
        "showlegend": False,
    }
    return {**base, **more}


def make_projections(results: Results) -> Spec | None:
    """Return the maps to move through, None if there are none."""
    if not results.maps:
        return None
    n_maps = sum(map(len, results.maps.values()))
    first = next(iter(next(iter(results.maps.values())).values()))
    chosen = _choose_points(len(first), max(LEAST_POINTS, MOST_POINTS // n_maps))
    names = first["class"].to_pylist()
    return {
        "names": results.classes,
        "classes": [_text(name) for name in results.classes],
        "y": [results.classes.index(names[index]) for index in chosen],
        "samples": [_text(first["sample"][int(index)].as_py()) for index in chosen],
        "n_samples": len(first),
        "colours": [f"@{SERIES[k % len(SERIES)]}" for k in range(len(results.classes))],
        "symbols": [SERIES_MARKERS[k % len(SERIES_MARKERS)] for k in range(len(results.classes))],
        "maps": [
            {
                "name": f"{METHODS[method]}, position {position}",
                "layers": [
                    _map(results, method, position, layer, maps[layer], chosen) for layer in sorted(maps)
                ],
            }
            for (method, position), maps in results.maps.items()
        ],
        "first": _first_map(results),
        "layout": _layout(
            xaxis={"showgrid": False, "showticklabels": False, "title": {"text": ""}},
            yaxis={"showgrid": False, "showticklabels": False, "title": {"text": ""}, "scaleanchor": "x"},
            height=520,
            hovermode="closest",
            margin={"l": 36, "r": 8, "t": 8, "b": 36},
        ),
    }


def _first_map(results: Results) -> int:
    """Return the number of the map that is shown first: of the best position."""
    keys = list(results.maps)
    return next((i for i, (_, position) in enumerate(keys) if position == results.best[1]), 0)


def _choose_points(n: int, most: int) -> np.ndarray:
    return np.sort(np.random.default_rng(0).permutation(n)[:most])


def _map(
    results: Results, method: str, position: str, layer: int, table: pa.Table, chosen: np.ndarray
) -> Spec:
    shares = results.shares(method, (layer, position))
    score = results.row("label", results.metric, (layer, position))
    return {
        "layer": layer,
        "name": "embedding" if layer < 0 else f"layer {layer}",
        "score": f"{METRIC_NAMES[results.metric]} {score['value']:.3f}" if score else "",
        "axes": [f"PC{k + 1}, {share:.0%} of the variance" for k, share in enumerate(shares or ())],
        **{axis: _encode(table[axis].to_numpy()[chosen]) for axis in ("x", "y")},
    }


def _encode(values: np.ndarray) -> str:
    """Return base64 of little-endian float32, which is half as long as decimal digits."""
    return base64.b64encode(np.ascontiguousarray(values, "<f4").tobytes()).decode()


def resolve(spec: Any, scheme: int, palette: Mapping[str, Sequence[str]] = PALETTE) -> Any:
    """Put colours in for their names, as the page does: scheme 0 on white, 1 on black."""
    if isinstance(spec, dict):
        return {key: resolve(value, scheme, palette) for key, value in spec.items()}
    if isinstance(spec, list):
        return [resolve(value, scheme, palette) for value in spec]
    if not isinstance(spec, str) or not spec.startswith("@"):
        return spec
    name, _, alpha = spec[1:].partition(":")
    colour = palette[name][scheme]
    if not alpha:
        return colour
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{alpha})"


def _numbers(values: Sequence[float] | np.ndarray) -> list[float | None]:
    """Return JSON-able numbers of six digits, null for what is not finite."""
    return [float(f"{value:.6g}") if np.isfinite(value) else None for value in values]


def _shorten(text: str) -> str:
    return text if len(text) <= 24 else text[:22] + "…"


def _text(text: str) -> str:
    """Return text that plotly shows as it is; a leading @ is not taken for a colour."""
    escaped = html.escape(text, quote=False)
    return f"\u2060{escaped}" if escaped.startswith("@") else escaped
