"""What streaming a layer will cost is known before it starts, and it costs no more."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from mmextract.probes import planning
from mmextract.probes.planning import predict_task_bytes
from mmextract.probes.run import plan_probe
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
    print(base, peak, predicted, predicted_task, held)
