"""Layers of a store as one file that others read: safetensors, NumPy's npz, or Parquet.

A layer is named `layer_0` or `embed`; where several positions are taken, `layer_0.last` and so on. The columns go
along: as arrays of the npz, as columns of the Parquet file, and beside a safetensors file as FILE.columns.parquet.
A file is written whole or not at all. Rows of rejected samples are NaN, as in the store, and `rejected` says why.

This module knows nothing of how a store is stored.
"""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mmextract.engine.files import flush_folder
from mmextract.engine.selection import parse_layers
from mmextract.engine.store import Store

if TYPE_CHECKING:
    import pyarrow as pa

FORMATS = ("safetensors", "npz", "parquet")
_SAFETENSORS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}

Progress = Callable[[int], None]


@dataclass(frozen=True, kw_only=True)
class ExportPlan:
    """What to export; see `plan_export`."""

    store: Store
    format: str
    """One of FORMATS."""
    output: Path
    layers: tuple[int, ...]
    """Values of the store's layer coordinate."""
    positions: tuple[str, ...]
    """Names of the store's positions."""
    columns: Mapping[str, NDArray[Any]]
    """Column → one value a sample."""

    @property
    def n_steps(self) -> int:
        """How often `run_export` reports progress."""
        return (
            -(-self.store.n_samples // self.store.shard_samples)
            if self.format == "parquet"
            else len(self.layers)
        )

    @property
    def files(self) -> list[Path]:
        """What is written."""
        beside = [self.output.with_name(f"{self.output.name}.columns.parquet")]
        return [self.output, *(beside if self.format == "safetensors" else [])]

    def name(self, layer: int, position: str) -> str:
        """Return what a layer at a position is called."""
        name = "embed" if layer < 0 else f"layer_{layer}"
        return name if len(self.positions) == 1 else f"{name}.{position}"


def plan_export(
    store: Store,
    output: Path,
    format: str,
    *,
    layers: str = "all",
    positions: Sequence[str] = (),
    allow_incomplete: bool = False,
) -> ExportPlan:
    """Work out what to export. layers: as for `selection.parse_layers`, `all` being all of the store's. positions: too.

    With `allow_incomplete`, samples that the store lacks are NaN, and a column `committed` tells them.
    Raises ValueError or LookupError for what the store does not have, FileExistsError for an output that is there.
    """
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    if not store.finished and not allow_incomplete:
        raise ValueError(
            f"{store.url} is incomplete: {store.missing} of {store.n_samples} samples are missing. Run the same "
            "`mmextract dump` again to finish it, or give --allow-incomplete"
        )
    chosen = tuple(positions) or tuple(store.positions)
    numbers = (
        tuple(store.layers.tolist()) if layers == "all" else parse_layers(layers, int(store.layers.max()) + 1)
    )
    for layer in numbers:
        store.find(layer, chosen)
    columns = {**store.columns, **({} if store.finished else {"committed": store.committed})}
    plan = ExportPlan(
        store=store, format=format, output=output, layers=numbers, positions=chosen, columns=columns
    )
    _refuse(plan)
    return plan


def _refuse(plan: ExportPlan) -> None:
    for file in plan.files:
        if os.path.lexists(file):
            raise FileExistsError(f"{file} exists: give another -o, or remove it")
    names = {plan.name(layer, position) for layer in plan.layers for position in plan.positions}
    if both := sorted(names & set(plan.columns)):
        raise ValueError(
            f"{plan.store.url} has a column named like a layer ({', '.join(both)}): it cannot be exported"
        )


def run_export(plan: ExportPlan, on_progress: Progress = lambda n: None) -> list[Path]:
    """Write the file, and what goes beside it, flushed to disk. Returns their paths.

    safetensors and npz hold one layer in memory at a time, Parquet one shard. Raises ValueError or FileNotFoundError
    for a damaged store, OSError if a file cannot be written; there is no file then.
    """
    write = {"safetensors": _write_safetensors, "npz": _write_npz, "parquet": _write_parquet}[plan.format]
    with ExitStack() as stack:  # all files or none, and the one that was asked for last
        files = [stack.enter_context(_whole_file(path)) for path in plan.files]
        write(plan, files[0], on_progress)
        for file in files[1:]:
            _write_table(file, plan.columns)
    return plan.files


@contextmanager
def _whole_file(path: Path) -> Iterator[IO[bytes]]:
    """Yield a file that stands at `path`, on disk, once the context is left without an exception."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.partial")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    flush_folder(path.parent)


def _write_safetensors(plan: ExportPlan, file: IO[bytes], on_progress: Progress) -> None:
    """Write the format by hand, since the library takes all tensors at once.

    It is the length of the header (8 bytes), the header in JSON, and the tensors one after the other:
    https://github.com/huggingface/safetensors#format
    """
    store = plan.store
    dtype = str(store.attributes["dtype"])
    size = store.n_samples * store.hidden_size * store.hidden_states.dtype.itemsize
    names = [plan.name(layer, position) for layer in plan.layers for position in plan.positions]
    header: dict[str, Any] = {
        "__metadata__": {"format": "pt", "run": json.dumps(store.attributes.get("run"))}
    }
    for index, name in enumerate(names):
        offsets = [index * size, (index + 1) * size]
        shape = [store.n_samples, store.hidden_size]
        header[name] = {"dtype": _SAFETENSORS[dtype], "shape": shape, "data_offsets": offsets}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little"))
    file.write(text)
    for layer in plan.layers:
        states = store.read_positions(layer, plan.positions, as_stored=True)
        for index in range(len(plan.positions)):
            file.write(np.ascontiguousarray(states[:, index]).data)
        on_progress(1)


def _write_npz(plan: ExportPlan, file: IO[bytes], on_progress: Progress) -> None:
    """Write what `numpy.savez` writes, an array at a time; bfloat16 becomes float32."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:

        def add(name: str, array: NDArray[Any]) -> None:
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array, allow_pickle=False)

        for layer in plan.layers:
            states = plan.store.read_positions(layer, plan.positions)
            for index, position in enumerate(plan.positions):
                add(plan.name(layer, position), np.ascontiguousarray(states[:, index]))
            on_progress(1)
        for name, values in plan.columns.items():
            add(name, values.astype(np.str_) if values.dtype == object else values)


