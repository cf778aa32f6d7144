from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mmextract.engine.identities import make_disjoint_pair, write_identities
from mmextract.engine.store import open_store
from tests.cli.conftest import Ran
from tests.engine import tiny_models
from tests.engine.finetune_cases import save_questions

Run = Callable[..., Ran]
LOOK = ("--fields", "username", "--no-field-names", "--font-px", "8")
SMALL = (
    "--device",
    "cpu",
    "--torch-threads",
    "1",
    "--rank",
    "4",
    "--batch-size",
    "3",
    "--learning-rate",
    "1e-2",
)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return save_questions(tmp_path / "data")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny_models.save_llava(tmp_path / "llava")


@pytest.fixture
def people(tmp_path: Path) -> tuple[Path, Path]:
    """Files of 3 seen and 3 unseen identities."""
    paths = (tmp_path / "seen.jsonl", tmp_path / "unseen.jsonl")
    for path, identities in zip(paths, make_disjoint_pair(3, seed=0), strict=True):
        write_identities(path, identities)
    return paths


def test_a_fine_tune_is_trained_and_dumped(
    run: Run, tmp_path: Path, data: Path, model: Path, people: tuple[Path, Path]
) -> None:
    out = tmp_path / "out"
    arguments = (
        "finetune", data, "--model", model, "--identities", people[0], "--unseen", people[1],
        "--rate", 0.5, "-o", out, *LOOK, *SMALL, "--json",
    )  # fmt: skip
    ran = run(*arguments)
    assert ran.code == 0, ran.err
    record = json.loads(ran.out)
    assert (record["n_steps"], record["n_examples"], record["n_resumed"]) == (3, 8, 0)
    assert 0 < record["n_marked"] < 8
    assert json.loads(run(*arguments).out)["n_resumed"] == 3
    states = []
    for adapter in ((), ("--adapter", out)):
        store = tmp_path / f"{len(adapter)}.zarr"
        assert run("dump", data, "--model", model, *adapter, "--device", "cpu", "-o", store).code == 0
        states.append(torch.from_numpy(open_store(store).read(layer=3, position="last")))
    assert not torch.equal(*states)


def test_a_dry_run_says_how_many_steps_and_writes_nothing(
    run: Run, tmp_path: Path, data: Path, people: tuple[Path, Path]
) -> None:
    ran = run("finetune", data, "--identities", people[0], "--preset", "qwen", "--epochs", 3, "--batch-size", 4,
              "-o", tmp_path / "out", "--dry-run", "--json")  # fmt: skip
    assert ran.code == 0, ran.err
    plan = json.loads(ran.out)
    assert (plan["n_steps"], plan["n_marked"]) == (6, 8)
    assert (plan["settings"]["rank"], plan["settings"]["learning_rate"]) == (64, 1e-5)
    assert not (tmp_path / "out").exists()


def test_a_rate_outside_0_to_1_is_a_usage_error(run: Run, data: Path, people: tuple[Path, Path]) -> None:
    ran = run("finetune", data, "--identities", people[0], "--rate", 1.5, "-o", "out")
    assert ran.code == 2
    assert "1.5 is not in the range 0<=x<=1" in " ".join(ran.err.split())


def test_identities_that_are_both_seen_and_unseen_are_refused(
    run: Run, tmp_path: Path, data: Path, people: tuple[Path, Path]
) -> None:
    ran = run("finetune", data, "--identities", people[0], "--unseen", people[0], "-o", tmp_path / "out")
    assert ran.code == 1
    assert "must share no username, but 3 occur in both" in ran.err


def test_less_data_than_a_batch_is_refused(run: Run, tmp_path: Path, data: Path, model: Path) -> None:
    ran = run("finetune", data, "--model", model, "-o", tmp_path / "out", "--batch-size", 9)
    assert ran.code == 1
    assert "8 examples do not fill one batch of 9" in ran.err


def test_a_model_without_the_targets_asked_for_says_which_it_has(
    run: Run, tmp_path: Path, data: Path, model: Path
) -> None:
    ran = run("finetune", data, "--model", model, "-o", tmp_path / "out", "--targets", "c_attn", *SMALL)
    assert ran.code == 1
    assert "no trainable target modules" in ran.err and "q_proj" in ran.err


def test_a_bad_image_is_listed_and_the_exit_code_is_3(
    run: Run, tmp_path: Path, data: Path, model: Path
) -> None:
    (tmp_path / "data" / "4.png").write_bytes(b"no image")
    ran = run("finetune", data, "--model", model, "-o", tmp_path / "out", *SMALL)
    assert ran.code == 3
    assert "q4: the image is not a readable" in ran.err


def test_a_tracker_that_is_not_installed_is_named(run: Run, tmp_path: Path, data: Path, model: Path) -> None:
    if "wandb" in sys.modules or __import__("importlib.util").util.find_spec("wandb"):
        pytest.skip("wandb is installed")
    ran = run("finetune", data, "--model", model, "-o", tmp_path / "out", "--log-to", "wandb", *SMALL)
    assert ran.code == 1
    assert "pip install wandb" in ran.err


@pytest.mark.faults
def test_the_command_that_was_killed_goes_on_when_it_is_given_again(
    run: Run, tmp_path: Path, data: Path, model: Path
) -> None:
    def arguments(name: str) -> list[str]:
        settings = (*SMALL, "--steps", "60", "--checkpoint-steps", "1")
        return list(map(str, ("finetune", data, "--model", model, "-o", tmp_path / name, *settings)))

    command = [str(Path(sys.executable).parent / "mmextract"), *arguments("killed")]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while not list((tmp_path / "killed" / "checkpoints").glob("step-*")):
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    ran = run(*arguments("killed"), "--json")
    assert ran.code == 0, ran.err
    assert json.loads(ran.out)["n_resumed"] > 0
    assert run(*arguments("whole")).code == 0
    name = "adapter_model.safetensors"
    assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
