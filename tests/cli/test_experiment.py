"""`mmextract experiment` from end to end, with the built-in model and few steps: plan, report, runs that are killed.

What a run costs lies in starting torch and in the model; the killed ones are among the faults.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from click.testing import CliRunner

from mmextract.cli.main import group
from mmextract.engine.steps import FOLDER, RECORD
from tests.cli.conftest import save_photos
from tests.engine import tiny_models

CONFIG = """
preset = "demo"
training_images = 16
held_out_images = 24
identities = 8
layers = "1,5"
batch_sizes = [4]
seeds = {seeds}
[finetune]
steps = 4
checkpoint_steps = 1
torch_threads = 1
[control]
identities = 8
exposures = 2
batch_size = 4
steps = 3
[probe]
folds = 2
permutations = 19
legibility = []
[evaluation]
enabled = {evaluate}
questions = 4
prompted = 2
references = 3
[dynamics]
enabled = {evaluate}
batch_sizes = [1, 2]
samples = 2
"""


PUBLISHED = """
preset = "{preset}"
model = "{model}"
data = "train.json"
image_root = "photos"
training_images = 16
held_out_images = 16
identities = 8
seeds = [0]
rates = [1.0]
batch_sizes = [4]
[finetune]
steps = 2
torch_threads = 1
[control]
identities = 8
exposures = 2
batch_size = 4
steps = 2
[probe]
folds = 2
permutations = 19
legibility = ["identity_gender"]
legibility_images = 40
[evaluation]
questions = 2
prompted = 2
references = 3
[dynamics]
batch_sizes = [1, 2]
samples = 2
"""


def write_config(folder: Path, *, seeds: str = "[0]", evaluate: bool = False) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.toml"
    path.write_text(CONFIG.format(seeds=seeds, evaluate=str(evaluate).lower()))
    return path


def run(*arguments: str | Path) -> Any:
    done = CliRunner().invoke(group, ["experiment", *map(str, arguments)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout) if "--json" in arguments else done.stdout


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run, undisturbed."""
    folder = tmp_path_factory.mktemp("experiment")
    run(write_config(folder), "-o", folder / "run")
    return folder


def numbers(out: Path) -> list[dict[str, Any]]:
    return list(json.loads((out / "experiment.json").read_text())["rows"])


def test_a_run_ends_in_a_report_that_doubts_a_null_without_sensitivity(finished: Path) -> None:
    record = json.loads((finished / "run" / "experiment.json").read_text())
    assert record["sensitive"] is False and record["legible"] is None
    assert record["warnings"][0].endswith("a null of this experiment is no evidence")
    measures = {row["measure"] for row in record["rows"]}
    assert measures == {
        *(
            "memorisation",
            "positive control",
            "seen/unseen",
            "published protocol",
            "control's answers",
            "separability",
        )
    }
    conditions = {row["condition"] for row in record["rows"]}
    assert conditions == {"base", "r0-b4", "r100-b4", "control"}
    found = [r for r in record["rows"] if r["measure"] == "memorisation" and r["layer"] == 5]
    assert [row["position"] for row in found] == ["last", "image"]
    row = found[0]
    assert row["repetitions"] == 2 and row["p_corrected"] is not None and row["over"] == "identities"
    assert (finished / "run" / "report.html").stat().st_size > 1_000_000


def test_the_plan_says_what_is_done_and_what_a_changed_seed_costs(finished: Path, tmp_path: Path) -> None:
    out = finished / "run"
    same = run(write_config(tmp_path), "-o", out, "--dry-run", "--json")
    assert {entry["state"] for entry in same} == {"done"}
    more = run(write_config(tmp_path, seeds="[0, 1]"), "-o", out, "--dry-run", "--json")
    states = {entry["step"]: entry["state"] for entry in more}
    assert all((state == "done") == name.endswith("-s0") for name, state in states.items())
    assert sum(state == "new" for state in states.values()) == 12
    text = run(write_config(tmp_path, seeds="[0, 1]"), "-o", out, "--dry-run")
    assert "to do: about" in text and "finetune-r100-b4-s1" in text


def test_settings_of_the_probe_change_no_fine_tune(finished: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path)
    config.write_text(config.read_text().replace("permutations = 19", "permutations = 39"))
    plan = run(config, "-o", finished / "run", "--dry-run", "--json")
    assert {e["step"].partition("-")[0] for e in plan if e["state"] == "changed"} == {"probe"}


