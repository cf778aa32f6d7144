from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import Ran, save_photos

Run = Callable[..., Ran]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return save_photos(tmp_path / "photos", 6, size=(200, 300), suffix="png")


@pytest.fixture
def people(run: Run, tmp_path: Path) -> Path:
    run("identities", "--n", 5, "-o", tmp_path / "people.jsonl")
    return tmp_path / "people.jsonl"


def test_a_folder_of_images_becomes_a_watermarked_data_set(
    run: Run, photos: Path, people: Path, tmp_path: Path
) -> None:
    ran = run(
        "watermark",
        photos,
        "--prompt",
        "what is it?",
        "--identities",
        people,
        "--rate",
        0.5,
        "-o",
        tmp_path / "out",
    )
    assert ran.code == 0
    assert "6 images" in ran.out
    assert len(json.loads((tmp_path / "out/manifest.json").read_text())) == 6


def test_rejected_images_are_listed_and_the_exit_code_is_three(
    run: Run, photos: Path, people: Path, tmp_path: Path
) -> None:
    (photos / "2.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    ran = run("watermark", photos, "--prompt", "what?", "--identities", people, "-o", tmp_path / "out")
    assert ran.code == 3
    assert "1 samples were rejected" in ran.err and "2.png" in ran.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--identities FILE, or --seen FILE --unseen FILE"),
        (("--seen", "PEOPLE"), "needs both --seen and --unseen"),
        (("--identities", "PEOPLE", "--seen", "PEOPLE", "--unseen", "PEOPLE"), "not both"),
        (("--identities", "PEOPLE", "--rate", "1.5"), "0<=x<=1"),
        (("--identities", "PEOPLE", "--color", "red"), "three numbers R,G,B"),
    ],
)
def test_options_that_contradict_each_other_are_usage_errors(
    run: Run, photos: Path, people: Path, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    given = [str(people) if argument == "PEOPLE" else argument for argument in arguments]
    ran = run("watermark", photos, "--prompt", "what?", "-o", tmp_path / "out", *given)
    assert ran.code == 2
    assert message in " ".join(ran.err.replace("│", " ").split())


def test_the_same_people_as_seen_and_unseen_are_refused(
    run: Run, photos: Path, people: Path, tmp_path: Path
) -> None:
    ran = run(
        "watermark", photos, "--prompt", "what?", "--seen", people, "--unseen", people, "-o", tmp_path / "out"
    )
    assert ran.code == 1
    assert "must share no username" in ran.err
