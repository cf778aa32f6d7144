from __future__ import annotations

import re
from pathlib import Path

import pytest

from mmextract.probes.rows import COLUMNS
from mmextract.probes.summary import Summary
from tests.probes.conftest import QUICK, summarise
from tests.probes.stores import make_paired_store


def test_there_is_one_row_a_layer_position_task_and_metric(summary: Summary) -> None:
    keys = {(row.layer, row.position, row.task, row.metric) for row in summary.rows}
    assert len(keys) == len(summary.rows) == 6 * (4 * 6 + 3)
    assert summary.tasks == {"label", "control", "majority", "random", "selectivity"}
    assert all(COLUMNS.values())


def test_every_estimate_lies_in_its_interval_and_that_in_the_simultaneous_one(summary: Summary) -> None:
    for row in summary.rows:
        if row.metric in ("log_loss", "brier", "ece"):
            assert row.low is row.high is row.simultaneous_low is row.simultaneous_high is row.error is None
            continue
        assert row.low is not None and row.high is not None
        assert row.simultaneous_low is not None and row.simultaneous_high is not None
        assert row.simultaneous_low <= row.low <= row.value <= row.high <= row.simultaneous_high


def test_rows_say_what_chance_is_and_what_is_a_baseline(summary: Summary) -> None:
    for row in summary.rows:
        assert row.baseline == (row.task in ("majority", "random") or row.layer == -1)
        if row.task == "selectivity":
            assert row.chance == 0
        if row.task == "majority":
            assert row.metric == "ece" or row.chance == pytest.approx(row.value)


def test_p_values_are_those_of_the_labels_auroc_and_correction_only_raises_them(summary: Summary) -> None:
    for row in summary.rows:
        if (row.task, row.metric) != ("label", "auroc"):
            assert row.p is row.p_corrected is row.p_fdr is row.detectable is row.n_permutations is None
            continue
        assert row.p is not None and row.p_corrected is not None and row.p_fdr is not None
        assert 1 / 50 <= row.p <= min(row.p_corrected, row.p_fdr) and row.n_permutations == 49
        assert row.detectable is not None and 0.5 < row.detectable < 0.85


def test_without_permutations_the_intervals_decide(store: Path) -> None:
    made = summarise(store, QUICK, permutations=0)
    assert [(row.layer, row.position) for row in made.above_chance] == [(1, "image")]
    assert "corrected p" not in made.headline and not made.is_tested
    null = summarise(store, QUICK, permutations=0, layers=(0,), positions=("last",))
    assert "clear of chance" in null.statement and "not ruled out" in null.qualification


def test_what_the_embedding_tells_already_is_said(tmp_path: Path) -> None:
    path = make_paired_store(tmp_path / "s.zarr", signals=[[1.0], [1.5]])
    made = summarise(path, QUICK)
    assert made.best.layer == 0
    assert f"reaches {made.row('label', 'auroc', (-1, 'last')).value:.2f}" in made.qualification


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
