from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from mmextract.probes.comparison import add_character
from mmextract.probes.outputs import make_record, write_outputs
from mmextract.probes.run import plan_probe, run_probe
from mmextract.probes.settings import ProbeSettings
from mmextract.probes.summary import Summary
from tests.probes.stores import make_paired_store, make_store, paired_columns, paired_states

QUICK = ProbeSettings(penalties=(0.1,), repeats=1, permutations=39)


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """States of the same samples: `marked` knows the label in layer 1, `same` is a copy, `clean` knows nothing."""
    folder = tmp_path_factory.mktemp("compare")
    return {
        name: make_paired_store(folder / f"{name}.zarr", signals=[[0], [0], [signal]])
        for name, signal in (("marked", 1.2), ("clean", 0.0), ("same", 1.2))
    }


def compare(a: Path, b: Path, settings: ProbeSettings = QUICK) -> Summary:
    plan = plan_probe(a, settings, compare_with=b)
    return Summary(plan, run_probe(plan))


@pytest.fixture(scope="module")
def summary(stores: dict[str, Path]) -> Summary:
    return compare(stores["marked"], stores["clean"])


def test_what_one_checkpoint_knows_more_is_found_in_its_layer_and_no_other(summary: Summary) -> None:
    assert [(row.layer, row.value > 0) for row in summary.different] == [(1, True)]
    for cell in summary.plan.cells:
        here, there, difference = (
            summary.row(task, "auroc", cell).value for task in ("label", "other", "difference")
        )
        assert difference == pytest.approx(here - there)


def test_the_statement_says_which_knows_more_by_how_much_and_how_sure_that_is(summary: Summary) -> None:
    assert summary.statement.startswith(
        "The hidden states tell seen from unseen for identities the probe never saw better than those compared with"
    )
    assert "corrected p = 0.025" in summary.statement and "95 % interval 0." in summary.statement
    assert "in 1 of 3 layers and positions" in summary.qualification


def test_a_checkpoint_does_not_differ_from_itself(stores: dict[str, Path]) -> None:
    made = compare(stores["marked"], stores["same"])
    assert made.different == []
    assert made.statement.startswith("No sign that the hidden states tell seen from unseen")
    assert all(row.value == 0 and row.p == 1 for row in made.select("difference"))


def test_the_sign_turns_with_the_order(stores: dict[str, Path], summary: Summary) -> None:
    turned = compare(stores["clean"], stores["marked"])
    assert "worse than" in turned.statement
    for row in summary.select("difference"):
        other = turned.row("difference", "auroc", (row.layer, row.position))
        assert other.value == pytest.approx(-row.value) and other.p_corrected == row.p_corrected


def test_rows_in_another_order_are_matched_by_sample(stores: dict[str, Path], tmp_path: Path) -> None:
    columns = paired_columns(60, 30)
    states = paired_states(columns, 12, signal=1.0, seed=5)[:, None, None]
    order = np.random.default_rng(0).permutation(120)
    shuffled: dict[str, list[Any]] = {name: [v[i] for i in order] for name, v in columns.items()}
    first = make_store(tmp_path / "a.zarr", states, layers=[0], positions=["last"], columns=columns)
    second = make_store(tmp_path / "b.zarr", states[order], layers=[0], positions=["last"], columns=shuffled)
    made = compare(first, second)
    assert made.row("difference", "auroc", (0, "last")).value == 0


def change(columns: dict[str, list[Any]], name: str, at: int, value: Any) -> dict[str, list[Any]]:
    return {**columns, name: [*columns[name][:at], value, *columns[name][at + 1 :]]}


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("sample", "elsewhere", r"lacks 1 of the 60 samples .*the first is '1#unseen'"),
        ("identity_set", "seen", r"differs in identity_set in 1 of 60 samples \(the first is 1#unseen"),
        ("pair", 99, r"differs in pair in 1 of 60 samples"),
    ],
)
def test_stores_that_do_not_match_are_refused_and_it_is_said_where(
    tmp_path: Path, name: str, value: Any, message: str
) -> None:
    columns = paired_columns(30, 15)
    states = paired_states(columns, 4)[:, None, None]
    ours = make_store(tmp_path / "a.zarr", states, layers=[0], positions=["last"], columns=columns)
    changed = change(columns, name, 3, value)
    theirs = make_store(tmp_path / "b.zarr", states, layers=[0], positions=["last"], columns=changed)
    with pytest.raises(ValueError, match=message):
        plan_probe(ours, QUICK, compare_with=theirs)


def test_a_layer_that_only_one_has_is_named(stores: dict[str, Path], tmp_path: Path) -> None:
    short = make_paired_store(tmp_path / "short.zarr", signals=[[0], [0]])
    with pytest.raises(LookupError, match=r"has no layer 1: choose what both"):
        plan_probe(stores["marked"], QUICK, compare_with=short)


