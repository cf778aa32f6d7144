"""Permutation tests: how often labels that say nothing score as the label does.

Labels are shuffled as the design leaves them open (`tasks.SHUFFLES`): where they belong to groups whole groups are
exchanged, never single samples, and in the paired design the classes of each pair change places, or not. Labels
that move between groups stay in their fold of the label's first split, which is stratified by label: given that
split, every such shuffle is as likely as the label itself if the null hypothesis holds. So the label's statistic is
one draw among equals, and p-values are valid at any size (Phipson & Smyth 2010, arXiv 1603.05766). The statistic is
the AUROC on that split, the largest over `ProbeSettings.test_penalties`, for the label and each shuffle alike. All
shuffles of a fold share its coordinates; see `dual`.

This module knows nothing about layers: shuffles depend on the seed alone, so that the largest of several layers'
statistics is a null distribution for their maximum.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import false_discovery_control, norm

from mmextract.probes.design import Design
from mmextract.probes.evaluation import TaskScores
from mmextract.probes.groups import IntArray
from mmextract.probes.intervals import studentise
from mmextract.probes.metrics import Estimate, FloatArray, rank, score
from mmextract.probes.settings import ProbeSettings
from mmextract.probes.solvers import Job
from mmextract.probes.states import States
from mmextract.probes.tasks import FoldArray, Task, shuffle_labels, weigh_classes

POWER = 0.8
"""Probability with which an effect of the size `detectable_at` returns is found."""

MOST_ELEMENTS = 1 << 25
"""Elements of coefficients and decisions that are held at once; more shuffles than that are taken in turn."""


@dataclass(frozen=True, kw_only=True)
class Null:
    """A metric on B shuffles."""

    values: FloatArray
    """[B]."""
    errors: FloatArray
    """[B] their jackknife standard errors."""

    def distances(self, *, is_share: bool) -> FloatArray:
        """Return [B]: how far each shuffle lies from their mean, see `intervals.studentise`."""
        return studentise(self.values, float(self.values.mean()), self.errors, is_share=is_share)


@dataclass(frozen=True, kw_only=True)
class PermutationTest:
    """A statistic and those of shuffled labels."""

    value: float
    """The statistic: see the module, or `compare`."""
    null: FloatArray
    """[B] the same, of each shuffle."""
    spread: float
    """Standard deviation of the shuffles' statistics, with their signs."""
    nulls: Mapping[str, Null]
    """Metric → what the shuffles scored at one C."""

    @property
    def p_value(self) -> float:
        """Share of the statistics, the label's included, that are no smaller than the label's."""
        return float((1 + (self.null >= self.value).sum()) / (1 + len(self.null)))


@dataclass(frozen=True, kw_only=True)
class Shuffled:
    """What a test leaves behind for a comparison of two tests."""

    estimates: Mapping[str, Estimate]
    """Of the label, first, and of each shuffle, at one C."""


def can_shuffle(design: Design) -> bool:
    """Whether labels can be shuffled as if they said nothing, with nothing else changed.

    They cannot in a mixed design, where some groups have one class and some several: no way to shuffle is known that
    leaves the groups' share in the labels.
    """
    return design.structure != "mixed"


def make_shuffles(design: Design, fold: FoldArray, n_shuffles: int, seed: int) -> IntArray:
    """Return int64 [1 + B, n]: the label, then its shuffles. fold: [n], of the label's first split."""
    rng = np.random.default_rng([seed, 3])
    shuffles = [
        shuffle_labels(design.y, design.groups, design.structure, rng, fold) for _ in range(n_shuffles)
    ]
    return np.stack([design.y, *shuffles])


def run_test(
    states: States,
    design: Design,
    label: Task,
    settings: ProbeSettings,
    chosen: Sequence[float],
) -> tuple[PermutationTest, Shuffled]:
    """Test the label on states [n, D] against `settings.n_permutations` shuffles.

    chosen: values of C that the label's own probes took. Nulls are of the tested value that is next to their median.
    """
    fold, penalties = label.folds[0], settings.test_penalties
    labels = make_shuffles(design, fold, settings.n_permutations, settings.seed)
    largest = np.full(len(labels), -np.inf)
    at = int(np.argmin(np.abs(np.log(penalties) - np.log(np.median(chosen)))))
    parts: list[Mapping[str, Estimate]] = []
    for start, decisions in _decide(states, labels, fold, settings):
        some = labels[start : start + decisions.shape[1]]
        for decided in decisions:
            auroc = _mean_auroc(decided, some, fold)
            largest[start : start + len(some)] = np.fmax(largest[start : start + len(some)], auroc)
        parts.append(score(decisions[at][:, None], some, fold[None], design.groups))
    estimates = {metric: _join([part[metric] for part in parts]) for metric in parts[0]}
    test = PermutationTest(
        value=float(largest[0]),
        null=largest[1:],
        spread=float(largest[1:].std()),
        nulls={metric: _null(estimate) for metric, estimate in estimates.items()},
    )
    return test, Shuffled(estimates=estimates)


