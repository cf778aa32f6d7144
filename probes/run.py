"""A whole probe run: store → samples, classes, groups → one Dask task a layer and position → scores.

This module composes the others; it writes no file and draws nothing on a screen.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dask
import numpy as np
from dask.callbacks import Callback
from sklearn.exceptions import ConvergenceWarning
from threadpoolctl import threadpool_limits

from mmextract.engine.store import Store, open_store
from mmextract.probes.design import Design, make_design
from mmextract.probes.evaluation import TaskScores, evaluate
from mmextract.probes.metrics import FloatArray
from mmextract.probes.paper import LARGEST_CLASS, evaluate_paper, make_paper_task
from mmextract.probes.settings import ProbeSettings
from mmextract.probes.solvers import SOLVERS
from mmextract.probes.tasks import Task, make_tasks

Cell = tuple[int, str]
"""A layer and a position."""


@dataclass(frozen=True, kw_only=True)
class ProbeRun:
    """What was probed and what came out."""

    store: Path
    attributes: Mapping[str, Any]
    """Those of the store: how it was made."""
    n_stored: int
    """Samples of the store, rejected and missing ones included."""
    settings: ProbeSettings
    design: Design
    layers: tuple[int, ...]
    positions: tuple[str, ...]
    samples: tuple[str, ...]
    """[n] ids of the probed samples."""
    group_names: tuple[str, ...]
    """[n] value of the group column, or the sample's id."""
    scores: Mapping[Cell, Sequence[TaskScores]]
    """For each layer and position, the label, its controls and its baselines."""


def run_probe(
    path: Path,
    settings: ProbeSettings,
    *,
    workers: int = 0,
    on_plan: Callable[[Design, int], None] = lambda design, n_cells: None,
    on_progress: Callable[[int], None] = lambda n_cells: None,
) -> ProbeRun:
    """Probe the store at `path`. workers: how many layers and positions at a time, 0 for one a core.

    on_plan is called once, with the samples, classes and groups and the number of layers × positions, before the work
    begins; on_progress with the number of these done since its last call. Raises ValueError or LookupError, saying
    what was expected, for a store, label, grouping, layer or position that cannot be probed.
    """
    store = open_store(path)
    _check_complete(store, settings)
    paper = settings.preset == "paper"
    # numpy's variable-width texts know few operations; as objects they know all
    columns = {name: v.astype(object) if v.dtype.kind == "T" else v for name, v in store.columns.items()}
    design = make_design(
        columns,
        store.committed,
        label=settings.label,
        group=settings.group,
        where=settings.where,
        largest_class=LARGEST_CLASS if paper else None,
        positive_last=not paper,
    )
    tasks = (make_paper_task(design),) if paper else make_tasks(design, settings)
    layers, positions = _choose_layers(store, settings), _choose_positions(store, settings, design)
    cells = [(layer, position) for layer in layers for position in positions]
    on_plan(design, len(cells))
    names = columns[design.group or "sample"][design.rows]
    return ProbeRun(
        store=path,
        attributes=store.attributes,
        n_stored=store.n_samples,
        settings=settings,
        design=design,
        layers=layers,
        positions=positions,
        samples=tuple(columns["sample"][design.rows].astype(str).tolist()),
        group_names=tuple(names.astype(str).tolist()),
        scores=dict(zip(cells, _compute(path, cells, design, tasks, settings, workers, on_progress), strict=True)),
    )


def _compute(
    path: Path,
    cells: Sequence[Cell],
    design: Design,
    tasks: Sequence[Task],
    settings: ProbeSettings,
    workers: int,
    on_progress: Callable[[int], None],
) -> Sequence[Sequence[TaskScores]]:
    shared = dask.delayed((design, tasks, settings), pure=False, traverse=False)
    score = dask.delayed(score_cell, pure=False)
    graph = [score(path, layer, position, shared) for layer, position in cells]
    keys = {item.key for item in graph}

    def count(key: Any, *_: Any) -> None:
        if key in keys:
            on_progress(1)

    scheduler = os.environ.get("SCHED","threads")
    # one BLAS thread a task: the tasks themselves fill the cores
    with threadpool_limits(1), Callback(posttask=count), warnings.catch_warnings():
        # whether a probe converged is measured on the solution, and counted in the output
        warnings.simplefilter("ignore", ConvergenceWarning)
        results: Sequence[Sequence[TaskScores]] = dask.compute(
            *graph, scheduler=scheduler, num_workers=workers or _cores(), optimize_graph=False
        )
    return results


def score_cell(
    path: Path, layer: int, position: str, shared: tuple[Design, Sequence[Task], ProbeSettings]
) -> Sequence[TaskScores]:
    """Read one layer and position from the store and score every task on it."""
    design, tasks, settings = shared
    x = read_states(open_store(path), layer, position, design)
    if settings.preset == "paper":
        return evaluate_paper(x, tasks[0])
    return evaluate(x, design.groups, tasks, SOLVERS[settings.solver], settings)


def read_states(store: Store, layer: int, position: str, design: Design) -> FloatArray:
    """Return float64 [n, D]: the states of the probed samples. Raises ValueError if any is not finite."""
    states = store.read(layer, position)[design.rows].astype(np.float64)
    bad = np.flatnonzero(~np.isfinite(states).all(1))
    if len(bad):
        first = store.columns["sample"][design.rows[bad[0]]]
        raise ValueError(
            f"layer {layer}, position {position}: {len(bad)} of {len(states)} samples hold NaN or infinite states "
            f"(the first is {first}): leave them out with --where, or this layer or position out"
        )
    return states


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _check_complete(store: Store, settings: ProbeSettings) -> None:
    if store.missing and not settings.allow_incomplete:
        raise ValueError(
            f"{store.path} is incomplete: {store.missing} of {store.n_samples} samples are missing. Finish it by running "
            "the same `mmextract dump` again, or probe what is there with --allow-incomplete"
        )


def _choose_layers(store: Store, settings: ProbeSettings) -> tuple[int, ...]:
    there = tuple(int(layer) for layer in store.layers)
    for layer in settings.layers or ():
        if layer not in there:
            raise LookupError(f"{store.path} has no layer {layer}: it has {_list_layers(there)}")
    return settings.layers or there


def _list_layers(layers: Sequence[int]) -> str:
    return ", ".join("embed" if layer < 0 else str(layer) for layer in layers)


def _choose_positions(store: Store, settings: ProbeSettings, design: Design) -> tuple[str, ...]:
    """Return the positions asked for; of a store of all tokens, by default, those that every sample has."""
    for position in settings.positions or ():
        if position not in store.positions:
            raise LookupError(f"{store.path} has no position {position!r}: it has {', '.join(store.positions)}")
    if settings.positions:
        return settings.positions
    run = store.attributes.get("run", {})
    if run.get("positions") == ["all"] and "n_tokens" in store.columns:
        return tuple(store.positions[: int(store.columns["n_tokens"][design.rows].min())])
    return tuple(store.positions)