def test_what_the_other_rejected_is_left_out_of_both_with_its_twin(
    stores: dict[str, Path], tmp_path: Path
) -> None:
    other = make_paired_store(tmp_path / "s.zarr", signals=[[0], [0], [0]], rejected={3: "no image"})
    design = plan_probe(stores["marked"], QUICK, compare_with=other).design
    assert design.dropped == {
        "rejected or not yet in the store compared with": 1,
        "whose other rendering is not there": 1,
    }


def test_an_incomplete_other_store_is_refused_and_can_be_used_all_the_same(
    stores: dict[str, Path], tmp_path: Path
) -> None:
    other = make_paired_store(tmp_path / "s.zarr", signals=[[0], [0], [0]], n_shards_written=3)
    with pytest.raises(ValueError, match=r"24 of 120 samples are missing.*--allow-incomplete"):
        plan_probe(stores["marked"], QUICK, compare_with=other)
    allowed = ProbeSettings(penalties=(0.1,), allow_incomplete=True)
    assert plan_probe(stores["marked"], allowed, compare_with=other).design.n_samples == 96


def test_the_files_say_what_was_compared_with(summary: Summary, tmp_path: Path) -> None:
    record = make_record(summary, "mmextract probe a --compare b")
    write_outputs(summary, record, tmp_path)
    assert record["compare"]["path"].endswith("clean.zarr") and len(record["compare"]["fingerprint"]) == 64
    assert {"other", "difference"} <= set(pq.read_table(tmp_path / "probe.parquet")["task"].to_pylist())
    assert "other" in set(pq.read_table(tmp_path / "scores.parquet")["task"].to_pylist())


def test_a_label_can_be_the_first_character_of_a_column_and_rare_ones_are_left_out() -> None:
    columns = {
        "identity_user_id": np.array(["11", "12", "12", "21", "22", "31"], object),
        "condition": np.array(["seen", "seen", "seen", "seen", "unseen", "seen"], object),
    }
    found = add_character(columns, "identity_user_id[0]")["identity_user_id[0]"]
    assert found.tolist() == ["1", "1", "1", "2", "2", "3"]
    common = add_character(columns, "identity_user_id[0]", least=2)["identity_user_id[0]"]
    assert common.tolist() == ["1", "1", "1", "2", "2", ""]  # 11 and 12 share the 1, 31 is alone with its 3
    seen = add_character(columns, "identity_user_id[0]", where="condition == 'seen'", least=2)
    assert seen["identity_user_id[0]"].tolist() == ["1", "1", "1", "", "", ""]
    refused = {**columns, "rejected": np.array(["", "", "", "", "no file", ""], object)}
    some = add_character(refused, "identity_user_id[0]", least=2)["identity_user_id[0]"]
    assert some.tolist() == ["1", "1", "1", "", "", ""]
    halves = add_character(columns, "identity_user_id[0]<3")["identity_user_id[0]<3"]
    assert halves.tolist() == ["<3", "<3", "<3", "<3", "<3", "≥3"]
    short = add_character(columns, "identity_user_id[2]<3")["identity_user_id[2]<3"]
    assert short.tolist() == [""] * 6  # none has a third
    assert add_character(columns, "condition") is columns and add_character(columns, "other[0]") is columns


def test_a_character_is_rare_where_few_groups_have_it_however_many_texts_or_samples_do() -> None:
    columns = {
        "gender": np.array(["female", "female", "male", "male", "other", "other", "other"], object),
        "name": np.array(["Ada", "Ann", "Bo", "Bo", "Cy", "Cal", "Cid"], object),
        "pair": np.array([0, 1, 2, 3, 4, 4, 4]),
    }
    for label in ("gender[0]", "name[0]"):
        first, second = ("f", "m") if label == "gender[0]" else ("A", "B")
        grouped = add_character(columns, label, least=2)[label]
        assert grouped.tolist() == [first, first, second, second, "", "", ""]
    alone = add_character(columns, "gender[0]", group="none", least=3)["gender[0]"]
    assert alone.tolist() == ["", "", "", "", "o", "o", "o"]
    with pytest.raises(LookupError, match="no column 'person' to use as group"):
        add_character(columns, "gender[0]", group="person")


def test_a_column_of_few_values_can_be_probed_by_its_first_character(tmp_path: Path) -> None:
    columns = paired_columns(60, 30)
    columns["gender"] = [("female", "male")[pair % 2] for pair in columns["pair"]]
    states = paired_states(columns, 6)[:, None, None]
    store = make_store(tmp_path / "a.zarr", states, layers=[0], positions=["last"], columns=columns)
    design = plan_probe(store, ProbeSettings(label="gender[0]", penalties=(0.1,), permutations=0)).design
    assert design.classes == ("f", "m") and design.n_samples == 120
