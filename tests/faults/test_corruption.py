"""Row F of the fault matrix: whatever happens to a file of a store, `verify` finds it and the same run repairs it.

A case is one fault in one file (two of a swap) of a small finished store. The oracle: `verify` names the object or its
shard, only what it names is written again, and then every byte is what it was.
"""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from mmextract.engine.verify import plan_verify, run_verify, withdraw
from tests.faults.outcomes import record, skip_if_passed
from tests.faults.small_store import run, tree

FAULTS = ("flip", "truncate", "delete", "swap", "stale", "zero", "append")
IN_SHARD = ("hidden_states/c/", "record/c/", "rejected/c/", "shard_digest/c/")


@dataclass(frozen=True)
class Stores:
    """Key → bytes of stores to take objects from."""

    whole: Mapping[str, bytes]
    """The finished store that every case begins with."""
    others: tuple[Mapping[str, bytes], ...]
    """What the same store was before it was finished, and a store of another run."""


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Stores:
    folder = tmp_path_factory.mktemp("stores")
    run(folder / "older", stop_after=4)
    older = tree(folder / "older")
    run(folder / "older")
    run(folder / "other", seed=1)
    return Stores(tree(folder / "older"), (older, tree(folder / "other")))


def kind(key: str) -> str:
    """Return what an object is: two of a kind can stand in each other's place."""
    return "metadata" if key.endswith("zarr.json") else f"{len(key.split('/'))}"


def damage(stores: Stores, rng: random.Random) -> tuple[str, dict[str, bytes | None]]:
    """Choose a fault. Returns its name and the objects that it changes, None for one that is gone."""
    whole = stores.whole
    while True:
        fault, key = rng.choice(FAULTS), rng.choice(sorted(whole))
        data = bytearray(whole[key])
        changed: dict[str, bytes | None] = {key: None}
        match fault:
            case "flip":
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
                changed[key] = bytes(data)
            case "truncate":
                changed[key] = bytes(data[: rng.randrange(len(data))])
            case "append":
                changed[key] = bytes(data) + rng.randbytes(rng.randint(1, 9))
            case "zero":
                start = rng.randrange(len(data))
                end = min(len(data), start + rng.randint(1, 64))
                changed[key] = bytes(data[:start]) + bytes(end - start) + bytes(data[end:])
            case "swap":
                other = rng.choice([name for name in sorted(whole) if kind(name) == kind(key)])
                changed = {key: whole[other], other: whole[key]}
            case "stale":
                changed[key] = rng.choice(stores.others).get(key, whole[key])
        if any(whole[name] != content for name, content in changed.items()):
            return fault, changed


def apply(path: Path, changed: Mapping[str, bytes | None]) -> None:
    for key, content in changed.items():
        if content is None:
            (path / key).unlink()
        else:
            (path / key).write_bytes(content)


def shards_of(changed: Mapping[str, bytes | None]) -> set[int]:
    return {int(key.split("/")[2]) for key in changed if key.startswith(IN_SHARD)}


def check(path: Path, stores: Stores, changed: Mapping[str, bytes | None]) -> None:
    """Hold one case against the oracle; `path` is the whole store before and after."""
    apply(path, changed)
    plan = plan_verify(path)
    report = run_verify(plan, threads=1)
    assert not report.sound
    # an older root is that of a run that is not done, and says so
    unfinished = changed.get("zarr.json") == stores.others[0]["zarr.json"]
    assert report.damage or (unfinished and not report.finished)
    assert set(report.bad_shards) == shards_of(changed)
    named = {found.key for found in report.damage}
    # a damaged root is named, and takes with it the digests by which others beside it would be
    assert (
        unfinished
        or "zarr.json" in named
        or {key for key in changed if not key.startswith(IN_SHARD)} <= named
    )
    assert len(named) <= max(1, len(changed))
    withdraw(plan, report)
    assert set(run(path)) == shards_of(changed)
    assert tree(path) == stores.whole


