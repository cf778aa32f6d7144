"""The figure of a run: cosines over batch sizes, over the model's parts and along training, and the noise scale.

This module knows nothing about models or files.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
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
_PARTS_OF_A_POINT = 0.5
"""Width over which the points of one place are spread, in places."""


def draw(cosines: Sequence[CosineRow], noise: Sequence[NoiseRow]) -> Figure:
    """Draw the last checkpoint by batch size and by part, all checkpoints along training, and the noise scale."""
    checkpoints = list(dict.fromkeys(row.checkpoint for row in cosines))
    sizes = sorted({row.batch_size for row in cosines})
    last, largest = checkpoints[-1], sizes[-1]
    whole = [row for row in cosines if row.matrix == ALL]
    groups = [group for group in dict.fromkeys(row.group for row in whole) if group != ALL]
    figure = Figure(figsize=(10.5, 7.6), layout="constrained", facecolor="white")
    axes = figure.subplots(2, 2)

    def of_all(row: Any) -> bool:
        return bool(row.group == ALL and row.matrix == ALL)

    _panel(
        axes[0, 0],
        [row for row in whole if of_all(row) and row.checkpoint == last],
        sizes,
        lambda row: row.batch_size,
        "cosine",
    )
    _label(axes[0, 0], f"Gradients against the clean batch's, {last}", "batch size", "cosine")
    _panel(
        axes[0, 1],
        [row for row in whole if row.checkpoint == last and row.batch_size == largest],
        groups,
        lambda row: row.group,
        "cosine",
    )
    _label(axes[0, 1], f"By part of the model, batches of {largest}", "", "cosine")
    _panel(
        axes[1, 0],
        [row for row in whole if of_all(row) and row.batch_size == largest],
        checkpoints,
        lambda row: row.checkpoint,
        "cosine",
    )
    _label(axes[1, 0], f"Along training, batches of {largest}", "", "cosine")
    scales = [row for row in noise if of_all(row) and row.checkpoint == last]
    _panel(axes[1, 1], scales, sizes[1:], lambda row: row.batch_size, "noise_scale")
    if any(row.noise_scale for row in scales):
        axes[1, 1].set_yscale("log")
    _label(axes[1, 1], f"Gradient noise scale, {last}", "estimated from batches of 1 and of", "examples")
    handles = {h.get_label(): h for ax in (axes[1, 1], axes[0, 0]) for h in ax.containers}
    names = [name for name in _views(cosines, noise) if name in handles]
    figure.legend(
        [handles[name] for name in names],
        names,
        loc="outside lower center",
        ncols=4,
        frameon=False,
        fontsize=9,
    )
    return figure


def save(figure: Figure, kind: str) -> bytes:
    """Return a figure as `png` or `svg`; the same figure gives the same bytes."""
    out = io.BytesIO()
    with mpl.rc_context({"svg.hashsalt": "mmextract", "svg.fonttype": "path"}):
        figure.savefig(out, format=kind, dpi=160, metadata={"Date": None} if kind == "svg" else None)
    return out.getvalue()


def _panel(
    ax: Axes, rows: Sequence[Any], places: Sequence[Any], place_of: Callable[[Any], Any], field: str
) -> None:
    """Draw the curve of each view with its intervals, the places evenly spaced."""
    views = _views(rows, ())
    rates = [view for view in views if view not in _STYLES]
    for number, view in enumerate(views):
        found = {place_of(row): row for row in rows if row.view == view}
        values = [_number(found.get(place), field) for place in places]
        ends = [[_number(found.get(place), end) for place in places] for end in ("low", "high")]
        below, above = np.nan_to_num(np.abs(np.array(ends) - values))
        color, marker = _STYLES.get(view) or (_RATES((1 + rates.index(view)) / len(rates)), "o")
        shift = _PARTS_OF_A_POINT * ((number + 0.5) / len(views) - 0.5)
        x = np.arange(len(places)) + shift
        line = "--" if view == OTHER_BATCH else "-"
        ax.errorbar(
            x,
            values,
            (below, above),
            color=color,
            marker=marker,
            markersize=4,
            linewidth=1.3,
            elinewidth=1,
            linestyle=line,
            label=_plain(view),
        )
    turned = len(places) > 4 and any(isinstance(place, str) for place in places)
    ax.set_xticks(range(len(places)), [_plain(str(place)) for place in places], rotation=40 if turned else 0)
    if turned:
        for tick in ax.get_xticklabels():
            tick.set_horizontalalignment("right")


def _views(cosines: Sequence[Any], noise: Sequence[Any]) -> list[str]:
    return list(dict.fromkeys(row.view for row in (*cosines, *noise)))


def _number(row: Any, field: str) -> float:
    value = None if row is None else getattr(row, field)
    return math.nan if value is None else value


def _plain(text: str) -> str:
    return text.replace("$", r"\$")  # a dollar would begin a formula


def _label(ax: Axes, title: str, x: str, y: str) -> None:
    ax.set_title(_plain(title), fontsize=10, color=_INK, loc="left")
    ax.set_xlabel(x, fontsize=9, color=_INK)
    ax.set_ylabel(y, fontsize=9, color=_INK)
    ax.tick_params(labelsize=8, colors=_INK)
    ax.grid(color=_GRID, linewidth=0.8)
    ax.set_axisbelow(True)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
