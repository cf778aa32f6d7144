"""What the states of each layer and position look like, beside the probes: separability, CKA and projections.

Layers and positions are Dask tasks, each of which reads nothing but its own states. This module writes no file.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from dask.base import compute
from dask.callbacks import Callback
from dask.delayed import delayed
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from mmextract.engine.cluster import SECONDS_WITHOUT_WORKERS
from mmextract.engine.store import open_store
from mmextract.probes.blocks import read_rows
from mmextract.probes.cka import MOST_SAMPLES, cka_between
from mmextract.probes.command_cost import choose_threads
from mmextract.probes.design import Design
from mmextract.probes.on_cluster import map_cells
from mmextract.probes.projections import LEAST_SAMPLES, Projection, Wish, align_signs, project
from mmextract.probes.results import MOST_POSITIONS, Cell
from mmextract.probes.run import ProbePlan
from mmextract.probes.separability import Labellings, make_labellings, measure

if TYPE_CHECKING:
    from distributed import Client


@dataclass(frozen=True, kw_only=True)
class DescriptionSettings:
    """What is to be described."""

    separability: bool = True
    """Whether to measure `separability.METRICS`, and CKA if there is another store."""
    projections: tuple[Wish, ...] = (Wish("pca"), Wish("tsne", best_only=True))
    """Methods, see `projections.parse_wishes`; with many positions, of the best one alone."""
    device: str = "cpu"
    """Where projections are made: `cuda` takes cuML."""
    n_shuffles: int = 199
    """Shuffled labels that separability is held against."""


def _about(text: str) -> Any:
    return field(metadata={"about": text})


@dataclass(frozen=True, kw_only=True)
class SeparabilityRow:
    """One line of separability.csv and .parquet; each field carries its description."""

    layer: int = _about("decoder block; -1 is the embedding, the input of block 0")
    position: str = _about("token or span of tokens")
    label: str = _about("column of the store that gave the classes")
    metric: str = _about(
        "fisher_ratio (trace of the scatter between classes over that within), silhouette, class_mean_cosine, "
        "effective_dimension (participation ratio); with another store, cka and cka_debiased (linear)"
    )
    value: float = _about("the metric; null where it is not defined")
    low: float | None = _about("lower end of the 95 % interval by the jackknife over groups")
    high: float | None = _about("upper end of that interval")
    null_mean: float | None = _about("mean over shuffled labels")
    null_low: float | None = _about("2.5 % quantile over shuffled labels")
    null_high: float | None = _about("97.5 % quantile over shuffled labels")
    p: float | None = _about(
        "share of shuffled labels, the label included, that separate at least as well; not corrected for layers"
    )
    n_shuffles: int = _about("shuffles behind it")
    n_samples: int = _about("samples measured")
    n_groups: int = _about("groups they fall into")


COLUMNS = {f.name: f.metadata["about"] for f in fields(SeparabilityRow)}
_FLOATS = ("value", "low", "high", "null_mean", "null_low", "null_high", "p")
_KINDS = {"layer": pa.int32(), **dict.fromkeys(_FLOATS, pa.float64())}
_KINDS |= dict.fromkeys(("n_shuffles", "n_samples", "n_groups"), pa.int64())
_SCHEMA = pa.schema(
    [
        pa.field(name, _KINDS.get(name, pa.string()), metadata={"about": about})
        for name, about in COLUMNS.items()
    ]
)


@dataclass(frozen=True, kw_only=True)
class Description:
    """What was found; see `describe`."""

    rows: Sequence[SeparabilityRow]
    """Separability, by layer and position in the order of the plan."""
    projections: pa.Table | None
    """A row a (method, position, layer, sample): sample, group, class, x, y. None if none was wished for."""
    shares: Sequence[dict[str, Any]]
    """Of the axes of each PCA: method, layer, position, x, y."""

    def entries(self) -> dict[str, Any]:
        """Return what probe.json says of it."""
        found: dict[str, Any] = {}
        if self.rows:
            rows = [
                {
                    k: None if isinstance(v, float) and not np.isfinite(v) else v
                    for k, v in asdict(row).items()
                }
                for row in self.rows
            ]
            found["separability"] = {"columns": COLUMNS, "rows": rows}
        if self.projections is not None:
            methods = list(dict.fromkeys(self.projections["method"].to_pylist()))
            found["projections"] = {"methods": methods, "shares": list(self.shares)}
        return found

    def table(self) -> pa.Table | None:
        """Return separability as a table, None if it was not measured."""
        if not self.rows:
            return None
        return pa.Table.from_pylist([asdict(row) for row in self.rows], schema=_SCHEMA)


@dataclass(frozen=True)
class _Work:
    """What a task needs beside its cell; the same for all."""

    store: str | Path
    design: Design
    labellings: Labellings | None
    methods: dict[Cell, tuple[str, ...]]
    device: str


def describe(
    plan: ProbePlan,
    settings: DescriptionSettings,
    best: Cell,
    *,
    other: str | Path | None = None,
    client: Client | None = None,
    patience: float = SECONDS_WITHOUT_WORKERS,
    on_progress: Callable[[int], None] = lambda n_cells: None,
) -> Description:
    """Describe every layer and position of a plan. best: where the probes score highest. other: the store for CKA.

    Of more than `cka.MOST_SAMPLES` samples as many are drawn, with their whole groups where they have any. client: of
    a cluster, which takes the tasks. patience: seconds that it may be without workers. on_progress is called with the
    number of tasks done since its last call.
    """
    design, samples, groups = _draw(plan)
    wishes = settings.projections if design.n_samples >= LEAST_SAMPLES else ()
    methods = {cell: _choose(wishes, cell, best, plan) for cell in plan.cells}
    n_shuffles, seed = settings.n_shuffles, plan.settings.seed
    labellings = make_labellings(design, n_shuffles=n_shuffles, seed=seed) if settings.separability else None
    store = plan.store if "://" in str(plan.store) else Path(plan.store).absolute()
    work = _Work(store, design, labellings, methods, settings.device)
    cells = [cell for cell in plan.cells if labellings or methods[cell]]
    if client is not None:
        done = map_cells(client, _describe_cell, work, cells, patience=patience, on_progress=on_progress)
    else:
        done = _run(work, cells, choose_threads(plan, settings), on_progress)
    rows = [_row(plan, design, cell, **vars(m)) for cell in cells for m in done[cell][0]]
    if other is not None and settings.separability:
        rows += _compare(plan, design, samples, other)
    shown = {(m, cell): projection for cell in cells for m, projection in done[cell][1].items()}
    table, shares = _tabulate(plan, shown, samples, groups, design)
    return Description(rows=rows, projections=table, shares=shares)


def _draw(plan: ProbePlan) -> tuple[Design, list[str], list[str]]:
    """Return the design, names of samples and of groups, of at most MOST_SAMPLES samples in whole groups."""
    design = plan.design
    keep = np.arange(design.n_samples)
    if len(keep) > MOST_SAMPLES:
        order = np.random.default_rng([plan.settings.seed, 7]).permutation(design.n_groups)
        rank = np.argsort(order)[design.groups]
        keep = np.sort(np.argsort(rank, kind="stable")[:MOST_SAMPLES])
    groups = np.unique(design.groups[keep], return_inverse=True)[1].astype(np.int64)
    part = replace(design, rows=design.rows[keep], y=design.y[keep], groups=groups)
    return part, [plan.samples[i] for i in keep], [plan.group_names[i] for i in keep]


def _choose(wishes: Sequence[Wish], cell: Cell, best: Cell, plan: ProbePlan) -> tuple[str, ...]:
    """Return the methods by which a cell is projected."""
    if len(plan.positions) > MOST_POSITIONS and cell[1] != best[1]:
        return ()
    return tuple(wish.method for wish in wishes if cell == best or not wish.best_only)


Found = tuple[list[Any], dict[str, Projection]]


def _run(
    work: _Work, cells: Sequence[Cell], n_threads: int, on_progress: Callable[[int], None]
) -> dict[Cell, Found]:
    task = delayed(_describe_cell, pure=False)
    shared = delayed(work, pure=False, traverse=False)
    graph = [task(shared, *cell) for cell in cells]
    keys = {entry.key for entry in graph}

    def count(key: Any, *_: Any) -> None:
        if key in keys:
            on_progress(1)

    # threads: products and t-SNE leave the interpreter's lock; and one thread each, for what they share
    with Callback(posttask=count), threadpool_limits(1):
        done = compute(*graph, scheduler="threads", num_workers=n_threads)
    return dict(zip(cells, done, strict=True))


def _describe_cell(work: _Work, layer: int, position: str) -> Found:
    # the probes have refused states that are not finite
    x = read_rows(open_store(work.store), layer, position, work.design.rows)
    with threadpool_limits(1):
        measures = measure(x, work.labellings) if work.labellings else []
    methods = work.methods[layer, position]
    return measures, {method: project(x, method, device=work.device) for method in methods}


def _row(plan: ProbePlan, design: Design, cell: Cell, **values: Any) -> SeparabilityRow:
    return SeparabilityRow(
        layer=cell[0],
        position=cell[1],
        label=design.label,
        n_samples=design.n_samples,
        n_groups=design.n_groups,
        **values,
    )


def _compare(
    plan: ProbePlan, design: Design, samples: Sequence[str], other: str | Path
) -> list[SeparabilityRow]:
    """Return CKA with the other store, of the layers and positions that it has, too."""
    first, second = open_store(plan.store), open_store(other)
    layers = [layer for layer in plan.layers if layer in second.layers]
    nothing = dict.fromkeys(("null_mean", "null_low", "null_high", "p"))
    rows = []
    for position in (p for p in plan.positions if p in second.positions):
        for found in cka_between(
            first, second, layers, position, samples=samples, group=design.group, seed=plan.settings.seed
        ):
            values = {"metric": found.metric, "value": found.value, "low": found.low, "high": found.high}
            row = _row(plan, design, (found.layer, position), **values, **nothing, n_shuffles=0)
            rows.append(replace(row, n_samples=found.n_samples))
    return rows


def _tabulate(
    plan: ProbePlan,
    shown: dict[tuple[str, Cell], Projection],
    samples: Sequence[str],
    groups: Sequence[str],
    design: Design,
) -> tuple[pa.Table | None, list[dict[str, Any]]]:
    """Return the coordinates, method by method and position by position, and the shares of their axes."""
    tables, shares = [], []
    classes = [design.classes[k] for k in design.y]
    for method in dict.fromkeys(method for method, _ in shown):
        for position in plan.positions:
            layers = [layer for layer in plan.layers if (method, (layer, position)) in shown]
            made = align_signs([shown[method, (layer, position)] for layer in layers])
            for layer, projection in zip(layers, made, strict=True):
                tables.append(_coordinates(method, layer, position, projection, samples, groups, classes))
                if projection.shares:
                    x, y = projection.shares
                    shares.append({"method": method, "layer": layer, "position": position, "x": x, "y": y})
    return (pa.concat_tables(tables) if tables else None), shares


def _coordinates(
    method: str,
    layer: int,
    position: str,
    projection: Projection,
    samples: Sequence[str],
    groups: Sequence[str],
    classes: Sequence[str],
) -> pa.Table:
    n = len(samples)
    return pa.table(
        {
            "method": pa.array([method] * n, pa.string()),
            "position": pa.array([position] * n, pa.string()),
            "layer": pa.array(np.full(n, layer, np.int32)),
            "sample": pa.array(samples, pa.string()),
            "group": pa.array(groups, pa.string()),
            "class": pa.array(classes, pa.string()),
            "x": pa.array(projection.coordinates[:, 0]),
            "y": pa.array(projection.coordinates[:, 1]),
        }
    )
