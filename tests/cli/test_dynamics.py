from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import Ran, save_photos

Run = Callable[..., Ran]
SMALL = ("--samples", 4, "--batch-size", 1, "--batch-size", 4, "--rate", 0, "--rate", 1)


def test_with_nothing_given_it_compares_gradients_of_the_builtin_model(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ran = run("dynamics", *SMALL)
    assert ran.code == 0, ran.err
    assert "rate 0               1.000" in ran.out and "4 samples" in ran.out
    assert {path.name for path in (tmp_path / "dynamics").iterdir()} == {
        *("cosines.csv", "cosines.parquet", "noise.csv", "noise.parquet"),
        *("dynamics.png", "dynamics.svg", "dynamics.json"),
    }


def test_checkpoints_are_loras_or_models_and_named(run: Run, tmp_path: Path) -> None:
    ran = run(
        *(
            "dynamics",
            *SMALL,
            "--no-text-augmentation",
            "--no-image-augmentation",
            "--json",
            "-o",
            tmp_path / "out",
        ),
        *("--checkpoint", "start=builtin:base", "--checkpoint", "builtin:watermarked"),
    )
    assert ran.code == 0, ran.err
    record = json.loads(ran.out)
    assert record["checkpoints"] == ["start", "builtin:watermarked"]
    groups = {
        name: {r["group"] for r in record["cosines"] if r["checkpoint"] == name}
        for name in record["checkpoints"]
    }
    assert "vision" in groups["start"]
    assert groups["builtin:watermarked"] == {"all", *(f"layer {index}" for index in range(6))}
    assert {r["matrix"] for r in record["cosines"]} == {"all", "A", "B"}


def test_data_of_ones_own_needs_identities(run: Run, tmp_path: Path) -> None:
    photos = save_photos(tmp_path / "photos", 2)
    ran = run("dynamics", photos, "--prompt", "what?")
    assert ran.code == 2 and "--identities" in ran.err


def test_a_checkpoint_that_is_not_there_is_named(run: Run, tmp_path: Path) -> None:
    ran = run("dynamics", *SMALL, "--checkpoint", tmp_path / "step-1.safetensors")
    assert ran.code == 1 and "step-1.safetensors" in ran.err
