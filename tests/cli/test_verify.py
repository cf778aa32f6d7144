"""`verify`, `info` and `export` as the shell calls them, on a store of the real writer."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mmextract.engine.lease import Lease
from mmextract.engine.objects import LocalObjects
from mmextract.engine.verify import plan_verify, run_verify, withdraw
from tests.cli.conftest import Ran
from tests.faults.small_store import run as write_store
from tests.faults.small_store import tree

Run = Callable[..., Ran]


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A finished store of four shards."""
    write_store(tmp_path / "a.zarr")
    return tmp_path / "a.zarr"


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def test_a_sound_store_is_sound(run: Run, store: Path) -> None:
    before = tree(store)
    ran = run("verify", store)
    assert ran.code == 0 and "is sound. 4 of 4 shards" in ran.out
    assert tree(store) == before


def test_bad_shards_are_named_and_withdrawn_and_the_same_run_repairs_them(run: Run, store: Path) -> None:
    before = tree(store)
    flip(store / "hidden_states/c/1/0/0/0")
    (store / "record/c/2/0").unlink()
    (store / "age/c/0").write_bytes(b"")
    ran = run("verify", store)
    assert ran.code == 1
    assert "2 shards and 1 objects of metadata and columns" in ran.out
    assert "shard 1: hidden_states/c/1/0/0/0: damaged at index" in ran.out
    assert "shard 2: record/c/2/0: it is missing" in ran.out and "age/c/0: it is not what was" in ran.out
    assert write_store(store) == [1, 2]
    assert tree(store) == before
    assert run("verify", store).code == 0


def test_read_only_changes_nothing(run: Run, store: Path) -> None:
    flip(store / "hidden_states/c/1/0/0/0")
    before = tree(store)
    ran = run("verify", store, "--read-only", "--json")
    record = json.loads(ran.out)
    assert ran.code == 1 and record["bad_shards"] == [1] and not record["withdrawn"] and not record["sound"]
    assert record["damage"][0]["key"] == "hidden_states/c/1/0/0/0"
    assert tree(store) == before


def test_a_store_that_is_not_finished_is_not_sound(run: Run, tmp_path: Path) -> None:
    write_store(tmp_path / "part.zarr", stop_after=2)
    ran = run("verify", tmp_path / "part.zarr")
    assert ran.code == 1 and "sound so far, and incomplete. 2 of 4 shards" in ran.out


def test_what_is_no_store_is_said(run: Run, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    assert "not a store of mmextract" in run("verify", tmp_path / "folder").err
    assert "there is no store" in run("verify", tmp_path / "nothing").err


def test_info_and_probe_say_that_a_withdrawn_store_is_incomplete(run: Run, store: Path) -> None:
    whole = json.loads(run("info", store, "--json").out)
    assert whole["state"] == "complete" and "digests" not in whole["attributes"]
    flip(store / "hidden_states/c/0/0/0/0")
    run("verify", store)
    record = json.loads(run("info", store, "--json").out)
    assert record["state"].startswith("incomplete")
    assert record["samples"] == "11 (8 committed, 3 missing, 2 rejected)"
    ratio, whole_ratio = (float(text.split(", ")[1].split()[0]) for text in (record["size"], whole["size"]))
    assert ratio == pytest.approx(whole_ratio, rel=0.1)
    ran = run("probe", store, "--label", "age", "-o", store.parent / "probe")
    assert ran.code == 1 and "3 of 11 samples are missing" in ran.err


def test_nothing_is_withdrawn_from_a_store_that_a_run_is_writing(run: Run, store: Path) -> None:
    flip(store / "hidden_states/c/1/0/0/0")
    (store / "age/c/0").write_bytes(b"")
    with Lease(objects=LocalObjects(store)):
        before = tree(store)
        ran = run("verify", store, "--json")
        assert tree(store) == before
        looked = run("verify", store, "--read-only")
    record = json.loads(ran.out)
    assert ran.code == 1 and record["bad_shards"] == [1] and not record["withdrawn"]
    assert (
        f"nothing was withdrawn: {store} is being written by another run: process {os.getpid()} on" in ran.err
    )
    assert looked.code == 1 and "is being written" not in looked.err
    assert "This is withdrawn" in run("verify", store).out
    assert not list((store / "shard_digest").glob("lease*"))


def test_what_a_run_has_repaired_since_it_was_looked_at_is_not_withdrawn(store: Path) -> None:
    whole = tree(store)
    for key in ("hidden_states/c/1/0/0/0", "record/c/2/0", "age/c/0"):
        flip(store / key)
    plan = plan_verify(store)
    report = run_verify(plan)
    assert report.bad_shards == [1, 2] and len(report.damage) == 3
    for key in ("record/c/2/0", "age/c/0"):
        (store / key).write_bytes(whole[key])
    assert withdraw(plan, report)
    assert write_store(store) == [1] and tree(store) == whole
    assert not withdraw(plan, report) and tree(store) == whole


def test_export_goes_by_the_ending_of_the_file(run: Run, store: Path) -> None:
    ran = run(
        "export", store, "-o", store.parent / "a.npz", "--layers", "embed,3", "--position", "last", "--json"
    )
    assert ran.code == 0 and json.loads(ran.out)["layers"] == ["embed", "layer_3"]
    assert np.load(store.parent / "a.npz")["layer_3"].shape == (11, 8)
    assert "exists" in run("export", store, "-o", store.parent / "a.npz").err
    unknown = run("export", store, "-o", store.parent / "a.bin")
    assert unknown.code == 2 and "--format" in unknown.err


def test_a_store_that_cannot_be_written_is_looked_at_all_the_same(
    run: Run, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    flip(store / "hidden_states/c/1/0/0/0")
    monkeypatch.setattr(Path, "replace", refuse)  # a mode would not keep root from writing
    before = tree(store)
    ran = run("verify", store)
    assert ran.code == 1 and "shard 1: hidden_states" in ran.out
    assert "cannot be written, so that nothing could be withdrawn" in ran.err
    assert tree(store) == before
