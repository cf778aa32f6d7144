"""What streaming a layer will cost is known before it starts, and it costs no more."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mmextract.probes import planning, primal, stream_cost
from mmextract.probes.batches import LIVE_LOGITS
from mmextract.probes.blocks import Blocks, StoredStates
from mmextract.probes.metrics import FloatArray
from mmextract.probes.planning import predict_task_bytes
from mmextract.probes.rounds import list_rounds
from mmextract.probes.run import plan_probe
from mmextract.probes.scoring import score_cell
from mmextract.probes.stream_cost import count_passes
from tests.probes.test_planning import LEAN, SCORE, noise_store

SMALL_BLOCKS = "from mmextract.probes import blocks\nblocks.BLOCK_ELEMENTS = 1 << 19\n"


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_a_worker_that_streams_takes_no_more_than_predicted_at_least_half_of_it_and_less_than_one_that_holds(
    tmp_path: Path,
) -> None:
    small, large = (
        noise_store(tmp_path / "small.zarr", 12, 8),
        noise_store(tmp_path / "large.zarr", 10_000, 500),
    )
    settings = replace(LEAN, penalties=(1e-3,), stream="always")
    command = [
        sys.executable,
        "-c",
        SMALL_BLOCKS + SCORE,
        json.dumps(asdict(settings)),
        str(small),
        str(large),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    base, peak, predicted, predicted_task = json.loads(done.stdout)
    assert peak <= predicted <= 2 * peak
    assert base <= planning.BASE_BYTES
    assert peak - base <= predicted_task <= 4 * (peak - base)
    held = predict_task_bytes(plan_probe(large, replace(settings, stream="never")))
    assert predicted_task < 0.6 * held


def test_passes_are_about_as_many_as_predicted(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[StoredStates] = []
    read = StoredStates.read

    def count(states: StoredStates) -> Iterator[tuple[slice, FloatArray]]:
        passes.append(states)
        return read(states)

    monkeypatch.setattr(StoredStates, "read", count)
    settings = replace(LEAN, layers=(1,), positions=("image",), stream="always")
    for most_elements in (1 << 28, 10_000):
        plan = replace(plan_probe(store, settings), streamed_elements=most_elements)
        passes.clear()
        score_cell(plan, 1, "image")
        assert count_passes(plan) / 3 < len(passes) < 2 * count_passes(plan), (
            len(passes),
            count_passes(plan),
        )


@pytest.mark.parametrize("n_together", [1, 4, 6, 13, 100])
@pytest.mark.parametrize(("repeats", "folds"), [(1, 5), (2, 5), (3, 5), (2, 10)])
def test_second_moments_are_summed_into_no_more_matrices_than_predicted(
    store: Path, monkeypatch: pytest.MonkeyPatch, repeats: int, folds: int, n_together: int
) -> None:
    found: list[tuple[int, int]] = []
    find, unique = primal._find_moments, torch.unique

    def watch(states: Blocks, members: torch.Tensor, scale: bool) -> Any:
        kinds = unique(members, dim=1)
        own = kinds.shape[1] > 4 * len(members)
        rows = members.sum() if own else members.any(0).sum()
        found.append((len(members) if own else kinds.shape[1], int(rows)))
        return find(states, members, scale)

    monkeypatch.setattr(primal, "_find_moments", watch)
    settings = replace(LEAN, folds=folds, repeats=repeats, inner_folds=3, layers=(1,), positions=("image",))
    plan = plan_probe(store, replace(settings, stream="always"))
    size = 2 * plan.hidden_size**2 + LIVE_LOGITS * plan.design.n_samples * 2 * len(plan.tasks)
    plan = replace(plan, streamed_elements=n_together * size)
    score_cell(plan, 1, "image")
    for one in reversed(list_rounds(plan)):  # C is chosen first
        most, rows = stream_cost._count_sums(plan, one)
        n_batches = stream_cost._count_batches(plan, one)
        batches, found = found[:n_batches], found[n_batches:]
        assert max(sums for sums, _ in batches) <= most
        if n_batches == 1:
            assert batches[0][1] == pytest.approx(rows, rel=0.05)
    assert not found
