"""What streaming a layer will cost is known before it starts, and it costs no more."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from mmextract.probes import planning
from mmextract.probes.blocks import StoredStates
from mmextract.probes.metrics import FloatArray
from mmextract.probes.planning import predict_task_bytes
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
