from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from mmextract.probes.design import Design, make_design
from mmextract.probes.groups import classify
from tests.probes.stores import paired_columns


def columns_of(**values: list[Any]) -> dict[str, NDArray[Any]]:
    n = len(next(iter(values.values())))
    given = {"sample": [str(i) for i in range(n)], "rejected": [""] * n, **values}
    return {name: np.array(v, object if isinstance(v[0], str) else None) for name, v in given.items()}


def design(columns: dict[str, NDArray[Any]], **more: Any) -> Design:
    return make_design(columns, np.ones(len(columns["sample"]), bool), **{"label": "identity_set", **more})


PAIRED = columns_of(**paired_columns(12, 4))


def test_the_paired_design_is_grouped_by_pair_and_has_no_leak() -> None:
    made = design(PAIRED)
    assert (made.group, made.structure, made.n_groups, made.n_samples) == ("pair", "paired", 4, 24)
    assert made.warnings == () and made.notes == ()


def test_seen_is_the_positive_class() -> None:
    made = design(PAIRED)
    assert made.classes == ("unseen", "seen")
    assert (made.y == (PAIRED["identity_set"] == "seen")).all()


def test_numbers_are_ordered_as_numbers() -> None:
    assert design(columns_of(age=[10, 9, 10, 9]), label="age").classes == ("9", "10")
    assert design(columns_of(old=[True, False]), label="old").classes == ("False", "True")


def test_samples_without_a_label_rejected_or_missing_are_left_out_and_counted() -> None:
    columns = columns_of(colour=["red", "blue", "", "red", "blue"], rejected=["", "", "", "no image", ""])
    made = make_design(columns, np.array([True, True, True, True, False]), label="colour")
    assert made.rows.tolist() == [0, 1]
    assert made.dropped == {
        "not in the store yet": 1,
        "rejected by the dump": 1,
        "without a value of colour": 1,
    }
    made = design(columns_of(level=[1.0, 2.0, np.nan, 1.0]), label="level")
    assert made.rows.tolist() == [0, 1, 3]


def test_a_rendering_whose_twin_was_rejected_is_left_out_so_that_pairs_stay_balanced() -> None:
    columns = columns_of(**{**paired_columns(12, 4), "rejected": ["no image"] + [""] * 23})
    made = design(columns)
    assert made.structure == "paired" and made.n_samples == 22
    assert made.dropped == {"rejected by the dump": 1, "whose other rendering is not there": 1}
    assert design(columns, label="answer").n_samples == 23


def test_a_filter_leaves_samples_out() -> None:
    made = design(PAIRED, label="answer", where="condition == 'seen'")
    assert made.n_samples == 12
    assert made.dropped == {"not selected by condition == 'seen'": 12}


def test_the_first_of_each_class_in_the_order_of_the_store_are_kept() -> None:
    colour = ["red", "red", "blue", "red", "blue", "blue"]
    assert design(columns_of(colour=colour), label="colour", largest_class=2).rows.tolist() == [0, 1, 2, 4]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (["red"] * 4, "one class only, 'red', in all 4 samples"),
        (["red", "red", "", ""], "2 more samples have no value"),
        ([f"user{i}" for i in range(30)], "looks like an identifier.*30 distinct values"),
        (
            [f"user{i}" for i in range(10_000)],
            "10000 distinct values in 10000 samples .user0, user1, user10, …",
        ),
        (np.linspace(0, 1, 40).tolist(), "looks continuous: 40 distinct values"),
        (["", ""], "no sample is left.*2 without a value of colour"),
    ],
)
def test_a_label_without_classes_to_tell_apart_is_refused(values: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        design(columns_of(colour=values), label="colour")


@pytest.mark.parametrize("role", ["label", "group"])
def test_an_unknown_column_is_named_with_those_there_are(role: str) -> None:
    with pytest.raises(LookupError, match=rf"no column 'colour'.*--{role}.*answer, condition"):
        design(PAIRED, **{role: "colour"})


def test_without_pairs_samples_are_grouped_by_a_shared_image_and_it_is_said() -> None:
    columns = columns_of(answer=["a", "b", "a", "b"], image=["1", "1", "2", "3"])
    made = design(columns, label="answer")
    assert made.group == "image" and "grouped by image" in made.notes[0]
    assert made.groups.tolist() == [0, 0, 1, 2]


def test_without_anything_shared_samples_stand_alone_and_it_is_said() -> None:
    made = design(columns_of(answer=["a", "b"], image=["1", "2"]), label="answer")
    assert made.group is None and made.structure == "rows" and "not grouped" in made.notes[0]


def test_samples_without_a_group_stand_alone() -> None:
    made = design(columns_of(answer=["a", "b", "a", "b"], pair=[3, 3, -1, -1]), label="answer")
    assert made.group == "pair" and made.n_groups == 3
    made = design(
        columns_of(answer=["a", "b", "a", "b"], page=["x", "", "x", ""]), label="answer", group="page"
    )
    assert made.n_groups == 3


@pytest.mark.parametrize("group", ["none", "answer", "identity_set"])
def test_a_grouping_that_separates_pairs_is_warned_of(group: str) -> None:
    made = design(PAIRED, group=group)
    assert "identity pairs fall into training and test at once" in made.warnings[0]


def test_an_image_with_opposite_labels_in_different_groups_is_warned_of() -> None:
    made = design(PAIRED, group="none")
    assert any("12 samples occur with opposite labels" in warning for warning in made.warnings)
    questions = columns_of(answer=["yes", "no", "no", "yes"], image=["1", "1", "2", "2"])
    assert (
        "2 images occur with opposite labels" in design(questions, label="answer", group="none").warnings[0]
    )


def test_an_image_with_the_same_label_in_different_groups_is_warned_of() -> None:
    colours = columns_of(colour=["red", "red", "blue", "blue"], image=["1", "1", "2", "2"])
    assert "2 images occur with the same label" in design(colours, label="colour", group="none").warnings[0]
    assert design(colours, label="colour").warnings == ()


def test_an_image_that_has_both_renderings_in_each_pair_leaks_nothing() -> None:
    columns = columns_of(
        identity_set=["seen", "unseen"] * 3,
        image=["1"] * 4 + ["2"] * 2,
        source_sample=["a", "a", "b", "b", "c", "c"],
        pair=[0, 0, 1, 1, 2, 2],
    )
    assert design(columns).warnings == ()


@pytest.mark.parametrize(
    ("y", "groups", "structure"),
    [
        ([0, 1, 0, 1], [0, 0, 1, 1], "paired"),
        ([0, 1, 2, 0, 1, 2], [0, 0, 0, 1, 1, 1], "paired"),
        ([0, 1, 1, 0, 1], [0, 0, 0, 1, 1], "within"),
        ([0, 1] * 10 + [1], [0] * 10 + [1] * 10 + [2], "within"),
        ([0, 0, 1, 1], [0, 0, 1, 1], "between"),
        ([0, 0, 0, 1], [0, 0, 1, 1], "mixed"),
        ([0, 1, 0], [0, 1, 2], "rows"),
    ],
)
def test_structure_says_how_classes_lie_in_groups(y: list[int], groups: list[int], structure: str) -> None:
    assert classify(np.array(y), np.array(groups)) == structure
