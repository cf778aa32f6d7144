from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mmextract.engine.finetune import FinetuneSummary, run_finetune
from mmextract.engine.finetune_log import read_log
from mmextract.engine.finetune_record import hold
from mmextract.engine.models import ModelSpec, load
from mmextract.engine.writer import OtherRunError
from tests.engine import tiny_models
from tests.engine.finetune_cases import examples, save_questions, spec
from tests.engine.tiny_adapters import edit_json

PROCESS = Path(__file__).with_name("finetune_process.py")


class Stop(Exception):
    """Ends a training from its progress callback."""


def tune(
    model: Path, work: Path, name: str, stop_after: int | None = None, **settings: Any
) -> FinetuneSummary:
    done = 0

    def advance(n_steps: int) -> None:
        nonlocal done
        done += n_steps
        if done == stop_after:
            raise Stop

    chosen = {"steps": 8, "checkpoint_steps": 3, "dropout": 0.3} | settings
    return run_finetune(
        spec(model, **chosen), examples(work / "data"), work / name, on_progress=advance, note=print
    )


def weights(folder: Path) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


KILLS = [(0, 2), *(pytest.param(seed, 4, marks=pytest.mark.faults) for seed in range(1, 6))]


@pytest.mark.parametrize(("seed", "n_kills"), KILLS)
def test_a_training_that_was_killed_at_random_moments_ends_in_the_same_weights(
    tiny_folders: dict[str, Path], tmp_path: Path, seed: int, n_kills: int
) -> None:
    data = save_questions(tmp_path / "data")
    command = [sys.executable, PROCESS, tiny_folders["llava"], data, tmp_path, seed, n_kills]
    ran = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, timeout=280)
    assert ran.returncode == 0, ran.stderr
    ended = json.loads(ran.stdout)
    assert [code for code, _ in ended] == [0, *[signal.SIGKILL] * n_kills, 0]
    assert ended[-1][1] > 0, "the last one began anew"
    assert weights(tmp_path / "killed") == weights(tmp_path / "undisturbed")
    whole, killed = (read_log(tmp_path / name / "log.csv") for name in ("undisturbed", "killed"))
    assert [step.loss for step in killed] == [step.loss for step in whole]
    assert not [path for path in (tmp_path / "killed").rglob("*") if "partial" in path.name]


