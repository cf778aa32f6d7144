from __future__ import annotations

import numpy as np
import pytest

from mmextract.probes.intervals import make_intervals, resample_groups, stretch_factor

RNG = np.random.default_rng(0)
REPLICATES = 0.6 + np.c_[np.zeros((4, 1)), 0.02 * RNG.normal(size=(4, 4000))]


def test_groups_are_drawn_with_replacement_after_a_plain_row_of_ones() -> None:
    draws = np.concatenate(list(resample_groups(50, 200, seed=3)))
    assert draws.shape == (201, 50)
    assert (draws[0] == 1).all() and (draws[1:] >= 0).all() and (draws.sum(1) == 50).all()
    assert len(np.unique(draws[1:], axis=0)) == 200


def test_the_seed_decides_the_draws() -> None:
    first, again, other = (np.concatenate(list(resample_groups(20, 50, seed))) for seed in (1, 1, 2))
    assert (first == again).all() and (first != other).any()


def test_the_factor_is_that_of_nadeau_and_bengio() -> None:
    folds, n = 5, 100
    naive, corrected = 1 / folds, 1 / folds + (n / folds) / (n - n / folds)
    assert stretch_factor(folds) == pytest.approx((corrected / naive) ** 0.5)


def test_an_interval_is_the_stretched_quantiles_of_the_replicates() -> None:
    interval = make_intervals(REPLICATES, folds=5, confidence=0.95, bounds=(0, 1))[0]
    low, high = np.quantile(REPLICATES[0, 1:] - 0.6, [0.025, 0.975]) * stretch_factor(5) + 0.6
    assert (interval.value, interval.low, interval.high) == pytest.approx((0.6, low, high))


def test_the_simultaneous_interval_is_wider_the_more_it_holds_for() -> None:
    four = make_intervals(REPLICATES, folds=5, confidence=0.95, bounds=(0, 1))[0]
    one = make_intervals(REPLICATES[:1], folds=5, confidence=0.95, bounds=(0, 1))[0]
    assert four.simultaneous_low is not None and one.simultaneous_low is not None and four.low is not None
    assert four.simultaneous_low < one.simultaneous_low <= four.low
    # the largest of four independent normal deviates: 95 % below 2.49
    reach = (0.6 - four.simultaneous_low) / (0.02 * stretch_factor(5))
    assert reach == pytest.approx(2.49, abs=0.1)


def test_estimates_that_move_together_pay_little_for_being_many() -> None:
    same = np.tile(REPLICATES[:1], (20, 1))
    one = make_intervals(REPLICATES[:1], folds=5, confidence=0.95, bounds=(0, 1))[0]
    many = make_intervals(same, folds=5, confidence=0.95, bounds=(0, 1))[7]
    assert many.simultaneous_low == pytest.approx(one.simultaneous_low)


def test_intervals_stay_within_bounds_and_skip_replicates_without_a_score() -> None:
    replicates = 0.99 + np.c_[np.zeros((1, 1)), 0.02 * RNG.normal(size=(1, 500))]
    replicates[0, 5] = np.nan
    interval = make_intervals(replicates, folds=5, confidence=0.95, bounds=(0, 1))[0]
    assert interval.high == interval.simultaneous_high == 1.0
    assert interval.low is not None and np.isfinite(interval.low)


def test_an_estimate_that_does_not_vary_has_an_interval_without_width() -> None:
    interval = make_intervals(np.full((1, 100), 0.5), folds=5, confidence=0.95, bounds=(0, 1))[0]
    assert interval.low == interval.high == interval.simultaneous_low == interval.simultaneous_high == 0.5
