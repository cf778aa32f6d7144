from __future__ import annotations

import math

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from mmextract.probes.prompting import separate


def test_the_auroc_is_that_of_scikit_learn_ties_included() -> None:
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 6, 60).astype(float)
    seen = rng.random(60) < 0.5
    found = separate(scores, seen.tolist(), rng.integers(0, 9, 60).tolist())
    assert found.auroc == pytest.approx(roc_auc_score(seen, scores))
    assert (found.n, found.n_groups) == (60, 9)
    assert found.seen == pytest.approx(scores[seen].mean())


def test_groups_are_drawn_whole() -> None:
    """Twenty images of an identity are not twenty observations: the interval is that of as many groups."""
    rng = np.random.default_rng(1)
    by_group = rng.normal(loc=(0.5, 0.0), size=(30, 2))
    groups = np.repeat(np.arange(30), 2)
    seen = np.tile([True, False], 30)
    single = separate(by_group.ravel(), seen.tolist(), groups.tolist())
    repeated = separate(
        np.repeat(by_group.ravel(), 20), np.repeat(seen, 20).tolist(), np.repeat(groups, 20).tolist()
    )
    assert repeated.auroc == pytest.approx(single.auroc)
    assert (repeated.low, repeated.high) == pytest.approx((single.low, single.high))


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(2)
    covered = 0
    for trial in range(200):
        scores = rng.normal(size=(40, 2))
        found = separate(
            scores.ravel(), [True, False] * 40, np.repeat(range(40), 2).tolist(), n_resamples=300, seed=trial
        )
        covered += found.low <= 0.5 <= found.high
    assert 0.88 <= covered / 200 <= 0.99


def test_scores_that_are_missing_are_left_out() -> None:
    found = separate([1.0, math.nan, 0.0, math.nan], [True, True, False, False], [0, 0, 0, 1])
    assert (found.auroc, found.n, found.n_groups) == (1.0, 2, 1)
    assert math.isnan(found.low)


def test_without_one_of_the_two_there_is_no_auroc() -> None:
    assert math.isnan(separate([1.0, 2.0], [True, True], [0, 1]).auroc)
    assert math.isnan(separate([], [], []).auroc)


def test_lengths_that_differ_are_refused() -> None:
    with pytest.raises(ValueError, match="do not match"):
        separate([1.0], [True, False], [0, 1])
