from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mmextract.engine.store import open_store
from mmextract.probes.cka import align, cka_between, debiased_cka, linear_cka
from mmextract.probes.metrics import FloatArray
from mmextract.probes.separability import Geometry
from tests.probes.stores import make_store, paired_columns, paired_states

NONE_LEFT_OUT = np.zeros(30, np.int64)


def products(x: FloatArray) -> FloatArray:
    return Geometry(x).products


def draw(n: int, d: int, seed: int) -> FloatArray:
    return np.random.default_rng(seed).normal(1, 1, size=(n, d))


def unbiased_hsic(x: FloatArray, y: FloatArray) -> float:
    """By its definition, as a U-statistic: mean over (i, j, q, r), all different, of k_ij (l_ij + l_qr − 2 l_iq)."""
    a, b, n = x @ x.T, y @ y.T, len(x)
    index = np.indices((n, n, n, n)).reshape(4, -1)
    i, j, q, r = index[:, [len(set(c)) == 4 for c in index.T.tolist()]]
    return float((a[i, j] * (b[i, j] + b[q, r] - 2 * b[i, q])).mean())


def test_linear_cka_is_that_of_the_cross_covariances() -> None:
    x, y = draw(30, 7, 0), draw(30, 4, 1)
    a, b = x - x.mean(0), y - y.mean(0)
    expected = np.linalg.norm(b.T @ a) ** 2 / np.linalg.norm(a.T @ a) / np.linalg.norm(b.T @ b)
    assert linear_cka(products(x), products(y), NONE_LEFT_OUT)[0] == pytest.approx(expected)


def test_debiased_cka_is_that_of_the_u_statistic() -> None:
    x, y = draw(9, 5, 0), draw(9, 3, 1) + draw(9, 5, 0)[:, :3]
    expected = unbiased_hsic(x, y) / np.sqrt(unbiased_hsic(x, x) * unbiased_hsic(y, y))
    assert debiased_cka(products(x), products(y), np.zeros(9, np.int64))[0] == pytest.approx(expected)


def test_a_block_left_out_is_the_same_as_samples_that_were_never_there() -> None:
    x, y, blocks = draw(30, 7, 0), draw(30, 4, 1), np.arange(30) % 3
    for function in (linear_cka, debiased_cka):
        values = function(products(x), products(y), blocks)
        for block in range(3):
            keep = blocks != block
            alone = function(products(x[keep]), products(y[keep]), np.zeros(keep.sum(), np.int64))
            assert values[1 + block] == pytest.approx(alone[0])


def test_turned_scaled_and_shifted_states_are_the_same_states() -> None:
    x = draw(30, 6, 0)
    turn = np.linalg.qr(draw(6, 6, 1))[0]
    for alignment in align(x, 3 * x @ turn + 2, np.arange(30) % 5, layer=0, position="last"):
        assert alignment.value == pytest.approx(1)


def test_independent_states_of_many_features_look_alike_only_without_the_correction() -> None:
    biased, debiased = align(draw(60, 500, 0), draw(60, 500, 1), np.arange(60) % 20, layer=0, position="last")
    assert biased.value > 0.8
    assert debiased.low is not None and debiased.high is not None and debiased.low < 0 < debiased.high
    assert abs(debiased.value) < 0.1


def make_pair(folder: Path) -> tuple[Path, Path]:
    columns = paired_columns(30, 15)
    states = paired_states(columns, 8)
    both = np.stack([states, states + paired_states(columns, 8, seed=9)], 1)[:, :, None]
    first = make_store(folder / "a.zarr", both, layers=[0, 1], positions=["last"], columns=columns)
    # the other store has its samples in reverse, lacks some, and is turned around in layer 0
    kept = np.arange(59, 9, -1)
    other = np.stack([-both[kept, 0], paired_states(columns, 8, seed=5)[kept][:, None]], 1)
    shuffled = {name: [values[row] for row in kept] for name, values in columns.items()}
    second = make_store(
        folder / "b.zarr", other, layers=[0, 1], positions=["last"], columns=shuffled, rejected={3: "broken"}
    )
    return first, second


def test_two_stores_are_compared_sample_by_sample_whatever_their_order(tmp_path: Path) -> None:
    first, second = map(open_store, make_pair(tmp_path))
    found = {(a.layer, a.metric): a for a in cka_between(first, second, [0, 1], "last", group="pair")}
    assert found[0, "cka_debiased"].value == pytest.approx(1, abs=1e-6)
    assert found[1, "cka_debiased"].value < 0.9
    assert {a.n_samples for a in found.values()} in ({49}, {50})
    few = cka_between(first, second, [0], "last", samples=[str(n) for n in first.columns["sample"][20:40]])
    assert few[0].n_samples in (19, 20)


def test_stores_without_common_samples_and_wrong_names_are_errors(tmp_path: Path) -> None:
    first, second = map(open_store, make_pair(tmp_path))
    with pytest.raises(ValueError, match="have 1 samples in common"):
        cka_between(first, second, [0], "last", samples=[str(first.columns["sample"][40])])
    with pytest.raises(LookupError, match="no layer 7"):
        cka_between(first, second, [7], "last")
    with pytest.raises(LookupError, match="no column 'team'"):
        cka_between(first, second, [0], "last", group="team")
