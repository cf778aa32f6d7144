"""Questions with known answers, as ScienceQA, MME or any data set that `samples` reads gives them.

ScienceQA (Lu et al. 2022): `problems.json`, `pid_splits.json` and `<split>/<id>/image.png`; the questions with an image
are ScienceQA-IMG, asked as Qwen-VL's evaluation asks them. MME (Fu et al. 2023): a folder a category, with `<name>.txt`
of `question<tab>Yes|No` lines beside `<name>.jpg`, or in `questions_answers_YN` and `images`. This module knows nothing
about models.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from mmextract.engine.samples import IMAGE_SLOT, Sample, Turn, read_samples
from mmextract.engine.sources import file_image

TASK_FORMATS = ("scienceqa", "mme")
"""Formats of a benchmark, beside those of `samples`."""

PERCEPTION = (
    *("existence", "count", "position", "color", "posters"),
    *("celebrity", "scene", "landmark", "artwork", "OCR"),
)
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
"""MME's categories."""

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
CHOICE_NAMES = ("choices", "options")
"""Columns that a question's answers to choose from are looked for in."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """One question with the answer that counts."""

    sample: Sample
    """Id, image and conversation; its answer is what a model should say."""
    options: tuple[str, ...] = ()
    """What to choose from by likelihood; none means that the answer is generated."""
    category: str = ""
    """What it is counted under besides all."""
    group: str = ""
    """MME's image, whose questions must all be right for accuracy+."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """A set of questions."""

    name: str
    """`scienceqa`, `mme`, or `vqa` for any other data set."""
    questions: Sequence[Question]
    source: str
    """The path that the user gave."""


def read_task(path: Path, *, format: str | None = None, split: str = "test", **options: Any) -> Task:
    """Read questions with answers.

    format: one of TASK_FORMATS, or of `samples.FORMATS`; None tells them apart. split: of ScienceQA. options: those of
    `read_samples`, for a data set that is none of the two. Raises ValueError, naming file and line, for what is wrong.
    """
    if format is None and path.is_dir():
        if _find_scienceqa(path) is not None:
            format = "scienceqa"
        elif any(_mme_files(path / name) for name in (*PERCEPTION, *COGNITION)):
            format = "mme"
    limit = options.pop("limit", None)
    if format == "scienceqa":
        questions = _read_scienceqa(path, split)
    elif format == "mme":
        questions = list(_read_mme(path))
    else:
        dataset = read_samples(path, format=format, limit=limit, **options)
        questions = [_with_choices(sample) for sample in dataset.samples]
    if not questions:
        raise ValueError(f"{path} holds no question to evaluate")
    if silent := [question.sample.id for question in questions if not question.sample.answer.strip()]:
        raise ValueError(
            f"{len(silent)} of {len(questions)} questions have no known answer, such as {silent[0]!r}: an evaluation "
            "needs a column `answer`"
        )
    name = format if format in TASK_FORMATS else "vqa"
    return Task(name=name, questions=questions[:limit], source=str(path))


def _find_scienceqa(path: Path) -> Path | None:
    return next((p for p in (path, path / "data" / "scienceqa") if (p / "problems.json").is_file()), None)


def _read_scienceqa(path: Path, split: str) -> list[Question]:
    folder = _find_scienceqa(path)
    if folder is None:
        raise ValueError(f"{path} is not ScienceQA: it has no problems.json")
    problems, splits = (_read_json(folder / name) for name in ("problems.json", "pid_splits.json"))
    if split not in splits:
        raise ValueError(f"{folder / 'pid_splits.json'} has no split {split!r}: it has {', '.join(splits)}")
    root = next((p for p in (folder / "images", path / "images", folder) if (p / split).is_dir()), None)
    if root is None:
        raise ValueError(f"the images of ScienceQA are missing: expected {folder / 'images' / split}")
    missing = [pid for pid in splits[split] if pid not in problems]
    if missing:
        raise ValueError(
            f"{folder / 'problems.json'} lacks problem {missing[0]}, which is in the split {split}"
        )
    with_image = (pid for pid in splits[split] if problems[pid].get("image"))
    return [_scienceqa_question(root, split, pid, problems[pid]) for pid in with_image]


