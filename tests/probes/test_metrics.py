from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.special import expit, softmax
from sklearn.metrics import (
    accuracy_score,
    balanced_accuracy_score,
    brier_score_loss,
    log_loss,
    roc_auc_score,
)

from mmextract.probes.metrics import (
    FOLD_METRICS,
    METRICS,
    FloatArray,
    IntArray,
    Predictions,
    combine,
    mean_log_loss,
    rank,
    score,
    score_calibration,
    score_test,
)

GROUPS = np.sort(np.random.default_rng(3).integers(0, 8, 50))


def make_test(logits: FloatArray, y: NDArray[np.int64], groups: IntArray | None = None) -> Predictions:
    groups = np.arange(len(y)) if groups is None else groups
    return Predictions(decisions=logits.reshape(1, len(y), -1), y=y[None], groups=groups)


def values_of(test: Predictions) -> dict[str, float]:
    return {metric: float(part.values[0]) for metric, part in score_test(test).items()}


def want_of_two(logits: FloatArray, y: IntArray) -> dict[str, float]:
    return {
        "auroc": roc_auc_score(y, logits),
        "accuracy": accuracy_score(y, logits > 0),
        "balanced_accuracy": balanced_accuracy_score(y, logits > 0),
        "log_loss": log_loss(y, expit(logits)),
        "brier": brier_score_loss(y, expit(logits)),
    }


def two_classes() -> tuple[FloatArray, IntArray]:
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, 50)
    return rng.normal(size=50).round(1) + 0.5 * y, y  # rounded, so that there are ties


def test_two_classes_equal_scikit_learn() -> None:
    logits, y = two_classes()
    assert values_of(make_test(logits, y, GROUPS)) == pytest.approx(want_of_two(logits, y))


def test_scores_without_a_group_equal_those_of_the_remaining_samples() -> None:
    logits, y = two_classes()
    parts = score_test(make_test(logits, y, GROUPS))
    for at, group in enumerate(parts["auroc"].groups):
        rest = group != GROUPS
        want = want_of_two(logits[rest], y[rest])
        assert {m: parts[m].without[0, at] for m in FOLD_METRICS} == pytest.approx(want)
        calibration = score_calibration(make_test(logits, y, GROUPS)).without[0, at]
        alone = score_calibration(make_test(logits[rest], y[rest], GROUPS[rest])).values[0]
        assert calibration == pytest.approx(alone)


def test_more_classes_equal_scikit_learn() -> None:
    rng = np.random.default_rng(1)
    y, logits = rng.integers(0, 4, 80), rng.normal(size=(80, 4))
    p = softmax(logits, axis=1)
    want = {
        "auroc": roc_auc_score(y, p, multi_class="ovr", average="macro"),
        "accuracy": accuracy_score(y, logits.argmax(1)),
        "balanced_accuracy": balanced_accuracy_score(y, logits.argmax(1)),
        "log_loss": log_loss(y, p),
        "brier": ((p - np.eye(4)[y]) ** 2).sum(1).mean(),
    }
    assert values_of(make_test(logits, y)) == pytest.approx(want)
    assert rank(logits[None], y[None])[0] == pytest.approx(want["auroc"])
    assert mean_log_loss(logits, y) == pytest.approx(want["log_loss"])


def test_several_label_vectors_are_scored_as_one_after_the_other() -> None:
    logits, y = two_classes()
    labels = np.stack([y, np.roll(y, 7), 1 - y])
    together = score_test(
        Predictions(decisions=np.repeat(logits[None, :, None], 3, 0), y=labels, groups=GROUPS)
    )
    for at, one in enumerate(labels):
        alone = score_test(make_test(logits, one, GROUPS))
        for metric, part in together.items():
            np.testing.assert_array_equal(part.values[at], alone[metric].values[0])
            np.testing.assert_array_equal(part.without[at], alone[metric].without[0])


def test_a_calibrated_probe_has_a_small_calibration_error_and_a_boastful_one_has_not() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=20_000)
    y = (rng.random(20_000) < expit(logits)).astype(np.int64)
    honest, boastful = (score_calibration(make_test(k * logits, y)).values[0] for k in (1, 4))
    assert honest < 0.02 < 0.15 < boastful


def test_calibration_by_hand() -> None:
    # confidences 0.6 (right), 0.6 (wrong), 0.9 (right): |1 − 1.2| / 3 + |1 − 0.9| / 3
    logits = np.log(np.array([0.6 / 0.4, 0.4 / 0.6, 0.9 / 0.1]))
    assert score_calibration(make_test(logits, np.array([1, 1, 1]))).values[0] == pytest.approx(0.1)


def test_equal_decisions_are_chance() -> None:
    assert values_of(make_test(np.zeros(6), np.array([0, 1, 1, 0, 1, 1])))["auroc"] == 0.5


def test_huge_logits_still_rank_and_have_a_finite_loss() -> None:
    scores = values_of(make_test(np.array([900.0, 800.0, -900.0]), np.array([1, 0, 0])))
    assert scores["auroc"] == 1.0 and scores["log_loss"] == pytest.approx(800 / 3)


