from __future__ import annotations

import re
from pathlib import Path

import pytest

from mmextract.probes.rows import COLUMNS
from mmextract.probes.summary import Summary
from tests.probes.conftest import QUICK, summarise


def test_there_is_one_row_a_layer_position_task_and_metric(summary: Summary) -> None:
    keys = {(row.layer, row.position, row.task, row.metric) for row in summary.rows}
    assert len(keys) == len(summary.rows) == 6 * (4 * 6 + 3)
    assert summary.tasks == {"label", "control", "majority", "random", "selectivity"}
    assert all(COLUMNS.values())


def test_every_estimate_lies_in_its_interval_and_that_in_the_simultaneous_one(summary: Summary) -> None:
    for row in summary.rows:
        assert row.low is not None and row.high is not None
        assert row.simultaneous_low is not None and row.simultaneous_high is not None
        assert row.simultaneous_low <= row.low <= row.value <= row.high <= row.simultaneous_high


def test_selectivity_is_the_label_minus_its_control(summary: Summary) -> None:
    for cell in summary.plan.cells:
        label, control, selectivity = (
            summary.row(task, "auroc", cell).value for task in ("label", "control", "selectivity")
        )
        assert selectivity == pytest.approx(label - control)


def test_selectivity_of_a_signal_excludes_zero_and_of_noise_does_not(summary: Summary) -> None:
    lows = {cell: summary.row("selectivity", "auroc", cell).simultaneous_low for cell in summary.plan.cells}
    assert [cell for cell, low in lows.items() if low is not None and low > 0] == [(1, "image")]


def test_the_statement_on_a_signal_gives_place_size_and_corrected_interval(summary: Summary) -> None:
    best = summary.best
    assert re.fullmatch(
        r"The hidden states tell seen from unseen for identities the probe never saw: "
        r"AUROC 0\.\d\d at layer 1, position image "
        r"\(95 % interval 0\.\d\d to \d\.\d\d, allowing for the 6 layers and positions looked at; "
        r"corrected p = 0\.02\)\.",
        summary.statement,
    )
    assert f"{best.value:.2f}" in summary.statement and f"{best.simultaneous_low:.2f}" in summary.statement
    assert "in 1 of 6 layers and positions" in summary.qualification


def test_the_statement_on_noise_claims_nothing_and_says_what_is_not_ruled_out(store: Path) -> None:
    made = summarise(store, QUICK, layers=(-1, 0))
    assert made.statement.startswith("No sign that the hidden states tell seen from unseen")
    assert "not ruled out" in made.qualification
    assert "significan" not in made.headline
    smallest = min(row.p_corrected or 1 for row in made.select("label"))
    assert f"smallest corrected p = {smallest:.2g}" in made.statement
    assert f"an AUROC of {made.best.detectable:.2f} would have been found" in made.qualification


def test_one_layer_alone_is_not_spoken_of_as_many(store: Path) -> None:
    made = summarise(store, QUICK, layers=(1,), positions=("image",))
    assert "looked at" not in made.headline and "of 1" not in made.headline
    null = summarise(store, QUICK, layers=(0,), positions=("image",))
    assert null.statement.startswith("No sign") and "none of" not in null.headline


def test_what_a_wrong_grouping_does_is_warned_of_before_and_after(store: Path) -> None:
    made = summarise(store, QUICK, group="none", layers=(-1, 0))
    assert any("fall into training and test" in text for text in made.warnings)
    assert any("below chance" in text for text in made.anomalies)
    assert made.qualification.startswith("See the warnings")


def test_a_clean_run_has_no_warnings(summary: Summary) -> None:
    assert summary.warnings == []
