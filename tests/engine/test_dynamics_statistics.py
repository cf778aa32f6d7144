from __future__ import annotations

import numpy as np
import pytest

from mmextract.engine.dynamics_statistics import (
    LOST_IN_NOISE,
    between_batches,
    cosines,
    mean_with_interval,
    noise_scale,
)


def squared_norms(gradients: np.ndarray, size: int) -> np.ndarray:
    """Return the squared norms of the mean gradients of disjoint batches of `size`; gradients: [n, P]."""
    means = gradients.reshape(-1, size, gradients.shape[1]).mean(1)
    return np.asarray((means**2).sum(1))


def test_a_cosine_is_exactly_one_for_equal_products_and_absent_for_a_zero_gradient() -> None:
    own = np.random.default_rng(0).lognormal(0, 5, 1000)
    assert (cosines(own, own, own) == 1).all()
    assert np.isnan(cosines(np.array([0.0]), np.array([1.0]), np.array([0.0]))).all()
    absent = mean_with_interval(np.array([np.nan, np.nan]), seed=0)
    assert absent.value is None and "zero" in absent.reason


def test_the_noise_scale_is_the_ratio_of_the_unbiased_estimates() -> None:
    """Of batches of one and two, |G|² is the mean inner product, and tr Σ half the mean squared difference."""
    gradients = np.random.default_rng(0).normal(1, 1, (12, 5))
    first, second = gradients[::2], gradients[1::2]
    squared = (first * second).sum(1).mean()
    trace = ((first - second) ** 2).sum(1).mean() / 2
    found = noise_scale(squared_norms(gradients, 1), squared_norms(gradients, 2), 1, 2, seed=0)
    assert found.value == pytest.approx(trace / squared)


@pytest.mark.parametrize(("small", "big"), [(1, 4), (2, 8)])
def test_a_planted_noise_scale_is_found(small: int, big: int) -> None:
    rng = np.random.default_rng(1)
    n_parameters, spread = 50, 2.0
    mean = np.full(n_parameters, 0.5)  # tr Σ / |G|² = 50 · 4 / 12.5 = 16
    gradients = mean + spread * rng.normal(size=(8_000, n_parameters))
    found = noise_scale(squared_norms(gradients, small), squared_norms(gradients, big), small, big, seed=0)
    assert found.value == pytest.approx(16, rel=0.1)
    assert found.low is not None and found.high is not None and found.low < 16 < found.high


def test_pure_noise_has_no_noise_scale_but_a_reason() -> None:
    gradients = np.random.default_rng(3).normal(size=(64, 200))
    big = squared_norms(gradients, 4)
    found = noise_scale(squared_norms(gradients, 1), 0.9 * big, 1, 4, seed=0)
    assert found.value is None and found.reason == LOST_IN_NOISE


def test_different_batches_are_compared_by_the_norms_of_their_sums() -> None:
    gradients = np.random.default_rng(0).normal(0.3, 1, (8, 5))
    pairs = gradients.reshape(4, 2, 5)
    expected = [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in pairs]
    found = between_batches((gradients**2).sum(1), (pairs.sum(1) ** 2).sum(1), seed=0)
    assert found.value == pytest.approx(np.mean(expected)) and found.n_batches == 4


def test_the_interval_of_a_mean_covers_it_as_often_as_it_says_even_for_few_batches() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        found = mean_with_interval(rng.normal(0.4, 0.1, 8), seed=0)
        assert found.low is not None and found.high is not None
        covered += found.low <= 0.4 <= found.high
    assert 0.92 <= covered / 400 <= 0.98