def compare(observed: TaskScores, a: Shuffled, b: Shuffled, statistic: str = "auroc") -> PermutationTest:
    """Test whether two sets of features differ in how well they tell the label, from tests of the same shuffles.

    observed: the difference of their scores, as it is reported.

    The statistic is the difference's distance from 0, in standard errors, to either side. Shuffling labels for both
    at once gives its distribution where neither knows anything; because it is studentised it is used where both know
    equally much, too (Chung & Romano 2013, arXiv 1304.5939). Exchanging the two models' held-out scores group by group
    would test that hypothesis outright, but takes the probes as given, as if other groups would have trained the
    same ones: it would find differences that are not there (see `intervals` for why).
    """
    differences = {
        metric: Estimate(
            values=mine.values - b.estimates[metric].values,
            deviations=mine.deviations - b.estimates[metric].deviations,
        )
        for metric, mine in a.estimates.items()
    }
    nulls = {metric: _null(difference) for metric, difference in differences.items()}
    error = float(np.sqrt((observed.deviations[statistic] ** 2).sum()))
    value = abs(observed.values[statistic]) / error if error else 0.0
    signed = nulls[statistic].distances(is_share=False)
    return PermutationTest(value=value, null=np.abs(signed), spread=float(signed.std()), nulls=nulls)


def correct_for_maximum(tests: Sequence[PermutationTest]) -> list[float]:
    """Return, for each of several tests of the same shuffles, the p-value of its being the largest of all.

    The max-statistic correction (Westfall & Young 1993): each statistic is held against the largest of every
    shuffle, so that the chance to find anything anywhere in noise is the p-value.
    """
    largest = np.max([test.null for test in tests], axis=0)
    return [float((1 + (largest >= test.value).sum()) / (1 + len(largest))) for test in tests]


def correct_for_discoveries(tests: Sequence[PermutationTest]) -> list[float]:
    """Return the p-values such that a share p of those called found is false (Benjamini & Hochberg 1995)."""
    return [float(p) for p in false_discovery_control([test.p_value for test in tests])]


def detectable_at(tests: Sequence[PermutationTest], alpha: float) -> list[float]:
    """Return, for each test, the smallest true statistic that is found with probability POWER at corrected `alpha`.

    What the largest of a shuffle's statistics exceeds in a share `alpha` of them, and above it the POWER quantile of
    a normal distribution as wide as the test's own null. It is a little too large where an effect narrows that.
    """
    largest = np.sort(np.max([test.null for test in tests], axis=0))
    at = min(int(np.ceil((1 - alpha) * (1 + len(largest)))), len(largest)) - 1
    return [float(largest[at] + norm.ppf(POWER) * test.spread) for test in tests]


def _decide(
    states: States, labels: IntArray, fold: FoldArray, settings: ProbeSettings
) -> Iterator[tuple[int, FloatArray]]:
    """Yield the number of a first label and held-out decisions [penalties, some labels, n, outputs] from it on."""
    penalties, n_classes = settings.test_penalties, int(labels.max()) + 1
    n_outputs = 1 if n_classes == 2 else n_classes
    size = len(penalties) * n_outputs * (len(fold) + states.shape[1])
    some = max(1, MOST_ELEMENTS // size)
    splits = [(np.flatnonzero(fold != k), np.flatnonzero(fold == k)) for k in range(int(fold.max()) + 1)]
    for start in range(0, len(labels), some):
        batch = labels[start : start + some]
        decisions = np.empty((len(penalties), len(batch), len(fold), n_outputs))
        for train, test in splits:
            jobs = [
                Job(
                    rows=train,
                    y=y[train],
                    penalties=penalties,
                    class_weights=weigh_classes(y[train], settings.class_weight),
                )
                for y in batch
            ]
            for number, (_, decided) in enumerate(states.fit(jobs, [test] * len(jobs))):
                for at, logits in enumerate(decided):
                    decisions[at, number, test] = logits
        yield start, decisions


def _mean_auroc(decisions: FloatArray, labels: IntArray, fold: FoldArray) -> FloatArray:
    """Return [L]: the mean over folds of the AUROC of decisions [L, n, outputs]."""
    tests = [np.flatnonzero(fold == k) for k in range(int(fold.max()) + 1)]
    return np.asarray(np.nanmean([rank(decisions[:, test], labels[:, test]) for test in tests], axis=0))


def _null(estimate: Estimate) -> Null:
    """Return what all but the first scored."""
    return Null(values=estimate.values[1:], errors=estimate.errors[1:])


def _join(parts: Sequence[Estimate]) -> Estimate:
    return Estimate(
        values=np.concatenate([part.values for part in parts]),
        deviations=np.concatenate([part.deviations for part in parts]),
    )
