from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from mmextract.engine.identities import make_disjoint_pair, write_identities
from tests.cli.conftest import Ran
from tests.engine import tiny_models
from tests.engine.finetune_cases import save_questions
from tests.engine.test_evaluate_formats import save_mme, save_scienceqa

Run = Callable[..., Ran]
ONE = ("--device", "cpu", "--torch-threads", 1)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny_models.save_llava(tmp_path / "llava")


def test_a_model_and_its_fine_tune_stand_beside_each_other(run: Run, tmp_path: Path, model: Path) -> None:
    data = save_questions(tmp_path / "data", 4)
    for name, people in zip(("seen", "unseen"), make_disjoint_pair(3, seed=0), strict=True):
        write_identities(tmp_path / f"{name}.jsonl", people)
    tuned = run("finetune", data, "--model", model, *ONE, "--batch-size", 4, "-o", tmp_path / "tuned")
    assert tuned.code == 0, tuned.err
    arguments = (
        "evaluate", data, "--model", model, "--adapter", tmp_path / "tuned", *ONE,
        "--seen", tmp_path / "seen.jsonl", "--unseen", tmp_path / "unseen.jsonl",
        "--fields", "username", "--no-field-names", "--font-px", 8, "--max-new-tokens", 3, "-o", tmp_path / "e",
    )  # fmt: skip
    ran = run(*arguments)
    assert ran.code == 0, ran.err
    assert "accuracy" in ran.out and "username, AUROC by exposure" in ran.out and "tuned" in ran.out
    record = json.loads((tmp_path / "e" / "evaluation.json").read_text())
    assert list(record["scores"]) == list(record["fields"]) == [str(model), str(tmp_path / "tuned")]
    found = record["fields"][str(model)]["username"]["exposure"]
    assert list(record["fields"][str(model)]) == ["username", "username, clean"]
    assert (found["n"], found["n_groups"]) == (8, found["n_groups"])
    with (tmp_path / "e" / "prompts.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 2 * 16
    with (tmp_path / "e" / "predictions.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 2 * 4
    assert json.loads(run(*arguments, "--json").out) == record


@pytest.mark.parametrize(("save", "names"), [(save_scienceqa, {"accuracy"}), (save_mme, {"perception"})])
def test_benchmarks_are_recognised(
    run: Run, tmp_path: Path, model: Path, save: Callable[[Path], Path], names: set[str]
) -> None:
    folder = save(tmp_path / "benchmark")
    ran = run("evaluate", folder, "--model", model, *ONE, "-o", tmp_path / "e", "--json",
              "--max-new-tokens", 2)  # fmt: skip
    assert ran.code == 0, ran.err
    assert names <= set(json.loads(ran.out)["scores"][str(model)])


def test_a_lora_of_another_base_is_refused(run: Run, tmp_path: Path, model: Path) -> None:
    data = save_questions(tmp_path / "data", 4)
    assert (
        run("finetune", data, "--model", model, *ONE, "--batch-size", 4, "-o", tmp_path / "tuned").code == 0
    )
    other = tiny_models.save_llava(tmp_path / "other", seed=1)
    ran = run("evaluate", data, "--model", other, *ONE, "--adapter", tmp_path / "tuned", "-o", tmp_path / "e")
    assert ran.code == 1
    assert "was trained on another base: on llava" in ran.err


def test_half_of_the_prompt_baseline_is_a_usage_error(run: Run, tmp_path: Path) -> None:
    ran = run("evaluate", save_questions(tmp_path / "data", 4), "--seen", tmp_path / "s.jsonl")
    assert ran.code == 2
    assert "needs both --seen and --unseen" in ran.err


def test_overlapping_identities_are_refused(run: Run, tmp_path: Path) -> None:
    write_identities(tmp_path / "p.jsonl", make_disjoint_pair(3, seed=0)[0])
    data = save_questions(tmp_path / "data", 4)
    ran = run("evaluate", data, "--seen", tmp_path / "p.jsonl", "--unseen", tmp_path / "p.jsonl")
    assert ran.code == 1
    assert "must share no username" in ran.err
