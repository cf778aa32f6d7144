"""Scores of held-out predictions, for many weightings of the same samples at once.

A weighting is a bootstrap replicate: each sample counts as often as its group was drawn. All ones give the
plain score. This module knows nothing about how predictions or weights came about.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_softmax

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]

METRICS = ("auroc", "accuracy", "balanced_accuracy", "log_loss")
"""auroc: of more than two classes, the mean over classes of one against the rest. log_loss: natural
logarithm."""


@dataclass(frozen=True)
class _Ranking:
    """Samples in ascending order of a decision value, for the AUROC of one class against the rest."""

    order: IntArray
    """[m] sample at each rank."""
    starts: IntArray
    """First rank of each block of tied values."""
    positive: BoolArray
    """[m] whether the sample at each rank is of the class."""


@dataclass(frozen=True)
class FoldScores:
    """What the predictions on one test fold contribute to each metric; see `score_fold`."""

    correct: FloatArray
    """[m] 1 where the most probable class is the true one."""
    loss: FloatArray
    """[m] −log of the probability of the true class."""
    classes: FloatArray
    """[m, n_classes] one-hot true class."""
    rankings: tuple[_Ranking, ...]
    """One for two classes, else one a class."""

    def weigh(self, weights: FloatArray) -> dict[str, FloatArray]:
        """Return metric → [B] for weights [B, m] of the samples; NaN where a weighting leaves nothing to score."""
        total = weights.sum(1)
        present = weights @ self.classes  # [B, n_classes]
        with np.errstate(invalid="ignore", divide="ignore"):
            recall = (weights @ (self.classes * self.correct[:, None])) / present
            return {
                "auroc": _mean([_auroc(weights, ranking) for ranking in self.rankings]),
                "accuracy": weights @ self.correct / total,
                "balanced_accuracy": _mean(list(recall.T)),
                "log_loss": weights @ self.loss / total,
            }


def score_fold(decisions: FloatArray, y: IntArray) -> FoldScores:
    """Prepare predictions for scoring. decisions: [m, 1] for two classes, [m, n_classes] for more: logits. y: [m]."""
    logits = decisions if decisions.shape[1] > 1 else np.hstack([np.zeros_like(decisions), decisions])
    log_probabilities = log_softmax(logits, axis=1)
    n_classes = logits.shape[1]
    ranked = range(1, 2) if n_classes == 2 else range(n_classes)
    return FoldScores(
        correct=(logits.argmax(1) == y).astype(np.float64),
        loss=-log_probabilities[np.arange(len(y)), y],
        classes=np.eye(n_classes)[y],
        # with two classes the logit ranks as the probability does, and does not saturate
        rankings=tuple(
            _rank(decisions[:, 0] if n_classes == 2 else log_probabilities[:, k], y == k) for k in ranked
        ),
    )


def _rank(values: FloatArray, positive: BoolArray) -> _Ranking:
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
    return _Ranking(order, starts, positive[order])


def _auroc(weights: FloatArray, ranking: _Ranking) -> FloatArray:
    """Return [B]: Σ over (positive, negative) pairs of w·w·(1 if ranked rightly, ½ if tied), over Σ w·w."""
    weights = weights[:, ranking.order]
    positive = np.add.reduceat(weights * ranking.positive, ranking.starts, axis=1)  # [B, n_blocks]
    negative = np.add.reduceat(weights * ~ranking.positive, ranking.starts, axis=1)
    below = np.cumsum(negative, axis=1) - negative / 2
    return np.asarray((positive * below).sum(1) / (positive.sum(1) * negative.sum(1)))


def _mean(values: list[FloatArray]) -> FloatArray:
    """Return the mean over a list of [B], leaving out NaN; NaN where there is nothing else."""
    stacked = np.stack(values)
    present = ~np.isnan(stacked)
    n = present.sum(0)
    return np.where(n > 0, np.where(present, stacked, 0).sum(0) / np.maximum(n, 1), np.nan)


def mean_scores(folds: list[dict[str, FloatArray]]) -> dict[str, FloatArray]:
    """Return metric → [B], the mean over folds: decision values of different probes are never pooled."""
    return {metric: _mean([fold[metric] for fold in folds]) for metric in METRICS}
