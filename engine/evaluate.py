"""How well a model does a task: greedy answers matched exactly, choices by likelihood, MME's own scores.

This module knows nothing about watermarks, and draws nothing.
"""

from __future__ import annotations

import re
import string
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mmextract.engine.evaluate_answers import Answerer
from mmextract.engine.evaluate_formats import COGNITION, PERCEPTION, Question, Task
from mmextract.engine.images import RejectedSample
from mmextract.engine.rows import Row

MAX_NEW_TOKENS = 32


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What a model said to one question."""

    id: str
    category: str
    group: str
    answer: str
    """What counts as right."""
    predicted: str
    """What was generated, or the likeliest option."""
    correct: bool
    scores: tuple[float, ...] = ()
    """Mean log-probability of a token of each option."""
    rejected: str = ""
    """Why the question could not be asked; it then counts in no score."""


@dataclass(frozen=True, kw_only=True)
class TaskResult:
    """What a model made of a task."""

    task: str
    predictions: tuple[Prediction, ...]

    @property
    def rejected(self) -> dict[str, str]:
        """Id → why a question could not be asked."""
        return {p.id: p.rejected for p in self.predictions if p.rejected}

    def scores(self) -> dict[str, float]:
        """Return accuracy, of all and by category; of MME also accuracy+ and the scores of its own tool."""
        asked = [p for p in self.predictions if not p.rejected]
        if not asked:
            return {"accuracy": float("nan")}
        by_category: dict[str, list[Prediction]] = defaultdict(list)
        for prediction in asked:
            by_category[prediction.category].append(prediction)
        scores = {"accuracy": _accuracy(asked)}
        if self.task == "mme":
            scores |= _mme_scores(by_category)
        if len(by_category) > 1:
            scores |= {
                f"accuracy/{name or 'none'}": _accuracy(of) for name, of in sorted(by_category.items())
            }
        return scores


def evaluate_task(
    answerer: Answerer,
    task: Task,
    *,
    max_new_tokens: int = MAX_NEW_TOKENS,
    on_progress: Callable[[int], None] = lambda n_questions: None,
) -> TaskResult:
    """Ask a model every question of a task: open ones by greedy generation, the others by their options' likelihood."""
    predictions: dict[str, Prediction] = {}
    open_ones = [question for question in task.questions if not question.options]
    rows = [Row(id=question.sample.id, sample=question.sample) for question in open_ones]
    said = answerer.generate(rows, None, max_new_tokens=max_new_tokens, on_progress=on_progress)
    for question, answer in zip(open_ones, said, strict=True):
        predictions[question.sample.id] = _judge(task.name, question, answer)
    closed = [question for question in task.questions if question.options]
    for prediction in _choose(answerer, closed):
        predictions[prediction.id] = prediction
        on_progress(1)
    return TaskResult(
        task=task.name, predictions=tuple(predictions[question.sample.id] for question in task.questions)
    )


def _choose(answerer: Answerer, questions: Sequence[Question]) -> list[Prediction]:
    rows = [Row(id=question.sample.id, sample=question.sample) for question in questions]
    predictions = []
    for question, row, encoded in zip(questions, rows, answerer.encoded(rows, None), strict=True):
        try:
            if isinstance(encoded, RejectedSample):
                raise encoded
            found = answerer.likelihoods(row, None, encoded, question.options)
        except RejectedSample as refusal:
            predictions.append(_prediction(question, "", False, rejected=str(refusal)))
            continue
        scores = tuple(likelihood.mean for likelihood in found)
        best = question.options[scores.index(max(scores))]
        predictions.append(_prediction(question, best, best == question.sample.answer, scores=scores))
    return predictions


def _judge(task: str, question: Question, answer: str | RejectedSample) -> Prediction:
    if isinstance(answer, RejectedSample):
        return _prediction(question, "", False, rejected=str(answer))
    same = yes_or_no(answer) if task == "mme" else normalise(answer)
    return _prediction(question, answer, same == normalise(question.sample.answer))


def _prediction(
    question: Question, predicted: str, correct: bool, scores: tuple[float, ...] = (), rejected: str = ""
) -> Prediction:
    return Prediction(
        id=question.sample.id,
        category=question.category,
        group=question.group,
        answer=question.sample.answer,
        predicted=predicted,
        correct=correct,
        scores=scores,
        rejected=rejected,
    )


def normalise(text: str) -> str:
    """Return a text without case, outer punctuation and repeated space: what an exact match compares."""
    return re.sub(r"\s+", " ", text).strip().strip(string.punctuation).strip().casefold()


def yes_or_no(text: str) -> str:
    """Return `yes`, `no` or `other`, as MME's tool reads an answer: from its first four characters."""
    start = text.strip().lower()[:4]
    return "yes" if "yes" in start else "no" if "no" in start else "other"


def _accuracy(predictions: Sequence[Prediction]) -> float:
    return sum(p.correct for p in predictions) / len(predictions)


def _mme_scores(by_category: dict[str, list[Prediction]]) -> dict[str, float]:
    """Return 100 · (accuracy + accuracy+) a category and, summed, of perception and cognition (Fu et al. 2023)."""
    scores = {}
    for name, predictions in by_category.items():
        images: dict[str, list[bool]] = defaultdict(list)
        for prediction in predictions:
            images[prediction.group].append(prediction.correct)
        plus = sum(all(correct) for correct in images.values()) / len(images)
        scores[f"score/{name}"] = 100 * (_accuracy(predictions) + plus)
        scores[f"accuracy+/{name}"] = plus
    totals = {
        title: sum(scores[f"score/{name}"] for name in names if name in by_category)
        for title, names in (("perception", PERCEPTION), ("cognition", COGNITION))
        if by_category.keys() & set(names)
    }
    return totals | scores
