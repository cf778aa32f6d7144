"""The label and its controls, each with the folds it is scored on.

A control has the same samples and groups, and labels that were shuffled only in ways the design leaves open,
so that whatever a probe gets from it is not about the label (control tasks: Hewitt & Liang 2019, arXiv
1909.03368). This module knows nothing about hidden states or scores.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

from mmextract.probes.design import Design
from mmextract.probes.groups import IntArray, count
from mmextract.probes.settings import ProbeSettings

FoldArray = NDArray[np.int16]

SHUFFLES = {
    "paired": "the classes are exchanged, or not, in each group as a whole, at random",
    "within": "labels are permuted among the samples of each group",
    "between": "the groups' labels are permuted among the groups",
    "mixed": "labels are permuted among all samples, which ignores the groups",
    "rows": "labels are permuted among all samples",
}
"""How the control's labels are made, by `Design.structure`."""

MANY_GROUPS = 10_000
"""Groups up to which scikit-learn splits, which looks at one after the other: 1.4 s for 10,000 pairs in 5 folds."""

SHARES = 16
"""Parts of a group that a class's share is rounded to where many are dealt out."""

TRIES = 20
"""Shuffles tried before a split that leaves a class out of some training set is given up."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """Labels to be told apart, and the splits on which that is measured."""

    name: str
    """`label` or `control`."""
    y: IntArray
    """[n] class of each sample."""
    folds: FoldArray
    """[repeats, n] fold in which a sample is tested."""
    inner_folds: FoldArray
    """[repeats, folds, n] fold of the inner split of each training set; −1 for the samples outside it."""


def make_tasks(design: Design, settings: ProbeSettings) -> tuple[Task, ...]:
    """Return the label and one control. Raises ValueError if the groups do not suffice for the folds."""
    check_folds(design, settings.folds)
    rng = np.random.default_rng([settings.seed, 1])
    shuffled = shuffle_labels(design.y, design.groups, design.structure, rng)
    return (
        make_task("label", design.y, design.groups, settings),
        make_task("control", shuffled, design.groups, settings),
    )


def check_folds(design: Design, folds: int) -> None:
    """Raise ValueError, with what to do, if there are fewer groups than folds, in all or of one class."""
    unit = f"groups ({design.group})" if design.group else "samples"
    if design.n_groups < folds:
        raise ValueError(
            f"{folds} folds need at least {folds} {unit}, but there are {design.n_groups}: "
            "lower --folds or choose another --group"
        )
    n_groups = (count(design.y, design.groups) > 0).sum(0)
    least = max(folds, 4)  # so that a training set keeps two of each class, for the choice of C
    for name, n in zip(design.classes, n_groups.tolist(), strict=True):
        if n < least:
            raise ValueError(
                f"class {name!r} of {design.label!r} occurs in {n} {unit}, and {folds} folds need at least "
                f"{least}: lower --folds, choose another --group, or leave the class out with --where"
            )


def make_task(name: str, y: IntArray, groups: IntArray, settings: ProbeSettings) -> Task:
    """Split the samples `repeats` times into folds, and each training set again if C is to be chosen."""
    seeds = [settings.seed + repeat for repeat in range(settings.repeats)]
    folds = np.stack([split(y, groups, settings.folds, seed, least_groups=2) for seed in seeds])
    inner = np.full((settings.repeats, settings.folds, len(y)), -1, np.int16)
    for repeat, seed in enumerate(seeds if len(settings.penalties) > 1 else ()):
        for fold in range(settings.folds):
            train = np.flatnonzero(folds[repeat] != fold)
            n_inner = min(settings.inner_folds, _fewest_groups(y[train], groups[train]))
            inner[repeat, fold, train] = split(y[train], groups[train], n_inner, seed)
    return Task(name=name, y=y, folds=folds, inner_folds=inner)


def split(y: IntArray, groups: IntArray, folds: int, seed: int, *, least_groups: int = 1) -> FoldArray:
    """Return int16 [n], the fold of each sample: groups stay together, classes are spread evenly.

    Every training set has every class, in at least `least_groups` groups: shuffles that fail this are tried
    again, and ValueError is raised after TRIES.
    """
    n_groups = len(np.unique(groups))
    n_classes = len(np.unique(y))
    for attempt in range(TRIES):
        fold = _draw_split(y, groups, n_groups, folds, (seed + attempt * 1_000_003) % 2**32)
        train = [fold != index for index in range(folds)]
        if all(len(np.unique(y[t])) == n_classes for t in train) and all(
            _fewest_groups(y[t], groups[t]) >= least_groups for t in train
        ):
            return fold
    raise ValueError(
        f"no split of {n_groups} groups into {folds} folds leaves every class in each training set: "
        "lower --folds or choose another --group"
    )


def _draw_split(y: IntArray, groups: IntArray, n_groups: int, folds: int, state: int) -> FoldArray:
    """Return the fold of each sample, by scikit-learn unless that takes minutes."""
    single = n_groups == len(groups)
    if n_groups > MANY_GROUPS and not single:
        return _deal(y, groups, folds, state)
    splitter, by = (StratifiedKFold, None) if single else (StratifiedGroupKFold, groups)
    fold = np.empty(len(y), np.int16)
    for index, (_, test) in enumerate(splitter(folds, shuffle=True, random_state=state).split(y, y, by)):
        fold[test] = index
    return fold


def _deal(y: IntArray, groups: IntArray, folds: int, state: int) -> FoldArray:
    """Return the fold of each sample: groups in the order of their classes' shares, and of size where these are about
    equal, are dealt out to and fro, so that no fold gets the larger one each time.
    """
    numbers = np.unique(groups, return_inverse=True)[1].astype(np.int64)
    counts = count(y, numbers)  # [groups, classes]
    shuffled = np.random.default_rng(state).permutation(len(counts))
    size = counts[shuffled].sum(1)
    shares = np.round(counts[shuffled] / size[:, None] * SHARES)
    order = shuffled[np.lexsort((-size, *shares.T))]
    turn, place = np.divmod(np.arange(len(order)), folds)
    fold = np.empty(len(order), np.int16)
    fold[order] = np.where(turn % 2, folds - 1 - place, place)
    return fold[numbers]


def _fewest_groups(y: IntArray, groups: IntArray) -> int:
    """Return in how many groups the rarest class of y occurs."""
    numbers = np.unique(groups, return_inverse=True)[1].astype(np.int64)
    return int((count(y, numbers) > 0).sum(0).min())


def shuffle_labels(
    y: IntArray,
    groups: IntArray,
    structure: str,
    rng: np.random.Generator,
    fold: NDArray[np.integer] | None = None,
) -> IntArray:
    """Return y [n] shuffled as SHUFFLES says for that structure.

    fold: [n]; labels that are permuted among samples or among groups then stay in their fold, so that its classes
    are as many as before. Those that are exchanged inside a group do so anyway.
    """
    if structure in ("rows", "mixed"):
        return _permute_within(y, np.zeros_like(y) if fold is None else fold, rng)
    n_groups = int(groups.max()) + 1
    if structure == "paired":
        n_classes = int(y.max()) + 1
        exchange = rng.permuted(np.tile(np.arange(n_classes), (n_groups, 1)), axis=1)  # [group, class]
        return exchange[groups, y]
    if structure == "between":
        label, place = np.empty(n_groups, np.int64), np.zeros(n_groups, np.int64)
        label[groups] = y
        if fold is not None:
            place[groups] = fold
        return _permute_within(label, place, rng)[groups]
    return _permute_within(y, groups, rng)


def _permute_within(values: IntArray, places: NDArray[np.integer], rng: np.random.Generator) -> IntArray:
    """Return values [n] permuted among those of the same place."""
    shuffled = np.empty_like(values)
    shuffled[np.argsort(places, kind="stable")] = values[np.lexsort((rng.random(len(values)), places))]
    return shuffled


def weigh_classes(y: IntArray, class_weight: str) -> tuple[float, ...]:
    """Return the weight of each class in a training set y [m]: m / (classes · samples of it) for `balanced`, else ().

    Those weights sum to m, as scikit-learn's `class_weight="balanced"` do.
    """
    if class_weight == "none":
        return ()
    counts = np.bincount(y)
    return tuple((len(y) / (len(counts) * counts)).tolist())
