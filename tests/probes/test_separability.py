from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from sklearn.metrics import silhouette_score

from mmextract.probes.design import Design
from mmextract.probes.groups import IntArray
from mmextract.probes.jackknife import make_blocks, make_interval
from mmextract.probes.metrics import FloatArray
from mmextract.probes.separability import (
    METRICS,
    Geometry,
    Measure,
    class_mean_cosine,
    effective_dimension,
    fisher_ratio,
    make_labellings,
    measure,
    silhouette,
)
from mmextract.probes.tasks import shuffle_labels

Y = np.array([0, 1, 2] * 14)
LEFT_OUT_Y = np.where(np.arange(42) % 5 == 0, -1, Y)


def draw_states(n: int = 42, d: int = 6, *, seed: int = 0, mean: float = 3.0) -> FloatArray:
    return np.random.default_rng(seed).normal(mean, np.arange(1, d + 1), size=(n, d))


def make_design(y: IntArray, groups: IntArray) -> Design:
    return Design(
        label="x",
        classes=tuple(str(k) for k in range(int(y.max()) + 1)),
        rows=np.arange(len(y)),
        y=y,
        group="g",
        groups=groups,
    )


def scatter(x: FloatArray, y: FloatArray) -> float:
    means = {k: x[y == k].mean(0) for k in np.unique(y)}
    between = sum((y == k).sum() * np.outer(m - x.mean(0), m - x.mean(0)) for k, m in means.items())
    within = sum((x[y == k] - m).T @ (x[y == k] - m) for k, m in means.items())
    return float(np.trace(between) / np.trace(within))


def test_fisher_ratio_is_the_trace_of_one_scatter_matrix_over_the_other() -> None:
    x = draw_states()
    labels = np.stack([Y, LEFT_OUT_Y, np.roll(Y, 5)])
    expected = [scatter(x[y >= 0], y[y >= 0]) for y in labels]
    np.testing.assert_allclose(fisher_ratio(Geometry(x), labels), expected, rtol=1e-10)


def test_fisher_ratio_of_two_points_and_their_spread_is_known() -> None:
    x = np.array([[-3.0], [-1.0], [1.0], [3.0]])  # means ∓2, spread 1: 4·4/4
    np.testing.assert_allclose(fisher_ratio(Geometry(x), np.array([[0, 0, 1, 1]])), [4.0])


def test_silhouette_is_that_of_scikit_learn() -> None:
    x = draw_states()
    lonely = np.where(np.arange(42) == 0, 2, Y % 2)  # a class of one sample
    labels = np.stack([Y, LEFT_OUT_Y, lonely])
    expected = [silhouette_score(x[y >= 0], y[y >= 0]) for y in labels]
    np.testing.assert_allclose(silhouette(Geometry(x), labels), expected, rtol=1e-9)


def test_class_mean_cosine_is_that_of_the_means_as_they_are() -> None:
    x = draw_states()
    means = [x[k == Y].mean(0) for k in range(3)]
    cosines = [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in combinations(means, 2)]
    np.testing.assert_allclose(class_mean_cosine(Geometry(x), Y[None]), [np.mean(cosines)], rtol=1e-10)


def test_effective_dimension_is_the_participation_ratio_with_every_block_left_out() -> None:
    x, blocks = draw_states(), np.arange(42) % 4
    kept = [np.full(42, True), *(blocks != block for block in range(4))]
    spectra = [np.linalg.eigvalsh(np.cov(x[keep].T)) for keep in kept]
    expected = [v.sum() ** 2 / (v**2).sum() for v in spectra]
    np.testing.assert_allclose(effective_dimension(Geometry(x), blocks), expected, rtol=1e-9)


@pytest.mark.parametrize("d", [1, 4])
def test_effective_dimension_of_equal_axes_is_their_number(d: int) -> None:
    axes = np.concatenate([np.eye(d), -np.eye(d)])
    value = effective_dimension(Geometry(axes), np.zeros(2 * d, np.int64))[0]
    assert value == pytest.approx(d)


