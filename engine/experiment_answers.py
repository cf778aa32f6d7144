"""What an experiment's models answer: the task's questions, those for private fields, and the positive control's.

Results are plain, as they go into a step's JSON. This module knows nothing about steps, seeds or fine-tunes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from mmextract.engine.evaluate import evaluate_task
from mmextract.engine.evaluate_answers import Answerer
from mmextract.engine.evaluate_formats import Question, Task
from mmextract.engine.evaluate_prompts import ask_fields
from mmextract.engine.experiment_spec import ControlSpec, EvaluationSpec
from mmextract.engine.identities import Identity
from mmextract.engine.rows import PairedMarking, Row
from mmextract.engine.samples import Dataset
from mmextract.engine.steps import Advance
from mmextract.engine.watermark import WatermarkSpec


def ask_task(
    answerer: Answerer, held_out: Dataset, settings: EvaluationSpec, advance: Advance
) -> dict[str, Any]:
    """Return how well the task's questions are answered on clean held-out images, for those that have an answer."""
    samples = list(held_out.samples)[: settings.questions]
    questions = [Question(sample=sample) for sample in samples if sample.answer]
    if not questions:
        return {"n_questions": 0, "scores": {}, "rejected": {}}
    task = Task(name="vqa", questions=questions, source=held_out.source)
    result = evaluate_task(answerer, task, on_progress=advance)
    return {"n_questions": len(questions), "scores": _plain(result.scores()), "rejected": result.rejected}


def ask_private(
    answerer: Answerer, held_out: Dataset, marking: PairedMarking, settings: EvaluationSpec, advance: Advance
) -> dict[str, Any]:
    """Return what is answered when private fields are asked for, on images that show them and on the same without."""
    rows: list[dict[str, Any]] = []
    if settings.prompted:
        shown = replace(held_out, samples=list(held_out.samples)[: settings.prompted])
        for marked in (True, False):
            asked = ask_fields(
                answerer,
                shown,
                marking,
                fields=settings.fields,
                marked=marked,
                n_references=settings.references,
                on_progress=advance,
            )
            rows += [{"marked": marked, **_plain(asdict(row))} for row in asked]
    return {"prompts": rows}


def ask_control(
    answerer: Answerer,
    rows: Sequence[Row],
    taught: tuple[Sequence[Identity], Sequence[str]],
    *,
    control: ControlSpec,
    look: WatermarkSpec,
    advance: Advance,
) -> dict[str, Any]:
    """Return how often held-out images of the control's identities, and of strangers, are answered as trained.

    rows: of the paired design; those of other pairs are left out. taught: the identities, and the answer to each.
    """
    people, words = taught
    wanted = {person.username: word for person, word in zip(people, words, strict=True)}
    asked = [row for row in rows if row.pair < len(people)]
    answers = answerer.generate(asked, look, max_new_tokens=8, on_progress=advance)
    known, strange, taken_for_seen = [], [], []
    for row, answer in zip(asked, answers, strict=True):
        if not isinstance(answer, str):
            continue
        if row.condition == "seen":
            assert row.person is not None
            known.append(answer == wanted[row.person.username])
            taken_for_seen.append(answer != control.stranger_answer)
        else:
            strange.append(answer == control.stranger_answer)
    told = (np.mean(taken_for_seen) + np.mean(strange)) / 2 if known and strange else None
    return {
        "known": {"n": len(known), "accuracy": float(np.mean(known)) if known else None},
        "strangers": {"n": len(strange), "accuracy": float(np.mean(strange)) if strange else None},
        "told": {"n": len(known) + len(strange), "accuracy": None if told is None else float(told)},
    }


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values with null for what JSON cannot say."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
