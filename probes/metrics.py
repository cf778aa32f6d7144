"""Scores of held-out predictions, for many label vectors at once, each also without one group at a time.

The score without a group says how much the group weighs in it: that is what `intervals` builds on. This module
knows nothing about how predictions came about.

auroc: of more than two classes, the mean over classes of one against the rest. log_loss: in nats. brier: the
squared error of the positive class's probability; of more than two classes, summed over classes (Brier 1950), so
that two classes counted that way would give twice as much. ece: expected calibration error, the mean over ECE_BINS
bins, by their samples, of |share of right predictions − mean confidence|, the confidence being the probability of
the predicted class and the bins of equal width between 0 and 1 (Guo et al. 2017, arXiv 1706.04599). Since a bin of
few samples is never right exactly as often as it says, ece is above 0 for a calibrated probe too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_softmax
from scipy.stats import rankdata

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]

FOLD_METRICS = ("auroc", "accuracy", "balanced_accuracy", "log_loss", "brier")
"""Formed in each test fold, then averaged: decision values of different probes are never ranked together."""

METRICS = (*FOLD_METRICS, "ece")
"""ece is formed over all the folds of a repeat: a fold's bins would hold next to nothing."""

ECE_BINS = 10


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """Predictions on samples that are scored together, for L label vectors."""

    decisions: FloatArray
    """[L, m, 1] for two classes, [L, m, n_classes] for more: logits."""
    y: IntArray
    """[L, m] class of each sample."""
    groups: IntArray
    """[m] number of the group of each, ascending."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """A metric on one test; NaN where it is not defined, as without a class."""

    values: FloatArray
    """[L]."""
    without: FloatArray
    """[L, g] the same without each of the test's groups."""
    groups: IntArray
    """[g] their numbers."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A metric over all tests, for L label vectors."""

    values: FloatArray
    """[L]."""
    deviations: FloatArray
    """[L, k] how far each group moves the value, k = n_groups for a single split (see `combine`, `combine_repeats`)."""

    @property
    def errors(self) -> FloatArray:
        """[L] jackknife standard errors: of the groups as they test, see `intervals` for what they lack."""
        return np.asarray(np.sqrt((self.deviations**2).sum(1)))


def order_by_group(rows: IntArray, groups: IntArray) -> IntArray:
    """Return rows [m] in ascending order of groups[rows], as `Predictions` want them."""
    return rows[np.argsort(groups[rows], kind="stable")]


def score_test(test: Predictions) -> dict[str, Part]:
    """Return each of the FOLD_METRICS on a test."""
    logits = _full_logits(test.decisions)
    n_classes = logits.shape[2]
    log_probabilities = log_softmax(logits, axis=2)
    truth = test.y[..., None] == np.arange(n_classes)  # [L, m, n_classes]
    correct = (logits.argmax(2) == test.y).astype(np.float64)
    loss = -np.where(truth, log_probabilities, 0.0).sum(2)
    squares = (np.exp(log_probabilities) - truth) ** 2
    numbers, starts = np.unique(test.groups, return_index=True)
    ranked = _rankable(test.decisions)
    positive = list(np.moveaxis(truth, 2, 0))[-len(ranked) :]
    found = {
        "auroc": _mean_of([_auroc(s, p, starts) for s, p in zip(ranked, positive, strict=True)]),
        "accuracy": _share(correct, np.ones_like(correct), starts),
        "balanced_accuracy": _mean_of(
            [
                _share(correct * truth[..., k], truth[..., k].astype(np.float64), starts)
                for k in range(n_classes)
            ]
        ),
        "log_loss": _share(loss, np.ones_like(loss), starts),
        "brier": _share(squares[..., 1] if n_classes == 2 else squares.sum(2), np.ones_like(loss), starts),
    }
    return {name: Part(values=v, without=w, groups=numbers) for name, (v, w) in found.items()}


def score_calibration(test: Predictions) -> Part:
    """Return the expected calibration error on a test."""
    logits = _full_logits(test.decisions)
    confidence = np.exp(log_softmax(logits, axis=2)).max(2)  # [L, m]
    surplus = (logits.argmax(2) == test.y) - confidence
    bins = np.minimum((confidence * ECE_BINS).astype(np.int64), ECE_BINS - 1)
    numbers, starts = np.unique(test.groups, return_index=True)
    sizes = np.diff(np.r_[starts, len(test.groups)])
    values, without = np.zeros(len(logits)), np.zeros((len(logits), len(starts)))
    for k in range(ECE_BINS):
        inside = np.where(bins == k, surplus, 0.0)
        total = inside.sum(1)
        values += np.abs(total)
        without += np.abs(total[:, None] - np.add.reduceat(inside, starts, axis=1))
    n = len(test.groups)
    with np.errstate(invalid="ignore", divide="ignore"):
        return Part(values=values / n, without=without / (n - sizes), groups=numbers)