def score_one(logits: FloatArray, y: IntArray, fold: list[int], groups: IntArray) -> dict[str, float]:
    found = score(logits.reshape(1, 1, len(y), 1), y[None], np.array([fold], np.int16), groups)
    return {metric: float(found[metric].values[0]) for metric in METRICS}


def test_a_fold_without_one_of_the_classes_has_no_auroc_and_does_not_count() -> None:
    y = np.array([1, 1, 0, 1])
    mean = score_one(np.array([1.0, 2.0, 1.0, 2.0]), y, [0, 0, 1, 1], np.arange(4))
    assert mean["auroc"] == 1.0 and mean["accuracy"] == 0.75


def test_folds_are_averaged_and_not_pooled() -> None:
    # each fold ranks perfectly, on a scale of its own
    logits, y = np.array([1.0, 2.0, 11.0, 12.0]), np.array([0, 1, 0, 1])
    assert score_one(logits, y, [0, 0, 1, 1], np.arange(4))["auroc"] == 1.0


def test_the_error_of_a_mean_is_that_of_the_textbook() -> None:
    """Accuracy of one fold of single samples: the jackknife gives s/√n."""
    rng = np.random.default_rng(0)
    logits, y = rng.normal(size=40), rng.integers(0, 2, 40)
    found = score(logits.reshape(1, 1, 40, 1), y[None], np.zeros((1, 40), np.int16), np.arange(40))
    right = ((logits > 0) == y).astype(float)
    assert found["accuracy"].errors[0] == pytest.approx(right.std(ddof=1) / np.sqrt(40))


def test_repeats_make_no_new_data() -> None:
    """The same split twice has the error of once."""
    rng = np.random.default_rng(0)
    logits, y = rng.normal(size=(1, 1, 40, 1)), rng.integers(0, 2, (1, 40))
    fold = (np.arange(40) % 4).astype(np.int16)
    once = score(logits, y, fold[None], np.arange(40) // 2)
    twice = score(np.repeat(logits, 2, 1), y, np.stack([fold, fold]), np.arange(40) // 2)
    for metric in METRICS:
        assert twice[metric].errors[0] == pytest.approx(once[metric].errors[0]), metric


def test_the_variance_over_repeats_is_half_that_of_their_mean_and_half_their_own() -> None:
    """Of a difference, too: what two probes of the same splits have in common is not in it."""
    rng = np.random.default_rng(0)
    y, groups = rng.integers(0, 2, (1, 60)), np.arange(60) // 2
    folds = np.stack([rng.permutation(np.arange(60) // 2 % 5)[groups] for _ in range(3)]).astype(np.int16)
    decisions = rng.normal(size=(2, 1, 3, 60, 1))
    decisions[1] = decisions[0] + 0.1 * rng.normal(size=decisions[1].shape)
    a, b = (score(values, y, folds, groups) for values in decisions)
    single = [
        [score(values[:, r : r + 1], y, folds[r : r + 1], groups) for r in range(3)] for values in decisions
    ]
    for metric in METRICS:
        moved = [
            one[metric].deviations - other[metric].deviations for one, other in zip(*single, strict=True)
        ]
        of_the_mean, own = (np.mean(moved, axis=0) ** 2).sum(), np.mean([(m**2).sum() for m in moved])
        difference = ((a[metric].deviations - b[metric].deviations) ** 2).sum()
        assert difference == pytest.approx((of_the_mean + own) / 2), metric
        assert own > of_the_mean > 0


def test_samples_of_a_group_do_not_count_as_independent() -> None:
    """Eight copies of each sample, grouped, have the error of one; taken as independent, a third of it."""
    rng = np.random.default_rng(0)
    logits, y = rng.normal(size=60), rng.integers(0, 2, 60)
    fold = np.zeros((1, 60), np.int16)
    one = score(logits.reshape(1, 1, 60, 1), y[None], fold, np.arange(60))
    copies = (np.repeat(logits, 8).reshape(1, 1, 480, 1), np.repeat(y, 8)[None], np.zeros((1, 480), np.int16))
    grouped = score(*copies, np.repeat(np.arange(60), 8))
    alone = score(*copies, np.arange(480))
    for metric in ("auroc", "accuracy", "log_loss"):
        assert grouped[metric].errors[0] == pytest.approx(one[metric].errors[0], rel=0.02)
        assert alone[metric].errors[0] == pytest.approx(one[metric].errors[0] / np.sqrt(8), rel=0.05)


def test_the_error_of_an_auroc_on_new_samples_is_how_much_it_varies() -> None:
    """Fixed scores, no training: over 300 draws of 30 groups of 4, the mean error is the standard deviation."""
    values, errors = [], []
    groups = np.repeat(np.arange(30), 4)
    for seed in range(300):
        rng = np.random.default_rng(seed)
        y = np.tile([0, 1], 60)
        logits = rng.normal(size=30)[groups] + rng.normal(size=120) + 0.8 * y
        part = score_test(make_test(logits, y, groups))["auroc"]
        estimate = combine([part], 30)
        values.append(estimate.values[0])
        errors.append(estimate.errors[0])
    assert 0.9 < np.sqrt(np.mean(np.square(errors))) / np.std(values) < 1.1
