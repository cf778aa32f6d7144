from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
import xxhash
import zarr

from mmextract.engine import completion
from mmextract.engine.assembly import to_numpy
from mmextract.engine.integrity import fingerprint, shard_seed
from mmextract.engine.layout import Layout
from mmextract.engine.lease import Lease
from mmextract.engine.processes import this_process
from mmextract.engine.store import open_store
from mmextract.engine.writer import OtherRunError, StoreWriter, open_writer

N, S = 10, 4


@pytest.fixture(scope="module")
def executor() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as pool:
        yield pool


def layout(dtype: str = "float32", codec: str = "lz4") -> Layout:
    return Layout(
        n_samples=N,
        layers=(-1, 0, 3),
        positions=("last", "image"),
        hidden_size=16,
        dtype=dtype,
        codec=codec,
        shard_samples=S,
        record_fields=("n_tokens", "image_hash"),
    )


def open_new(path: Path, executor: ThreadPoolExecutor, chosen: Layout | None = None) -> StoreWriter:
    columns: dict[str, Any] = {"sample": [f"s{i}" for i in range(N)], "age": np.arange(N)}
    return open_writer(path, chosen or layout(), columns, {"run": {"model": {"a": 1, "b": [2]}}}, executor)


def states(dtype: str) -> torch.Tensor:
    return torch.randn(N, 3, 2, 16, generator=torch.Generator().manual_seed(0)).to(getattr(torch, dtype))


def write(writer: StoreWriter, shard: int, rejected: dict[int, str] | None = None) -> None:
    rows = writer.layout.rows(shard)
    chunks, records = writer.layout.empty_shard(), writer.layout.empty_records()
    chunks[:, : len(rows)] = to_numpy(states(writer.layout.dtype)[rows.start : rows.stop]).swapaxes(0, 1)
    records[: len(rows)] = [(row, -row) for row in rows]
    writer.write_shard(shard, chunks, records, rejected or {})


def complete(path: Path, executor: ThreadPoolExecutor, chosen: Layout | None = None) -> StoreWriter:
    writer = open_new(path, executor, chosen)

    def compute(writer: StoreWriter, missing: Sequence[int], held: Lease) -> None:
        for shard in missing:
            write(writer, shard, {1: "no such file: é"} if shard == 1 else None)

    completion.complete(writer, compute)
    return writer


def tree(path: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()
    }


