"""The stores that released versions wrote open for ever and hold what make.py wrote down."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from mmextract.engine.store import open_store
from mmextract.engine.verify import plan_verify, run_verify
from tests.golden.make import COLUMNS, LAYERS, POSITIONS, RECORDS, REJECTED, states

STORES = sorted(path.parent for path in Path(__file__).parent.glob("v*/*/zarr.json"))


def name(path: Path) -> str:
    return f"{path.parent.name}-{path.name}"


def test_there_is_one_of_every_dtype() -> None:
    assert {path.name for path in STORES} == {"float32", "float16", "bfloat16"}


@pytest.mark.parametrize("path", STORES, ids=name)
def test_it_holds_what_was_written_down(path: Path) -> None:
    store = open_store(path)
    assert store.finished
    assert store.layers.tolist() == list(LAYERS) and store.positions == list(POSITIONS)
    for i, layer in enumerate(LAYERS):
        for j, position in enumerate(POSITIONS):
            read = store.read(layer, position)
            assert np.array_equal(read, states()[:, i, j].astype(read.dtype), equal_nan=True)
    for column, values in {**COLUMNS, **RECORDS}.items():
        assert store.columns[column].tolist() == values
    assert store.columns["rejected"].tolist() == [REJECTED.get(row, "") for row in range(len(states()))]


@pytest.mark.parametrize("path", STORES, ids=name)
@pytest.mark.filterwarnings("error")
def test_xarray_reads_it(path: Path) -> None:
    opened = xr.open_zarr(path)
    read = opened.hidden_states.sel(layer=2, position="image").values
    expected = states()[:, 2, 1]
    if path.name == "bfloat16":
        read = (read.astype(np.uint32) << 16).view(np.float32)
    assert np.array_equal(read, expected.astype(read.dtype), equal_nan=True)
    assert opened.n_tokens.values.tolist() == RECORDS["n_tokens"]


@pytest.mark.parametrize("path", STORES, ids=name)
def test_nothing_of_it_has_changed(path: Path) -> None:
    assert run_verify(plan_verify(path)).sound
