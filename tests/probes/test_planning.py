"""What a run will cost is known before it starts, and it costs no more."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from distributed import Client, LocalCluster

from mmextract.cli.probe import probe
from mmextract.probes import permutation, planning
from mmextract.probes.planning import check_cluster, choose_workers, predict_bytes
from mmextract.probes.rounds import list_rounds, list_tests
from mmextract.probes.run import plan_probe, run_probe
from mmextract.probes.settings import ProbeSettings
from tests.probes.stores import make_store, paired_columns

LEAN = ProbeSettings(folds=2, repeats=1, inner_folds=2, penalties=(1e-3, 1e-2), permutations=0)
SCORE = """
import json, sys
from pathlib import Path
from mmextract.probes.planning import predict_bytes, predict_task_bytes
from mmextract.probes.run import plan_probe
from mmextract.probes.scoring import score_cell
from mmextract.probes.settings import ProbeSettings

def peak():
    return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) << 10

small, large = (plan_probe(place, ProbeSettings(**json.loads(sys.argv[1]))) for place in sys.argv[2:])
score_cell(small, 0, "last")
base = peak()
score_cell(large, 0, "last")
print(json.dumps([base, peak(), predict_bytes(large), predict_task_bytes(large)]))
"""


def noise_store(path: Path, n_images: int, hidden_size: int, n_layers: int = 1, seed: int = 0) -> Path:
    columns = paired_columns(n_images, n_images // 2)
    columns["third"] = [str(row // 2 % 3) for row in range(2 * n_images)]
    shape = (2 * n_images, n_layers, 1, hidden_size)
    states = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    return make_store(path, states, layers=list(range(n_layers)), positions=["last"], columns=columns)


@pytest.mark.parametrize(
    ("n_images", "hidden_size", "changes"),
    [
        pytest.param(500, 3000, {}, id="dual"),
        pytest.param(400, 2000, {"permutations": 200}, id="dual, with permutations"),
        pytest.param(300, 3000, {"label": "third", "group": "image"}, id="dual, three classes"),
        pytest.param(4_000, 200, {}, id="primal"),
        pytest.param(250, 3000, {"solver": "sklearn"}, id="sklearn"),
    ],
)
@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_a_worker_takes_no_more_memory_than_predicted_and_at_least_half_of_it(
    tmp_path: Path, n_images: int, hidden_size: int, changes: dict[str, str]
) -> None:
    stores = (
        noise_store(tmp_path / "small.zarr", 12, 8),
        noise_store(tmp_path / "large.zarr", n_images, hidden_size),
    )
    settings = json.dumps(asdict(replace(LEAN, **changes)))  # type: ignore[arg-type]
    done = subprocess.run(
        [sys.executable, "-c", SCORE, settings, *map(str, stores)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    base, peak, predicted, predicted_task = json.loads(done.stdout)
    assert peak <= predicted <= 2 * peak
    assert base <= planning.BASE_BYTES
    assert peak - base <= predicted_task <= 4 * (peak - base)


def test_rounds_are_what_a_run_fits(store: Path) -> None:
    plan = plan_probe(store, replace(LEAN, layers=(0,), positions=("last",)))
    (cell,) = run_probe(plan).values()
    assert sum(one.n_fits for one in list_rounds(plan)) == len(plan.tasks) * cell.find("label").n_fits


def test_tasks_whose_splits_are_the_same_share_their_training_sets(store: Path, tmp_path: Path) -> None:
    columns = paired_columns(40, 20)
    states = np.random.default_rng(0).normal(size=(80, 1, 1, 4)).astype(np.float32)
    other = make_store(tmp_path / "a.zarr", states, layers=[0], positions=["last"], columns=columns)
    settings = replace(LEAN, repeats=2)
    for place, changes, shared in ((store, {}, True), (other, {"label": "answer", "group": "none"}, False)):
        plan = plan_probe(place, replace(settings, **changes))  # type: ignore[arg-type]
        sets = {
            (task.folds[repeat] != fold).tobytes()
            for task in plan.tasks
            for repeat in range(2)
            for fold in range(2)
        }
        first, inner = list_rounds(plan)
        assert first.n_labels == inner.n_labels == (2 if shared else 1)
        assert first.n_sets == len(sets) == (4 if shared else 8) and inner.n_sets == 2 * first.n_sets


def test_tests_are_in_batches_that_hold_every_label(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_probe(store, replace(LEAN, permutations=39))
    n_penalties, size = 2, 2 * (plan.design.n_samples + plan.hidden_size)
    assert [one.n_labels for one in list_tests(plan)] == [40, 40]
    monkeypatch.setattr(permutation, "MOST_ELEMENTS", 16 * size)
    assert [one.n_labels for one in list_tests(plan)] == [16, 16, 16, 16, 8, 8]
    assert sum(one.n_fits for one in list_tests(plan)) == 2 * 40 * n_penalties


def test_workers_are_as_many_as_fit(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_probe(store, LEAN)
    monkeypatch.setattr(planning, "available_bytes", lambda: int(3.5 * predict_bytes(plan)))
    assert choose_workers(plan, 0, cores=8) == 3
    assert choose_workers(plan, 0, cores=2) == 2
    assert choose_workers(plan, 3, cores=1) == 3
    with pytest.raises(ValueError, match=r"4 workers of .* GiB each, and .* do not fit .*--workers 3"):
        choose_workers(plan, 4, cores=8)
    monkeypatch.setattr(planning, "available_bytes", lambda: 1)
    with pytest.raises(ValueError, match=r"1 workers of .* larger machine"):
        run_probe(plan)


def test_a_cluster_whose_workers_are_too_small_is_refused(store: Path) -> None:
    plan = plan_probe(store, LEAN)
    for limit, refused in (
        ("4GiB", nullcontext()),
        ("300MiB", pytest.raises(ValueError, match=r"may use 0\.29")),
    ):
        with (
            LocalCluster(
                n_workers=1, threads_per_worker=1, processes=False, dashboard_address=None, memory_limit=limit
            ) as cluster,
            Client(cluster) as client,
            refused,
        ):
            check_cluster(plan, client)


def test_a_dry_run_says_what_it_would_do_and_does_nothing(store: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(probe, [str(store), "--dry-run", "-o", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    words = {line.split()[0]: line for line in done.stdout.splitlines()}
    assert "embed, 0, 1" in words["layers"] and "label, control" in words["tasks"]
    assert "primal" in words["solver"] and "GiB a worker" in words["memory"] and "about" in words["time"]
    scores, tests = 2 * 10 * (1 + 3 * 5), 5 * 201 * 3
    assert f"{6 * (scores + tests):,}" in words["fits"] and f"{tests:,} for the permutations" in words["fits"]
    assert not (tmp_path / "out").exists()
