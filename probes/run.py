"""A whole probe run: store → samples, classes, groups → one Dask task a layer and position → scores.

This module composes the others; it writes no file and draws nothing on a screen.
"""

from __future__ import annotations

import signal
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dask.base import compute
from dask.callbacks import Callback
from dask.delayed import delayed
from sklearn.exceptions import ConvergenceWarning
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from mmextract.engine.cluster import SECONDS_WITHOUT_WORKERS
from mmextract.engine.store import Store, open_store
from mmextract.probes.choice import check_name, one_thread
from mmextract.probes.comparison import (
    OtherStore,
    add_character,
    check_same,
    match_store,
    read_columns,
    require_cells,
)
from mmextract.probes.cost import predict_seconds
from mmextract.probes.design import Design, make_design
from mmextract.probes.on_cluster import map_cells
from mmextract.probes.paper import LARGEST_CLASS, make_paper_task
from mmextract.probes.planning import check_cluster, choose_workers, count_cores
from mmextract.probes.scoring import CellScores, score_cell
from mmextract.probes.settings import UNGROUPED, ProbeSettings
from mmextract.probes.streaming import choose_states
from mmextract.probes.tasks import Task, make_tasks

if TYPE_CHECKING:
    from distributed import Client

SECONDS_WORTH_PROCESSES = 10.0
"""Work from which on worker processes pay, which take 3 s to start."""

Cell = tuple[int, str]
"""A layer and a position."""


Scores = Mapping[Cell, CellScores]
"""For each layer and position, the label, its control and its baselines."""


@dataclass(frozen=True, kw_only=True)
class ProbePlan:
    """A run, decided to the last split; see `plan_probe`."""

    store: str | Path
    """Where the hidden states are: a path, or s3://bucket/name."""
    attributes: Mapping[str, Any]
    """Those of the store: how it was made."""
    n_stored: int
    """Samples of the store, rejected and missing ones included."""
    hidden_size: int
    """D."""
    settings: ProbeSettings
    """What was asked for."""
    design: Design
    """Samples, classes, groups."""
    tasks: tuple[Task, ...]
    """The label and its controls, each with its splits."""
    layers: tuple[int, ...]
    """In the order of the store, or as asked for."""
    positions: tuple[str, ...]
    """Likewise."""
    samples: tuple[str, ...]
    """[n] ids of the probed samples."""
    group_names: tuple[str, ...]
    """[n] value of the group column, or the sample's id."""
    other: OtherStore | None = None
    """What it is compared with."""
    streamed_elements: int = 0
    """Elements that the solver of streamed states takes at once (see `states.stream`); 0 where states are held."""
    held_bytes: int = 0
    """What a worker would take that held them, where they are streamed."""

    @property
    def cells(self) -> list[Cell]:
        """What is probed."""
        return [(layer, position) for layer in self.layers for position in self.positions]


def plan_probe(
    place: str | Path,
    settings: ProbeSettings,
    *,
    compare_with: str | Path | None = None,
    client: Client | None = None,
) -> ProbePlan:
    """Decide what is probed in the store at `place`; reads its columns, not its hidden states.

    compare_with: a store of the same samples from another checkpoint, for the difference of the two. client: of the
    cluster that will take the tasks, whose memory then decides whether states are held in memory or streamed.

    Raises ValueError or LookupError, saying what was expected and what to do, for a store, label, grouping,
    layer or position that cannot be probed, or compared.
    """
    check_name(settings.solver)
    store = open_store(place)
    _check_complete(store, settings)
    paper = settings.preset == "paper"
    group = UNGROUPED if paper else settings.group
    derive = partial(
        add_character,
        label=settings.label,
        where=settings.where,
        group=group,
        least=max(settings.folds, 4),
    )
    columns = derive(read_columns(store))
    other = None
    if compare_with is not None:
        theirs = open_store(compare_with)
        _check_complete(theirs, settings)
        other = match_store(theirs, columns)
        other = replace(other, columns=derive(dict(other.columns)))
    design = make_design(
        columns,
        store.committed,
        label=settings.label,
        group=group,
        where=settings.where,
        largest_class=LARGEST_CLASS if paper else None,
        positive_last=not paper,
        usable=None if other is None else other.usable,
    )
    layers, positions = _choose_layers(store, settings), _choose_positions(store, settings, design)
    if other is not None:
        check_same(other, columns, design.rows, [design.label, *([design.group] if design.group else [])])
        require_cells(other, layers, positions)
        other = replace(other, columns={})  # checked, and not worth sending to every worker
    plan = ProbePlan(
        store=place,
        attributes=store.attributes,
        n_stored=store.n_samples,
        hidden_size=store.hidden_size,
        settings=settings,
        design=design,
        tasks=(make_paper_task(design),) if paper else make_tasks(design, settings),
        layers=layers,
        positions=positions,
        samples=tuple(map(str, columns["sample"][design.rows])),
        group_names=tuple(map(str, columns[design.group or "sample"][design.rows])),
        other=other,
    )
    return choose_states(plan, client)


