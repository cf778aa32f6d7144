"""What a run leaves behind: JSON, CSV, Parquet, figures and the report, each written whole or not at all.

This module knows nothing about how scores or sentences came about.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import io
import json
import math
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from mmextract.probes.comparison import OtherStore
from mmextract.probes.description import Description
from mmextract.probes.pictures import make_pictures
from mmextract.probes.planning import describe_states
from mmextract.probes.results import PROJECTIONS, RECORD, Results
from mmextract.probes.rows import COLUMNS, Row
from mmextract.probes.score_table import COLUMNS as SCORE_COLUMNS
from mmextract.probes.score_table import write_scores
from mmextract.probes.summary import Summary
from mmextract.probes.tasks import SHUFFLES

Content = bytes | Callable[[IO[bytes]], None]
"""Of a file: its bytes, or what writes them."""

FORMAT = 2
"""Of probe.json. 2: p-values, errors, calibration, comparisons; intervals by the jackknife."""

PACKAGES = ("mmextract", "numpy", "scipy", "scikit-learn", "dask", "zarr", "pyarrow", "matplotlib", "plotly")

FILES = (
    "probe.csv",
    "probe.parquet",
    "scores.parquet",
    "curves.png",
    "curves.svg",
    "curves.pdf",
    "report.html",
    "probe.json",
)
"""Those of every run, in the order in which they are put in place: where probe.json is, the others are of the same run.
There are more where there is more to show: projections.parquet, separability.csv and .parquet, and their figures."""

_SCHEMA = pa.schema(
    [
        pa.field(name, kind, metadata={"about": COLUMNS[name]})
        for name, kind in (
            *(("layer", pa.int32()), ("position", pa.string()), ("label", pa.string())),
            *(("task", pa.string()), ("metric", pa.string()), ("value", pa.float64())),
            *(
                (name, pa.float64())
                for name in ("error", "low", "high", "simultaneous_low", "simultaneous_high")
            ),
            *(("chance", pa.float64()), ("baseline", pa.bool_())),
            *((name, pa.float64()) for name in ("p", "p_corrected", "p_fdr", "detectable")),
            ("n_permutations", pa.int64()),
            *(("n_samples", pa.int64()), ("n_groups", pa.int64()), ("n_classes", pa.int64())),
            *(
                ("c", pa.float64()),
                ("solver", pa.string()),
                ("n_fits", pa.int64()),
                ("n_unconverged", pa.int64()),
            ),
        )
    ]
)


def write_outputs(
    summary: Summary, record: Mapping[str, Any], folder: Path, description: Description | None = None
) -> list[Path]:
    """Write all FILES into `folder` and return their paths. record: see `make_record`; description: the same as there.

    Raises OSError if the folder cannot be written; then no file was replaced.
    """
    folder.mkdir(parents=True, exist_ok=True)  # before the figures, which take seconds
    projections = description.projections if description else None
    pictures = make_pictures(Results(record, projections))
    return replace_all(folder, {**_tables(summary, description), **pictures, RECORD: _json(record)})


def write_data(
    summary: Summary, record: Mapping[str, Any], folder: Path, description: Description | None = None
) -> list[Path]:
    """Do as `write_outputs` does, without figures and report: `mmextract report` makes them from what is written."""
    return replace_all(folder, {**_tables(summary, description), RECORD: _json(record)})


def _tables(summary: Summary, description: Description | None) -> dict[str, Content]:
    table = make_table(summary.rows)
    return {
        "probe.csv": to_csv(table),
        "probe.parquet": to_parquet(table),
        "scores.parquet": partial(write_scores, summary),
        **_describing_files(description),
    }


def _json(record: Mapping[str, Any]) -> bytes:
    return (json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _describing_files(description: Description | None) -> dict[str, bytes]:
    """Return the tables of a description, of those that it has."""
    files: dict[str, bytes] = {}
    if description and (table := description.table()) is not None:
        files |= {"separability.csv": to_csv(table), "separability.parquet": to_parquet(table)}
    if description and description.projections is not None:
        files[PROJECTIONS] = to_parquet(description.projections)
    return files


def write_pictures(results: Results, folder: Path) -> list[Path]:
    """Write the figures and the report of results into `folder` and return their paths. Raises OSError."""
    return replace_all(folder, make_pictures(results))


def write_tables(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Write probe.csv and probe.parquet of rows that may come of several runs. Raises OSError."""
    table = make_table(rows)
    return replace_all(folder, {"probe.csv": to_csv(table), "probe.parquet": to_parquet(table)})


