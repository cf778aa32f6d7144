"""The figure of a run: cosines over batch sizes, over the model's parts and along training, and the noise scale.

This module knows nothing about models or files.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mmextract.engine.dynamics_rows import ALL, OTHER_BATCH, CosineRow, NoiseRow
from mmextract.engine.dynamics_views import CLEAN, IMAGE, TEXT

_INK, _GRID = "#333333", "#e4e4e4"
_RATES = mpl.colormaps["viridis_r"]
_STYLES = {  # of Okabe and Ito's palette, which colour-blind readers can tell apart
    IMAGE: ("#d55e00", "s"),
    TEXT: ("#cc79a7", "^"),
    OTHER_BATCH: ("#777777", "x"),
    CLEAN: ("#333333", "o"),
}
_WIDTH_OF_A_PLACE = 0.5
"""Width over which the points of one place are spread, in places."""


@dataclass(frozen=True)
class _Panel:
    """One set of axes."""

    title: str
    x_label: str
    y_label: str
    field: str
    """What is drawn of a row: `cosine` or `noise_scale`."""
    rows: Sequence[Any]
    places: Sequence[Any]
    """Along the x axis, evenly spaced."""
    place_of: Callable[[Any], Any]
    """Row → its place."""


def draw(cosines: Sequence[CosineRow], noise: Sequence[NoiseRow]) -> Figure:
    """Draw the last checkpoint by batch size and by part, the noise scale and, if there are several, all checkpoints.

    A noise scale whose interval has no upper end is drawn with its lower end only.
    """
    panels = _arrange(cosines, noise)
    figure = Figure(figsize=(10.5, 7.6), layout="constrained", facecolor="white")
    axes = list(figure.subplots(2, 2).flat)
    handles: dict[str, Any] = {}
    for ax, panel in zip(axes, panels, strict=False):
        handles |= _draw_panel(ax, panel)
    for ax in axes[len(panels) :]:
        ax.set_visible(False)
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=4, frameon=False, fontsize=9
    )
    return figure


def _arrange(cosines: Sequence[CosineRow], noise: Sequence[NoiseRow]) -> list[_Panel]:
    checkpoints = list(dict.fromkeys(row.checkpoint for row in cosines))
    sizes = sorted({row.batch_size for row in cosines})
    last, largest = checkpoints[-1], sizes[-1]
    whole = [row for row in cosines if row.matrix == ALL]
    of_all = [row for row in whole if row.group == ALL]
    groups = [group for group in dict.fromkeys(row.group for row in whole) if group != ALL]
    now = [row for row in of_all if row.checkpoint == last]
    parts = [row for row in whole if row.checkpoint == last and row.batch_size == largest]
    training = [row for row in of_all if row.batch_size == largest]
    scales = [row for row in noise if row.checkpoint == last and row.group == row.matrix == ALL]
    of_size = f"batches of {largest}"
    panels = [
        _Panel(f"Against the clean gradient, {last}", "batch size", "cosine", "cosine", now, sizes, _size),
        _Panel(
            f"By part of the model, {of_size}", "", "cosine", "cosine", parts, groups, lambda row: row.group
        ),
    ]
    if len(sizes) > 1:
        x = f"estimated from batches of {sizes[0]} and of"
        panels.append(
            _Panel(f"Gradient noise scale, {last}", x, "examples", "noise_scale", scales, sizes[1:], _size)
        )
    if len(checkpoints) > 1:
        panels.append(
            _Panel(
                f"Along training, {of_size}",
                "",
                "cosine",
                "cosine",
                training,
                checkpoints,
                lambda row: row.checkpoint,
            )
        )
    return panels


def _size(row: Any) -> int:
    return int(row.batch_size)


def save(figure: Figure, kind: str) -> bytes:
    """Return a figure as `png` or `svg`; the same figure gives the same bytes."""
    out = io.BytesIO()
    with mpl.rc_context({"svg.hashsalt": "mmextract", "svg.fonttype": "path"}):
        figure.savefig(out, format=kind, dpi=160, metadata={"Date": None} if kind == "svg" else None)
    return out.getvalue()


def _draw_panel(ax: Axes, panel: _Panel) -> dict[str, Any]:
    """Draw the curve of each view with its intervals; return what to show of each in a legend."""
    views = list(dict.fromkeys(row.view for row in panel.rows))
    rates = [view for view in views if view not in _STYLES]
    drawn = {}
    for number, view in enumerate(views):
        found = {panel.place_of(row): row for row in panel.rows if row.view == view}
        values = np.array([_number(found.get(place), panel.field) for place in panel.places])
        ends = np.array(
            [[_number(found.get(place), end) for place in panel.places] for end in ("low", "high")]
        )
        shift = _WIDTH_OF_A_PLACE * ((number + 0.5) / len(views) - 0.5)
        color, marker = _STYLES.get(view) or (_RATES((1 + rates.index(view)) / len(rates)), "o")
        drawn[_plain(view)] = ax.errorbar(
            np.arange(len(panel.places)) + shift,
            values,
            np.nan_to_num(np.abs(ends - values)),
            color=color,
            marker=marker,
            markersize=4,
            linewidth=1.3,
            elinewidth=1,
            linestyle="--" if view == OTHER_BATCH else "-",
        )
    if panel.field == "noise_scale" and any(row.noise_scale for row in panel.rows):
        ax.set_yscale("log")
    _label(ax, panel)
    return drawn


def _number(row: Any, field: str) -> float:
    value = None if row is None else getattr(row, field)
    return math.nan if value is None else value


def _plain(text: str) -> str:
    return text.replace("$", r"\$")  # a dollar would begin a formula


def _label(ax: Axes, panel: _Panel) -> None:
    ax.set_title(_plain(panel.title), fontsize=10, color=_INK, loc="left")
    ax.set_xlabel(panel.x_label, fontsize=9, color=_INK)
    ax.set_ylabel(panel.y_label, fontsize=9, color=_INK)
    turned = len(panel.places) > 4 and isinstance(panel.places[0], str)
    ax.set_xticks(range(len(panel.places)), [_plain(str(place)) for place in panel.places])
    ax.tick_params(labelsize=8, colors=_INK)
    if turned:
        ax.tick_params(axis="x", labelrotation=40)
    ax.minorticks_off()
    ax.grid(color=_GRID, linewidth=0.8)
    ax.set_axisbelow(True)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
