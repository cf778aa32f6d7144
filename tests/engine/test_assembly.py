"""Rows become shards: whole, in any order, and with no more of them in memory than there must be."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from stat import S_ISREG
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from mmextract.engine import direct, files
from mmextract.engine.assembly import BUFFERS, Assembler, Done
from mmextract.engine.layout import Layout
from mmextract.engine.store import open_store
from mmextract.engine.writer import StoreWriter, open_writer

N_SHARDS, S = 9, 4
STATES = torch.randn(N_SHARDS * S, 2, 1, 8, generator=torch.Generator().manual_seed(0))


class Counting(Layout):
    """Counts the buffers that were made."""

    made: list[int]

    def empty_shard(self) -> NDArray[Any]:
        self.made.append(1)
        return super().empty_shard()


def layout(codec: str) -> Counting:
    found = Counting(
        n_samples=len(STATES), layers=(0, 1), positions=("last",), hidden_size=8, codec=codec, shard_samples=S
    )
    object.__setattr__(found, "made", [])  # it is frozen
    return found


def finished(rows: Sequence[int]) -> Done:
    """Return what is known of rows of one shard."""
    return Done(
        shard=rows[0] // S,
        rows=tuple(row % S for row in rows),
        records=tuple({"n_tokens": row} for row in rows),
        nonfinite=torch.zeros(len(rows), 2, dtype=torch.int64),
        overflow=torch.zeros(len(rows), dtype=torch.int64),
    )


def assemble(path: Path, codec: str, order: Sequence[int]) -> Counting:
    """Write the rows one by one, in that order."""
    chosen = layout(codec)
    with ThreadPoolExecutor(2) as executor:
        columns = {"sample": [str(row) for row in range(len(STATES))]}
        writer = open_writer(path, chosen, columns, {"run": {}}, executor)
        with Assembler(writer, lambda n_rows: None) as assembler:
            for row in order:
                assembler.consume(finished([row]), STATES[row : row + 1])
        writer.finalise()
    return chosen


@pytest.mark.parametrize("codec", ("lz4", "none"))
@pytest.mark.parametrize("interleaved", (False, True))
def test_rows_in_any_order_become_the_same_states(tmp_path: Path, codec: str, interleaved: bool) -> None:
    # interleaved: all shards are open at once, more than there are buffers otherwise
    rows = np.arange(len(STATES)).reshape(N_SHARDS, S)
    order = (rows.T if interleaved else rows).ravel().tolist()
    chosen = assemble(tmp_path / "a.zarr", codec, order)
    store = open_store(tmp_path / "a.zarr")
    assert np.array_equal(store.hidden_states[:], STATES.numpy())
    assert store.columns["n_tokens"].tolist() == list(range(len(STATES)))
    assert len(chosen.made) <= (N_SHARDS if interleaved else BUFFERS)


@pytest.mark.parametrize("codec", ("lz4", "none"))
def test_a_slow_disk_does_not_fill_the_memory(
    tmp_path: Path, codec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = StoreWriter.commit

    def commit_slowly(
        self: StoreWriter, shard: int, encoded: Sequence[Sequence[Any]], on_read: Callable[[], None]
    ) -> int:
        time.sleep(0.05)
        return commit(self, shard, encoded, on_read)

    monkeypatch.setattr(StoreWriter, "commit", commit_slowly)
    assert len(assemble(tmp_path / "a.zarr", codec, range(len(STATES))).made) <= BUFFERS
    assert np.array_equal(open_store(tmp_path / "a.zarr").hidden_states[:], STATES.numpy())


@pytest.mark.parametrize("stage", ("encode", "commit"))
@pytest.mark.parametrize("codec", ("lz4", "none"))
def test_what_goes_wrong_with_a_shard_is_raised(
    tmp_path: Path, codec: str, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[int] = []

    def fail(*arguments: object, **options: object) -> int:
        tried.append(1)
        raise OSError("the disk is gone")

    monkeypatch.setattr(StoreWriter, stage, fail)
    with pytest.raises(OSError, match="the disk is gone"):
        assemble(tmp_path / "a.zarr", codec, range(len(STATES)))
    assert len(tried) < N_SHARDS  # it did not go on to the end


def test_what_went_wrong_is_raised_by_the_next_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object, **options: object) -> int:
        raise OSError("the disk is gone")

    monkeypatch.setattr(StoreWriter, "commit", fail)
    columns = {"sample": [str(row) for row in range(len(STATES))]}
    with ThreadPoolExecutor(2) as executor:
        writer = open_writer(tmp_path / "a.zarr", layout("lz4"), columns, {"run": {}}, executor)
        with pytest.raises(OSError, match="the disk is gone"), Assembler(writer, lambda n: None) as assembler:
            assembler.consume(finished(range(S)), STATES[:S])
            wait(assembler._writing)
            assembler.consume(finished(range(S, 2 * S)), STATES[S : 2 * S])
            pytest.fail("the second shard was taken")


def test_memory_is_used_again_while_what_it_held_is_flushed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed = threading.Event()
    fsync, begun = os.fsync, Assembler._begin

    def of_a_shard() -> bool:
        return threading.current_thread().name.startswith("mmextract-shards")

    def write_late(file: Any, parts: Any) -> None:
        if of_a_shard():
            time.sleep(0.02)  # time for others to overwrite what is not written yet
        direct.write(file, parts)

    def flush_late(descriptor: int) -> None:
        if of_a_shard() and S_ISREG(os.fstat(descriptor).st_mode):
            assert flushed.wait(60), "nothing was begun while the first shards were flushed"
        fsync(descriptor)

    def begin(self: Assembler, index: int) -> Any:
        found = begun(self, index)
        if index == BUFFERS:  # one more than there is memory for at once
            flushed.set()
        return found

    monkeypatch.setattr(files, "write", write_late)
    monkeypatch.setattr(os, "fsync", flush_late)
    monkeypatch.setattr(Assembler, "_begin", begin)
    chosen = assemble(tmp_path / "a.zarr", "none", range(len(STATES)))
    assert len(chosen.made) <= BUFFERS
    assert np.array_equal(open_store(tmp_path / "a.zarr").hidden_states[:], STATES.numpy())
