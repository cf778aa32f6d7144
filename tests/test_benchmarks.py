"""Each benchmark runs, at a tiny size, and writes figures with the machine and the versions."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.mark.timeout(300)
def test_bench_dump_compares_a_dump_with_the_bare_forward_pass(tmp_path: Path) -> None:
    names = ["easyvqa", "photos-llava", "photos-qwen2vl"]
    command = [sys.executable, BENCHMARKS / "bench_dump.py", *names, "--limit", "4", "--repeats", "1"]
    done = subprocess.run(
        [*map(str, command), "--json", str(tmp_path / "out.json")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "÷ forward" in done.stdout
    record = json.loads((tmp_path / "out.json").read_text())
    assert record["machine"]["cores"] >= 1 and record["machine"]["torch"]
    assert set(record["results"]) == set(names)
    for found in record["results"].values():
        assert found["n_samples"] == 4 and found["n_rejected"] == 0 and found["bytes_written"] > 0
        assert found["dump_over_forward"] > 0


@pytest.mark.timeout(300)
def test_bench_store_compares_writes_and_reads_with_peers_and_limits(tmp_path: Path) -> None:
    sizes = ["--states", "easyvqa", "--vectors", "100", "--samples", "40", "--repeats", "1"]
    command = [sys.executable, str(BENCHMARKS / "bench_store.py"), *sizes]
    done = subprocess.run(
        [*command, "--folder", str(tmp_path), "--json", str(tmp_path / "out.json")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "out.json").read_text())["results"]
    assert results["write"]["ratios"]["ours none ÷ raw write"] > 0
    assert results["read"]["ratios"]["ours ÷ zarr-python, none"] > 0
    assert results["many shards"]["n_shards"] == 40


@pytest.mark.timeout(300)
def test_bench_scale_fits_and_computes_what_many_samples_cost(tmp_path: Path) -> None:
    sizes = ["--samples", "20", "60", "--tasks", "20", "--shards", "3"]
    command = [sys.executable, BENCHMARKS / "bench_scale.py", *sizes, "--json", tmp_path / "out.json"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "measured: " in done.stdout and "computed from the fits: " in done.stdout
    results = json.loads((tmp_path / "out.json").read_text())["results"]
    assert results["measured"]["60"]["n_shards"] == 60
    assert results["fitted"]["plan_bytes_a_row"] > 0
    assert results["computed"]["1000000"]["bytes"] == 10**6 * 33 * 4096 * 4


@pytest.mark.timeout(300)
def test_bench_probe_compares_solvers_at_equal_residuals(tmp_path: Path) -> None:
    sizes = ["--samples", "60", "--features", "80", "--sets", "1", "--layer-features", "70", "--cross", "8"]
    sizes += ["--labels", "2", "--layers", "2", "--stored", "200", "1", "6", "--folder", str(tmp_path)]
    command = [sys.executable, str(BENCHMARKS / "bench_probe.py"), *sizes]
    done = subprocess.run(
        [*command, "--json", str(tmp_path / "out.json")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "out.json").read_text())["results"]
    for found in results["speed"].values():
        assert found["method"] == "dual cpu" and found["largest residual"]["ours"] <= 1e-8
        assert found["ours over"]["lbfgs, tol 1e-8"] > 0 and found["predictions that differ"]["ours"] == 0
    assert max(results["agreement"].values()) <= 1e-6
    assert results["layer"]["fits a layer"] == 125
    assert set(results["crossings"]["8"]) == {"0.5", "1", "2", "4"}
    assert results["layers"]["layers"] == 2 and results["layers"]["fits a layer"] == 2 * 5 * (3 * 5 + 1)
    assert 0.5 < results["memory"]["peak ÷ predicted"] <= 1
    assert results["stored"]["largest residual"] <= 1e-8 and results["stored"]["passes"] > 2


@pytest.mark.timeout(300)
def test_bench_finetune_compares_a_step_with_a_bare_loop_and_the_trainer(tmp_path: Path) -> None:
    sizes = ["--steps", "4", "--batch-size", "2", "--repeats", "1"]
    command = [sys.executable, BENCHMARKS / "bench_finetune.py", *sizes, "--json", tmp_path / "out.json"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    ratios = json.loads((tmp_path / "out.json").read_text())["results"]["ratios"]
    assert set(ratios) == {"bare loop", "Trainer", "ours, images met first", "ours, images kept"}
    assert all(ratio > 0 for ratio in ratios.values())