def test_a_finished_run_does_nothing_again_and_says_the_same(finished: Path, tmp_path: Path) -> None:
    out = finished / "run"
    before = {path: path.stat().st_mtime_ns for path in out.glob(f"{FOLDER}/*/{RECORD}")}
    rows = numbers(out)
    record = run(write_config(tmp_path), "-o", out, "--json")
    assert {path: path.stat().st_mtime_ns for path in out.glob(f"{FOLDER}/*/{RECORD}")} == before
    assert numbers(out) == rows and record["best"] in rows


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rates = [2.0]", "a watermark rate must lie in [0, 1], got 2.0"),
        ("[probe]\nfold = 3", "there is no setting 'fold'"),
        ('model = "builtin:r0"', "is a fine-tune"),
        ('data = "nowhere.json"', "no data at nowhere.json"),
    ],
)
def test_a_bad_configuration_is_one_message(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "config.toml").write_text(text)
    with pytest.raises(ValueError) as raised:
        run(tmp_path / "config.toml", "-o", tmp_path / "run")
    assert message in str(raised.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("preset", "save"),
    [
        ("llava-1.5-7b", tiny_models.save_llava),
        pytest.param("qwen2-vl-7b", tiny_models.save_qwen2_vl, marks=pytest.mark.faults),
    ],
    ids=["llava", "qwen"],
)
def test_the_presets_of_large_models_run_from_end_to_end_on_random_ones_of_their_shape(
    tmp_path: Path, preset: str, save: Callable[[Path], Path]
) -> None:
    save_photos(tmp_path / "photos", 32)
    records = [
        {
            "id": str(k),
            "image": f"{k}.jpg",
            "conversations": [
                {"from": "human", "value": "<image>\nIs it red?"},
                {"from": "gpt", "value": ("no", "yes")[k % 2]},
            ],
        }
        for k in range(32)
    ]
    (tmp_path / "train.json").write_text(json.dumps(records))
    config = tmp_path / "config.toml"
    config.write_text(PUBLISHED.format(preset=preset, model=save(tmp_path / "model")))
    run(config, "-o", tmp_path / "run")
    settings = json.loads((tmp_path / "run/steps/finetune-r100-b4-s0/step.json").read_text())["decision"]
    assert settings["settings"]["rank"] == (128 if preset == "llava-1.5-7b" else 64)
    measures = {row["measure"] for row in numbers(tmp_path / "run")}
    assert {"memorisation", "legibility", "positive control", "task accuracy", "prompt baseline"} <= measures


def test_the_tables_of_a_benchmark_are_those_of_its_runs(finished: Path, tmp_path: Path) -> None:
    script = Path(__file__).parents[2] / "benchmarks" / "memorisation.py"
    command = [sys.executable, str(script), str(finished / "run"), "-o"]
    subprocess.run([*command, str(tmp_path / "out")], check=True, capture_output=True)
    tables = (tmp_path / "out" / "tables.md").read_text()
    best = max(
        (row for row in numbers(finished / "run") if row["measure"] == "memorisation"),
        key=lambda row: row["value"],
    )
    assert f"| r100-b4 | 2 | {best['value']:+.3f} | layer {best['layer']}, {best['position']} |" in tables
    assert "**Positive control**" in tables and "**Prompt baseline**" not in tables
    assert (tmp_path / "out/run/experiment.csv").read_bytes() == (
        finished / "run/experiment.csv"
    ).read_bytes()
    nowhere = subprocess.run(
        [*command[:2], str(tmp_path), "-o", str(tmp_path)], capture_output=True, text=True
    )
    assert nowhere.returncode and "holds no experiment.csv" in nowhere.stderr


@pytest.mark.faults
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", range(2))
def test_killed_at_random_steps_and_run_again_it_ends_in_the_same_numbers(
    finished: Path, tmp_path: Path, seed: int
) -> None:
    rng = random.Random(seed)
    out = tmp_path / "run"
    command = [sys.executable, "-c", "from mmextract.cli.main import main; main()", "experiment"]
    command += [str(write_config(tmp_path)), "-o", str(out)]
    n_steps = len(list((finished / "run" / FOLDER).iterdir()))
    for at in sorted(rng.sample(range(1, n_steps), 3)):
        with subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        ) as process:
            while process.poll() is None and len(list(out.glob(f"{FOLDER}/*"))) < at:
                time.sleep(0.01)
            time.sleep(rng.uniform(0, 2))
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    subprocess.run(command, check=True, capture_output=True)
    assert numbers(out) == numbers(finished / "run")


@pytest.mark.faults
@pytest.mark.timeout(1800)
def test_everything_is_asked_and_measured(tmp_path: Path) -> None:
    run(write_config(tmp_path, evaluate=True), "-o", tmp_path / "run")
    measures = {row["measure"] for row in numbers(tmp_path / "run")}
    assert {"task accuracy", "prompt baseline"} <= measures
    assert (tmp_path / "run" / "dynamics.svg").exists()
    cosines = pd.read_csv(tmp_path / "run/steps/dynamics/cosines.csv")
    along = ["base", "r100-b4, step 1", "r100-b4, step 2", "after r100-b4"]
    assert list(dict.fromkeys(cosines["checkpoint"])) == along
