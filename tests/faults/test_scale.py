"""Row J: memory and descriptors do not grow with the samples, and a store of many shards is taken up in seconds."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.faults.outcomes import sweep

SCRIPT = Path(__file__).parent / "scale.py"
MOST_GROWTH = 8 << 20
"""Bytes that resident memory may grow by between the first tenth of a run and its end."""


def test_memory_and_descriptors_stay_flat(memory_folder: Path) -> None:
    _measure_growth(memory_folder, 6_400)


def test_a_store_of_many_shards_is_taken_up_in_seconds(memory_folder: Path) -> None:
    _measure_resume(memory_folder, 2_000)


@pytest.mark.faults
@pytest.mark.timeout(1800)
def test_memory_and_descriptors_stay_flat_over_100_000_samples(memory_folder: Path) -> None:
    sweep("J, 100,000 samples × 32 layers", ["growth"], lambda _: _measure_growth(memory_folder, 100_000))


@pytest.mark.faults
@pytest.mark.timeout(1800)
def test_a_store_of_100_000_shards_is_taken_up_in_seconds(memory_folder: Path) -> None:
    sweep("J, 100,000 shards", ["resume"], lambda _: _measure_resume(memory_folder, 100_000))


def _measure_growth(folder: Path, n_samples: int) -> Mapping[str, float]:
    options = ("--shard-samples", 64, "--layers", 32, "--hidden-size", 16)
    found = _run(folder / f"growth-{n_samples}", n_samples, *options)
    memory, descriptors = found["resident_bytes"], found["descriptors"]
    assert max(memory) - memory[0] < MOST_GROWTH, f"resident bytes grew: {memory}"
    assert max(descriptors) == descriptors[0], f"descriptors grew: {descriptors}"
    return {"growth_mib": (max(memory) - memory[0]) / 2**20, "resident_mib": max(memory) / 2**20}


def _measure_resume(folder: Path, n_shards: int) -> Mapping[str, float]:
    found = _run(folder / f"resume-{n_shards}", n_shards, "--fill")
    assert found["resume_seconds"] < 10, f"resuming took {found['resume_seconds']:.1f} s"
    assert found["finished_seconds"] < 2, f"a finished store took {found['finished_seconds']:.1f} s"
    return {name: found[name] for name in ("resume_seconds", "finalise_seconds", "finished_seconds")}


def _run(folder: Path, n_samples: int, *options: object) -> Mapping[str, Any]:
    folder.mkdir()
    command = [sys.executable, SCRIPT, folder, n_samples, *options]
    done = subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found
