"""Permutation tests: how often labels that say nothing reach the score that the label reaches.

Labels are shuffled as the design leaves them open (`tasks.SHUFFLES`): where they belong to groups, whole groups
are exchanged, never single samples. Folds are not stratified, and the statistic is the
largest AUROC over the values of C, for the label and for each shuffle alike, so that under the null hypothesis
it is one draw among equals and p-values are valid at any size (Phipson & Smyth 2010, arXiv 1603.05766). All shuffles
share a fold's coordinates; see `dual`. This module knows nothing about layers: shuffles depend on the seed
alone, so that the largest of several layers' statistics is a null distribution for their maximum.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from sklearn.model_selection import GroupKFold

from mmextract.probes.design import Design
from mmextract.probes.groups import IntArray
from mmextract.probes.metrics import FloatArray, score_fold
from mmextract.probes.solvers import Job, Solver
from mmextract.probes.tasks import shuffle_labels

TRIES = 100
"""Shuffles drawn for each that is wanted, before too many have left a class out of some fold."""


@dataclass(frozen=True, kw_only=True)
class PermutationTest:
    """The label's statistic and those of shuffled labels."""

    value: float
    """Largest over C of the mean over folds of the AUROC."""
    null: FloatArray
    """[B] the same, of each shuffle."""

    @property
    def p_value(self) -> float:
        """Share of the statistics, the label's included, that are no smaller than the label's."""
        return float((1 + (self.null >= self.value).sum()) / (1 + len(self.null)))


def run_test(
    x: FloatArray,
    design: Design,
    solver: Solver,
    *,
    penalties: tuple[float, ...],
    folds: int,
    n_shuffles: int,
    seed: int,
) -> PermutationTest:
    """Return the label's AUROC among those of `n_shuffles` shuffles, on features x [n, D].

    Raises ValueError if the groups do not suffice to have every class on both sides of every fold, and for a
    mixed design, of which no way to shuffle is known that leaves the groups' share in the labels.
    """
    if design.structure == "mixed":
        raise ValueError(
            f"some groups ({design.group}) hold one class of {design.label!r} and some hold several: its labels "
            "cannot be shuffled as if they said nothing; leave one of the two kinds out with --where"
        )
    fold = _split(design, folds, seed)
    labels = _draw_labels(design, fold, n_shuffles, seed)
    statistics = np.zeros((1 + n_shuffles, len(penalties)))
    for k in range(folds):
        train, test = np.flatnonzero(fold != k), np.flatnonzero(fold == k)
        jobs = [Job(rows=train, y=y[train], penalties=penalties) for y in labels]
        held_out, ones = x[test], np.ones((1, len(test)))
        for number, solutions in enumerate(solver.solve(x, jobs)):
            y = labels[number][test]
            for at, solution in enumerate(solutions):
                scores = score_fold(solution.decide(held_out), y).weigh(ones)
                statistics[number, at] += scores["auroc"][0] / folds
    largest = statistics.max(1)
    return PermutationTest(value=float(largest[0]), null=largest[1:])


def correct_for_maximum(tests: list[PermutationTest]) -> list[float]:
    """Return, for each of several tests of the same shuffles, the p-value of its being the largest of all.

    The max-statistic correction (Westfall & Young 1993): each statistic is held against the largest of every
    shuffle.
    """
    largest = np.max([test.null for test in tests], axis=0)
    return [PermutationTest(value=test.value, null=largest).p_value for test in tests]


def _split(design: Design, folds: int, seed: int) -> IntArray:
    """Return the fold [n] of each sample: groups by chance, drawn again until every fold has every class."""
    fold = np.empty(design.n_samples, np.int64)
    for attempt in range(TRIES if design.n_groups >= folds else 0):
        splitter = GroupKFold(folds, shuffle=True, random_state=(seed + attempt * 1_000_003) % 2**32)
        for k, (_, test) in enumerate(splitter.split(fold, groups=design.groups)):
            fold[test] = k
        if _is_complete(design.y, fold):
            return fold
    raise ValueError(
        f"no split of {design.n_groups} groups into {folds} folds has every class of {design.label!r} on both "
        "sides: lower --folds, or choose another --group"
    )


def _draw_labels(design: Design, fold: IntArray, n_shuffles: int, seed: int) -> list[IntArray]:
    """Return the label and its shuffles, all with every class on both sides of every fold."""
    rng = np.random.default_rng([seed, 3])
    labels = [design.y]
    for _ in range(TRIES * n_shuffles):
        if len(labels) > n_shuffles:
            break
        shuffled = shuffle_labels(design.y, design.groups, design.structure, rng)
        if _is_complete(shuffled, fold):
            labels.append(shuffled)
    if len(labels) <= n_shuffles:
        raise ValueError(
            f"most ways to shuffle {design.label!r} among {design.n_groups} groups leave a class out of a "
            "fold: lower --folds, or choose another --group"
        )
    return labels


def _is_complete(y: IntArray, fold: IntArray) -> bool:
    counts = np.zeros((int(fold.max()) + 1, int(y.max()) + 1), np.int64)
    np.add.at(counts, (fold, y), 1)
    return bool((counts > 0).all())
