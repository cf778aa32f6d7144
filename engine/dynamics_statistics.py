"""Cosines and noise scales out of inner products, with intervals.

This module knows nothing about models, images or files.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy import stats

FloatArray = np.ndarray[tuple[int, ...], np.dtype[np.float64]]

LEAST_BATCHES = 4
"""Fewer batches than this have no interval."""
RESAMPLES = 2000
LEVEL = 0.95
LOST_IN_NOISE = "the mean gradient cannot be told from noise: take more samples"


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A number with its interval, or the reason why there is none."""

    value: float | None
    low: float | None = None
    high: float | None = None
    """Ends of the 95 % interval; None where there are too few batches."""
    n_batches: int
    """Batches that went in."""
    reason: str = ""
    """Why the value or its interval is absent."""


def cosines(own: FloatArray, own_clean: FloatArray, cross: FloatArray) -> FloatArray:
    """Return [batches]: cosines out of squared norms and inner products; NaN where a gradient is zero.

    The root of the product, not the product of the roots: x / √(x·x) is exactly 1.
    """
    norms = np.sqrt(own * own_clean)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(norms > 0, np.clip(cross / norms, -1.0, 1.0), np.nan)


def mean_with_interval(values: FloatArray, seed: int) -> Estimate:
    """Return the mean of the values that are not NaN, and a bootstrap interval over them."""
    defined = values[np.isfinite(values)]
    if not len(defined):
        return Estimate(value=None, n_batches=0, reason="the gradient is zero in every batch")
    mean = float(defined.mean())
    if len(defined) < LEAST_BATCHES:
        return Estimate(value=mean, n_batches=len(defined), reason=_too_few(len(defined)))
    low, high = _interval(lambda weights: weights @ defined, len(defined), seed)
    return Estimate(value=mean, low=low, high=high, n_batches=len(defined))


def noise_scale(small_norms: FloatArray, big_norms: FloatArray, small: int, big: int, seed: int) -> Estimate:
    """Return the simple gradient noise scale B = tr Σ / |G|², in examples.

    McCandlish et al. 2018 (arXiv 1812.06162), appendix A.1: with |G_b|² the squared norm of the mean gradient of b
    examples, |G|² = (big·|G_big|² − small·|G_small|²) / (big − small) and tr Σ = (|G_small|² − |G_big|²) /
    (1/small − 1/big) are unbiased; their ratio is not, and is the less biased the more batches there are.

    big_norms: [n], of the mean gradients of n disjoint batches. small_norms: [n · big/small], of the batches that
    these are made of, in order. The interval resamples the big batches, each with its small ones.
    """
    n = len(big_norms)
    of_small = small_norms[: n * (big // small)].reshape(n, -1).mean(1)

    def scale(weights: FloatArray) -> FloatArray:
        few, many = weights @ of_small, weights @ big_norms
        squared = (big * many - small * few) / (big - small)
        trace = (few - many) / (1 / small - 1 / big)
        with np.errstate(invalid="ignore", divide="ignore"):
            ratio: FloatArray = np.where(squared > 0, np.maximum(trace, 0.0) / squared, np.inf)
        return ratio

    if not big_norms.any():
        return Estimate(value=None, n_batches=n, reason="the gradient is zero in every batch")
    value = float(scale(np.full(n, 1 / n)))
    if not math.isfinite(value):
        return Estimate(
            value=None, n_batches=n, reason="the mean gradient cannot be told from noise: take more samples"
        )
    if n < LEAST_BATCHES:
        return Estimate(value=value, n_batches=n, reason=_too_few(n))
    low, high = _interval(scale, n, seed)
    return Estimate(value=value, low=low, high=high if math.isfinite(high) else None, n_batches=n)


def between_batches(small_norms: FloatArray, big_norms: FloatArray, seed: int) -> Estimate:
    """Return the cosine between the clean gradients of two different batches of one size: how alike batches are at all.

    small_norms: [2n], big_norms: [n], squared norms of summed gradients; the i-th of the big batches is the sum of the
    small ones 2i and 2i + 1, so that their inner product is (|sum|² − |first|² − |second|²) / 2.
    """
    first, second = small_norms[: 2 * len(big_norms) : 2], small_norms[1 : 2 * len(big_norms) : 2]
    return mean_with_interval(cosines(first, second, (big_norms - first - second) / 2), seed)


def _interval(statistic: Callable[[FloatArray], FloatArray], n: int, seed: int) -> tuple[float, float]:
    """Return the expanded percentile bootstrap interval, that allows for few batches.

    statistic takes [resamples, n], the weights of the batches in each resample, and returns [resamples]. Hesterberg
    2015 (The American Statistician 69:371), section 5.3: the tails are those of Student's t with n − 1 degrees of
    freedom, widened by √(n / (n − 1)), as quantiles of the normal distribution.
    """
    quantile = stats.t.ppf((1 - LEVEL) / 2, n - 1) * math.sqrt(n / (n - 1))
    tail = float(stats.norm.cdf(quantile))
    values = statistic(_weights(n, seed))
    # these methods never interpolate to an infinite value
    low = np.quantile(values, tail, method="lower")
    return float(low), float(np.quantile(values, 1 - tail, method="higher"))


@lru_cache(maxsize=16)
def _weights(n: int, seed: int) -> FloatArray:
    """Return [RESAMPLES, n]: how often each of n batches occurs in a resample, as a share."""
    chosen = np.random.default_rng(seed).integers(0, n, (RESAMPLES, n))
    counts = np.apply_along_axis(np.bincount, 1, chosen, minlength=n)
    weights: FloatArray = counts / n
    return weights


def _too_few(n: int) -> str:
    return f"{n} batch{'es are' if n > 1 else ' is'} too few for an interval: take more samples"
