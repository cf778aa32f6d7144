from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mmextract.engine.evaluate_formats import Task, read_task
from mmextract.engine.images import decode


def save_image(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((20, 30, 3), 7, np.uint8)).save(path)


def save_scienceqa(folder: Path) -> Path:
    """Three problems in the layout of the release: one with an image, one without, one of another split."""
    common = {
        "task": "closed choice",
        "grade": "grade5",
        "topic": "geography",
        "category": "Geography",
        "skill": "Read a map",
        "lecture": "",
        "solution": "",
    }
    problems = {
        "1": {
            "question": "Which is farthest north?",
            "choices": ["Maine", "Ohio"],
            "answer": 0,
            "hint": "",
            "image": "image.png",
            "subject": "social science",
            "split": "test",
            **common,
        },
        "2": {
            "question": "What is water?",
            "choices": ["a liquid", "a solid", "a gas"],
            "answer": 2,
            "hint": "Steam.",
            "image": None,
            "subject": "natural science",
            "split": "test",
            **common,
        },
        "3": {
            "question": "Is it alive?",
            "choices": ["yes", "no"],
            "answer": 1,
            "hint": "Look.",
            "image": "choice_1.png",
            "subject": "natural science",
            "split": "train",
            **common,
        },
    }
    folder.mkdir(parents=True)
    (folder / "problems.json").write_text(json.dumps(problems))
    (folder / "pid_splits.json").write_text(json.dumps({"train": ["3"], "val": [], "test": ["1", "2"]}))
    save_image(folder / "images" / "test" / "1" / "image.png")
    save_image(folder / "images" / "train" / "3" / "choice_1.png")
    return folder


def save_mme(folder: Path) -> Path:
    """One category of each of the release's two layouts, two questions an image."""
    for name in ("0001", "0002"):
        save_image(folder / "color" / f"{name}.jpg")
        (folder / "color" / f"{name}.txt").write_text(
            "Is the cat red? Please answer yes or no.\tYes\nIs the cat blue? Please answer yes or no.\tNo\n\n"
        )
    save_image(folder / "artwork" / "images" / "7.jpg")
    questions = folder / "artwork" / "questions_answers_YN"
    questions.mkdir()
    (questions / "7.txt").write_text("Is it a painting?\tYes\nIs it a vase?\tNo\n")
    (folder / "eval_tool").mkdir()
    return folder


def test_scienceqa_img_is_read_as_released_and_asked_as_qwen_vl_asks(tmp_path: Path) -> None:
    task = read_task(save_scienceqa(tmp_path / "scienceqa"))
    assert (task.name, len(task.questions)) == ("scienceqa", 1)
    question = task.questions[0]
    assert (question.sample.id, question.options, question.sample.answer) == ("1", ("A", "B"), "A")
    assert question.sample.turns[0].text == (
        "<image>\nContext: N/A\nQuestion: Which is farthest north?\nOptions: A. Maine\nB. Ohio\nAnswer:"
    )
    assert question.category == "social science"
    assert question.sample.image is not None
    assert decode(question.sample.image).pixels.shape == (20, 30, 3)


def test_another_split_of_scienceqa_can_be_asked_for(tmp_path: Path) -> None:
    folder = save_scienceqa(tmp_path / "scienceqa")
    assert [q.sample.id for q in read_task(folder, split="train").questions] == ["3"]
    with pytest.raises(ValueError, match="has no split 'dev': it has train, val, test"):
        read_task(folder, split="dev")


def test_both_layouts_of_mme_are_read(tmp_path: Path) -> None:
    task = read_task(save_mme(tmp_path / "MME"))
    assert task.name == "mme"
    assert [q.sample.id for q in task.questions] == [
        *(f"color/000{n}/{k}" for n in (1, 2) for k in (0, 1)),
        *(f"artwork/7/{k}" for k in (0, 1)),
    ]
    assert [q.sample.answer for q in task.questions] == ["Yes", "No"] * 3
    assert len({q.group for q in task.questions}) == 3
    for question in task.questions:
        assert question.sample.image is not None
        assert decode(question.sample.image).pixels.any()


def change_problem(folder: Path, **changes: Any) -> None:
    path = folder / "problems.json"
    problems = json.loads(path.read_text())
    problems["1"] |= changes
    path.write_text(json.dumps(problems))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: change_problem(f, answer=5), "problem 1 of ScienceQA is not as released"),
        (lambda f: change_problem(f, image="../../../secret.png"), "outside"),
        (lambda f: (f / "problems.json").write_text("["), "cannot be read"),
        (lambda f: (f / "problems.json").write_text("{}"), "lacks problem 1"),
        (lambda f: (f / "pid_splits.json").unlink(), "cannot be read"),
    ],
)
def test_a_damaged_scienceqa_is_refused(
    tmp_path: Path, damage: Callable[[Path], object], message: str
) -> None:
    folder = save_scienceqa(tmp_path / "a" / "b" / "scienceqa")
    damage(folder)
    with pytest.raises(ValueError, match=message):
        read_task(folder)


def test_a_line_of_mme_without_an_answer_is_named(tmp_path: Path) -> None:
    folder = save_mme(tmp_path / "MME")
    (folder / "color" / "0002.txt").write_text("Is it red?\tYes\nIs it blue? maybe\n")
    with pytest.raises(ValueError, match=r"0002.txt:2: expected a question, a tab, and Yes or No"):
        read_task(folder)


def jsonl(folder: Path, *records: dict[str, Any]) -> Path:
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def read_one(folder: Path, **record: Any) -> Task:
    return read_task(jsonl(folder, {"question": "Which?", **record}))


@pytest.mark.parametrize("answer", ["blue", 1, "1"])
def test_choices_are_texts_and_the_answer_one_of_them_or_its_index(tmp_path: Path, answer: object) -> None:
    question = read_one(tmp_path, choices=["red", "blue"], answer=answer).questions[0]
    assert (question.options, question.sample.answer) == (("red", "blue"), "blue")


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"choices": ["red", "blue"], "answer": "green"}, "its answer 'green' is none of its choices"),
        ({"choices": "red, blue", "answer": "red"}, "the column choices cannot be read"),
        ({}, "1 of 1 questions have no known answer"),
    ],
)
def test_a_question_that_cannot_be_scored_is_refused(
    tmp_path: Path, record: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        read_one(tmp_path, **record)