def _scienceqa_question(root: Path, split: str, pid: str, problem: Mapping[str, Any]) -> Question:
    try:
        choices, answer = problem["choices"], int(problem["answer"])
        letters = tuple(ascii_uppercase[: len(choices)])
        shown = "\n".join(f"{letter}. {choice}" for letter, choice in zip(letters, choices, strict=True))
        hint = problem.get("hint") or "N/A"
        text = f"{IMAGE_SLOT}\nContext: {hint}\nQuestion: {problem['question']}\nOptions: {shown}\nAnswer:"
        wanted = letters[answer]
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise ValueError(f"problem {pid} of ScienceQA is not as released: {error!r}") from error
    columns = {
        name: problem[name]
        for name in ("subject", "topic", "category", "grade")
        if isinstance(problem.get(name), str)
    }
    sample = Sample(
        id=pid,
        image=file_image(root, f"{split}/{pid}/{problem['image']}"),
        turns=(Turn(role="user", text=text),),
        answer=wanted,
        columns=columns,
    )
    return Question(sample=sample, options=letters, category=str(problem.get("subject", "")))


def _mme_files(folder: Path) -> list[Path]:
    """Return the question files of a category."""
    inside = folder / "questions_answers_YN"
    return sorted((inside if inside.is_dir() else folder).glob("*.txt"))


def _read_mme(path: Path) -> Iterator[Question]:
    found = [name for name in (*PERCEPTION, *COGNITION) if _mme_files(path / name)]
    if not found:
        raise ValueError(
            f"{path} is not MME: expected folders such as {', '.join(PERCEPTION[:3])}, with .txt files"
        )
    for category in found:
        for file in _mme_files(path / category):
            yield from _mme_image(path, category, file)


def _mme_image(root: Path, category: str, file: Path) -> Iterator[Question]:
    folder = file.parent.with_name("images") if file.parent.name == "questions_answers_YN" else file.parent
    names = [folder / f"{file.stem}{suffix}" for suffix in IMAGE_SUFFIXES]
    image = next((name for name in names if name.is_file()), names[0])
    lines = [line for line in file.read_text("utf-8").splitlines() if line.strip()]
    for number, line in enumerate(lines):
        question, tab, answer = line.rpartition("\t")
        if not tab or answer.strip().lower() not in ("yes", "no"):
            raise ValueError(
                f"{file}:{number + 1}: expected a question, a tab, and Yes or No, got {line[:80]!r}"
            )
        sample = Sample(
            id=f"{category}/{file.stem}/{number}",
            image=file_image(root, image.relative_to(root).as_posix()),
            turns=(Turn(role="user", text=f"{IMAGE_SLOT}\n{question.strip()}"),),
            answer=answer.strip(),
            columns={"category": category},
        )
        yield Question(sample=sample, category=category, group=f"{category}/{file.stem}")


def _with_choices(sample: Sample) -> Question:
    """Take a sample's column of choices, a list of texts, as its options; its answer is one of them, or its index."""
    name = next((name for name in CHOICE_NAMES if sample.columns.get(name)), None)
    category = str(sample.columns.get("category") or "")
    if name is None:
        return Question(sample=sample, category=category)
    try:
        options = json.loads(str(sample.columns[name]))
        if not isinstance(options, list) or not all(isinstance(option, str) for option in options):
            raise TypeError("it must be a list of texts")
    except (ValueError, TypeError) as error:
        raise ValueError(f"sample {sample.id!r}: the column {name} cannot be read: {error}") from error
    answer = sample.answer.strip()
    if answer not in options and answer.isdecimal() and int(answer) < len(options):
        answer = options[int(answer)]
    if answer not in options:
        raise ValueError(
            f"sample {sample.id!r}: its answer {answer!r} is none of its {name} ({', '.join(options)})"
        )
    chosen = Sample(
        id=sample.id, image=sample.image, turns=sample.turns, answer=answer, columns=sample.columns
    )
    return Question(sample=chosen, options=tuple(options), category=category)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object")
    return content
