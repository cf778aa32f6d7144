"""States that are read from a store block by block give the probes that states in memory give."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from distributed import Client, LocalCluster
from sklearn.preprocessing import StandardScaler

from mmextract.engine.store import open_store
from mmextract.probes import blocks
from mmextract.probes.blocks import StoredStates
from mmextract.probes.cuml_solver import ClusterCumlSolver, measure_features, stored_residual
from mmextract.probes.primal import PrimalSolver, decide_stored
from mmextract.probes.solvers import Job, kkt_residual
from tests.probes.stores import make_store, paired_columns

ROWS = np.r_[0:50, 53:90, 97:200]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    columns = paired_columns(100, 50)
    states = np.random.default_rng(0).normal(size=(200, 2, 2, 9)).astype(np.float32)
    states[91] = np.nan
    return make_store(
        tmp_path / "s.zarr", states, layers=[0, 1], positions=["last", "image"], columns=columns
    )


@pytest.fixture
def stored(path: Path, monkeypatch: pytest.MonkeyPatch) -> StoredStates:
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", 9 * 40)
    return StoredStates(open_store(path), 1, "image", ROWS)


def test_blocks_are_the_wanted_rows_in_order(path: Path, stored: StoredStates) -> None:
    want = open_store(path).read(1, "image")[ROWS].astype(np.float64)
    parts = list(stored)
    assert len(parts) > 2 and stored.shape == want.shape
    np.testing.assert_array_equal(np.concatenate([x.numpy() for _, x in parts]), want)
    for rows, x in parts:
        np.testing.assert_array_equal(x.numpy(), want[rows])


@pytest.mark.parametrize("n_classes", [2, 3])
@pytest.mark.parametrize("scale", [True, False])
def test_the_optimum_is_that_of_states_in_memory(stored: StoredStates, n_classes: int, scale: bool) -> None:
    """Grouped folds, two label vectors, several penalties, all in the same passes."""
    x = np.concatenate([x.numpy() for _, x in stored])
    groups = np.arange(len(x)) // 2
    rng = np.random.default_rng(1)
    labels = [rng.permutation(np.arange(len(x)) % n_classes) for _ in range(2)]
    folds = [np.flatnonzero(groups % 3 != fold) for fold in range(3)]
    jobs = [Job(rows=r, y=y[r], penalties=(0.01, 1.0), scale=scale) for r in folds for y in labels]
    solver = PrimalSolver()
    for got, want in zip(solver.solve_stored(stored, jobs), solver.solve(x, jobs), strict=True):
        for found, other in zip(got, want, strict=True):
            assert found.penalty == other.penalty and found.residual <= 1e-8
            np.testing.assert_allclose(found.coefficients, other.coefficients, atol=1e-7)
        some = rng.permutation(len(x))[:40]
        first, (_, second) = decide_stored(stored, [(got[:1], np.arange(len(x))), (got, some)])
        np.testing.assert_allclose(first[0], got[0].decide(x), atol=1e-12)
        np.testing.assert_allclose(second, got[1].decide(x[some]), atol=1e-12)


def test_states_that_are_not_finite_are_refused(path: Path) -> None:
    with pytest.raises(ValueError, match=r"layer 0, position last: 1 of 200 samples hold NaN.*is 45#unseen"):
        list(StoredStates(open_store(path), 0, "last", np.arange(200)))


@pytest.mark.parametrize("n_classes", [2, 3])
def test_the_residual_over_blocks_is_that_of_states_in_memory(stored: StoredStates, n_classes: int) -> None:
    x = np.concatenate([x.numpy() for _, x in stored])
    y = np.random.default_rng(1).permutation(np.arange(len(x)) % n_classes)
    center, scale = measure_features(stored, True)
    scaler = StandardScaler().fit(x)
    np.testing.assert_allclose(center, scaler.mean_, atol=1e-14)
    np.testing.assert_allclose(scale, scaler.scale_)
    outputs = 1 if n_classes == 2 else n_classes
    w, b = np.random.default_rng(2).normal(size=(9, outputs)), np.ones(outputs)
    want = kkt_residual(scaler.transform(x), y, 0.3, w, b)
    job = Job(rows=np.arange(len(x)), y=y, penalties=(0.3,))
    assert stored_residual(stored, job, 0.3, w, b, center, scale) == pytest.approx(want)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_cluster_without_gpus_is_refused_by_cuml() -> None:
    with (
        LocalCluster(n_workers=1, threads_per_worker=1, processes=False, dashboard_address=None) as cluster,
        Client(cluster) as client,
        pytest.raises(ValueError, match=r"needs a GPU for each worker.*dask cuda worker"),
    ):
        ClusterCumlSolver(client)