@pytest.mark.parametrize("codec", ["lz4", "zstd", "none"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_zarr_reads_what_was_written(
    tmp_path: Path, executor: ThreadPoolExecutor, dtype: str, codec: str
) -> None:
    complete(tmp_path / "a.zarr", executor, layout(dtype, codec))
    group = zarr.open_group(tmp_path / "a.zarr", mode="r")
    assert np.array_equal(np.asarray(group["hidden_states"]), to_numpy(states(dtype)))
    store = open_store(tmp_path / "a.zarr")
    for index, layer in enumerate(store.layers):
        expected = states(dtype)[:, index, 1]
        read = torch.from_numpy(store.read(int(layer), "image"))
        assert torch.equal(read, expected.float() if dtype == "bfloat16" else expected)


def test_xarray_opens_it_labelled_and_without_a_warning(tmp_path: Path, executor: ThreadPoolExecutor) -> None:
    complete(tmp_path / "a.zarr", executor)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opened = xr.open_zarr(tmp_path / "a.zarr")
        chosen = opened.hidden_states.sel(sample="s7", layer=3, position="last").values
    assert opened.hidden_states.dims == ("sample", "layer", "position", "hidden")
    assert np.array_equal(chosen, states("float32")[7, 2, 0].numpy())
    assert opened.n_tokens.values.tolist() == list(range(N))


def test_records_become_columns_and_hashes_stay_unsigned(
    tmp_path: Path, executor: ThreadPoolExecutor
) -> None:
    complete(tmp_path / "a.zarr", executor)
    columns = open_store(tmp_path / "a.zarr").columns
    assert columns["age"].tolist() == columns["n_tokens"].tolist() == list(range(N))
    assert columns["image_hash"].dtype == np.uint64 and columns["image_hash"][1] == 2**64 - 1
    assert columns["rejected"].tolist() == [""] * 5 + ["no such file: é"] + [""] * 4


def test_a_layer_is_one_chunk_of_each_shard(tmp_path: Path, executor: ThreadPoolExecutor) -> None:
    complete(tmp_path / "a.zarr", executor)
    array = open_store(tmp_path / "a.zarr").hidden_states
    assert array.shards == (S, 3, 2, 16) and array.chunks == (S, 1, 2, 16)


def test_a_digest_covers_every_object_of_its_shard(tmp_path: Path, executor: ThreadPoolExecutor) -> None:
    writer = complete(tmp_path / "a.zarr", executor)
    digests = np.asarray(zarr.open_group(tmp_path / "a.zarr", mode="r")["shard_digest"])
    for shard, digest in enumerate(digests):
        keys = [f"hidden_states/c/{shard}/0/0/0", f"record/c/{shard}/0", f"rejected/c/{shard}"]
        data = b"".join(writer.objects.get(key) or b"" for key in keys)
        run = fingerprint({"model": {"a": 1, "b": [2]}})
        assert digest == xxhash.xxh3_64_intdigest(data, seed=shard_seed(run, shard))


def test_reasons_of_an_earlier_attempt_do_not_stay(tmp_path: Path, executor: ThreadPoolExecutor) -> None:
    writer = open_new(tmp_path / "a.zarr", executor)
    write(writer, 0, {2: "out of reach for a while"})
    write(writer, 0)
    assert not writer.rejected() and writer.objects.get("rejected/c/0") is None


def test_what_has_no_digest_does_not_exist(tmp_path: Path, executor: ThreadPoolExecutor) -> None:
    writer = open_new(tmp_path / "a.zarr", executor)
    for shard in range(3):
        write(writer, shard)
    (tmp_path / "a.zarr" / "shard_digest/c/1").unlink()
    assert writer.committed() == {0, 2}
    store = open_store(tmp_path / "a.zarr")
    assert store.missing == S
    read = store.read(0, "last")
    assert np.isnan(read[4:8]).all() and not np.isnan(read[:4]).any() and not np.isnan(read[8:]).any()


def test_an_interrupted_run_ends_in_the_same_bytes(tmp_path: Path, executor: ThreadPoolExecutor) -> None:
    complete(tmp_path / "whole.zarr", executor)
    writer = open_new(tmp_path / "part.zarr", executor)
    write(writer, 1, {1: "no such file: é"})
    (tmp_path / "part.zarr" / "hidden_states/c/2/0/0").mkdir(parents=True)
    for left in (
        "hidden_states/c/2/0/0/.0.ab.partial",
        "shard_digest/c/.2.cd.partial",
        ".zarr.json.ef.partial",
    ):
        (tmp_path / "part.zarr" / left).write_bytes(b"half a sha")  # as a kill leaves it
    assert open_new(tmp_path / "part.zarr", executor).committed() == {1}
    complete(tmp_path / "part.zarr", executor)
    assert tree(tmp_path / "part.zarr") == tree(tmp_path / "whole.zarr")


def test_a_kill_during_creation_or_finalisation_leaves_nothing_behind(
    tmp_path: Path, executor: ThreadPoolExecutor
) -> None:
    complete(tmp_path / "whole.zarr", executor)
    dead = replace(this_process(), started=1)
    (tmp_path / f".part.zarr.{dead}.0.creating/sample").mkdir(parents=True)
    (tmp_path / f".part.zarr.{this_process()}.0.creating/sample").mkdir(parents=True)
    writer = open_new(tmp_path / "part.zarr", executor)
    for shard in range(3):
        write(writer, shard, {1: "no such file: é"} if shard == 1 else None)
    (tmp_path / "part.zarr" / "n_tokens").mkdir()
    assert not writer.finalised()
    writer.finalise()
    writer.finalise()
    assert writer.finalised()
    assert tree(tmp_path / "part.zarr") == tree(tmp_path / "whole.zarr")
    assert [left.name for left in tmp_path.glob("*.creating")] == [f".part.zarr.{this_process()}.0.creating"]


def test_of_many_that_create_one_store_one_does_and_all_see_it_whole(
    tmp_path: Path, executor: ThreadPoolExecutor
) -> None:
    for i in range(5):
        with ThreadPoolExecutor(4) as many:
            writers = list(many.map(lambda _, i=i: open_new(tmp_path / f"{i}.zarr", executor), range(4)))
        assert all(writer.committed() == set() for writer in writers)
        assert open_store(tmp_path / f"{i}.zarr").missing == N
    assert not list(tmp_path.glob(".*"))


def test_a_store_of_another_run_is_refused_with_what_differs(
    tmp_path: Path, executor: ThreadPoolExecutor
) -> None:
    complete(tmp_path / "a.zarr", executor)
    before = tree(tmp_path / "a.zarr")
    with pytest.raises(OtherRunError, match=r"model\.b: the store has \[2\], this run has \[3\]"):
        open_writer(tmp_path / "a.zarr", layout(), {}, {"run": {"model": {"a": 1, "b": [3]}}}, executor)
    assert tree(tmp_path / "a.zarr") == before


def test_anything_else_at_the_path_is_left_alone(tmp_path: Path, executor: ThreadPoolExecutor) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.txt").write_text("precious")
    (tmp_path / "file").write_text("precious")
    zarr.create_group(tmp_path / "foreign.zarr")
    for name, message in (
        ("folder", "not a store"),
        ("file", "not a store"),
        ("foreign.zarr", "mmextract_format"),
    ):
        with pytest.raises(ValueError, match=message):
            open_new(tmp_path / name, executor)
    assert (tmp_path / "folder" / "thesis.txt").read_text() == "precious"


def test_reading_names_what_there_is(tmp_path: Path, executor: ThreadPoolExecutor) -> None:
    complete(tmp_path / "a.zarr", executor)
    store = open_store(tmp_path / "a.zarr")
    with pytest.raises(LookupError, match="no layer 7: it has -1, 0, 3"):
        store.read(7, "last")
    with pytest.raises(LookupError, match="no position 'mean': it has last, image"):
        store.read(0, "mean")
    with pytest.raises(ValueError, match="mmextract dump"):
        open_store(tmp_path / "none.zarr")


def test_a_damaged_chunk_is_an_error_and_not_a_number(tmp_path: Path, executor: ThreadPoolExecutor) -> None:
    complete(tmp_path / "a.zarr", executor)
    file = tmp_path / "a.zarr" / "hidden_states/c/0/0/0/0"
    data = bytearray(file.read_bytes())
    data[10] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match="checksum"):
        open_store(tmp_path / "a.zarr").read(-1, "last")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dtype": "int8"}, "dtype must be one of"),
        ({"codec": "rar"}, "codec must be"),
        ({"n_samples": 0}, "at least"),
    ],
)
def test_a_layout_that_makes_no_sense_is_refused(settings: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {"n_samples": 1, "layers": (0,), "positions": ("last",), "hidden_size": 1}
    with pytest.raises(ValueError, match=message):
        Layout(**{**good, **settings})


def test_metadata_are_consolidated_only_at_the_end(tmp_path: Path, executor: ThreadPoolExecutor) -> None:
    writer = open_new(tmp_path / "a.zarr", executor)
    assert "consolidated_metadata" not in json.loads((tmp_path / "a.zarr" / "zarr.json").read_text())
    for shard in range(3):
        write(writer, shard)
    writer.finalise()
    assert "consolidated_metadata" in json.loads((tmp_path / "a.zarr" / "zarr.json").read_text())
