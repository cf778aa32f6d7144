"""Seeds taken together: known answers, p-values that hold, and effects that are found as often as promised."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from mmextract.probes.experiment_table import (
    SeedScores,
    combine,
    mean_interval,
    mean_over_seeds,
)

N_SHUFFLES = 199


def make_seed(
    differences: list[float], rng: np.random.Generator, *, error: float = 0.05, calibrated: float = 0.07
) -> SeedScores:
    """Return scores whose studentised differences are standard normal in noise."""
    n = len(differences)
    return SeedScores(
        values=0.5 + np.array(differences),
        references=np.full(n, 0.5),
        errors=np.full(n, calibrated),
        raw_errors=np.full(n, error),
        null=rng.normal(size=(n, N_SHUFFLES)),
    )


def test_one_seed_has_an_interval_over_identities() -> None:
    rng = np.random.default_rng(0)
    (effect,) = combine({"r100": [make_seed([0.2], rng)]})["r100"]
    assert effect.value == pytest.approx(0.2) and effect.over == "identities"
    assert (effect.low, effect.high) == pytest.approx((0.2 - 1.96 * 0.07, 0.2 + 1.96 * 0.07), abs=1e-4)
    assert effect.auroc == pytest.approx(0.7) and effect.reference == 0.5


def test_three_seeds_have_students_interval_and_the_one_over_identities_beside_it() -> None:
    rng = np.random.default_rng(0)
    (effect,) = combine({"r100": [make_seed([value], rng) for value in (0.1, 0.2, 0.3)]})["r100"]
    half = stats.t.ppf(0.975, 2) * 0.1 / 3**0.5
    assert effect.over == "seeds" and effect.value == pytest.approx(0.2)
    assert (effect.low, effect.high) == pytest.approx((0.2 - half, 0.2 + half))
    own = 1.96 * 0.07 / 3**0.5
    assert (effect.identity_low, effect.identity_high) == pytest.approx((0.2 - own, 0.2 + own), abs=1e-4)
    assert effect.by_seed == pytest.approx((0.1, 0.2, 0.3))


def test_two_seeds_are_too_few_for_an_interval_over_seeds() -> None:
    rng = np.random.default_rng(0)
    (effect,) = combine({"a": [make_seed([value], rng) for value in (0.1, 0.3)]})["a"]
    assert effect.over == "identities"
    assert np.isnan(mean_interval([1.0], 0.95)).all()


def test_p_values_count_shuffles_and_the_corrected_ones_the_largest_of_all_conditions() -> None:
    rng = np.random.default_rng(1)
    seeds = {"a": [make_seed([0.2, 0.0], rng)], "b": [make_seed([0.05, -0.15], rng)]}
    found = combine(seeds)
    null = np.concatenate([seeds["a"][0].null, seeds["b"][0].null])
    for effect, row in zip([*found["a"], *found["b"]], range(4), strict=True):
        statistic = abs(effect.value) / 0.05
        assert effect.p == pytest.approx((1 + (np.abs(null[row]) >= statistic - 1e-12).sum()) / 200)
        assert effect.p_corrected == pytest.approx(
            (1 + (np.abs(null).max(0) >= statistic - 1e-12).sum()) / 200
        )
        assert effect.p_corrected >= effect.p


def test_an_error_of_zero_is_no_evidence() -> None:
    rng = np.random.default_rng(0)
    (effect,) = combine({"a": [make_seed([0.3], rng, error=0.0)]})["a"]
    assert effect.p == effect.p_corrected == 1.0


def test_conditions_that_do_not_match_are_refused() -> None:
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="differ in cells or shuffles"):
        combine({"a": [make_seed([0.1], rng)], "b": [make_seed([0.1, 0.2], rng)]})


def simulate(effect: float, *, n_runs: int, n_seeds: int = 3, n_cells: int = 4) -> tuple[float, float]:
    """Return how often the first cell, and any cell, is found; the first has a true effect, the others none."""
    rng = np.random.default_rng(7)
    first = anything = 0
    for _ in range(n_runs):
        truth = np.zeros(n_cells)
        truth[0] = effect
        seeds = [make_seed((truth + 0.05 * rng.normal(size=n_cells)).tolist(), rng) for _ in range(n_seeds)]
        effects = combine({"a": seeds})["a"]
        first += effects[0].p_corrected <= 0.05
        anything += any(e.p_corrected <= 0.05 for e in effects)
    return first / n_runs, anything / n_runs


def test_noise_is_found_as_often_as_the_level_says() -> None:
    _, anything = simulate(0.0, n_runs=600)
    assert anything == pytest.approx(0.05, abs=0.025)


def test_an_effect_of_the_detectable_size_is_found_with_a_probability_of_four_fifths() -> None:
    rng = np.random.default_rng(3)
    sizes = [
        combine({"a": [make_seed([0.0] * 4, rng) for _ in range(3)]})["a"][0].detectable for _ in range(20)
    ]
    found, _ = simulate(float(np.mean(sizes)), n_runs=400)
    assert found == pytest.approx(0.8, abs=0.06)


def test_the_mean_of_one_seed_keeps_its_own_interval() -> None:
    assert mean_over_seeds([0.7], [(0.6, 0.8)]).low == 0.6
    assert mean_over_seeds([0.7, 0.8], [(0.6, 0.8), (0.7, 0.9)]).low is None
    several = mean_over_seeds([0.6, 0.7, 0.8])
    assert several.value == pytest.approx(0.7) and several.low is not None and several.low < 0.6
