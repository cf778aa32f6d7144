"""A GPU without room: batches halve, and the states are those that whole, or halved, batches have."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mmextract.engine.dump import DumpSpec, DumpSummary, plan_dump, run_dump
from mmextract.engine.memory import NoRoomError, Parts
from mmextract.engine.models import Adapter
from mmextract.engine.samples import read_samples
from mmextract.engine.store import Store, open_store
from mmextract.engine.verify import plan_verify, run_verify
from tests.engine.test_store import tree

N_SAMPLES = 13


def fits(most: int) -> Any:
    """Return work that has room for so many samples, and writes down what it was asked for."""
    asked: list[slice] = []

    def work(part: slice) -> slice:
        asked.append(part)
        if part.stop - part.start > most:
            raise torch.OutOfMemoryError("no room")
        return part

    return work, asked


@pytest.mark.parametrize("batch_size", [1, 2, 7, 16])
@pytest.mark.parametrize("n_samples", [1, 2, 5, 7, 16])
@pytest.mark.parametrize("most", [1, 2, 3, 8])
def test_parts_cover_the_batch_in_order_and_fit(batch_size: int, n_samples: int, most: int) -> None:
    n_samples = min(n_samples, batch_size)
    parts, (work, _) = Parts(batch_size), fits(most)
    found = parts.run("shape", n_samples, work)
    assert [row for part in found for row in range(part.start, part.stop)] == list(range(n_samples))
    assert parts.n_split == (n_samples > most)
    halves = {batch_size := -(-batch_size // 2) for _ in range(5)} | {n_samples}
    assert all(part.stop - part.start in halves for part in found[:-1])


def test_what_did_not_fit_is_not_tried_again_for_the_same_shape() -> None:
    parts, (work, asked) = Parts(16), fits(4)
    parts.run("shape", 16, work)
    asked.clear()
    assert len(parts.run("shape", 16, work)) == 4
    assert len(asked) == 4
    assert len(parts.run("other", 3, work)) == 1


def test_a_passing_shortage_changes_nothing() -> None:
    parts, calls = Parts(8), 0

    def work(part: slice) -> slice:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise torch.OutOfMemoryError("no room, for once")
        return part

    assert parts.run("shape", 8, work) == [slice(0, 8)]
    assert parts.n_split == 0


def test_a_single_sample_without_room_says_what_to_do() -> None:
    work, _ = fits(0)
    with pytest.raises(NoRoomError, match="no room for a single sample: use --device-map"):
        Parts(4).run("shape", 3, work)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    rows = []
    for i in range(N_SAMPLES):
        pixels = rng.integers(0, 256, ((40, 60, 3), (33, 30, 3))[i % 2], dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        rows.append({"id": f"s{i}", "image": f"{i}.png", "question": ("what?", "who is it?")[i % 3 == 0]})
    (folder / "s.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "s.jsonl"


def dump(adapter: Adapter, data: Path, out: Path, batch_size: int = 8) -> tuple[Store, DumpSummary]:
    settings: dict[str, Any] = {"positions": ("last", "image"), "shard_samples": 7, "threads": 2}
    spec = DumpSpec(dataset=read_samples(data), model=adapter.spec, batch_size=batch_size, **settings)
    summary = run_dump(plan_dump(spec, adapter), adapter, out)
    assert run_verify(plan_verify(out)).sound
    return open_store(out), summary


@contextmanager
def short_of_memory(adapter: Adapter, fails: Any) -> Iterator[None]:
    """Fail forward passes as a GPU does: fails(number of the pass, its samples) says which."""
    count = 0

    def before(module: Any, args: Any, kwargs: Any) -> None:
        nonlocal count
        count += 1
        if fails(count, len(kwargs["input_ids"])):
            raise torch.OutOfMemoryError("CUDA out of memory (injected)")

    handle = adapter.model.base_model.register_forward_pre_hook(before, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def states(store: Store) -> np.ndarray[Any, Any]:
    return np.asarray(store.hidden_states[:])


@pytest.mark.parametrize("family", ["llava", "qwen2-vl"])
def test_a_dump_whose_batches_do_not_fit_equals_one_with_smaller_batches(
    family: str, tiny_adapters: dict[str, Adapter], data: Path, tmp_path: Path
) -> None:
    adapter = tiny_adapters[family]
    whole, _ = dump(adapter, data, tmp_path / "whole.zarr")
    for most in (1, 2, 4):
        smaller, _ = dump(adapter, data, tmp_path / f"of{most}.zarr", batch_size=most)
        with short_of_memory(adapter, lambda number, size, most=most: size > most):
            halved, summary = dump(adapter, data, tmp_path / f"halved{most}.zarr")
        assert summary.n_split > 0 or most > 1  # there may be no batch of more
        assert not summary.rejected
        assert np.array_equal(states(halved), states(smaller))
        assert np.abs(states(halved) - states(whole)).max() <= 1e-5 * np.abs(states(whole)).max()


@pytest.mark.parametrize("failing", range(1, 7))
def test_a_pass_that_fails_once_leaves_the_very_bytes(
    failing: int, tiny_adapters: dict[str, Adapter], data: Path, tmp_path: Path
) -> None:
    adapter = tiny_adapters["llava"]
    dump(adapter, data, tmp_path / "whole.zarr")
    with short_of_memory(adapter, lambda number, size: number == failing):
        _, summary = dump(adapter, data, tmp_path / "once.zarr")
    assert summary.n_split == 0
    assert tree(tmp_path / "once.zarr") == tree(tmp_path / "whole.zarr")


def test_a_run_without_room_for_one_sample_ends_and_is_continued(
    tiny_adapters: dict[str, Adapter], data: Path, tmp_path: Path
) -> None:
    adapter = tiny_adapters["llava"]
    dump(adapter, data, tmp_path / "whole.zarr")
    with short_of_memory(adapter, lambda number, size: number > 2), pytest.raises(NoRoomError):
        dump(adapter, data, tmp_path / "part.zarr")
    assert open_store(tmp_path / "part.zarr").missing > 0
    dump(adapter, data, tmp_path / "part.zarr")
    assert tree(tmp_path / "part.zarr") == tree(tmp_path / "whole.zarr")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Bit for bit equality holds for one number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
