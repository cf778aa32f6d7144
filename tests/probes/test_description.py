from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from sklearn.metrics import silhouette_score

from mmextract.engine.store import open_store
from mmextract.probes import description as module
from mmextract.probes.description import COLUMNS, Description, DescriptionSettings, describe
from mmextract.probes.projections import Wish, project
from mmextract.probes.summary import Summary
from tests.probes.stores import make_paired_store

NOTHING = DescriptionSettings(separability=False, projections=())


def test_every_layer_and_position_is_measured_on_its_own_states(
    summary: Summary, description: Description
) -> None:
    plan = summary.plan
    values = {(row.layer, row.position): row for row in description.rows if row.metric == "silhouette"}
    assert set(values) == set(plan.cells)
    for layer, position in plan.cells:
        x = open_store(plan.store).read(layer, position)[plan.design.rows].astype(np.float64)
        assert values[layer, position].value == pytest.approx(silhouette_score(x, plan.design.y), abs=1e-9)
    planted, noise = values[1, "image"], values[0, "last"]
    assert planted.p == pytest.approx(0.05) and noise.p is not None and noise.p > 0.05
    assert (planted.n_samples, planted.n_groups, planted.n_shuffles) == (120, 30, 19)


def test_coordinates_lie_beside_their_samples(summary: Summary, description: Description) -> None:
    table = description.projections
    assert table is not None
    frame = table.to_pandas()
    here = frame[(frame.method == "pca") & (frame.layer == 1) & (frame.position == "image")]
    assert here["sample"].tolist() == list(summary.plan.samples)
    assert here["class"].tolist() == [summary.plan.design.classes[k] for k in summary.plan.design.y]
    x = open_store(summary.plan.store).read(1, "image")[summary.plan.design.rows].astype(np.float64)
    np.testing.assert_allclose(abs(here["x"]), abs(project(x, "pca").coordinates[:, 0]), rtol=1e-5)
    assert set(frame[frame.method == "tsne"].groupby(["layer", "position"]).groups) == {(1, "image")}


def test_the_files_say_what_the_record_says(folder: Path, description: Description) -> None:
    table = pq.read_table(folder / "separability.parquet")
    assert {f.name: f.metadata[b"about"].decode() for f in table.schema} == COLUMNS
    assert table.to_pylist() == description.entries()["separability"]["rows"]
    assert pq.read_table(folder / "projections.parquet").equals(description.projections)


def test_it_is_the_same_again(summary: Summary, description: Description) -> None:
    again = describe(summary.plan, DescriptionSettings(n_shuffles=19), (1, "image"))
    assert again.rows == description.rows and again.entries() == description.entries()
    assert again.projections is not None and again.projections.equals(description.projections)


def test_nothing_is_read_for_nothing(summary: Summary) -> None:
    counted: list[int] = []
    nothing = describe(summary.plan, NOTHING, (1, "image"), on_progress=counted.append)
    assert not nothing.rows and nothing.projections is None and not nothing.entries() and not counted


def test_progress_counts_layers_and_positions(summary: Summary) -> None:
    counted: list[int] = []
    wished = DescriptionSettings(separability=False, projections=(Wish("pca"),))
    describe(summary.plan, wished, (1, "image"), on_progress=counted.append)
    assert sum(counted) == 6


def test_of_many_samples_whole_groups_are_drawn(summary: Summary, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_SAMPLES", 40)
    drawn = describe(
        summary.plan, DescriptionSettings(n_shuffles=19, projections=(Wish("pca"),)), (1, "image")
    )
    assert {(row.n_samples, row.n_groups) for row in drawn.rows} == {(40, 10)}
    assert drawn.projections is not None
    one = drawn.projections.slice(0, 40).to_pandas()
    assert (one.groupby("group")["sample"].count() == 4).all()


def test_cka_with_another_store_stands_among_the_rows(summary: Summary, tmp_path: Path) -> None:
    other = make_paired_store(tmp_path / "other.zarr", signals=[[0, 0], [0, 0], [0, 3.0]])
    wished = DescriptionSettings(n_shuffles=0, projections=())
    rows = describe(summary.plan, wished, (1, "image"), other=other).rows
    cka = {(row.layer, row.position): row.value for row in rows if row.metric == "cka_debiased"}
    assert cka[0, "last"] == pytest.approx(1) and cka[-1, "image"] == pytest.approx(1)
    assert cka[1, "image"] < 0.9
