"""States that are read from a store block by block give the probes that states in memory give."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mmextract.engine.store import open_store
from mmextract.probes import blocks
from mmextract.probes.blocks import StoredStates
from mmextract.probes.primal import PrimalSolver, decide_stored
from mmextract.probes.solvers import Job
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
        decided = decide_stored(stored, got)
        np.testing.assert_allclose(decided[1], got[1].decide(x), atol=1e-12)


def test_states_that_are_not_finite_are_refused(path: Path) -> None:
    with pytest.raises(ValueError, match="layer 0, position last: some states are NaN"):
        list(StoredStates(open_store(path), 0, "last", np.arange(200)))
