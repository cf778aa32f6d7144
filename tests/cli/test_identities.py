from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from mmextract.engine.identities import check_disjoint, read_identities
from tests.cli.conftest import Ran

Run = Callable[..., Ran]


def test_people_are_written_and_a_second_set_shares_nobody(run: Run, tmp_path: Path) -> None:
    first, second = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    assert run("identities", "--n", 20, "--seed", 0, "-o", first).code == 0
    assert run("identities", "--n", 20, "--seed", 0, "--disjoint-from", first, "-o", second).code == 0
    check_disjoint(read_identities(first), read_identities(second))


def test_seen_and_unseen_come_out_of_one_pool(run: Run, tmp_path: Path) -> None:
    seen, unseen = tmp_path / "seen.jsonl", tmp_path / "unseen.jsonl"
    assert run("identities", "--n", 10, "-o", seen, "--unseen", unseen).code == 0
    assert len(read_identities(seen)) == len(read_identities(unseen)) == 10
    check_disjoint(read_identities(seen), read_identities(unseen))
