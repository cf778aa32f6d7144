from __future__ import annotations

import numpy as np
import pytest
from scipy.special import expit, softmax
from sklearn.metrics import accuracy_score, balanced_accuracy_score, log_loss, roc_auc_score

from mmextract.probes.metrics import METRICS, mean_scores, score_fold


def test_two_classes_equal_scikit_learn_for_every_weighting() -> None:
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, 50)
    logits = rng.normal(size=50).round(1) + 0.5 * y  # rounded, so that there are ties
    weights = rng.integers(0, 4, (6, 50)).astype(float)
    scores = score_fold(logits[:, None], y).weigh(weights)
    for index, w in enumerate(weights):
        want = {
            "auroc": roc_auc_score(y, logits, sample_weight=w),
            "accuracy": accuracy_score(y, logits > 0, sample_weight=w),
            "balanced_accuracy": balanced_accuracy_score(y, logits > 0, sample_weight=w),
            "log_loss": log_loss(y, expit(logits), sample_weight=w),
        }
        assert {metric: scores[metric][index] for metric in METRICS} == pytest.approx(want)


def test_more_classes_equal_scikit_learn() -> None:
    rng = np.random.default_rng(1)
    y, logits = rng.integers(0, 4, 80), rng.normal(size=(80, 4))
    scores = score_fold(logits, y).weigh(np.ones((1, 80)))
    probabilities = softmax(logits, axis=1)
    want = {
        "auroc": roc_auc_score(y, probabilities, multi_class="ovr", average="macro"),
        "accuracy": accuracy_score(y, logits.argmax(1)),
        "balanced_accuracy": balanced_accuracy_score(y, logits.argmax(1)),
        "log_loss": log_loss(y, probabilities),
    }
    assert {metric: scores[metric][0] for metric in METRICS} == pytest.approx(want)


def test_equal_decisions_are_chance() -> None:
    assert score_fold(np.zeros((6, 1)), np.array([0, 1, 1, 0, 1, 1])).weigh(np.ones((1, 6)))["auroc"] == 0.5


def test_huge_logits_still_rank_and_have_a_finite_loss() -> None:
    logits = np.array([[900.0], [800.0], [-900.0]])
    scores = score_fold(logits, np.array([1, 0, 0])).weigh(np.ones((1, 3)))
    assert scores["auroc"] == 1.0 and scores["log_loss"] == pytest.approx(800 / 3)


def test_a_fold_without_one_of_the_classes_has_no_auroc_and_does_not_count() -> None:
    one = score_fold(np.array([[1.0], [2.0]]), np.array([1, 1])).weigh(np.ones((1, 2)))
    two = score_fold(np.array([[1.0], [2.0]]), np.array([0, 1])).weigh(np.ones((1, 2)))
    assert np.isnan(one["auroc"]) and one["accuracy"] == 1
    mean = mean_scores([one, two])
    assert mean["auroc"] == 1.0 and mean["accuracy"] == 0.75


def test_folds_are_averaged_and_not_pooled() -> None:
    # each fold ranks perfectly, on a scale of its own
    low = score_fold(np.array([[1.0], [2.0]]), np.array([0, 1])).weigh(np.ones((1, 2)))
    high = score_fold(np.array([[11.0], [12.0]]), np.array([0, 1])).weigh(np.ones((1, 2)))
    assert mean_scores([low, high])["auroc"] == 1.0
