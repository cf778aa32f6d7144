"""A sample of `benchmarks/bench_calibration.py`, small enough for every run of the tests; seeds make it repeatable."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "bench_calibration.py"
DRAWS = 30
SIGNAL = 1.25
"""About what is detectable with 40 groups."""


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, float]]:
    path = tmp_path_factory.mktemp("calibration") / "out.json"
    sizes = ["--draws", DRAWS, "--permutations", 39, "--repeats", 1, "--c", 0.01, "--workers", 2]
    what = ["--shape", "40 groups of 3", "--signal", 0, "--signal", SIGNAL]
    command = [sys.executable, BENCHMARK, *sizes, *what, "--json", path]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(path.read_text())["results"]
    assert isinstance(found, dict)
    return found


@pytest.mark.parametrize("signal", [0, SIGNAL])
def test_intervals_cover_what_they_promise_in_noise_and_with_a_signal(
    results: dict[str, dict[str, float]], signal: float
) -> None:
    found = results[f"40 groups of 3, signal {signal:g}"]
    for metric in ("auroc", "accuracy", "balanced_accuracy"):
        # three standard deviations of DRAWS fair draws below 95 %
        assert found[f"coverage of {metric}"] >= 0.83, metric


def test_p_values_of_grouped_noise_are_uniform(results: dict[str, dict[str, float]]) -> None:
    found = results["40 groups of 3, signal 0"]
    assert found["uniform p of noise (KS)"] > 0.01
    assert found["found"] <= 0.175 and found["found elsewhere"] <= 0.175


def test_a_signal_in_one_layer_is_found_there_and_nowhere_else_at_the_promised_power(
    results: dict[str, dict[str, float]],
) -> None:
    found = results[f"40 groups of 3, signal {SIGNAL:g}"]
    assert abs(found["auroc"] - found["detectable"]) < 0.04
    assert 0.6 <= found["found"] <= 0.97 and found["found elsewhere"] <= 0.175
