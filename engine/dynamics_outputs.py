"""What a run of `dynamics` leaves behind: two tables, a figure and a record, each written whole or not at all.

This module knows nothing about how the numbers came about.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from mmextract.engine.dynamics import Dynamics, DynamicsSpec
from mmextract.engine.dynamics_figure import draw, save
from mmextract.engine.dynamics_rows import CosineRow, NoiseRow
from mmextract.engine.objects import make_local
from mmextract.engine.rows import describe_marking
from mmextract.engine.samples import Dataset

FORMAT = 1
RECORD = "dynamics.json"

_TYPES: Mapping[str, pa.DataType] = {
    "str": pa.string(),
    "int": pa.int64(),
    "float | None": pa.float64(),
}


def write_outputs(found: Dynamics, record: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write cosines and noise as CSV and Parquet, the figure as PNG and SVG, and last the record as JSON.

    record: see `make_record`. Raises OSError if the folder cannot be written.
    """
    tables = {"cosines": _table(found.cosines, CosineRow), "noise": _table(found.noise, NoiseRow)}
    figure = draw(found.cosines, found.noise)
    contents = {
        **{f"{name}.csv": _csv(table) for name, table in tables.items()},
        **{f"{name}.parquet": _parquet(table) for name, table in tables.items()},
        **{f"dynamics.{kind}": save(figure, kind) for kind in ("png", "svg")},
        RECORD: (json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode(),
    }
    objects = make_local(folder)
    for name, data in contents.items():
        objects.put(name, [data])
    return [folder / name for name in contents]


def make_record(found: Dynamics, spec: DynamicsSpec, dataset: Dataset, command: str) -> dict[str, Any]:
    """Return what was found and everything that decides it, JSON-able."""
    views = spec.views
    return {
        "format": FORMAT,
        "command": command,
        "checkpoints": [checkpoint.name for checkpoint in spec.checkpoints],
        "models": found.models,
        "n_parameters": found.n_parameters,
        "dataset": dataset.describe(),
        "watermark": describe_marking(views.marking),
        "views": {
            "rates": list(views.rates),
            "image": views.augment_image,
            "text": (views.text_column or "rules") if views.augment_text else None,
            "seed": views.seed,
        },
        "batch_sizes": list(spec.batch_sizes),
        "n_samples": found.n_samples,
        "rejected": found.rejected,
        "cosines": [asdict(row) for row in found.cosines],
        "noise": [asdict(row) for row in found.noise],
    }


def _table(rows: Sequence[CosineRow | NoiseRow], kind: type[CosineRow | NoiseRow]) -> pa.Table:
    schema = pa.schema([(name, _TYPES[str(type_)]) for name, type_ in kind.__annotations__.items()])
    return pa.Table.from_pylist([asdict(row) for row in rows], schema=schema)


def _csv(table: pa.Table) -> bytes:
    out = io.BytesIO()
    pyarrow.csv.write_csv(table, out)
    return out.getvalue()


def _parquet(table: pa.Table) -> bytes:
    out = io.BytesIO()
    pyarrow.parquet.write_table(table, out, compression="zstd")
    return out.getvalue()