def test_no_measure_changes_when_the_states_are_turned_and_only_what_should_when_they_are_moved() -> None:
    x = draw_states()
    turn = np.linalg.qr(np.random.default_rng(1).normal(size=(6, 6)))[0]
    labellings = make_labellings(make_design(Y, np.arange(42)), n_shuffles=9, seed=0)

    def values(states: FloatArray) -> dict[str, float]:
        return {m.metric: m.value for m in measure(states, labellings)}

    plain = values(x)
    assert set(plain) == set(METRICS)
    assert values(2 * x @ turn) == pytest.approx(plain, rel=1e-9)
    moved = values(x + 5)
    assert moved.pop("class_mean_cosine") > plain.pop("class_mean_cosine") + 0.01
    assert moved == pytest.approx(plain, rel=1e-9)


def by_metric(measures: list[Measure]) -> dict[str, Measure]:
    return {m.metric: m for m in measures}


def test_a_planted_difference_stands_out_from_shuffles() -> None:
    y, groups = np.tile([0, 1], 60), np.repeat(np.arange(60), 2)
    labellings = make_labellings(make_design(y, groups), n_shuffles=99, seed=0)
    x = draw_states(120, 8, mean=0)
    planted = by_metric(measure(x + 3 * y[:, None] * np.eye(8)[0], labellings))
    for metric in ("fisher_ratio", "silhouette", "class_mean_cosine"):
        assert planted[metric].p == pytest.approx(0.01)
        low, high = planted[metric].low, planted[metric].high
        assert low is not None and high is not None and low < planted[metric].value < high
    assert planted["effective_dimension"].p is None


def test_p_values_of_noise_are_spread_evenly() -> None:
    y, groups = np.tile([0, 1], 20), np.repeat(np.arange(20), 2)
    labellings = make_labellings(make_design(y, groups), n_shuffles=19, seed=0)
    found = [by_metric(measure(draw_states(40, 8, seed=s, mean=0), labellings)) for s in range(200)]
    for metric in ("fisher_ratio", "silhouette", "class_mean_cosine"):
        p = np.array([m[metric].p for m in found], np.float64)
        # of 200 draws, 40 ± 3.3 standard deviations of 5.7
        assert 21 <= (p <= 0.2).sum() <= 59 and 21 <= (p > 0.8).sum() <= 59


def test_shuffles_are_those_of_the_design() -> None:
    y, groups = np.tile([0, 1], 6), np.repeat(np.arange(6), 2)
    labellings = make_labellings(make_design(y, groups), n_shuffles=20, seed=3)
    shuffled = labellings.labels[1 + labellings.n_blocks :]
    assert len(shuffled) == 20 and (shuffled.reshape(20, 6, 2).sum(2) == 1).all()
    rng = np.random.default_rng([3, 5])
    np.testing.assert_array_equal(shuffled[0], shuffle_labels(y, groups, "paired", rng))


def test_a_mixed_design_gets_no_reference() -> None:
    y, groups = np.array([0, 1, 0, 0, 1, 1, 0, 1]), np.array([0, 0, 1, 1, 2, 2, 3, 3])
    measures = measure(draw_states(8), make_labellings(make_design(y, groups), n_shuffles=20, seed=0))
    assert all(m.p is None and m.n_shuffles == 0 for m in measures)


def test_states_that_are_all_the_same_have_no_value_instead_of_a_wrong_one() -> None:
    labellings = make_labellings(make_design(Y, np.arange(42)), n_shuffles=9, seed=0)
    measures = by_metric(measure(np.full((42, 5), 0.1), labellings))
    for metric in ("fisher_ratio", "effective_dimension"):
        assert (
            np.isnan(measures[metric].value) and measures[metric].low is None and measures[metric].p is None
        )
    assert measures["silhouette"].value == 0


def test_the_jackknife_of_a_mean_is_the_known_standard_error() -> None:
    values = np.random.default_rng(0).normal(size=20)
    left_out = np.array([np.delete(values, i).mean() for i in range(20)])
    low, high = make_interval(float(values.mean()), left_out, (-np.inf, np.inf))
    error = values.std(ddof=1) / np.sqrt(20)
    assert low is not None and high is not None
    assert (high - low) / 2 == pytest.approx(2.0930 * error, rel=1e-4)  # Student's t of 19 degrees of freedom


def test_no_group_is_torn_between_blocks() -> None:
    groups = np.random.default_rng(0).integers(0, 50, 300)
    blocks = make_blocks(groups, seed=0)
    assert all(len(np.unique(blocks[groups == group])) == 1 for group in np.unique(groups))
    assert len(np.unique(blocks)) == 20
