"""What `mmextract probe` takes in its own process is known before it starts, and it takes no more."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from mmextract.cli.probe import probe
from mmextract.probes import command_cost
from mmextract.probes.command_cost import choose_threads, describing_bytes, predict_command_bytes
from mmextract.probes.description import DescriptionSettings
from mmextract.probes.run import plan_probe
from mmextract.probes.settings import ProbeSettings
from tests.probes.test_planning import noise_store

SETTINGS = DescriptionSettings()
COMMAND = """
import sys
from pathlib import Path
from mmextract.cli.main import main
from mmextract.probes import command_cost, run

run.SECONDS_WORTH_PROCESSES = float(sys.argv.pop(1))
predict = command_cost.predict_command_bytes

def report(*arguments, **options):
    global predicted
    predicted = predict(*arguments, **options)
    return predicted

command_cost.predict_command_bytes = report
try:
    main()
finally:
    peak = int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) << 10
    print(peak, predicted)
"""


@pytest.mark.parametrize(
    ("n_images", "hidden_size", "processes", "options"),
    [
        pytest.param(30, 16, False, [], id="small"),
        pytest.param(1000, 2000, False, [], id="described by the large"),
        pytest.param(1000, 2000, True, ["--workers", "1", "--projections", "pca"], id="scored elsewhere"),
        pytest.param(4000, 100, False, ["--stream", "always", "--projections", "pca"], id="streamed"),
        pytest.param(2000, 500, False, ["--no-separability", "--projections", "none"], id="not described"),
    ],
)
@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_the_command_takes_no_more_memory_than_predicted_and_at_least_half_of_it(
    tmp_path: Path, n_images: int, hidden_size: int, processes: bool, options: list[str]
) -> None:
    store = noise_store(tmp_path / "a.zarr", n_images, hidden_size)
    chosen = ["--folds", "2", "--repeats", "1", "--c", "0.01", "--permutations", "0", *options]
    worth = "0" if processes else "1e9"
    command = [
        sys.executable,
        "-c",
        COMMAND,
        worth,
        "probe",
        str(store),
        *chosen,
        "-o",
        str(tmp_path / "out"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    peak, predicted = map(int, done.stdout.splitlines()[-1].split())
    assert peak <= predicted <= 2 * peak


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
    assert done.exit_code != 0 and "has 0.10 GiB" in str(done.exception)
    assert "--no-separability" in str(done.exception) and not (tmp_path / "out").exists()


def test_as_many_are_described_at_a_time_as_memory_is_ample_for(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_probe(store, ProbeSettings())
    monkeypatch.setattr(command_cost, "count_cores", lambda: 64)
    one = describing_bytes(plan, SETTINGS)
    for share, threads in ((1000.0, len(plan.cells)), (3.5, 2), (0.1, 1)):
        monkeypatch.setattr(command_cost, "available_bytes", lambda share=share: int(share * one))
        assert choose_threads(plan, SETTINGS) == threads


def test_more_labels_and_another_store_take_more(store: Path) -> None:
    plan = plan_probe(store, ProbeSettings())
    one = predict_command_bytes([plan], SETTINGS)
    assert predict_command_bytes([plan, plan], SETTINGS) > one
    assert predict_command_bytes([plan_probe(store, ProbeSettings(), compare_with=store)], SETTINGS) > one
    assert describing_bytes(plan, replace(SETTINGS, separability=False, projections=())) == 0