@pytest.mark.parametrize("settings", [{}, {"full": True}, {"projector_learning_rate": 1e-2}])
def test_a_training_that_was_stopped_goes_on_from_its_checkpoint(
    tiny_folders: dict[str, Path], tmp_path: Path, settings: dict[str, Any]
) -> None:
    model = tiny_folders["llava"]
    tune(model, tmp_path, "whole", **settings)
    with pytest.raises(Stop):
        tune(model, tmp_path, "stopped", stop_after=5, **settings)
    left = tmp_path / "stopped" / ".log.csv.0.partial"  # of a run that was killed while it wrote
    left.touch()
    summary = tune(model, tmp_path, "stopped", **settings)
    assert summary.n_resumed == 3 and not left.exists()
    name = "model.safetensors" if settings.get("full") else "adapter_model.safetensors"
    assert (tmp_path / "stopped" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize("name", [".tmpAbC123", ".step-00000003.safetensors.0.partial"])
def test_what_a_killed_process_left_beside_checkpoints_is_removed(
    tiny_folders: dict[str, Path], tmp_path: Path, name: str
) -> None:
    save_questions(tmp_path / "data")
    with pytest.raises(Stop):
        tune(tiny_folders["llava"], tmp_path, "stopped", stop_after=4)
    (tmp_path / "stopped/checkpoints" / name).touch()
    tune(tiny_folders["llava"], tmp_path, "stopped")
    assert not (tmp_path / "stopped/checkpoints").exists()


def test_a_file_of_others_among_the_checkpoints_stays(tiny_folders: dict[str, Path], tmp_path: Path) -> None:
    save_questions(tmp_path / "data")
    with pytest.raises(Stop):
        tune(tiny_folders["llava"], tmp_path, "stopped", stop_after=4)
    (tmp_path / "stopped/checkpoints/notes.txt").touch()
    tune(tiny_folders["llava"], tmp_path, "stopped")
    assert [path.name for path in (tmp_path / "stopped/checkpoints").iterdir()] == ["notes.txt"]


def test_a_finished_training_is_left_as_it_is(tiny_folders: dict[str, Path], tmp_path: Path) -> None:
    first = tune(tiny_folders["llava"], tmp_path, "out")
    before = weights(tmp_path / "out")
    again = tune(tiny_folders["llava"], tmp_path, "out")
    assert (again.n_resumed, again.final_loss) == (8, first.final_loss)
    assert weights(tmp_path / "out") == before


@pytest.mark.parametrize("full", [False, True])
def test_a_snapshot_is_the_model_as_it_was_and_changes_nothing(
    tiny_folders: dict[str, Path], tmp_path: Path, full: bool
) -> None:
    model, name = tiny_folders["llava"], "model.safetensors" if full else "adapter_model.safetensors"
    settings: dict[str, Any] = {"full": full, "schedule": "constant", "warmup": 0.0}
    tune(model, tmp_path, "short", steps=4, **settings)
    tune(model, tmp_path, "whole", **settings)
    with pytest.raises(Stop):
        tune(model, tmp_path, "out", stop_after=5, snapshots=(2, 4), **settings)
    (tmp_path / "out" / ".snapshot").mkdir()  # of a run that was killed while it wrote
    assert tune(model, tmp_path, "out", snapshots=(2, 4), **settings).n_resumed == 3
    assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    kept, wanted = tmp_path / "out" / "step-4", tmp_path / "short"
    assert (kept / name).read_bytes() == (wanted / name).read_bytes()
    load(ModelSpec(model=str(kept)) if full else ModelSpec(model=str(model), adapter=str(kept)))
    assert (tmp_path / "out" / "step-2" / name).read_bytes() != (kept / name).read_bytes()


def test_a_snapshot_that_training_cannot_come_by_is_an_error(
    tiny_folders: dict[str, Path], tmp_path: Path
) -> None:
    model = tiny_folders["llava"]
    with pytest.raises(ValueError, match="no snapshot can be taken after 8 of 8 steps"):
        tune(model, tmp_path, "short", snapshots=(8,))
    assert not (tmp_path / "short").exists()
    with pytest.raises(Stop):
        tune(model, tmp_path, "out", stop_after=5)
    with pytest.raises(ValueError, match="is past step 2 and kept no snapshot"):
        tune(model, tmp_path, "out", snapshots=(2,))
    tune(model, tmp_path, "out", snapshots=(4,))
    with pytest.raises(ValueError, match="is past step 5 and kept no snapshot"):
        tune(model, tmp_path, "out", snapshots=(4, 5))
    with pytest.raises(ValueError, match="different steps, from 1 on, got 2, 2"):
        tune(model, tmp_path, "out", snapshots=(2, 2))


def test_a_damaged_checkpoint_is_passed_over(
    tiny_folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_folders["llava"]
    tune(model, tmp_path, "whole")
    with pytest.raises(Stop):
        tune(model, tmp_path, "stopped", stop_after=7)
    newest = max((tmp_path / "stopped" / "checkpoints").iterdir())
    data = bytearray(newest.read_bytes())
    data[-5] ^= 1
    newest.write_bytes(data)
    assert tune(model, tmp_path, "stopped").n_resumed == 3
    assert "step-00000006.safetensors is damaged" in capsys.readouterr().out
    assert weights(tmp_path / "stopped") == weights(tmp_path / "whole")


def test_as_many_checkpoints_are_kept_as_asked_for(tiny_folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(Stop):
        tune(tiny_folders["llava"], tmp_path, "out", stop_after=8, checkpoint_steps=1, keep_checkpoints=3)
    names = sorted(path.name for path in (tmp_path / "out" / "checkpoints").iterdir())
    assert names == [f"step-0000000{n}.safetensors" for n in (5, 6, 7)]


def test_another_run_is_refused_with_what_differs(tiny_folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(Stop):
        tune(tiny_folders["llava"], tmp_path, "out", stop_after=4)
    with pytest.raises(OtherRunError, match=r"settings.rank: it has 4, this run has 2"):
        tune(tiny_folders["llava"], tmp_path, "out", rank=2)


def test_a_checkpoint_from_another_base_is_refused(tiny_folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(Stop):
        tune(tiny_folders["llava"], tmp_path, "out", stop_after=4)
    other = tiny_models.save_llava(tmp_path / "other" / "llava", seed=1)
    with pytest.raises(OtherRunError, match=r"model.weights.xxh3_128: it has"):
        tune(other, tmp_path, "out")


def test_a_checkpoint_of_other_tensors_is_refused_with_their_names(
    tiny_folders: dict[str, Path], tmp_path: Path
) -> None:
    for name, rank in (("four", 4), ("two", 2)):
        with pytest.raises(Stop):
            tune(tiny_folders["llava"], tmp_path, name, stop_after=4, rank=rank)
    shutil.rmtree(tmp_path / "four" / "checkpoints")
    shutil.copytree(tmp_path / "two" / "checkpoints", tmp_path / "four" / "checkpoints")
    with pytest.raises(ValueError, match=r"checkpoint of another base: \d+ tensors differ, such as .*lora_A"):
        tune(tiny_folders["llava"], tmp_path, "four")


def test_a_continued_run_keeps_its_number_of_threads(tiny_folders: dict[str, Path], tmp_path: Path) -> None:
    tune(tiny_folders["llava"], tmp_path, "whole")
    with pytest.raises(Stop):
        tune(tiny_folders["llava"], tmp_path, "stopped", stop_after=4)
    tune(tiny_folders["llava"], tmp_path, "stopped", torch_threads=2)
    assert weights(tmp_path / "stopped") == weights(tmp_path / "whole")


def test_two_runs_do_not_train_in_one_folder(tiny_folders: dict[str, Path], tmp_path: Path) -> None:
    with hold(tmp_path / "out"), pytest.raises(OSError, match="another run is training"):
        tune(tiny_folders["llava"], tmp_path, "out")


@pytest.mark.parametrize("make", [Path.touch, Path.mkdir])
def test_a_place_that_holds_something_else_is_left_alone(
    tiny_folders: dict[str, Path], tmp_path: Path, make: Callable[[Path], None]
) -> None:
    make(tmp_path / "out")
    if (tmp_path / "out").is_dir():
        (tmp_path / "out" / "thesis.tex").write_text("important")
    with pytest.raises(ValueError, match=r"is a file|no fine-tune of mmextract"):
        tune(tiny_folders["llava"], tmp_path, "out")


def test_a_record_that_cannot_be_read_is_an_error(tiny_folders: dict[str, Path], tmp_path: Path) -> None:
    tune(tiny_folders["llava"], tmp_path, "out", steps=1)
    edit_json(tmp_path / "out" / "finetune.json", format=99)
    with pytest.raises(ValueError, match="has format 99"):
        tune(tiny_folders["llava"], tmp_path, "out", steps=1)


def test_a_log_that_was_cut_short_is_continued(tiny_folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(Stop):
        tune(tiny_folders["llava"], tmp_path, "out", stop_after=5)
    log = tmp_path / "out" / "log.csv"
    log.write_text(log.read_text()[:-20])
    tune(tiny_folders["llava"], tmp_path, "out")
    assert [step.step for step in read_log(log)] == list(range(1, 9))