def check_cases(path: Path, stores: Stores, seeds: range) -> tuple[dict[str, int], dict[str, str]]:
    """Check a case a seed. Returns how many there were of each fault, and the cases that failed with their reason."""
    counts, losses = dict.fromkeys(FAULTS, 0), {}
    for seed in seeds:
        fault, changed = damage(stores, random.Random(seed))
        counts[fault] += 1
        try:
            if not path.exists():
                run(path)
            check(path, stores, changed)
        except Exception as error:
            losses[str(seed)] = f"{fault} of {', '.join(changed)}: {type(error).__name__}: {error}"[:500]
            shutil.rmtree(path)
    return counts, losses


def test_verify_finds_what_happened_to_a_file_and_the_same_run_repairs_it(
    tmp_path: Path, stores: Stores
) -> None:
    _, losses = check_cases(tmp_path / "a", stores, range(60))
    assert not losses


@pytest.mark.faults
@pytest.mark.timeout(3600)
def test_every_case_of_row_f(tmp_path: Path, stores: Stores) -> None:
    skip_if_passed("F")
    started = time.monotonic()
    counts, losses = check_cases(tmp_path / "a", stores, range(3200))
    found = {"cases": sum(counts.values()), "losses": len(losses), "reproduce": losses, "faults": counts}
    record("F", {**found, "seeds": "0-3199"}, time.monotonic() - started)
    assert not losses


def test_the_root_and_every_kind_of_object_are_among_the_cases(stores: Stores) -> None:
    hit = {key for seed in range(3200) for key in damage(stores, random.Random(seed))[1]}
    assert hit == set(stores.whole)


@pytest.mark.parametrize(
    "other", ["shard_digest/zarr.json", "record/zarr.json", "age/c/0", "hidden_states/zarr.json"]
)
def test_the_root_and_something_else_are_repaired_together(
    tmp_path: Path, stores: Stores, other: str
) -> None:
    run(tmp_path / "a")
    apply(tmp_path / "a", {"zarr.json": b"{", other: stores.whole[other][:-3]})
    plan = plan_verify(tmp_path / "a")
    report = run_verify(plan)
    assert "zarr.json" in {found.key for found in report.damage} and not report.bad_shards
    withdraw(plan, report)
    assert run(tmp_path / "a") == []
    assert tree(tmp_path / "a") == stores.whole


def test_two_whole_shards_in_each_others_place_are_found(tmp_path: Path, stores: Stores) -> None:
    run(tmp_path / "a")
    swapped = {
        key: stores.whole[key.replace("/c/0", "/c/2")]
        for key in stores.whole
        if key.startswith(("hidden_states/c/0", "record/c/0", "shard_digest/c/0"))
    }
    swapped |= {
        key: stores.whole[key.replace("/c/2", "/c/0")]
        for key in stores.whole
        if key.startswith(("hidden_states/c/2", "record/c/2", "shard_digest/c/2"))
    }
    assert len(swapped) == 6
    check(tmp_path / "a", stores, dict(swapped))


def test_a_whole_shard_of_another_run_is_found(tmp_path: Path, stores: Stores) -> None:
    run(tmp_path / "a")
    keys = [key for key in stores.whole if key.startswith(IN_SHARD) and key.split("/")[2] == "1"]
    check(tmp_path / "a", stores, {key: stores.others[1][key] for key in keys})


def test_what_is_left_of_a_store_with_a_damaged_root_is_not_taken_by_another_run(
    tmp_path: Path, stores: Stores
) -> None:
    run(tmp_path / "a")
    for root in (b"{", stores.others[1]["zarr.json"]):
        apply(tmp_path / "a", {"zarr.json": root})
        before = tree(tmp_path / "a")
        with pytest.raises(ValueError, match="left as it is"):
            run(tmp_path / "a", seed=1)
        assert tree(tmp_path / "a") == before
    shutil.rmtree(tmp_path / "a")


def test_a_repair_that_is_killed_is_taken_up_again(tmp_path: Path, stores: Stores) -> None:
    run(tmp_path / "a")
    apply(tmp_path / "a", {"hidden_states/c/1/0/0/0": None, "record/c/2/0": None, "age/c/0": b"?"})
    plan = plan_verify(tmp_path / "a")
    withdraw(plan, run_verify(plan))
    assert run(tmp_path / "a", stop_after=1) == [1]
    assert run(tmp_path / "a") == [2]
    assert tree(tmp_path / "a") == stores.whole
