"""What a model's answers tell of who was seen: AUROC of seen against unseen, with an interval over pairs of identities.

It is the baseline beside the probes: prompting may show nothing where hidden states show something. This module is
handed scores; it knows nothing about models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

FloatArray = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Separation:
    """How well one score tells seen from unseen."""

    auroc: float
    """0.5 is chance; NaN if one of the two has no score."""
    low: float
    """Of the interval; NaN for fewer than two groups."""
    high: float
    seen: float
    """Mean of the seen."""
    unseen: float
    """Mean of the unseen."""
    n: int
    """Scores."""
    n_groups: int
    """Groups that were resampled."""


def separate(
    scores: ArrayLike,
    is_seen: Sequence[bool],
    groups: Sequence[int],
    *,
    n_resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Separation:
    """Return how well scores tell seen from unseen, and a percentile bootstrap interval over groups.

    Scores that are NaN are left out. A group (a pair of identities, with all its images) is drawn whole, so that
    images of one identity are not taken for independent ones. Raises ValueError for lengths that differ.
    """
    values = np.asarray(scores, dtype=np.float64)
    seen, group = np.asarray(is_seen, dtype=bool), np.asarray(groups)
    if not len(values) == len(seen) == len(group):
        raise ValueError(f"{len(values)} scores, {len(seen)} labels and {len(group)} groups do not match")
    kept = ~np.isnan(values)
    values, seen, group = values[kept], seen[kept], group[kept]
    names, group = np.unique(group, return_inverse=True)
    wins, pairs = _by_group(values, seen, group, len(names))
    replicates = np.empty(0)
    if len(names) > 1:
        rng = np.random.default_rng([seed, 3])
        counts = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=n_resamples)
        replicates = _auroc(counts.astype(np.float64), wins, pairs)
        replicates = replicates[~np.isnan(replicates)]
    tail = (1 - confidence) / 2
    low, high = np.quantile(replicates, [tail, 1 - tail]) if len(replicates) else (np.nan, np.nan)
    return Separation(
        auroc=float(_auroc(np.ones((1, len(names))), wins, pairs)[0]),
        low=float(low),
        high=float(high),
        seen=float(values[seen].mean()) if seen.any() else np.nan,
        unseen=float(values[~seen].mean()) if (~seen).any() else np.nan,
        n=len(values),
        n_groups=len(names),
    )


def _by_group(
    values: FloatArray, seen: NDArray[np.bool_], group: NDArray[np.int64], n_groups: int
) -> tuple[FloatArray, FloatArray]:
    """Return [G, G]: for seen of group g and unseen of group h, how many pairs are ranked rightly, and how many are.

    A tie counts half.
    """
    first, second = values[seen][:, None], values[~seen][None]
    right = (first > second) + 0.5 * (first == second)  # [n_seen, n_unseen]
    of_seen = np.eye(n_groups)[group[seen]]  # [n_seen, G]
    of_unseen = np.eye(n_groups)[group[~seen]]
    return of_seen.T @ right @ of_unseen, np.outer(of_seen.sum(0), of_unseen.sum(0))


def _auroc(counts: FloatArray, wins: FloatArray, pairs: FloatArray) -> FloatArray:
    """Return [B] for counts [B, G] of how often each group was drawn."""
    with np.errstate(invalid="ignore"):
        return np.asarray(((counts @ wins) * counts).sum(1) / ((counts @ pairs) * counts).sum(1))