def combine(parts: Sequence[Part], n_groups: int) -> Estimate:
    """Return the mean over tests and the deviation of each group from it.

    In a test of g groups, a group's deviation is √((g − 1)/g) × (the value − the value without it): the squares
    sum to the jackknife variance of the test's value. Deviations of a group in several tests, as of repeats, add
    up. Where nothing can be scored without a group, the whole test deviates by (its value − the mean).
    """
    values = np.stack([part.values for part in parts])  # [tests, L]
    n_scored = np.maximum((~np.isnan(values)).sum(0), 1)
    mean = _nanmean(values)
    deviations = np.zeros((values.shape[1], n_groups))
    for part in parts:
        size = len(part.groups)
        own = (part.values[:, None] - part.without) * np.sqrt((size - 1) / size)
        whole = (part.values - mean)[:, None]
        moved = np.where(np.isnan(part.without), whole, own) / n_scored[:, None]
        deviations[:, part.groups] += np.nan_to_num(moved)
    return Estimate(values=mean, deviations=deviations)


def combine_repeats(repeats: Sequence[Sequence[Part]], n_groups: int) -> Estimate:
    """Return the mean over the tests of all repeats, and how far groups move it, [L, (1 + repeats) · n_groups].

    Averaged over repeats, deviations lose what was the luck of a split. But they only tell of the groups as they test:
    about as much variance again comes from the groups as they train (see `intervals`), which the repeats share and
    which does not average out. So the variance is taken half from the averaged deviations and half from the repeats'
    own: the deviations hold the first, then each repeat's, so weighted that squares sum to that. Those of two scores on
    the same splits can be subtracted.
    """
    together = combine([part for parts in repeats for part in parts], n_groups)
    if len(repeats) == 1:
        return together
    alone = [combine(parts, n_groups).deviations / np.sqrt(len(repeats)) for parts in repeats]
    deviations = np.concatenate([together.deviations, *alone], axis=1) / np.sqrt(2)
    return Estimate(values=together.values, deviations=deviations)


def score(
    decisions: FloatArray, y: IntArray, folds: NDArray[np.int16], groups: IntArray
) -> Mapping[str, Estimate]:
    """Return each of the METRICS for L label vectors.

    decisions: [L, repeats, n, 1 or n_classes] logits of each sample from a probe that has not seen it. y: [L, n].
    folds: [repeats, n] fold in which a sample was tested. groups: [n].
    """
    n_groups = int(groups.max()) + 1
    found: dict[str, list[list[Part]]] = {name: [] for name in METRICS}
    for repeat, fold in enumerate(folds):
        for parts in found.values():
            parts.append([])
        for k in range(int(fold.max()) + 1):
            rows = order_by_group(np.flatnonzero(fold == k), groups)
            test = Predictions(decisions=decisions[:, repeat, rows], y=y[:, rows], groups=groups[rows])
            for name, part in score_test(test).items():
                found[name][repeat].append(part)
        rows = order_by_group(np.flatnonzero(fold >= 0), groups)
        whole = Predictions(decisions=decisions[:, repeat, rows], y=y[:, rows], groups=groups[rows])
        found["ece"][repeat].append(score_calibration(whole))
    return {name: combine_repeats(parts, n_groups) for name, parts in found.items()}


def rank(decisions: FloatArray, y: IntArray) -> FloatArray:
    """Return [L]: the AUROC of decisions [L, m, 1 or n_classes] on labels y [L, m], samples that one probe scored."""
    ranked = _rankable(decisions)
    n_classes = max(2, decisions.shape[2])
    found = []
    for k, scores in zip(range(n_classes - len(ranked), n_classes), ranked, strict=True):
        positive = y == k
        below, _ = _placements(scores, positive)
        n_positive = positive.sum(1)
        with np.errstate(invalid="ignore", divide="ignore"):
            found.append(below.sum(1) / (n_positive * (y.shape[1] - n_positive)))
    return _nanmean(np.stack(found))


def mean_log_loss(decisions: FloatArray, y: IntArray) -> float:
    """Return the mean log-loss of logits [m, 1 or n_classes]. y: [m]."""
    log_probabilities = log_softmax(_full_logits(decisions[None])[0], axis=1)
    return float(-log_probabilities[np.arange(len(y)), y].mean())


