"""Ways to write and read hidden states, for comparison: ours, a raw write, and what the field uses.

What is written to must not be there yet.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zarr
from numpy.typing import NDArray

from mmextract.engine import direct, shards
from mmextract.engine.assembly import Assembler, Done
from mmextract.engine.dump import SHARD_BYTES
from mmextract.engine.layout import Layout
from mmextract.engine.staging import Staging
from mmextract.engine.writer import open_writer

BATCH = 64


def make_layout(states: NDArray[Any], codec: str) -> Layout:
    """Return the layout that a dump of `states`, float32 [N, L, P, D], would have."""
    n_samples, n_layers, n_positions, hidden_size = states.shape
    return Layout(
        n_samples=n_samples,
        layers=tuple(range(n_layers)),
        positions=tuple(map(str, range(n_positions))),
        hidden_size=hidden_size,
        codec=codec,
        shard_samples=min(n_samples, max(1, SHARD_BYTES // states[0].nbytes)),
    )


def whole_shards(states: NDArray[Any]) -> NDArray[Any]:
    """Return the states that fill whole shards, so that no way to write pads the last one; all, if they fill none."""
    shard = make_layout(states, "none").shard_samples
    return states[: len(states) // shard * shard]


def write_ours(states: NDArray[Any], codec: str, path: Path) -> int:
    """Write states as a dump does once the model has given them; return the bytes written."""
    layout = make_layout(states, codec)
    source = torch.from_numpy(states)
    nothing = torch.zeros(BATCH, states.shape[1], dtype=torch.int64)
    with ThreadPoolExecutor(os.cpu_count()) as executor:
        columns = {"sample": [str(i) for i in range(len(states))]}
        writer = open_writer(path, layout, columns, {"run": {}}, executor)
        with (
            Assembler(writer, lambda n_rows: None) as assembler,
            Staging(
                assembler.consume,
                shape=(BATCH, *states.shape[1:]),
                dtype=torch.float32,
                device=torch.device("cpu"),
            ) as staging,
        ):
            for shard in range(layout.n_shards):
                rows = layout.rows(shard)
                for start in range(rows.start, rows.stop, BATCH):
                    stop = min(start + BATCH, rows.stop)
                    slot, n = staging.acquire(), stop - start
                    # on a CPU the model writes where staging reads
                    slot.device = slot.host = source[start:stop]
                    done = Done(
                        shard=shard,
                        rows=tuple(range(start - rows.start, stop - rows.start)),
                        records=({"n_tokens": 1},) * n,
                        nonfinite=nothing[:n],
                        overflow=nothing[:n, 0],
                    )
                    staging.submit(slot, n, done)
        writer.finalise()
    return assembler.bytes_written


def shard_arrays(states: NDArray[Any]) -> list[NDArray[Any]]:
    """Return the shards, each [L, S, P, D]."""
    layout = make_layout(states, "none")
    return [
        np.ascontiguousarray(states[rows.start : rows.stop].swapaxes(0, 1))
        for rows in map(layout.rows, range(layout.n_shards))
    ]


def copy_to_shards(states: NDArray[Any], shard: NDArray[Any]) -> None:
    """Copy states into the order of a shard, [L, S, P, D], one shard after the other."""
    size = shard.shape[1]
    for start in range(0, len(states), BATCH):
        at, part = start % size, states[start : min(start + BATCH, (start // size + 1) * size)]
        np.copyto(shard[:, at : at + len(part)], part.swapaxes(0, 1))


def write_raw(parts: Sequence[bytes | memoryview], folder: Path) -> None:
    """Write the same bytes, a file a shard, each flushed to disk."""
    folder.mkdir()
    for index, part in enumerate(parts):
        with (folder / str(index)).open("wb") as file:
            file.write(part)
            file.flush()
            os.fsync(file.fileno())


def write_raw_direct(parts: Sequence[bytes | memoryview], folder: Path) -> None:
    """Do the same past the page cache."""
    folder.mkdir()
    for index, part in enumerate(parts):
        with (folder / str(index)).open("wb", buffering=0) as file:
            direct.write(file, [part])
            os.fsync(file.fileno())


def encode_only(parts: list[NDArray[Any]], codec: str, executor: ThreadPoolExecutor) -> None:
    """Run the codec and keep nothing."""
    for part in parts:
        shards.encode_shard(part, codec, executor)


def write_safetensors(parts: list[NDArray[Any]], folder: Path) -> None:
    """Write a file a shard, as most tools of the field do."""
    from safetensors.numpy import save_file

    folder.mkdir()
    for index, part in enumerate(parts):
        save_file(
            {f"layer_{layer}": array for layer, array in enumerate(part)}, folder / f"{index}.safetensors"
        )


def create_with_zarr_python(states: NDArray[Any], codec: str, path: Path) -> Path:
    """Create an empty array of our shards and chunks."""
    shape = (make_layout(states, codec).shard_samples, *states.shape[1:])
    zarr.create_array(
        path,
        shape=states.shape,
        dtype=states.dtype,
        shards=shape,
        chunks=(shape[0], 1, *shape[2:]),
        compressors=shards.zarr_compressors(codec, 4),
        config={"write_empty_chunks": True},
    )
    return path


def write_zarr_python(states: NDArray[Any], codec: str, path: Path) -> None:
    """Write through zarr-python's default pipeline, whole shards."""
    array = zarr.open_array(create_with_zarr_python(states, codec, path), config={"write_empty_chunks": True})
    for rows in map(make_layout(states, codec).rows, range(make_layout(states, codec).n_shards)):
        array[rows.start : rows.stop] = states[rows.start : rows.stop]


def open_tensorstore(path: Path) -> Any:
    """Open an array with tensorstore."""
    import tensorstore

    return tensorstore.open(
        {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path)}}, open=True
    ).result()


def write_tensorstore(states: NDArray[Any], codec: str, path: Path) -> None:
    """Write through tensorstore, whole shards into an array whose metadata zarr-python made."""
    array = open_tensorstore(create_with_zarr_python(states, codec, path))
    for rows in map(make_layout(states, codec).rows, range(make_layout(states, codec).n_shards)):
        array[rows.start : rows.stop].write(states[rows.start : rows.stop]).result()


def read_safetensors(folder: Path, layer: int) -> NDArray[Any]:
    """Read one layer of all samples from the files that `write_safetensors` wrote."""
    from safetensors import safe_open

    parts = []
    for index in range(len(list(folder.iterdir()))):
        with safe_open(folder / f"{index}.safetensors", "numpy") as file:
            parts.append(file.get_tensor(f"layer_{layer}"))
    return np.concatenate(parts)
