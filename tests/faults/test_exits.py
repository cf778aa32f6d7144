"""Row A: the process ends at a named step, in a first run, in a resumed one, and in the recovery from either."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.faults.injection import KILLED, Exit, read_log
from tests.faults.interposer import CHANGES, Operation
from tests.faults.outcomes import sweep
from tests.faults.stores import WITH_REJECTED, Disks


@dataclass(frozen=True, kw_only=True)
class Ending:
    """A run that ends at a step, and perhaps a second one that ends too."""

    name: str
    """Says where."""
    resumed: bool
    """Whether half of the store is there at first."""
    exits: tuple[Exit, ...]
    """The fault of each run."""

    def __str__(self) -> str:
        return f"{'resumed' if self.resumed else 'first'} run: {self.name}"


def test_a_run_that_ends_at_any_step_is_continued_to_the_same_bytes(disks: Disks) -> None:
    _row(disks, 12)


@pytest.mark.faults
@pytest.mark.timeout(1800)
def test_a_run_that_ends_at_any_of_many_steps_is_continued_to_the_same_bytes(disks: Disks) -> None:
    _row(disks, 120)


def _row(disks: Disks, n_cases: int) -> None:
    changes = _changes(disks, disks.new("whole"))
    first = _endings(changes, resumed=False)
    committing = next(
        at for at, change in enumerate(changes) if change.target and change.target.match("shard_digest/c/2")
    )
    half = disks.new("half")
    assert disks.run(half, Exit(at=committing, when="after")).code == KILLED
    resumed = _endings(_changes(disks, disks.new("resumed", half)), resumed=True)
    twice = [_again(ending, len(changes)) for ending in first]

    def end(ending: Ending) -> None:
        disk = disks.new("case", half if ending.resumed else None)
        codes = [disks.run(disk, fault).code for fault in ending.exits]
        assert codes[0] == KILLED and codes[-1] in (KILLED, WITH_REJECTED), f"the runs left with {codes}"
        disks.check_recovery(disk)

    third = n_cases // 3
    sweep("A", [case for cases in (first, resumed, twice) for case in _spread(cases, third)], end)


def _changes(disks: Disks, disk: Path) -> list[Operation]:
    """Return the operations by which a run there changes something, in order, with paths from the disk's top."""
    log = disk.with_suffix(".log")
    log.unlink(missing_ok=True)
    assert disks.run(disk, log=log).code == WITH_REJECTED
    changes = [entry for entry in read_log(log) if isinstance(entry, Operation) and entry.kind in CHANGES]
    for change in changes:
        change.path = change.path.relative_to(disk)
    return changes


def _endings(changes: Sequence[Operation], *, resumed: bool) -> list[Ending]:
    endings = []
    for at, change in enumerate(changes):
        for when in ("before", "within", "after") if change.kind == "write" else ("before", "after"):
            name = f"{when} step {at}, {change.kind} of {change.path}"
            endings.append(Ending(name=name, resumed=resumed, exits=(Exit(at=at, when=when),)))
    return endings


def _again(ending: Ending, n_steps: int) -> Ending:
    """Let the recovery end too, about in the middle of what it has to do."""
    at = (n_steps - ending.exits[0].at) // 2
    return Ending(
        name=f"{ending.name}; then the recovery before its step {at}",
        resumed=False,
        exits=(*ending.exits, Exit(at=at)),
    )


def _spread(cases: Sequence[Ending], n: int) -> list[Ending]:
    """Choose n, evenly."""
    return [cases[index * len(cases) // n] for index in range(min(n, len(cases)))]