def _rankable(decisions: FloatArray) -> list[FloatArray]:
    """Return values [L, m] that rank the samples: of the positive class of two, else of each class."""
    # with two classes the logit ranks as the probability does, and does not saturate
    return list(np.moveaxis(decisions if decisions.shape[2] == 1 else log_softmax(decisions, axis=2), 2, 0))


def _mean_of(pairs: Sequence[tuple[FloatArray, FloatArray]]) -> tuple[FloatArray, FloatArray]:
    """Return the mean of values [L] and of those without each group [L, g], over classes that have one."""
    values, without = zip(*pairs, strict=True)
    return _nanmean(np.stack(values)), _nanmean(np.stack(without))


def _nanmean(values: FloatArray) -> FloatArray:
    """Return the mean over the first axis of what is not NaN; NaN where nothing is."""
    there = ~np.isnan(values)
    n = there.sum(0)
    return np.where(n > 0, np.where(there, values, 0.0).sum(0) / np.maximum(n, 1), np.nan)


def _full_logits(decisions: FloatArray) -> FloatArray:
    """Return one logit a class, also of two."""
    if decisions.shape[2] > 1:
        return decisions
    return np.concatenate([np.zeros_like(decisions), decisions], axis=2)


def _share(part: FloatArray, whole: FloatArray, starts: IntArray) -> tuple[FloatArray, FloatArray]:
    """Return Σ part / Σ whole, [L], and the same without each group, [L, g]; both given as [L, m]."""
    p, w = (np.add.reduceat(values, starts, axis=1) for values in (part, whole))
    p_all, w_all = p.sum(1, keepdims=True), w.sum(1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        # a difference of equal sums is not always zero to the last bit
        rest = np.where(np.abs(p_all - p) < 1e-12, 0.0, p_all - p)
        return (p_all / w_all)[:, 0], np.asarray(rest / (w_all - w))


def _auroc(scores: FloatArray, positive: BoolArray, starts: IntArray) -> tuple[FloatArray, FloatArray]:
    """Return the share of (positive, negative) pairs that scores [L, m] rank rightly, ties counting half, as `_share`.

    Counted by midranks. Without a group, the pairs with one or both of its samples are taken away.
    """
    n_positive = positive.sum(1, keepdims=True)
    below, above = _placements(scores, positive)
    first = np.add.reduceat(below, starts, axis=1)  # [L, g] pairs won by a group's positives
    second = np.add.reduceat(above, starts, axis=1)  # … and lost by its negatives
    own = _within(scores, positive, starts)
    in_group = np.add.reduceat(positive, starts, axis=1, dtype=np.int64)
    sizes = np.diff(np.r_[starts, scores.shape[1]])
    won = below.sum(1, keepdims=True)
    n_negative = scores.shape[1] - n_positive
    with np.errstate(invalid="ignore", divide="ignore"):
        rest = (won - first - second + own) / ((n_positive - in_group) * (n_negative - (sizes - in_group)))
        return (won / (n_positive * n_negative))[:, 0], np.asarray(rest)


def _placements(scores: FloatArray, positive: BoolArray) -> tuple[FloatArray, FloatArray]:
    """Return [L, m]: for positives, how many negatives lie below (0 for others); for negatives, positives above."""
    rank = rankdata(scores, axis=1)
    among_positives = rankdata(np.where(positive, scores, np.inf), axis=1)
    among_negatives = rankdata(np.where(positive, np.inf, scores), axis=1)
    n_positive = positive.sum(1, keepdims=True)
    below = np.where(positive, rank - among_positives, 0.0)
    above = np.where(positive, 0.0, n_positive - (rank - among_negatives))
    return below, above


def _within(scores: FloatArray, positive: BoolArray, starts: IntArray) -> FloatArray:
    """Return [L, g]: the rightly ranked pairs inside each group."""
    n = scores.shape[1]
    if len(starts) == n:
        return np.zeros(scores.shape)
    group = np.repeat(np.arange(len(starts)), np.diff(np.r_[starts, n]))
    # ranks that do not mix groups: all of one group come before all of the next
    apart = rankdata(scores, axis=1) + group * 2.0 * n
    below, _ = _placements(apart, positive)
    negatives_before: IntArray = (
        np.cumsum(~positive, axis=1)[:, starts] - ~positive[:, starts]
    )  # in earlier groups
    return np.asarray(
        np.add.reduceat(np.where(positive, below - negatives_before[:, group], 0.0), starts, axis=1)
    )
