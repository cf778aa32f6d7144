from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from mmextract.probes.choice import AutoSolver
from mmextract.probes.design import Design
from mmextract.probes.evaluation import TaskScores, evaluate
from mmextract.probes.metrics import FloatArray
from mmextract.probes.permutation import (
    PermutationTest,
    Shuffled,
    can_shuffle,
    compare,
    correct_for_discoveries,
    correct_for_maximum,
    detectable_at,
    make_shuffles,
    run_test,
)
from mmextract.probes.settings import ProbeSettings
from mmextract.probes.states import ArrayStates
from mmextract.probes.tasks import make_task

N_GROUPS, PER_GROUP = 20, 4
SETTINGS = ProbeSettings(penalties=(0.1,), folds=4, repeats=1, permutations=19)


def make_design(structure: str, rng: np.random.Generator) -> Design:
    """20 groups of 4 samples; classes lie within groups, or each group has one."""
    groups = np.repeat(np.arange(N_GROUPS), PER_GROUP)
    if structure == "paired":
        y = np.tile([0, 1], N_GROUPS * PER_GROUP // 2)
    elif structure == "within":
        y = np.concatenate([rng.permutation([0, 1, 1, int(rng.integers(2))]) for _ in range(N_GROUPS)])
    else:
        y = rng.permutation(np.arange(N_GROUPS) % 2)[groups]
    return Design(label="x", classes=("a", "b"), group="g", rows=np.arange(len(y)), y=y, groups=groups)


def make_noise(design: Design, rng: np.random.Generator, d: int = 5) -> FloatArray:
    """Features that samples of a group share for the most part, and that say nothing of the label."""
    return 3 * rng.normal(size=(N_GROUPS, d))[design.groups] + rng.normal(size=(design.n_samples, d))


def run_both(
    x: FloatArray, design: Design, settings: ProbeSettings = SETTINGS
) -> tuple[TaskScores, PermutationTest, Shuffled]:
    label = make_task("label", design.y, design.groups, settings)
    states = ArrayStates(x, AutoSolver("cpu"))
    (scores,) = evaluate(states, design.groups, [label], settings)
    return scores, *run_test(states, design, label, settings, scores.penalties)


def run(x: FloatArray, design: Design, settings: ProbeSettings = SETTINGS) -> PermutationTest:
    return run_both(x, design, settings)[1]


def with_permutations(n: int) -> ProbeSettings:
    return ProbeSettings(penalties=(0.1,), folds=4, repeats=1, permutations=n)


@pytest.mark.parametrize("structure", ["paired", "within", "between"])
def test_p_values_of_noise_are_spread_evenly(structure: str) -> None:
    p_values = []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        design = make_design(structure, rng)
        assert design.structure == structure
        p_values.append(run(make_noise(design, rng), design).p_value)
    # three standard deviations of 20 fair draws, of a half and of a tenth
    assert 3 < np.sum(np.array(p_values) <= 0.5) < 17
    assert np.sum(np.array(p_values) <= 0.1) < 7


def test_groups_are_exchanged_and_not_samples() -> None:
    """With labels shuffled sample by sample, noise that groups share would pass for a signal far too often."""
    p_values = []
    for seed in range(12):
        rng = np.random.default_rng(seed)
        design = make_design("between", rng)
        rows = Design(
            label="x",
            classes=("a", "b"),
            group=None,
            rows=design.rows,
            y=design.y,
            groups=np.arange(design.n_samples),
        )
        p_values.append(run(make_noise(design, rng), rows).p_value)
    assert np.mean(np.array(p_values) <= 0.1) > 0.3


def test_shuffles_leave_what_the_design_fixes() -> None:
    rng = np.random.default_rng(0)
    paired, between = make_design("paired", rng), make_design("between", rng)
    fold = make_task("label", between.y, between.groups, SETTINGS).folds[0]
    for y in make_shuffles(paired, fold, 20, seed=0):
        # both samples of a pair keep one class each, or change places, in the whole group at once
        swapped = (y != paired.y).reshape(N_GROUPS, PER_GROUP)
        assert (swapped.all(1) | ~swapped.any(1)).all()
    for y in make_shuffles(between, fold, 20, seed=0):
        assert (y.reshape(N_GROUPS, PER_GROUP) == y.reshape(N_GROUPS, PER_GROUP)[:, :1]).all()
        for k in range(4):
            assert np.bincount(y[fold == k]).tolist() == np.bincount(between.y[fold == k]).tolist()
    assert (make_shuffles(paired, fold, 3, seed=0)[0] == paired.y).all()


def find_everywhere(signals: Sequence[float]) -> list[PermutationTest]:
    rng = np.random.default_rng(0)
    design = make_design("paired", rng)
    tests = []
    for signal in signals:
        x = make_noise(design, rng)
        x[:, 0] += signal * design.y
        tests.append(run(x, design, with_permutations(49)))
    return tests


def test_a_signal_is_beyond_every_shuffle_and_stays_so_after_correction() -> None:
    tests = find_everywhere((0.0, 3.0, 0.0))
    assert tests[1].p_value == 1 / 50
    corrected = correct_for_maximum(tests)
    assert corrected[1] == 1 / 50 and all(
        after >= test.p_value for after, test in zip(corrected, tests, strict=True)
    )
    assert corrected[0] > 0.1
    assert correct_for_discoveries(tests)[1] == pytest.approx(3 / 50)


def test_a_p_value_counts_the_label_among_its_shuffles() -> None:
    test = PermutationTest(value=0.6, null=np.array([0.5, 0.6, 0.7, 0.4]), spread=0.1, nulls={})
    assert test.p_value == 3 / 5


def test_the_detectable_effect_lies_above_the_critical_value_and_shrinks_with_the_spread() -> None:
    null = 0.5 + 0.05 * np.random.default_rng(0).normal(size=9999)
    test = PermutationTest(value=0.6, null=null, spread=float(null.std()), nulls={})
    # z(0.95) + z(0.8) standard deviations above chance
    assert detectable_at([test], 0.05)[0] == pytest.approx(0.5 + 0.05 * (1.645 + 0.842), abs=0.003)


def test_shuffles_taken_a_few_at_a_time_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    design = make_design("paired", rng)
    x = make_noise(design, rng)
    whole = run(x, design)
    monkeypatch.setattr("mmextract.probes.permutation.MOST_ELEMENTS", 6 * (design.n_samples + 5))
    parts = run(x, design)
    assert parts.value == pytest.approx(whole.value) and parts.null == pytest.approx(whole.null)
    found, wanted = (test.nulls["auroc"].distances(is_share=True) for test in (parts, whole))
    assert found == pytest.approx(wanted)


def compare_two(signals: tuple[float, float], seed: int) -> PermutationTest:
    """Two sets of features with the same samples and noise of their own, of which each may know the label."""
    rng = np.random.default_rng(seed)
    design = make_design("paired", rng)
    scores, shuffled = [], []
    for signal in signals:
        x = make_noise(design, rng)
        x[:, 0] += signal * design.y
        label, _, left = run_both(x, design)
        scores.append(label)
        shuffled.append(left)
    return compare(scores[0].minus(scores[1], "difference"), shuffled[0], shuffled[1])


def test_a_difference_is_found_where_one_knows_more_and_not_where_both_know_the_same() -> None:
    assert compare_two((4.0, 0.0), 0).p_value == 1 / 20
    assert compare_two((0.0, 4.0), 0).p_value == 1 / 20
    equal = [compare_two((2.0, 2.0), seed).p_value for seed in range(12)]
    assert np.mean(np.array(equal) <= 0.1) < 0.4 and np.mean(equal) > 0.3


def test_designs_that_leave_no_fair_shuffle_are_known() -> None:
    rng = np.random.default_rng(0)
    design = make_design("paired", rng)
    y = design.y.copy()
    y[: N_GROUPS * PER_GROUP // 2] = 0
    mixed = Design(label="x", classes=("a", "b"), group="g", rows=design.rows, y=y, groups=design.groups)
    assert can_shuffle(design) and not can_shuffle(mixed)
