"""A layer as a Dask array or a tensor: lazy, over what is committed, with errors that say what there is."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mmextract.engine.store import open_store
from tests.faults.small_store import make_layout, run


def test_a_dask_array_reads_only_what_is_asked_of_it(tmp_path: Path) -> None:
    run(tmp_path / "a")
    lazy: Any = open_store(tmp_path / "a").to_dask(0, "last")
    (tmp_path / "a/hidden_states/c/0/0/0/0").unlink()
    assert lazy.chunks == ((3, 3, 3, 2), (8,))
    assert not np.isnan(lazy[6:9].compute(scheduler="sync")).any()
    with pytest.raises(FileNotFoundError, match="lost shard 0"):
        lazy.compute(scheduler="sync")


def test_what_is_not_committed_is_nan(tmp_path: Path) -> None:
    run(tmp_path / "a", stop_after=2, layout=make_layout("bfloat16"))
    store = open_store(tmp_path / "a")
    expected = np.array([False] * 4 + [True] * 7)
    lazy: Any = store.to_dask(3, "image")
    assert (np.isnan(lazy.compute(scheduler="sync")).all(1) == expected).all()
    tensor = store.to_torch(3, "image")
    assert tensor.dtype == torch.bfloat16
    assert (tensor.isnan().all(1).numpy() == expected).all()


def test_an_array_can_be_sent_to_a_worker_without_the_columns_that_were_read(tmp_path: Path) -> None:
    run(tmp_path / "a")
    store = open_store(tmp_path / "a")
    assert len(store.columns["question"]) == 11
    sent = pickle.dumps(store.to_dask(-1, "last"))
    assert b"is it 3?" not in sent
    received = pickle.loads(sent).compute(scheduler="sync")
    assert np.array_equal(received, store.read(-1, "last"), equal_nan=True)


def test_views_name_what_there_is(tmp_path: Path) -> None:
    run(tmp_path / "a")
    store = open_store(tmp_path / "a")
    with pytest.raises(LookupError, match="no layer 7: it has -1, 0, 3"):
        store.to_dask(7, "last")
    with pytest.raises(LookupError, match="no position 'mean': it has last, image"):
        store.to_torch(0, "mean")


@pytest.mark.parametrize("damaged", ["question/c/0", "layer/c/0", "n_tokens/c/0", "question/zarr.json"])
def test_a_column_that_is_lost_is_an_error_and_not_an_empty_text(tmp_path: Path, damaged: str) -> None:
    run(tmp_path / "a")
    (tmp_path / "a" / damaged).unlink()
    store = open_store(tmp_path / "a")
    with pytest.raises(ValueError, match=rf"{damaged}: it is missing"):
        _ = store.columns, store.layers


def test_a_column_that_changed_is_an_error(tmp_path: Path) -> None:
    run(tmp_path / "a")
    file = tmp_path / "a/age/c/0"
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    with pytest.raises(ValueError, match="age/c/0: it is not what was written"):
        _ = open_store(tmp_path / "a").columns
