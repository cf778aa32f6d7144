from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from mmextract.engine.identities import (
    FIELDS,
    check_disjoint,
    make_disjoint_pair,
    make_identities,
    read_identities,
    write_identities,
)


def test_the_same_seed_gives_the_same_people_and_another_seed_others() -> None:
    assert make_identities(20, seed=3) == make_identities(20, seed=3)
    assert make_identities(20, seed=3) != make_identities(20, seed=4)


def test_no_two_people_share_a_name_or_an_id() -> None:
    people = make_identities(500, seed=0)
    assert len({p.username for p in people}) == len({p.user_id for p in people}) == 500


def test_a_disjoint_pair_is_one_pool_split_at_random() -> None:
    seen, unseen = make_disjoint_pair(50, seed=1)
    check_disjoint(seen, unseen)
    pool = make_identities(100, seed=1)
    assert sorted(p.user_id for p in [*seen, *unseen]) == sorted(p.user_id for p in pool)
    assert seen != pool[:50]


def test_excluded_people_do_not_come_again() -> None:
    first = make_identities(50, seed=0)
    check_disjoint(first, make_identities(50, seed=0, exclude=first))


def test_sets_that_overlap_are_refused_with_the_shared_value() -> None:
    first = make_identities(3, seed=0)
    second = make_identities(3, seed=1)
    second[1] = replace(second[1], user_id=first[2].user_id)
    with pytest.raises(ValueError, match=first[2].user_id):
        check_disjoint(first, second)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    people = make_identities(7, seed=0)
    write_identities(tmp_path / "new" / "people.jsonl", people)
    assert read_identities(tmp_path / "new" / "people.jsonl") == people


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("nonsense", "people.jsonl:2: expected one JSON object"),
        ("[1]", "people.jsonl:2: expected a JSON object with the fields username"),
        ('{"username": "a"}', "people.jsonl:2: the identity lacks user_id, gender"),
        ("{first}", "people.jsonl:2: username .* was already used in line 1"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "people.jsonl"
    write_identities(path, make_identities(1, seed=0))
    first = path.read_text("utf-8")
    path.write_text(first + line.replace("{first}", first), "utf-8")
    with pytest.raises(ValueError, match=message):
        read_identities(path)


def test_a_missing_and_an_empty_file_say_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="mmextract identities"):
        read_identities(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="holds no identity"):
        read_identities(tmp_path / "empty.jsonl")


def test_fewer_than_one_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1, got 0"):
        make_identities(0, seed=0)


def test_an_identity_has_the_published_fields(tmp_path: Path) -> None:
    write_identities(tmp_path / "p.jsonl", make_identities(1, seed=0))
    assert tuple(json.loads((tmp_path / "p.jsonl").read_text("utf-8"))) == FIELDS
