from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from mmextract.engine.export import ExportPlan, plan_export, run_export
from mmextract.engine.store import Store, open_store
from tests.faults.small_store import REJECTED, make_layout, run


def make(folder: Path, dtype: str = "float32", **more: Any) -> Store:
    run(folder / "a", layout=make_layout(dtype), **more)
    return open_store(folder / "a")


def export(store: Store, output: Path, **settings: Any) -> ExportPlan:
    plan = plan_export(store, output, output.suffix[1:], **settings)
    steps: list[int] = []
    assert run_export(plan, steps.append) == plan.files
    assert sum(steps) == plan.n_steps
    return plan


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_safetensors_hold_the_bits_of_the_store(tmp_path: Path, dtype: str) -> None:
    store = make(tmp_path, dtype)
    export(store, tmp_path / "a.safetensors", positions=["image"])
    tensors = load_file(tmp_path / "a.safetensors")
    assert list(tensors) == ["embed", "layer_0", "layer_3"]
    for name, layer in (("embed", -1), ("layer_0", 0), ("layer_3", 3)):
        expected = store.to_torch(layer, "image")
        assert tensors[name].dtype == expected.dtype == getattr(torch, dtype)
        assert torch.equal(tensors[name].view(torch.uint8), expected.view(torch.uint8))
    columns = pq.read_table(tmp_path / "a.safetensors.columns.parquet")
    assert columns["sample"].to_pylist() == store.columns["sample"].tolist()
    assert columns["image_hash"].to_pylist() == store.columns["image_hash"].tolist()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_npz_holds_layers_and_columns(tmp_path: Path, dtype: str) -> None:
    store = make(tmp_path, dtype)
    export(store, tmp_path / "a.npz", layers="0,3")
    with np.load(tmp_path / "a.npz") as arrays:
        layers = {"layer_0.last", "layer_0.image", "layer_3.last", "layer_3.image"}
        assert set(arrays) == layers | set(store.columns)
        assert np.array_equal(arrays["layer_3.image"], store.read(3, "image"), equal_nan=True)
        assert arrays["layer_3.image"].dtype == store.dtype
        assert arrays["question"].tolist() == store.columns["question"].tolist()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_parquet_has_a_row_a_sample(tmp_path: Path, dtype: str) -> None:
    store = make(tmp_path, dtype)
    export(store, tmp_path / "a.parquet", positions=["last"])
    table = pq.read_table(tmp_path / "a.parquet")
    assert table.num_rows == store.n_samples
    for name, layer in (("embed", -1), ("layer_3", 3)):
        flat = table[name].combine_chunks().flatten().to_numpy(zero_copy_only=False)
        assert flat.dtype == store.dtype
        assert np.array_equal(flat.reshape(-1, store.hidden_size), store.read(layer, "last"), equal_nan=True)
    reasons = [REJECTED.get(row, "") for row in range(store.n_samples)]
    assert table["rejected"].to_pylist() == reasons
    assert table["age"].to_pylist() == store.columns["age"].tolist()


@pytest.mark.parametrize("ending", ["safetensors", "npz", "parquet"])
def test_an_incomplete_store_is_exported_only_on_request(tmp_path: Path, ending: str) -> None:
    store = make(tmp_path, stop_after=3)
    with pytest.raises(ValueError, match="2 of 11 samples are missing"):
        export(store, tmp_path / f"a.{ending}")
    plan = export(store, tmp_path / f"a.{ending}", allow_incomplete=True, positions=["last"])
    assert plan.columns["committed"].tolist() == [True] * 9 + [False] * 2
    if ending == "parquet":
        rows = pq.read_table(tmp_path / "a.parquet")["layer_0"].to_pylist()
        assert np.isnan(rows[9:]).all() and not np.isnan(rows[:4]).any()


def test_a_file_that_exists_is_not_touched(tmp_path: Path) -> None:
    store = make(tmp_path)
    (tmp_path / "a.npz").write_text("precious")
    (tmp_path / "a.safetensors.columns.parquet").write_text("precious")
    for output in (tmp_path / "a.npz", tmp_path / "a.safetensors"):
        with pytest.raises(FileExistsError, match="exists: give another -o"):
            export(store, output)
    assert (tmp_path / "a.npz").read_text() == "precious" and not (tmp_path / "a.safetensors").exists()


@pytest.mark.parametrize("ending", ["safetensors", "npz", "parquet"])
def test_a_damaged_store_leaves_no_file_behind(tmp_path: Path, ending: str) -> None:
    store = make(tmp_path)
    (tmp_path / "a/hidden_states/c/3/0/0/0").unlink()
    with pytest.raises(FileNotFoundError, match="lost shard 3"):
        export(store, tmp_path / f"out/a.{ending}")
    assert list((tmp_path / "out").iterdir()) == []


def test_what_the_store_does_not_have_is_named(tmp_path: Path) -> None:
    store = make(tmp_path)
    for settings, message in (
        ({"layers": "1"}, "no layer 1: it has -1, 0, 3"),
        ({"layers": "9"}, "out of range"),
        ({"positions": ["mean"]}, "no position 'mean'"),
    ):
        with pytest.raises((LookupError, ValueError), match=message):
            plan_export(store, tmp_path / "a.npz", "npz", **settings)
    with pytest.raises(ValueError, match="format must be one of"):
        plan_export(store, tmp_path / "a.csv", "csv")