def _write_parquet(plan: ExportPlan, file: IO[bytes], on_progress: Progress) -> None:
    """Write one row a sample, one row group a shard; a layer is a fixed-size list, bfloat16 becomes float32."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    store = plan.store
    table = _to_table(plan.columns)
    kind = pa.list_(pa.from_numpy_dtype(store.dtype), store.hidden_size)
    names = [plan.name(layer, position) for layer in plan.layers for position in plan.positions]
    schema = pa.schema([*table.schema, *(pa.field(name, kind) for name in names)])
    schema = schema.with_metadata({"run": json.dumps(store.attributes.get("run"))})
    with pq.ParquetWriter(file, schema, compression="zstd") as writer:
        for shard, start in enumerate(range(0, store.n_samples, store.shard_samples)):
            part = table.slice(start, store.shard_samples)
            states = [
                pa.FixedSizeListArray.from_arrays(column.reshape(-1), type=kind)
                for layer in plan.layers
                for column in _read_rows(plan, shard, layer)
            ]
            writer.write_table(pa.table([*part.columns, *states], schema=schema), row_group_size=len(part))
            on_progress(1)


def _read_rows(plan: ExportPlan, shard: int, layer: int) -> NDArray[Any]:
    """Return [P, rows of the shard, D] of a layer; NaN if the shard is not committed."""
    store = plan.store
    layer_index, position_indices = store.find(layer, plan.positions)
    if store.has_shard(shard):
        return store.read_shard(shard, layer_index, position_indices).swapaxes(0, 1)
    n_rows = min(store.shard_samples, store.n_samples - shard * store.shard_samples)
    return np.full((len(plan.positions), n_rows, store.hidden_size), np.nan, store.dtype)


def _to_table(columns: Mapping[str, NDArray[Any]]) -> pa.Table:
    import pyarrow as pa

    return pa.table(
        {
            name: pa.array(values, pa.string()) if values.dtype == object else pa.array(values)
            for name, values in columns.items()
        }
    )


def _write_table(file: IO[bytes], columns: Mapping[str, NDArray[Any]]) -> None:
    import pyarrow.parquet as pq

    pq.write_table(_to_table(columns), file)
