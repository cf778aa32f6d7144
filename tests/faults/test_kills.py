"""Row B: a run is sent SIGKILL, SIGTERM or SIGINT at any moment, its recovery too, and some runs of a real model."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.faults.outcomes import sweep
from tests.faults.stores import WITH_REJECTED, Disks, different, tree

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
INTERRUPTED = 130
MOST_SECONDS = 10.0
"""In which a run that is asked to leave has left."""


def test_a_run_that_is_killed_at_any_moment_is_continued_to_the_same_bytes(disks: Disks) -> None:
    _row(disks, 12)


@pytest.mark.faults
@pytest.mark.timeout(1800)
def test_a_run_that_is_killed_at_any_of_many_moments_is_continued_to_the_same_bytes(disks: Disks) -> None:
    _row(disks, 194)


@pytest.mark.faults
@pytest.mark.timeout(1800)
def test_a_real_dump_that_is_killed_at_any_moment_is_continued_to_the_same_bytes(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    (tmp_path / "photos").mkdir()
    for number in range(60):
        pixels = rng.integers(0, 256, (90, 120, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"photos/{number}.jpg")
    started = time.perf_counter()
    assert _start_dump(tmp_path, "whole").wait() == 0
    seconds = time.perf_counter() - started
    whole = tree(tmp_path / "whole")

    def kill(seed: int) -> Mapping[str, float]:
        process = _start_dump(tmp_path, f"{seed}")
        sent = SIGNALS[seed % 3]
        time.sleep(random.Random(seed).uniform(0.3, 1) * seconds)
        process.send_signal(sent)
        asked = time.perf_counter()
        code = process.wait(timeout=60)
        took = time.perf_counter() - asked
        assert code in (0, INTERRUPTED, -sent), f"{sent.name}: it left with {code}"
        assert took < MOST_SECONDS, f"{sent.name}: it took {took:.1f} s to leave"
        assert _start_dump(tmp_path, f"{seed}").wait() == 0, "it was not continued"
        differs = different(tree(tmp_path / f"{seed}"), whole)
        assert not differs, f"after recovery these differ: {differs}"
        return {"seconds_to_leave": took}

    sweep("B, real dumps", range(6), kill)


def _row(disks: Disks, n_kills: int) -> None:
    started = time.perf_counter()
    assert disks.run(disks.new("whole")).code == WITH_REJECTED
    seconds = time.perf_counter() - started

    def kill(seed: int) -> Mapping[str, float]:
        chance = random.Random(seed)
        disk = disks.new("case")
        to_leave = 0.0
        for _ in range(1 + seed % 2):  # every second one is killed while it recovers, too
            sent = SIGNALS[chance.randrange(3)]
            process = disks.launcher.start(disks.request(disk))
            time.sleep(chance.uniform(0, seconds))
            os.kill(process, sent)
            asked = time.perf_counter()
            left = disks.launcher.wait()
            took = time.perf_counter() - asked
            assert left.code in (WITH_REJECTED, INTERRUPTED, -sent), (
                f"{sent.name}: it left with {left.code}: {left.err[-300:]}"
            )
            # an interrupt while a library sets up its event loop makes the half-made loop complain as it goes
            assert "Traceback" not in left.err.partition("Exception ignored in")[0], left.err
            assert took < MOST_SECONDS, f"{sent.name}: it took {took:.1f} s to leave"
            to_leave = max(to_leave, took)
        disks.check_recovery(disk)
        return {"seconds_to_leave": to_leave}

    sweep("B", range(n_kills), kill)


def _start_dump(folder: Path, name: str) -> subprocess.Popen[bytes]:
    command = [Path(sys.executable).parent / "mmextract", "dump", folder / "photos", "--prompt", "what?"]
    options = ["--shard-samples", "2", "--batch-size", "2", "-o", folder / name / "a.zarr"]
    return subprocess.Popen(
        list(map(str, [*command, *options])), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
