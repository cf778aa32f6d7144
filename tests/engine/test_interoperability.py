"""Row L of the fault matrix: what others read of a finished store is what was dumped, and they warn of nothing."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import dask.array
import numpy as np
import pytest
import tensorstore
import torch
import xarray as xr
import zarr
from numpy.typing import NDArray

from mmextract.engine.layout import Layout
from mmextract.engine.shards import CODECS
from mmextract.engine.store import open_store
from mmextract.engine.writer import open_writer
from tests.faults.outcomes import record

N, D = 7, 16
POSITIONS = {"pooled": ("last", "image"), "all tokens": tuple(str(token) for token in range(6))}

pytestmark = pytest.mark.filterwarnings("error")


def stored_states(dtype: str, n_positions: int) -> NDArray[Any]:
    """[N, 3, P, D] as stored; of all tokens the last are padding, and row 4 was rejected."""
    values = torch.randn(N, 3, n_positions, D, generator=torch.Generator().manual_seed(0))
    if n_positions > 2:
        values[::2, :, 4:] = torch.nan
    values[4] = torch.nan
    if dtype == "bfloat16":
        return values.to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    return values.numpy().astype(dtype)


@pytest.fixture(
    params=[(c, d, p) for c in CODECS for d in ("float32", "float16", "bfloat16") for p in POSITIONS],
    ids="-".join,
)
def case(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, NDArray[Any], str]:
    """A finished store, what it holds, and the dtype of what it stands for."""
    codec, dtype, kind = request.param
    positions = POSITIONS[kind]
    layout = Layout(
        n_samples=N,
        layers=(-1, 0, 5),
        positions=positions,
        hidden_size=D,
        dtype=dtype,
        codec=codec,
        shard_samples=3,
    )
    states, path = stored_states(dtype, len(positions)), tmp_path / "a.zarr"
    with ThreadPoolExecutor(1) as executor:
        columns = {"sample": [f"s{row}" for row in range(N)], "answer": ["yes", "no"] * 3 + ["é"]}
        writer = open_writer(path, layout, columns, {"run": {"codec": codec}}, executor)
        for shard in range(layout.n_shards):
            rows, chunks, records = layout.rows(shard), layout.empty_shard(), layout.empty_records()
            chunks[:, : len(rows)] = states[rows.start : rows.stop].swapaxes(0, 1)
            records[: len(rows), 0] = rows
            writer.write_shard(shard, chunks, records, {1: "not an image"} if shard == 1 else {})
        writer.finalise()
    return path, states, dtype


@pytest.fixture(scope="module")
def tally() -> Iterator[dict[str, bool]]:
    """Case → whether it held; recorded at the end."""
    held: dict[str, bool] = {}
    started = time.monotonic()
    yield held
    failed = [name for name, good in held.items() if not good]
    outcome = {"cases": len(held), "losses": len(failed), "reproduce": failed, "zarr": zarr.__version__}
    record("L", outcome, time.monotonic() - started)


def same(read: Any, expected: NDArray[Any]) -> bool:
    array = np.asarray(read)
    return array.dtype == expected.dtype and array.tobytes() == expected.tobytes()


def test_every_reader_gives_the_same_bits(
    request: pytest.FixtureRequest, case: tuple[Path, NDArray[Any], str], tally: dict[str, bool]
) -> None:
    path, states, _ = case
    tally[request.node.name] = False
    opened = xr.open_zarr(path)
    assert opened.hidden_states.dims == ("sample", "layer", "position", "hidden")
    assert opened.layer.values.tolist() == [-1, 0, 5] and opened.answer.values.tolist()[-1] == "é"
    assert same(xr.open_zarr(path, mask_and_scale=False).hidden_states.values, states)
    assert same(zarr.open_group(path, mode="r")["hidden_states"], states)
    lazy: Any = dask.array.from_zarr(str(path), component="hidden_states")
    assert same(lazy.compute(scheduler="sync"), states)
    tally[request.node.name] = True


def test_tensorstore_gives_the_same_bits(
    request: pytest.FixtureRequest, case: tuple[Path, NDArray[Any], str], tally: dict[str, bool]
) -> None:
    path, states, _ = case
    tally[request.node.name] = False
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{path}/hidden_states/"}}
    assert same(tensorstore.open(spec, read=True).result().read().result(), states)
    tally[request.node.name] = True


def test_our_own_views_give_the_same_values(case: tuple[Path, NDArray[Any], str]) -> None:
    path, states, dtype = case
    store = open_store(path)
    bits = states.view(np.int16) if dtype == "bfloat16" else states
    tensors = torch.from_numpy(bits).view(getattr(torch, dtype))
    for index, layer in enumerate(store.layers.tolist()):
        for place, position in enumerate(store.positions):
            expected = tensors[:, index, place]
            read = store.to_torch(layer, position)
            assert read.dtype == expected.dtype
            assert torch.equal(read.view(torch.uint8), expected.contiguous().view(torch.uint8))
            values = expected.float().numpy() if dtype == "bfloat16" else expected.numpy()
            assert same(store.read(layer, position), np.ascontiguousarray(values))
            lazy: Any = store.to_dask(layer, position)
            assert lazy.chunks == ((3, 3, 1), (D,)) and lazy.dtype == values.dtype
            assert same(lazy.compute(scheduler="sync"), np.ascontiguousarray(values))