def run_probe(
    plan: ProbePlan,
    *,
    workers: int = 0,
    scheduler: str | None = None,
    client: Client | None = None,
    patience: float = SECONDS_WITHOUT_WORKERS,
    on_progress: Callable[[int], None] = lambda n_cells: None,
) -> Scores:
    """Score every layer and position, each in a Dask task that reads nothing but its own states.

    workers: tasks at a time, 0 for one a core as far as memory suffices. scheduler: a name that Dask knows,
    such as `threads` or `processes`; None chooses (see `choose_scheduler`). client: of a cluster, whose workers
    see the store by its path and take the tasks, whatever `workers` and `scheduler` say. patience: seconds that it
    may be without workers. on_progress is called with the number of tasks done since its last call. Raises
    ValueError for states that are not finite, saying where; ClusterLostError if the cluster is lost.
    """
    if client is not None:
        return _run_on_cluster(plan, client, patience, on_progress)
    workers = choose_workers(plan, workers, count_cores())
    score = delayed(score_cell, pure=False)
    # the plan has no lazy parts, and looking for them in every sample takes longer than a probe
    shared = delayed(plan, pure=False, traverse=False)
    graph = [score(shared, layer, position) for layer, position in plan.cells]
    keys = {task.key for task in graph}

    def count(key: Any, *_: Any) -> None:
        if key in keys:
            on_progress(1)

    progress = Callback(posttask=count)
    # `one_thread` first: asked inside the limit, torch would take one thread for what it had before
    with one_thread(), progress, threadpool_limits(1), warnings.catch_warnings():
        _prepare()
        results = compute(
            *graph,
            scheduler=scheduler or choose_scheduler(plan, workers),
            num_workers=workers,
            initializer=_start_process,
            chunksize=1,
        )
    return dict(zip(plan.cells, results, strict=True))


def _run_on_cluster(
    plan: ProbePlan, client: Client, patience: float, on_progress: Callable[[int], None]
) -> Scores:
    check_cluster(plan, client)
    plan = replace(plan, store=_absolute(plan.store))
    if plan.other is not None:
        plan = replace(plan, other=replace(plan.other, place=_absolute(plan.other.place)))
    return map_cells(client, _score_on_worker, plan, plan.cells, patience=patience, on_progress=on_progress)


def _absolute(place: str | Path) -> str | Path:
    """Return a place that means the same in another working directory."""
    return place if "://" in str(place) else Path(place).absolute()


def _score_on_worker(plan: ProbePlan, layer: int, position: str) -> CellScores:
    with threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return score_cell(plan, layer, position)


def choose_scheduler(plan: ProbePlan, workers: int) -> str:
    """Return `processes` for long work with several workers, else `synchronous`.

    Never threads: fits of a few milliseconds are mostly Python, and SciPy's solver keeps the interpreter's
    lock, so that two threads took longer than one in every measurement (12 layers and positions of 400
    samples × 128: 21 s against 17 s).
    """
    return "processes" if workers > 1 and predict_seconds(plan) > SECONDS_WORTH_PROCESSES else "synchronous"


def _prepare() -> None:
    """Set up a process for tasks that fill the cores by being many, and whose convergence is measured afterwards."""
    threadpool_limits(1)
    warnings.simplefilter("ignore", ConvergenceWarning)


def _start_process() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, that ends its workers
    _prepare()


def _check_complete(store: Store, settings: ProbeSettings) -> None:
    if store.missing and not settings.allow_incomplete:
        raise ValueError(
            f"{store.url} is incomplete: {store.missing} of {store.n_samples} samples are missing. Finish "
            "it by running the same `mmextract dump` again, or probe what is there with --allow-incomplete"
        )


def _choose_layers(store: Store, settings: ProbeSettings) -> tuple[int, ...]:
    there = tuple(int(layer) for layer in store.layers)
    for layer in settings.layers or ():
        if layer not in there:
            raise LookupError(f"{store.url} has no layer {layer}: it has {_list_layers(there)}")
    return settings.layers or there


def _list_layers(layers: Sequence[int]) -> str:
    return ", ".join("embed" if layer < 0 else str(layer) for layer in layers)


def _choose_positions(store: Store, settings: ProbeSettings, design: Design) -> tuple[str, ...]:
    """Return the positions asked for; of a store of all tokens, by default, those that every sample has."""
    for position in settings.positions or ():
        if position not in store.positions:
            raise LookupError(
                f"{store.url} has no position {position!r}: it has {', '.join(store.positions)}"
            )
    if settings.positions:
        return settings.positions
    run = store.attributes.get("run", {})
    if run.get("positions") == ["all"] and "n_tokens" in store.columns:
        return tuple(store.positions[: int(store.columns["n_tokens"][design.rows].min())])
    return tuple(store.positions)
