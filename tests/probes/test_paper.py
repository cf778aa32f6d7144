from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split

from mmextract.engine.store import open_store
from mmextract.probes.settings import ProbeSettings
from mmextract.probes.summary import Summary
from tests.probes.conftest import summarise
from tests.probes.stores import make_store


def published_accuracy(x: np.ndarray, labels: np.ndarray) -> float:
    """The released procedure, in scikit-learn's words."""
    x_train, x_test, y_train, y_test = train_test_split(
        x, labels, test_size=0.2, random_state=42, stratify=labels
    )
    model = LogisticRegression(max_iter=5000)
    model.fit(x_train, y_train)
    return round(float(np.mean(model.predict(x_test) == y_test)), 4)


def test_accuracies_are_the_published_ones_to_the_digit(store: Path, paper_summary: Summary) -> None:
    opened = open_store(store)
    labels = opened.columns["identity_set"].astype(object)
    for layer, position in paper_summary.plan.cells:
        want = published_accuracy(opened.read(layer, position).astype(np.float64), labels)
        assert paper_summary.row("label", "accuracy", (layer, position)).value == want


def test_at_most_500_of_a_class_are_taken_the_first_in_the_store(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    colour = rng.permutation(["red"] * 620 + ["blue"] * 300)
    states = rng.normal(size=(920, 1, 1, 6)).astype(np.float32) + (colour == "red")[:, None, None, None] * 0.4
    columns = {"sample": [str(i) for i in range(920)], "colour": colour.tolist()}
    path = make_store(tmp_path / "s.zarr", states, layers=[0], positions=["last"], columns=columns, run={})
    summary = summarise(path, ProbeSettings(label="colour", preset="paper"))
    rows = np.sort(np.r_[np.flatnonzero(colour == "red")[:500], np.flatnonzero(colour == "blue")])
    assert summary.plan.design.rows.tolist() == rows.tolist()
    want = published_accuracy(states[rows, 0, 0].astype(np.float64), colour[rows])
    assert summary.row("label", "accuracy", (0, "last")).value == want


def test_three_classes_are_told_apart_as_scikit_learn_does(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    level = rng.integers(9, 12, 90)  # as texts these would come in another order
    states = (rng.normal(size=(90, 1, 1, 5)) + level[:, None, None, None] * 0.5).astype(np.float32)
    columns = {"sample": [str(i) for i in range(90)], "level": level.tolist()}
    path = make_store(tmp_path / "s.zarr", states, layers=[0], positions=["last"], columns=columns, run={})
    summary = summarise(path, ProbeSettings(label="level", preset="paper"))
    want = published_accuracy(states[:, 0, 0].astype(np.float64), level)
    assert summary.row("label", "accuracy", (0, "last")).value == want


def test_it_claims_an_accuracy_and_nothing_else(paper_summary: Summary) -> None:
    assert {row.metric for row in paper_summary.rows} == {"accuracy"}
    assert {row.task for row in paper_summary.rows} == {"label", "majority"}
    assert all(row.low is None and row.simultaneous_high is None for row in paper_summary.rows)
    assert "one split with 24 test samples" in paper_summary.headline
    assert "reading a watermark is enough" in paper_summary.headline


def test_it_is_warned_that_identities_are_in_training_and_test(paper_summary: Summary) -> None:
    assert any("identity pairs fall into training and test" in text for text in paper_summary.warnings)


def test_a_class_of_one_is_refused(tmp_path: Path) -> None:
    columns = {"sample": ["a", "b", "c"], "colour": ["red", "blue", "blue"]}
    path = make_store(
        tmp_path / "s.zarr",
        np.zeros((3, 1, 1, 2), np.float32),
        layers=[0],
        positions=["last"],
        columns=columns,
    )
    with pytest.raises(ValueError, match=r"at least 2 samples of each class.*a class of 1"):
        summarise(path, ProbeSettings(label="colour", preset="paper"))
