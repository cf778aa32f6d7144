"""Several seeds taken together: mean differences to r0 with intervals, p-values over everything looked at.

The score of a cell (a layer and a position) in a condition (rate, repetitions, batch size) is the AUROC of seen against
unseen in the fine-tuned model less that in the model of the same seed fine-tuned without watermarks (r0). Its mean over
seeds has two intervals. Over *seeds*: Student's t on the seeds' own differences; each seed draws its own identities,
places, order of training and first weights, so it covers all of these. Over *identities*: the seeds' calibrated
standard errors (see `intervals`), which take the fine-tunes as given; it is the only one where there are fewer than
FEWEST_SEEDS.

p-values: each seed's difference is studentised, as is that of each shuffle of its labels; means over seeds of both are
compared. Shuffles are the same in all layers, positions and conditions of a seed, so the largest mean of a shuffle is
a draw of the largest of all cells and conditions under the null hypothesis (Westfall & Young 1993): corrected p-values
hold for the whole table at once. This module knows nothing about files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from mmextract.probes.metrics import FloatArray
from mmextract.probes.permutation import POWER

FEWEST_SEEDS = 3
"""With two, an interval over seeds reaches 13 standard errors to either side and says nothing."""


@dataclass(frozen=True, kw_only=True)
class SeedScores:
    """What one seed gives of C cells of one condition."""

    values: FloatArray
    """[C] AUROC of the fine-tuned model."""
    references: FloatArray
    """[C] that of r0."""
    errors: FloatArray
    """[C] calibrated standard errors of the differences, over identities."""
    raw_errors: FloatArray
    """[C] jackknife standard errors that statistics are divided by."""
    null: FloatArray
    """[C, B] studentised differences of shuffled labels."""

    @property
    def differences(self) -> FloatArray:
        """[C]."""
        return self.values - self.references

    @property
    def statistics(self) -> FloatArray:
        """[C] studentised differences; 0 where nothing varies."""
        zero = np.zeros_like(self.raw_errors)
        return np.divide(self.differences, self.raw_errors, out=zero, where=self.raw_errors > 0)


@dataclass(frozen=True, kw_only=True)
class Effect:
    """One cell of one condition, all seeds together."""

    value: float
    """Mean difference of AUROC."""
    auroc: float
    """Mean of the fine-tuned models."""
    reference: float
    """Mean of r0."""
    low: float
    """Of the interval that is shown."""
    high: float
    over: str
    """What that interval is over: `seeds` or `identities`."""
    identity_low: float
    """Of the interval over identities alone."""
    identity_high: float
    p: float
    """Two-sided, of this cell alone."""
    p_corrected: float
    """Over all cells and conditions."""
    detectable: float
    """Smallest true mean difference that is found with probability POWER at the corrected level."""
    by_seed: tuple[float, ...]
    """The seeds' differences."""


def mean_interval(values: Sequence[float], confidence: float) -> tuple[float, float]:
    """Return Student's interval of the mean; NaN for fewer than two values."""
    n = len(values)
    if n < 2:
        return float("nan"), float("nan")
    mean, error = float(np.mean(values)), float(np.std(values, ddof=1)) / n**0.5
    half = float(stats.t.ppf((1 + confidence) / 2, n - 1)) * error
    return mean - half, mean + half


def combine(
    conditions: Mapping[str, Sequence[SeedScores]], *, confidence: float = 0.95
) -> dict[str, list[Effect]]:
    """Return each condition's effects [C], tested as one family.

    Raises ValueError if the conditions differ in their numbers of cells or shuffles.
    """
    shapes = {scores.null.shape for seeds in conditions.values() for scores in seeds}
    if len(shapes) > 1:
        raise ValueError(f"conditions differ in cells or shuffles: {sorted(shapes)}")
    observed = {name: np.mean([s.statistics for s in seeds], axis=0) for name, seeds in conditions.items()}
    null = {name: np.mean([s.null for s in seeds], axis=0) for name, seeds in conditions.items()}
    largest = np.max([np.abs(values).max(0) for values in null.values()], axis=0)  # [B]
    limit = _quantile(largest, confidence)
    return {
        name: [
            _effect(seeds, cell, observed[name][cell], null[name][cell], largest, limit, confidence)
            for cell in range(len(observed[name]))
        ]
        for name, seeds in conditions.items()
    }


def _quantile(largest: FloatArray, confidence: float) -> float:
    """Return what the largest of a shuffle exceeds in a share 1 − confidence of all, the data among them."""
    ordered = np.sort(largest)
    return float(ordered[min(int(np.ceil(confidence * (1 + len(ordered)))), len(ordered)) - 1])


def _effect(
    seeds: Sequence[SeedScores],
    cell: int,
    statistic: float,
    null: FloatArray,
    largest: FloatArray,
    limit: float,
    confidence: float,
) -> Effect:
    differences = [float(s.differences[cell]) for s in seeds]
    value = float(np.mean(differences))
    error = float(np.sqrt(sum(s.errors[cell] ** 2 for s in seeds))) / len(seeds)
    half = float(stats.norm.ppf((1 + confidence) / 2)) * error
    own = (value - half, value + half)
    over_seeds = len(seeds) >= FEWEST_SEEDS
    low, high = mean_interval(differences, confidence) if over_seeds else own
    raw = float(np.mean([s.raw_errors[cell] for s in seeds]))
    return Effect(
        value=value,
        auroc=float(np.mean([s.values[cell] for s in seeds])),
        reference=float(np.mean([s.references[cell] for s in seeds])),
        low=low,
        high=high,
        over="seeds" if over_seeds else "identities",
        identity_low=own[0],
        identity_high=own[1],
        p=_p_value(np.abs(null), abs(statistic)),
        p_corrected=_p_value(largest, abs(statistic)),
        detectable=float((limit + stats.norm.ppf(POWER) * null.std()) * raw),
        by_seed=tuple(differences),
    )


def _p_value(null: FloatArray, statistic: float) -> float:
    """Return the share of statistics, the data's among them, that are no smaller (Phipson & Smyth 2010)."""
    return float((1 + (null >= statistic).sum()) / (1 + len(null)))


@dataclass(frozen=True, kw_only=True)
class Mean:
    """A number of every seed, together."""

    value: float
    low: float | None
    """Over seeds, or for one seed its own interval if it has one."""
    high: float | None
    by_seed: tuple[float, ...]


def mean_over_seeds(
    values: Sequence[float], own: Sequence[tuple[float, float] | None] = (), *, confidence: float = 0.95
) -> Mean:
    """Return the mean, with Student's interval where there are FEWEST_SEEDS; of one seed, with its own."""
    low: float | None = None
    high: float | None = None
    if len(values) >= FEWEST_SEEDS:
        low, high = mean_interval(values, confidence)
    elif len(values) == 1 and own and own[0] is not None:
        low, high = own[0]
    return Mean(value=float(np.mean(values)), low=low, high=high, by_seed=tuple(values))
