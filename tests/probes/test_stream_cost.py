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
from mmextract.probes.blocks import StoredStates
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


@pytest.mark.parametrize("repeats", [1, 2, 3])
def test_second_moments_are_summed_into_as_many_matrices_as_predicted(
    store: Path, monkeypatch: pytest.MonkeyPatch, repeats: int
) -> None:
    predicted: list[tuple[int, int]] = []
    found: list[tuple[int, int]] = []
    add = primal._add_square
    totals: dict[int, int] = {}

    def count(total: torch.Tensor, x: torch.Tensor) -> None:
        totals[total.data_ptr()] = totals.get(total.data_ptr(), 0) + len(x)
        add(total, x)

    find = primal._find_moments

    def watch(*arguments: Any) -> Any:
        totals.clear()
        moments = find(*arguments)
        found.append((len(totals), sum(totals.values())))
        return moments

    monkeypatch.setattr(primal, "_add_square", count)
    monkeypatch.setattr(primal, "_find_moments", watch)
    settings = replace(LEAN, folds=5, repeats=repeats, layers=(1,), positions=("image",), stream="always")
    plan = plan_probe(store, replace(settings, inner_folds=3))
    score_cell(plan, 1, "image")
    for one in reversed(list_rounds(plan)):  # C is chosen first
        predicted.append(stream_cost._count_sums(plan, one))
    assert len(found) == len(predicted)
    for (sums, added), (most, expected) in zip(found, predicted, strict=True):
        assert sums <= most and added == pytest.approx(expected, rel=0.05)