def make_record(summary: Summary, command: str, description: Description | None = None) -> dict[str, Any]:
    """Return everything about the run, JSON-able: what was found, from what, how, with which versions.

    command: what the user ran, to be written down. description: how the states lie, if that was looked at.
    """
    plan, design = summary.plan, summary.plan.design
    n_in_class = np.bincount(design.y, minlength=len(design.classes)).tolist()
    return {
        "format": FORMAT,
        "headline": summary.headline,
        "statement": summary.statement,
        "qualification": summary.qualification,
        "warnings": summary.warnings,
        "notes": list(design.notes),
        "best": asdict(summary.best),
        "command": command,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in PACKAGES},
        },
        "store": {
            "path": str(plan.store),
            "n_samples": plan.n_stored,
            "fingerprint": fingerprint(plan.attributes),
            "attributes": dict(plan.attributes),
        },
        "settings": asdict(plan.settings),
        "design": {
            "label": design.label,
            "classes": dict(zip(design.classes, n_in_class, strict=True)),
            "positive": design.classes[1] if len(design.classes) == 2 else None,
            "group": design.group,
            "structure": design.structure,
            "n_samples": design.n_samples,
            "n_groups": design.n_groups,
            "dropped": dict(design.dropped),
            "control": None if summary.is_paper else SHUFFLES[design.structure],
        },
        "permutations": {
            "n": plan.settings.n_permutations,
            "shuffle": SHUFFLES[design.structure],
            "statistic": "largest AUROC over "
            f"C = {', '.join(f'{c:g}' for c in plan.settings.test_penalties)} on the first repeat's folds",
        }
        if summary.is_tested
        else None,
        "compare": _describe_other(plan.other),
        "states": describe_states(plan),
        "layers": list(plan.layers),
        "positions": list(plan.positions),
        "fits": {
            "n": summary.n_fits,
            "n_unconverged": summary.n_unconverged,
            "solvers": sorted({s.solver for cell in summary.scores.values() for s in cell.tasks if s.solver}),
            "worst_residual": max(s.worst_residual for cell in summary.scores.values() for s in cell.tasks),
        },
        "columns": dict(COLUMNS),
        "score_columns": dict(SCORE_COLUMNS),
        "rows": [_finite(asdict(row)) for row in summary.rows],
        **(description.entries() if description else {}),
    }


def _describe_other(other: OtherStore | None) -> dict[str, Any] | None:
    if other is None:
        return None
    return {
        "path": str(other.place),
        "fingerprint": fingerprint(other.attributes),
        "attributes": dict(other.attributes),
    }


def fingerprint(attributes: Mapping[str, Any]) -> str:
    """Return a hash of how a store was made, hex: two stores have the same if the same run made them."""
    return hashlib.sha256(json.dumps(attributes, sort_keys=True).encode()).hexdigest()


def _finite(row: dict[str, Any]) -> dict[str, Any]:
    """Return the row with null for what JSON cannot say."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}


def make_table(rows: Sequence[Row]) -> pa.Table:
    """Return the tidy table, a row a (layer, position, task, metric); `COLUMNS` says what each column means."""
    return pa.Table.from_pylist([asdict(row) for row in rows], schema=_SCHEMA)


def to_csv(table: pa.Table) -> bytes:
    """Return a table as a CSV file."""
    out = io.BytesIO()
    pyarrow.csv.write_csv(table, out)
    return out.getvalue()


def to_parquet(table: pa.Table) -> bytes:
    """Return a table as a Parquet file."""
    out = io.BytesIO()
    pyarrow.parquet.write_table(table, out, compression="zstd")
    return out.getvalue()


def replace_all(folder: Path, contents: Mapping[str, Content]) -> list[Path]:
    """Write every file under a temporary name, then put all in place, in the order given.

    Raises OSError, which names a path, if that fails; before the first is in place, none was replaced.
    """
    folder.mkdir(parents=True, exist_ok=True)
    temporary = {name: folder / f".{name}.{os.getpid()}.tmp" for name in contents}
    try:
        for name, content in contents.items():
            with temporary[name].open("wb") as file:
                if isinstance(content, bytes):
                    file.write(content)
                else:
                    content(file)
        for name, path in temporary.items():
            path.replace(folder / name)
    except OSError as error:  # those of writing do not say where
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(folder)) from error
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)
    return [folder / name for name in contents]
