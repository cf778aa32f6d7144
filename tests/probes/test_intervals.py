from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import norm

from mmextract.probes import intervals
from mmextract.probes.intervals import (
    Interval,
    Reach,
    make_intervals,
    reach_by_correction,
    reach_by_permutations,
    stretch_factor,
    studentise,
)

RNG = np.random.default_rng(0)
DISTANCES = 1.4 * RNG.normal(size=(4, 9999))


def interval(
    value: float, error: float, reach: Reach, *, share: bool = False, n_groups: int = 30
) -> Interval:
    (made,) = make_intervals(
        [value],
        np.array([error]),
        reach,
        confidence=0.95,
        n_groups=n_groups,
        bounds=(0.0, 1.0),
        is_share=share,
    )
    return made


def test_an_interval_reaches_as_far_as_shuffles_lie_from_their_mean() -> None:
    reach = reach_by_permutations(DISTANCES, 0.95)
    assert reach.own == pytest.approx([1.4 * 1.96] * 4, rel=0.03)
    made = interval(0.6, 0.02, Reach(own=reach.own[:1], together=reach.together))
    assert made.low == pytest.approx(0.6 - reach.own[0] * 0.02) and made.error == pytest.approx(
        0.028, rel=0.03
    )


def test_few_shuffles_reach_as_far_as_the_largest() -> None:
    nineteen = np.arange(1.0, 20.0)[None]
    assert reach_by_permutations(nineteen, 0.95).own[0] == 19
    # the smallest that 95 % of the 99 and the data, 100 in all, do not exceed
    assert reach_by_permutations(np.arange(1.0, 100.0)[None], 0.95).own[0] == 95


def test_the_simultaneous_interval_is_wider_the_more_it_holds_for() -> None:
    one, four = reach_by_permutations(DISTANCES[:1], 0.95), reach_by_permutations(DISTANCES, 0.95)
    assert one.together == one.own[0]
    # the largest of four independent normal deviates: 95 % below 2.49
    assert four.together == pytest.approx(1.4 * 2.49, rel=0.03)


def test_estimates_that_move_together_pay_nothing_for_being_many() -> None:
    many = reach_by_permutations(np.tile(DISTANCES[:1], (20, 1)), 0.95)
    assert many.together == many.own[7]


def test_without_permutations_the_factor_is_that_of_nadeau_and_bengio() -> None:
    folds, n = 5, 100
    naive, corrected = 1 / folds, 1 / folds + (n / folds) / (n - n / folds)
    assert stretch_factor(folds) == pytest.approx((corrected / naive) ** 0.5)
    reach = reach_by_correction(RNG.normal(size=(4, 50)), folds, 0.95, seed=0)
    assert reach.own == pytest.approx([norm.ppf(0.975) * stretch_factor(5)] * 4)
    assert reach.together == pytest.approx(2.49 * stretch_factor(5), rel=0.05)


def test_many_groups_are_drawn_for_in_parts_with_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    deviations = np.random.default_rng(0).normal(size=(5, 103))
    whole = reach_by_correction(deviations, 5, 0.95, seed=3)
    monkeypatch.setattr(intervals, "GROUPS_AT_ONCE", 10)
    parts = reach_by_correction(deviations, 5, 0.95, seed=3)
    assert parts.together == pytest.approx(whole.together, rel=1e-12) and parts.together > parts.own[0]


def test_of_one_estimate_the_two_intervals_are_the_same_without_permutations_too() -> None:
    reach = reach_by_correction(RNG.normal(size=(1, 50)), 5, 0.95, seed=0)
    assert reach.together == reach.own[0]


def test_a_share_near_one_has_more_room_inwards_than_outwards_and_never_leaves_its_bounds() -> None:
    made = interval(0.95, 0.03, Reach(own=np.array([2.7]), together=3.0), share=True)
    assert made.low is not None and made.high is not None
    assert 0.95 - made.low > 2.7 * 0.03 > made.high - 0.95 and made.high < 1
    middle = interval(0.5, 0.03, Reach(own=np.array([2.7]), together=3.0), share=True)
    assert middle.low == pytest.approx(0.5 - 2.7 * 0.03, abs=0.002)


def test_a_perfect_score_is_not_certain() -> None:
    made = interval(1.0, 0.0, Reach(own=np.array([2.7]), together=3.0), share=True, n_groups=10)
    # ten successes of ten: the Clopper-Pearson interval starts at 0.025^(1/10)
    assert made.low == pytest.approx(0.025**0.1) and made.high == 1.0


def test_other_intervals_stay_within_bounds() -> None:
    made = interval(0.99, 0.02, Reach(own=np.array([2.7]), together=3.0))
    assert made.high == made.simultaneous_high == 1.0


def test_an_estimate_that_does_not_vary_has_an_interval_without_width() -> None:
    made = interval(0.5, 0.0, Reach(own=np.array([2.7]), together=3.0), share=True)
    assert made.low == made.high == made.simultaneous_low == made.simultaneous_high == 0.5


@pytest.mark.parametrize("share", (False, True))
@pytest.mark.parametrize("value", (0.0, 0.03, 0.6, 0.9, 1.0))
@pytest.mark.parametrize("truth", (0.2, 0.5, 0.97))
def test_an_interval_holds_a_truth_if_it_reaches_as_far_as_that_lies(
    value: float, truth: float, share: bool
) -> None:
    error = 0.07
    (distance,) = np.abs(studentise(np.array([value]), truth, np.array([error]), is_share=share))
    for reach, holds in ((0.999 * distance, False), (1.001 * distance, True)):
        made = interval(
            value, error, Reach(own=np.array([reach]), together=0.0), share=share, n_groups=10_000
        )
        assert made.low is not None and made.high is not None
        assert (made.low <= truth <= made.high) == holds


def test_where_nothing_varies_nothing_lies_away() -> None:
    assert studentise(np.array([0.3, 0.6]), 0.5, np.zeros(2), is_share=True).tolist() == [0, 0]
