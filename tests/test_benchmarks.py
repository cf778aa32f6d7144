"""Each benchmark runs, at a tiny size, and writes figures with the machine and the versions."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
RUNS = ("rates", "batches", "repetitions")
"""Of `results/memorisation`, in the order of its tables."""


@pytest.mark.timeout(300)
def test_bench_dump_compares_a_dump_with_the_bare_forward_pass(tmp_path: Path) -> None:
    names = ["easyvqa", "photos-llava", "photos-qwen2vl"]
    command = [sys.executable, BENCHMARKS / "bench_dump.py", *names, "--limit", "2", "--repeats", "1"]
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
        assert found["n_samples"] == 2 and found["n_rejected"] == 0 and found["bytes_written"] > 0
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
    sizes = ["--samples", "20", "60", "--tasks", "20", "--shards", "3", "--markdown"]
    command = [sys.executable, BENCHMARKS / "bench_scale.py", *sizes, "--json", tmp_path / "out.json"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "measured: " in done.stdout and "computed, not run: " in done.stdout
    assert "| launcher's memory |" in done.stdout and " samples " in done.stdout.splitlines()[-1]
    results = json.loads((tmp_path / "out.json").read_text())["results"]
    assert [(run["n_rows"], run["n_shards"]) for run in results["measured"]] == [
        (20, 20),
        (60, 60),
        (20, 1),
        (60, 1),
    ]
    assert all(fit["a_shard"] >= 0 and fit["a_row"] >= 0 for fit in results["fitted"].values())
    assert results["fitted besides"]["row_bytes"] > 100
    assert results["computed"][0]["bytes"] == 10**6 * 33 * 4096 * 4


def test_a_plane_is_fitted_to_what_lies_on_one_and_its_residual_says_what_does_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    bench_scale = importlib.import_module("bench_scale")
    shards, rows = [10, 1000, 10, 1000], [10, 1000, 1000, 100_000]
    exact = [2 + 0.5 * n_shards + 0.01 * n_rows for n_shards, n_rows in zip(shards, rows, strict=True)]
    fit = bench_scale.fit_plane(shards, rows, exact)
    assert fit.at(10**6, 10**8) == pytest.approx(2 + 0.5e6 + 1e6) and fit.residual < 1e-9
    assert bench_scale.fit_plane(shards, rows, [*exact[:3], 2 * exact[3]]).residual > 0.1


@pytest.mark.timeout(300)
def test_bench_probe_compares_solvers_at_equal_residuals(tmp_path: Path) -> None:
    sizes = ["--samples", "60", "--features", "80", "--sets", "1", "--layer-features", "70", "--cross", "8"]
    sizes += ["--labels", "2", "--layers", "2", "--stored", "200", "1", "6", "--folder", str(tmp_path)]
    sizes += ["--draws", "3"]
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
    assert results["calibration"]["draws"] == 3 and 0 <= results["calibration"]["coverage of auroc"] <= 1
    assert results["stored"]["largest residual"] <= 1e-8 and results["stored"]["passes"] > 2


@pytest.mark.timeout(300)
def test_bench_cost_holds_predictions_against_what_is_taken(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARKS / "bench_cost.py"), "--smallest", "2"]
    done = subprocess.run(
        [*command, "--json", str(tmp_path / "out.json")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "out.json").read_text())["results"]
    assert len(results["runs"]) == 2 * 2 * 4 and not any(run["streamed"] for run in results["runs"])
    assert 1 / 5 < results["ratios"]["held, median"] < 5


@pytest.mark.timeout(300)
def test_bench_large_probes_a_layer_from_the_disk(tmp_path: Path) -> None:
    sizes = ["--samples", "6000", "--features", "80", "--folds", "3", "--c", "10", "--stream", "always"]
    command = [sys.executable, str(BENCHMARKS / "bench_large.py"), *sizes, "--folder", str(tmp_path)]
    done = subprocess.run(
        [*command, "--json", str(tmp_path / "out.json")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "out.json").read_text())["results"]
    assert results["states"].startswith("read from the store") and results["solvers"] == ["primal cpu"]
    assert results["fits"] == 2 * 3 and results["largest residual"] <= 1e-8
    expected = results["auroc expected of one from as many samples"]
    assert (
        results["auroc"] == pytest.approx(expected, abs=0.03)
        and expected < results["auroc of the best probe"]
    )
    assert 0.5 < results["peak ÷ predicted"] <= 1


@pytest.mark.timeout(300)
def test_the_gpu_benchmark_runs_in_all_its_sections_without_a_gpu(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--smoke", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("CPU, timings mean nothing\n")
    results = json.loads((tmp_path / "gpu.json").read_text())["results"]
    assert results["smoke"] and list(results["sections"]) == ["exact", "ceilings", "images", "states", "dump"]
    judged = [figure for section in results["sections"].values() for figure in section if figure["verdict"]]
    assert len(judged) == 4 and all(figure["verdict"] == "ok" and figure["value"] == 0 for figure in judged)
    ratios = dump_ratios(results)
    dumps = ["pooled", "all tokens, null sink", "all tokens, null sink, uncompressed"]
    for model in ("tiny LLaVA", "tiny Qwen2-VL"):
        assert {f"{model}, {name}: dump ÷ bare forward" for name in dumps} < set(ratios)
        assert {f"{model}, {name}: capture ÷ bare forward" for name in ("pooled", "all tokens")} < set(ratios)
    assert len(ratios) == 10 and all(ratio > 0 for ratio in ratios.values())
    assert "not measured" not in done.stderr


def dump_ratios(results: dict[str, Any]) -> dict[str, float]:
    """Return name → value of the ratios to a bare forward pass."""
    figures = results["sections"]["dump"]
    return {f["name"]: f["value"] for f in figures if f["name"].endswith("÷ bare forward")}


@pytest.mark.timeout(300)
def test_without_zarr_the_gpu_benchmark_measures_capture_and_says_that_it_is_no_dump(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    blocked = "import runpy, sys\nfor name in ('zarr', 'numcodecs', 'google_crc32c', 'xxhash', 'pyarrow', 'faker'):\n"
    blocked += "    sys.modules[name] = None\nrunpy.run_path('gpu.py', run_name='__main__')\n"
    arguments = ["--smoke", "--sections", "dump", "--out", str(tmp_path)]
    command = [sys.executable, "-c", blocked, *arguments]  # which finds modules in its folder
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=BENCHMARKS)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("dump ÷ bare forward is not measured, as zarr is missing") == 1
    ratios = dump_ratios(json.loads((tmp_path / "gpu.json").read_text())["results"])
    assert len(ratios) == 4 and all("capture ÷ bare forward" in name for name in ratios)


def test_the_gpu_benchmark_says_at_once_that_it_needs_a_device(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--out", str(tmp_path)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 1 and "torch finds none here" in done.stderr
    assert "Traceback" not in done.stderr and not any(tmp_path.iterdir())


@pytest.mark.timeout(300)
def test_bench_finetune_compares_a_step_with_a_bare_loop_and_the_trainer(tmp_path: Path) -> None:
    sizes = ["--steps", "4", "--batch-size", "2", "--repeats", "1"]
    command = [sys.executable, BENCHMARKS / "bench_finetune.py", *sizes, "--json", tmp_path / "out.json"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    ratios = json.loads((tmp_path / "out.json").read_text())["results"]["ratios"]
    assert set(ratios) == {"bare loop", "Trainer", "ours, images met first", "ours, images kept"}
    assert all(ratio > 0 for ratio in ratios.values())


@pytest.mark.timeout(300)
def test_bench_preprocess_finds_no_value_that_differs_from_the_processors(tmp_path: Path) -> None:
    names = ["llava", "siglip-pil", "qwen2-vl"]
    sizes = ["--limit", "2", "--largest", "300000", "--repeats", "1", "--json", str(tmp_path / "out.json")]
    command = [sys.executable, str(BENCHMARKS / "bench_preprocess.py"), *names, *sizes]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "÷ processor" in done.stdout
    results = json.loads((tmp_path / "out.json").read_text())["results"]
    assert results["decode"]["images_per_second"] > 0 and set(results["families"]) == set(names)
    for found in results["families"].values():
        assert found["values_compared"] > 100_000 and found["values_differing"] == 0
        assert found["ours_over_processor"] > 0 and found["images_per_second"] > 0


def test_the_tables_of_memorisation_are_those_of_the_results_beside_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    memorisation = importlib.import_module("memorisation")
    results = BENCHMARKS / "results" / "memorisation"
    tables = (results / "tables.md").read_text("utf-8")
    runs = {name: memorisation.read_rows(results / name / "experiment.csv") for name in RUNS}
    for rows in runs.values():
        for describe in (memorisation.memory, memorisation.learnt, memorisation.published):
            assert describe(rows) in tables
    assert memorisation.resolution([row for rows in runs.values() for row in rows]) in tables


def test_what_seeds_would_find_is_what_their_interval_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five seeds: Student's t with 4 degrees of freedom, 2.776 for the interval and 0.941 more for a power of 0.8."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    memorisation = importlib.import_module("memorisation")
    row = {"n_seeds": "5", "low": "-0.01", "high": "0.03"}
    assert memorisation.found_by_seeds(row) == pytest.approx(0.02 * (2.776 + 0.941) / 2.776, rel=1e-3)
