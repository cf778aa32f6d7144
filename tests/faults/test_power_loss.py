"""Row C: power is lost at any moment, also in a run that continues a killed one, and the disk keeps what it must.

An image is what a disk may then hold (see `disk`). In every image, what was promised is there and whole, and a run
continues to the bytes of an uninterrupted one.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.faults.disk import Disk, materialise
from tests.faults.injection import KILLED, Exit, read_log
from tests.faults.interposer import CHANGES, Operation
from tests.faults.outcomes import sweep
from tests.faults.stores import STORE, WITH_REJECTED, Disks, check_committed, committed, different, tree

FINISHED = "finished"
IMAGES_OF_A_RUN = 5


def test_after_a_loss_of_power_what_was_promised_is_there(disks: Disks) -> None:
    _row(disks, 20)


@pytest.mark.faults
@pytest.mark.timeout(3600)
def test_after_each_of_many_losses_of_power_what_was_promised_is_there(disks: Disks) -> None:
    _row(disks, 500)


def test_the_recorded_operations_are_all_that_a_run_does(disks: Disks) -> None:
    _, log = _recorded(disks, [])
    disk = Disk(disks.scratch / "recorded")
    for entry in log:
        if isinstance(entry, Operation):
            disk.apply(entry)
    assert not different(disk.tree(), disks.oracle)


@pytest.mark.parametrize(
    "name", [".", "results", "record", "hidden_states", "shard_digest", "shard_digest/c"]
)
def test_names_that_a_killed_run_left_unflushed_are_flushed_by_the_next(disks: Disks, name: str) -> None:
    changes = [entry for entry in _recorded(disks, [])[1] if isinstance(entry, Operation)]
    top = disks.scratch / "recorded"
    folder = top / name if name in (".", "results") else top / STORE / name
    at = next(i for i, change in enumerate(changes) if (change.kind, change.path) == ("fsync_folder", folder))
    disk = Disk(top)
    for entry in _recorded(disks, [Exit(at=at)])[1]:
        if isinstance(entry, Operation):
            disk.apply(entry)
    assert not different(disk.safe(), disks.oracle)


def _row(disks: Disks, n_images: int) -> None:
    logs: dict[int, list[Any]] = {}
    changes = [entry for entry in _recorded(disks, [])[1] if isinstance(entry, Operation)]
    steps = range(len(changes))
    made = (
        "mkdir",
        "rename",
    )  # a run that is killed now leaves a name that is not safe, and that the next run finds
    flushes = [at for at in steps if changes[at].kind == "fsync_folder" and changes[at - 1].kind in made]

    def lose_power(seed: int) -> None:
        run = seed // IMAGES_OF_A_RUN
        if run not in logs:
            logs.clear()
            kills = random.Random(run)
            at = [kills.choice(kills.choice((steps, flushes))) for _ in range(run % 3)]
            logs[run] = _recorded(disks, [Exit(at=step) for step in at])[1]
        chance = random.Random(seed)
        image, promised = _image(disks.scratch / "recorded", logs[run], chance)
        disk = disks.new("image")
        materialise(image, disk)
        check_committed(disk / STORE)
        if FINISHED in promised:
            differs = different(tree(disk), disks.oracle)
            assert not differs, f"a run had finished, and these differ: {differs}"
        lost = {shard for shard in promised if shard != FINISHED} - committed(disk / STORE)
        assert not lost, f"these shards were committed, and are gone: {sorted(lost)}"
        disks.check_recovery(disk)

    sweep("C", range(n_images), lose_power)


def _recorded(disks: Disks, exits: Sequence[Exit]) -> tuple[Path, list[Any]]:
    """Return a disk after a run, and after others before it that were killed, and all that was done to it."""
    disk = disks.new("recorded")
    path = disk.with_suffix(".log")
    path.unlink(missing_ok=True)
    for fault in exits:
        assert disks.run(disk, fault, path).code in (KILLED, WITH_REJECTED)
    assert disks.run(disk, log=path).code == WITH_REJECTED
    log = [*read_log(path), FINISHED]
    return disk, [entry for entry in log if not isinstance(entry, Operation) or entry.kind in CHANGES]


def _image(root: Path, log: Sequence[Any], chance: random.Random) -> tuple[dict[str, bytes | None], set[Any]]:
    """Return what a loss of power at some moment may leave, and the promises that had been made by then."""
    disk = Disk(root)
    promised: set[Any] = set()
    for entry in log[: chance.choice((chance.randrange(len(log)), len(log)))]:
        if isinstance(entry, Operation):
            disk.apply(entry)
        else:
            promised.add(entry)
    return disk.left_by_crash(chance), promised
