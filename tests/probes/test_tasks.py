from __future__ import annotations

import numpy as np
import pytest

from mmextract.probes.design import Design
from mmextract.probes.groups import classify, count
from mmextract.probes.settings import ProbeSettings
from mmextract.probes.tasks import make_tasks, shuffle_labels, split


def make(y: np.ndarray, groups: np.ndarray) -> Design:
    names = tuple("abcdef"[: int(y.max()) + 1])
    return Design(label="x", classes=names, group="g", rows=np.arange(len(y)), y=y, groups=groups)


PAIRED = make(np.tile([0, 1], 60), np.repeat(np.arange(30), 4))
CONSTANT = make(np.repeat(np.arange(40) % 2, 3), np.repeat(np.arange(40), 3))


@pytest.mark.parametrize("design", [PAIRED, CONSTANT], ids=["paired", "between"])
def test_groups_are_never_split_and_every_sample_is_tested_once_a_repeat(design: Design) -> None:
    for task in make_tasks(design, ProbeSettings(folds=4, repeats=3)):
        assert task.folds.shape == (3, design.n_samples)
        assert set(np.unique(task.folds)) == {0, 1, 2, 3}
        for folds in task.folds:
            assert all(len(np.unique(folds[design.groups == g])) == 1 for g in range(design.n_groups))


@pytest.mark.parametrize("design", [PAIRED, CONSTANT], ids=["paired", "between"])
def test_inner_splits_cover_the_training_set_only_and_keep_groups_together(design: Design) -> None:
    task = make_tasks(design, ProbeSettings(folds=3, repeats=2, inner_folds=3))[0]
    for repeat in range(2):
        for fold in range(3):
            inner = task.inner_folds[repeat, fold]
            assert ((inner < 0) == (task.folds[repeat] == fold)).all()
            for group in np.unique(design.groups[inner >= 0]):
                assert len(np.unique(inner[design.groups == group])) == 1


def test_classes_are_spread_evenly_over_folds() -> None:
    rare = make(np.repeat((np.arange(50) % 5 == 0).astype(np.int64), 2), np.repeat(np.arange(50), 2))
    task = make_tasks(rare, ProbeSettings())[0]
    for folds in task.folds:
        assert np.bincount(folds[rare.y == 1]).tolist() == [4] * 5


def test_repeats_differ_and_the_seed_decides() -> None:
    first, again, other = (make_tasks(PAIRED, ProbeSettings(seed=seed)) for seed in (0, 0, 5))
    assert (first[0].folds[0] != first[0].folds[1]).any()
    assert (first[0].folds == again[0].folds).all() and (first[1].y == again[1].y).all()
    assert (first[0].folds != other[0].folds).any() and (first[1].y != other[1].y).any()


def test_in_pairs_a_shuffle_exchanges_the_classes_of_whole_groups() -> None:
    shuffled = shuffle_labels(PAIRED.y, PAIRED.groups, "paired", np.random.default_rng(0))
    exchanged = (shuffled != PAIRED.y).reshape(30, 4)
    assert (exchanged.all(1) | ~exchanged.any(1)).all()
    assert 5 < exchanged[:, 0].sum() < 25


def test_labels_that_belong_to_groups_are_shuffled_among_groups() -> None:
    shuffled = shuffle_labels(CONSTANT.y, CONSTANT.groups, "between", np.random.default_rng(0))
    assert classify(shuffled, CONSTANT.groups) == "between"
    assert (shuffled != CONSTANT.y).any() and shuffled.sum() == CONSTANT.y.sum()


def test_labels_that_vary_within_groups_are_shuffled_there() -> None:
    y, groups = np.array([0, 1, 1] * 20), np.repeat(np.arange(20), 3)
    shuffled = shuffle_labels(y, groups, "within", np.random.default_rng(0))
    assert (count(shuffled, groups) == count(y, groups)).all() and (shuffled != y).any()


@pytest.mark.parametrize("structure", ["rows", "mixed"])
def test_other_labels_are_shuffled_among_all_samples(structure: str) -> None:
    shuffled = shuffle_labels(PAIRED.y, PAIRED.groups, structure, np.random.default_rng(0))
    assert shuffled.sum() == PAIRED.y.sum() and (shuffled != PAIRED.y).any()


def test_fewer_groups_than_folds_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"31 folds need at least 31 groups \(g\), but there are 30.*--folds"
    ):
        make_tasks(PAIRED, ProbeSettings(folds=31))


def test_a_class_in_too_few_groups_is_named() -> None:
    rare = make(np.repeat((np.arange(50) < 3).astype(np.int64), 2), np.repeat(np.arange(50), 2))
    with pytest.raises(
        ValueError, match=r"class 'b' of 'x' occurs in 3 groups \(g\), and 5 folds need at least 5"
    ):
        make_tasks(rare, ProbeSettings(folds=5))


def test_a_split_that_leaves_a_class_out_of_training_is_refused() -> None:
    y, groups = np.array([0] * 10 + [1, 1]), np.array([*range(10), 10, 10])
    with pytest.raises(ValueError, match="no split of 11 groups into 2 folds"):
        split(y, groups, 2, 0)


@pytest.mark.parametrize(
    "shape", ["paired", "a class a group", "two classes of any share", "one size or many"]
)
@pytest.mark.parametrize("folds", [2, 4, 5])
def test_many_groups_are_dealt_out_evenly(shape: str, folds: int) -> None:
    rng = np.random.default_rng(0)
    n_groups = 12_000
    sizes = np.full(n_groups, 2) if shape == "paired" else 1 + rng.geometric(0.3, n_groups)
    if shape == "one size or many":
        sizes = np.where(rng.random(n_groups) < 0.5, 1, rng.integers(50, 200, n_groups))
    groups = np.repeat(rng.permutation(n_groups), sizes)
    y = np.arange(len(groups)) % 2
    if shape == "a class a group":
        y = rng.choice(4, n_groups, p=[0.4, 0.3, 0.2, 0.1])[groups]
    elif shape != "paired":
        y = (rng.random(len(groups)) < rng.random(n_groups)[groups]).astype(np.int64)
    found = split(y, groups, folds, 3)
    rows = np.argsort(groups, kind="stable")
    together = np.split(found[rows], np.flatnonzero(np.diff(groups[rows])) + 1)
    assert len(together) == n_groups and all((one == one[0]).all() for one in together)
    in_fold = np.array([np.bincount(y[found == fold], minlength=y.max() + 1) for fold in range(folds)])
    np.testing.assert_allclose(in_fold, np.broadcast_to(in_fold.mean(0), in_fold.shape), rtol=0.02)
    assert np.array_equal(found, split(y, groups, folds, 3))
    assert not np.array_equal(found, split(y, groups, folds, 4))
