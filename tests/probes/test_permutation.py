from __future__ import annotations

import numpy as np
import pytest

from mmextract.probes.choice import AutoSolver
from mmextract.probes.design import Design
from mmextract.probes.metrics import FloatArray
from mmextract.probes.permutation import PermutationTest, correct_for_maximum, run_test

N_GROUPS, PER_GROUP = 20, 4
PENALTIES = (0.1,)


def make_design(structure: str, rng: np.random.Generator) -> Design:
    """20 groups of 4 samples; classes lie within groups, or each group has one."""
    groups = np.repeat(np.arange(N_GROUPS), PER_GROUP)
    if structure == "paired":
        y = np.tile([0, 1], N_GROUPS * PER_GROUP // 2)
    else:
        y = rng.permutation(np.arange(N_GROUPS) % 2)[groups]
    return Design(label="x", classes=("a", "b"), group="g", rows=np.arange(len(y)), y=y, groups=groups)


def make_noise(design: Design, rng: np.random.Generator, d: int = 5) -> FloatArray:
    """Features that samples of a group share for the most part, and that say nothing of the label."""
    return 3 * rng.normal(size=(N_GROUPS, d))[design.groups] + rng.normal(size=(design.n_samples, d))


def run(x: FloatArray, design: Design, n_shuffles: int = 19) -> PermutationTest:
    solver = AutoSolver("cpu")
    return run_test(x, design, solver, penalties=PENALTIES, folds=3, n_shuffles=n_shuffles, seed=0)


@pytest.mark.parametrize("structure", ["paired", "between"])
def test_p_values_of_noise_are_spread_evenly(structure: str) -> None:
    p_values = []
    for seed in range(30):
        rng = np.random.default_rng(seed)
        design = make_design(structure, rng)
        assert design.structure == structure
        p_values.append(run(make_noise(design, rng), design).p_value)
    # three standard deviations of 30 fair draws, of a half and of a tenth
    assert 6 < np.sum(np.array(p_values) <= 0.5) < 24
    assert np.sum(np.array(p_values) <= 0.1) < 9


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


def test_a_signal_is_beyond_every_shuffle_and_stays_so_after_correction() -> None:
    rng = np.random.default_rng(0)
    design = make_design("paired", rng)
    tests = []
    for signal in (0.0, 3.0, 0.0):
        x = make_noise(design, rng)
        x[:, 0] += signal * design.y
        tests.append(run(x, design, 49))
    assert tests[1].p_value == 1 / 50
    corrected = correct_for_maximum(tests)
    assert corrected[1] == 1 / 50 and all(
        after >= test.p_value for after, test in zip(corrected, tests, strict=True)
    )
    assert corrected[0] > 0.1


def test_a_p_value_counts_the_label_among_its_shuffles() -> None:
    test = PermutationTest(value=0.6, null=np.array([0.5, 0.6, 0.7, 0.4]))
    assert test.p_value == 3 / 5


def test_designs_that_leave_no_fair_shuffle_are_refused() -> None:
    rng = np.random.default_rng(0)
    design = make_design("paired", rng)
    y = design.y.copy()
    y[: N_GROUPS * PER_GROUP // 2] = 0
    mixed = Design(label="x", classes=("a", "b"), group="g", rows=design.rows, y=y, groups=design.groups)
    with pytest.raises(ValueError, match="--where"):
        run(make_noise(mixed, rng), mixed)
    rare = Design(
        label="x",
        classes=("a", "b"),
        group="g",
        rows=design.rows,
        y=(design.groups == 0).astype(np.int64),
        groups=design.groups,
    )
    with pytest.raises(ValueError, match="lower --folds"):
        run(make_noise(rare, rng), rare)
