from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from mmextract.engine.identities import make_disjoint_pair
from mmextract.engine.rows import (
    PairedMarking,
    RandomMarking,
    describe_marking,
    make_columns,
    make_rows,
    store_name,
)
from mmextract.engine.samples import Dataset, Sample, Turn
from mmextract.engine.sources import FileImage
from mmextract.engine.watermark import WatermarkSpec

SEEN, UNSEEN = make_disjoint_pair(6, seed=0)
PAIRED = PairedMarking(spec=WatermarkSpec(), seen=tuple(SEEN), unseen=tuple(UNSEEN))


def dataset(n: int = 30, columns: Mapping[str, list[Any]] | None = None, *, images: bool = True) -> Dataset:
    samples = [
        Sample(
            id=f"s{i}",
            image=FileImage(root=Path("/nowhere"), name=f"{i}.png") if images else None,
            turns=(Turn(role="user", text="<image>\nwhat?" if images else "what?"),),
            answer="that",
            columns={name: values[i] for name, values in (columns or {}).items()},
        )
        for i in range(n)
    ]
    return Dataset(samples=samples, format="jsonl", source="data", fingerprint="f")


def test_the_paired_design_renders_every_image_with_both_identities_of_one_pair() -> None:
    rows = make_rows(dataset(), PAIRED)
    for first, second in zip(rows[::2], rows[1::2], strict=True):
        assert first.sample is second.sample and first.pair == second.pair
        assert (first.person, second.person) == (SEEN[first.pair], UNSEEN[first.pair])
        assert (first.condition, second.condition) == ("seen", "unseen")
        assert first.texts_to_fit == second.texts_to_fit == (first.text, second.text)
    assert len({row.id for row in rows}) == 60


def test_a_row_does_not_depend_on_which_other_samples_there_are() -> None:
    full, part = dataset(), dataset(10)
    assert make_rows(full, PAIRED)[:20] == make_rows(part, PAIRED)


def test_random_marking_marks_its_share_and_says_so() -> None:
    marking = RandomMarking(spec=WatermarkSpec(), identities=tuple(SEEN), rate=0.5, set_name="people")
    rows = make_rows(dataset(400), marking)
    marked = [row for row in rows if row.condition == "watermarked"]
    assert 150 < len(marked) < 250
    assert all(row.text and row.person in SEEN and row.identity_set == "people" for row in marked)
    assert all(row.text is None and row.condition == "clean" for row in rows if row not in marked)


def test_identity_sets_of_unequal_size_or_with_a_shared_name_are_refused() -> None:
    with pytest.raises(ValueError, match="got 6 seen and 5 unseen"):
        PairedMarking(spec=WatermarkSpec(), seen=tuple(SEEN), unseen=tuple(UNSEEN[:5]))
    with pytest.raises(ValueError, match="must share no username"):
        PairedMarking(spec=WatermarkSpec(), seen=tuple(SEEN), unseen=(*UNSEEN[:5], SEEN[0]))


def test_a_sample_without_image_cannot_be_paired() -> None:
    with pytest.raises(ValueError, match="'s0' has no image"):
        make_rows(dataset(3, images=False), PAIRED)


def test_columns_keep_their_type_and_gaps_do_not_become_values() -> None:
    columns: dict[str, list[Any]] = {
        "whole": [1, 2, 3],
        "gap": [1, None, 3],
        "mixed": [1, "a", None],
        "flag": [True, False, True],
        "share": [0.5, 1, None],
    }
    made = make_columns(make_rows(dataset(3, columns), None), None)
    assert made["whole"] == [1, 2, 3] and made["flag"] == [True, False, True]
    assert made["gap"][0] == 1.0 and math.isnan(made["gap"][1])
    assert made["mixed"] == ["1", "a", ""]
    assert made["share"][:2] == [0.5, 1.0] and math.isnan(made["share"][2])


def test_the_columns_of_a_paired_run_tell_who_is_where() -> None:
    rows = make_rows(dataset(4), PAIRED)
    columns = make_columns(rows, PAIRED)
    assert columns["identity_set"] == ["seen", "unseen"] * 4
    assert columns["identity_username"] == [row.person.username for row in rows if row.person]
    assert columns["source_sample"] == ["s0", "s0", "s1", "s1", "s2", "s2", "s3", "s3"]


@pytest.mark.parametrize(
    ("given", "stored"),
    [
        ("pair", "input_pair"),
        ("a/b", "a_b"),
        ("__x", "input___x"),
        ("sample", "input_sample"),
        ("ok", "ok"),
        (" ", "unnamed"),
    ],
)
def test_a_column_never_takes_a_name_that_the_store_needs(given: str, stored: str) -> None:
    assert store_name(given) == stored


def test_two_columns_that_would_share_a_name_are_both_kept() -> None:
    made = make_columns(make_rows(dataset(1, {"a/b": ["x"], "a_b": ["y"]}), None), None)
    assert (made["a_b"], made["input_a_b"]) == (["x"], ["y"])


def test_the_description_changes_with_every_part_of_the_marking() -> None:
    described = [
        describe_marking(PAIRED),
        describe_marking(PairedMarking(spec=WatermarkSpec(seed=1), seen=tuple(SEEN), unseen=tuple(UNSEEN))),
        describe_marking(PairedMarking(spec=WatermarkSpec(), seen=tuple(UNSEEN), unseen=tuple(SEEN))),
        describe_marking(RandomMarking(spec=WatermarkSpec(), identities=tuple(SEEN), rate=0.5)),
        describe_marking(RandomMarking(spec=WatermarkSpec(), identities=tuple(SEEN), rate=0.4)),
    ]
    assert all(a != b for i, a in enumerate(described) for b in described[:i])
