"""What `mmextract probe` takes in its own process is known before it starts, and it takes no more."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from distributed import Client, LocalCluster
from numpy.typing import NDArray

from mmextract.cli.probe import probe
from mmextract.probes import command_cost, kept_cost, planning
from mmextract.probes.command_cost import (
    check_command,
    choose_threads,
    describing_bytes,
    predict_command_bytes,
)
from mmextract.probes.description import DescriptionSettings
from mmextract.probes.kept_cost import kept_bytes
from mmextract.probes.run import plan_probe, run_probe
from mmextract.probes.settings import ProbeSettings
from tests.probes.test_planning import noise_store

SETTINGS = DescriptionSettings()
COMMAND = """
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from mmextract.cli.main import main
from mmextract.probes import command_cost, run

run.SECONDS_WORTH_PROCESSES = float(sys.argv.pop(1))
predict = command_cost.predict_command_bytes

def report(*arguments, threads=None, **options):
    global predicted
    predicted = predict(*arguments, **options)
    return predict(*arguments, threads=threads, **options)

command_cost.predict_command_bytes = report
try:
    main()
finally:
    peak = int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) << 10
    print(peak, predicted)
"""


LEAN = ["--folds", "2", "--repeats", "1", "--c", "0.01", "--permutations", "0"]
PCA = ["--projections", "pca"]
NOTHING = ["--no-separability", "--projections", "none"]


@pytest.mark.parametrize(
    ("n_images", "hidden_size", "n_layers", "processes", "options"),
    [
        pytest.param(30, 16, 1, False, [], id="small"),
        pytest.param(1000, 2000, 1, False, PCA, id="large"),
        pytest.param(1000, 2000, 2, True, ["--workers", "2", *PCA], id="scored elsewhere"),
        pytest.param(1000, 1500, 2, False, ["--compare", "other.zarr", *PCA], id="compared"),
        pytest.param(4000, 100, 1, False, ["--stream", "always", *PCA], id="streamed"),
        pytest.param(100, 8, 100, False, NOTHING, id="many layers"),
    ],
)
@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_the_command_takes_no_more_memory_than_predicted_and_at_least_half_of_it(
    tmp_path: Path, n_images: int, hidden_size: int, n_layers: int, processes: bool, options: list[str]
) -> None:
    noise_store(tmp_path / "a.zarr", n_images, hidden_size, n_layers)
    if "--compare" in options:
        noise_store(tmp_path / "other.zarr", n_images, hidden_size, n_layers, seed=1)
    worth = "0" if processes else "1e9"
    command = [sys.executable, "-c", COMMAND, worth, "probe", "a.zarr", *LEAN, *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    peak, predicted = map(int, done.stdout.splitlines()[-1].split())
    assert peak <= predicted <= 2 * peak, (peak / 2**20, predicted / 2**20)


def test_a_dry_run_tells_it(store: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(probe, [str(store), "--dry-run", "-o", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    line = done.stdout.splitlines()[-1]
    size = predict_command_bytes([plan_probe(store, ProbeSettings())], SETTINGS)
    assert line.startswith(f"command    at most {size / 2**30:.2f} GiB")


def test_what_does_not_fit_is_refused_before_anything_is_scored(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command_cost, "available_bytes", lambda: 100 << 20)
    done = CliRunner().invoke(probe, [str(store), "-o", str(tmp_path / "out")])
    assert done.exit_code != 0 and "and 0.10 GiB are free" in str(done.exception)
    assert "--no-separability" in str(done.exception) and not (tmp_path / "out").exists()


def test_as_many_are_described_at_a_time_as_memory_is_ample_for(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_probe(store, ProbeSettings())
    monkeypatch.setattr(command_cost, "count_cores", lambda: 64)
    one = describing_bytes(plan, SETTINGS)
    for share, threads in ((1000.0, len(plan.cells)), (3.5, 2), (0.1, 1)):
        free = share * one + command_cost.PICTURE_BYTES / planning.AMPLE
        monkeypatch.setattr(command_cost, "available_bytes", lambda free=free: int(free))
        assert choose_threads(plan, SETTINGS) == threads
        assert choose_threads(plan, SETTINGS, kept=int(free)) == 1


def test_one_thread_at_a_time_is_enough_to_begin(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_probe(store, ProbeSettings())
    one = predict_command_bytes([plan], SETTINGS, threads=1)
    assert one < predict_command_bytes([plan], SETTINGS, threads=2)
    free = one - planning.BASE_BYTES
    monkeypatch.setattr(command_cost, "available_bytes", lambda: free)
    monkeypatch.setattr(command_cost, "count_cores", lambda: 64)
    check_command([plan], SETTINGS)


def test_workers_of_a_cluster_that_cannot_describe_are_refused(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_probe(store, ProbeSettings())
    with (
        LocalCluster(
            n_workers=1, threads_per_worker=1, processes=False, dashboard_address=None, memory_limit="4GiB"
        ) as cluster,
        Client(cluster) as client,
    ):
        check_command([plan], SETTINGS, client=client)
        monkeypatch.setattr(command_cost, "describing_bytes", lambda *_: 9 << 30)
        with pytest.raises(ValueError, match=r"may use 4.00 GiB, and to describe .*--no-separability"):
            check_command([plan], SETTINGS, client=client)


@pytest.mark.parametrize(
    ("settings", "compared"),
    [
        pytest.param(ProbeSettings(permutations=20), False, id="default"),
        pytest.param(ProbeSettings(permutations=20), True, id="compared"),
        pytest.param(ProbeSettings(group="none", repeats=3, permutations=0), False, id="many groups"),
        pytest.param(ProbeSettings(repeats=1, penalties=(0.1,), permutations=0), False, id="one repeat"),
    ],
)
def test_scores_take_what_was_predicted(store: Path, settings: ProbeSettings, compared: bool) -> None:
    settings = replace(settings, layers=(0, 1), positions=("last",))
    plan = plan_probe(store, settings, compare_with=store if compared else None)
    arrays: list[NDArray[Any] | None] = []
    for cell in run_probe(plan).values():
        for task in cell.tasks:
            arrays += [*task.deviations.values(), task.decisions, task.folds]
            arrays += [task.y] if task.decisions is not None else []  # others share the label's
        for test in cell.tests.values():
            arrays += [test.null, *(a for null in test.nulls.values() for a in (null.values, null.errors))]
    held = sum(array.nbytes for array in arrays if array is not None)
    predicted = len(plan.cells) * (kept_cost._decided_bytes(plan) + kept_cost._moved_bytes(plan))
    assert held <= predicted <= 1.25 * held


def test_what_is_kept_grows_with_what_is_asked_for(store: Path) -> None:
    plan = plan_probe(store, ProbeSettings())
    one = kept_bytes(plan)
    assert kept_bytes(plan_probe(store, ProbeSettings(layers=(0,)))) == one / 3
    assert kept_bytes(plan_probe(store, ProbeSettings(repeats=1))) < one
    assert kept_bytes(plan_probe(store, ProbeSettings(), compare_with=store)) > one
    paper = plan_probe(store, ProbeSettings(preset="paper"))
    assert kept_bytes(paper) < one / 3
    assert predict_command_bytes([plan, plan], SETTINGS) - predict_command_bytes([plan], SETTINGS) > one
