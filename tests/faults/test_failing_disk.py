"""Row D: the disk is full, broken or forbidden at any operation, once or from then on.

The run then ends with one clear message that names the place, and once the disk is well again, the same command
continues to the bytes of an uninterrupted run.
"""

from __future__ import annotations

import errno
import os
import random
import subprocess
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.faults.injection import KILLED, Exit, Refuse, read_log
from tests.faults.interposer import CHANGES, READS, Operation
from tests.faults.outcomes import record, skip_if_passed, sweep
from tests.faults.stores import WITH_REJECTED, Disks

FAILED = 1
NEEDS_ROOM = ("create", "write", "fsync", "mkdir", "rename")
FAILURES: Mapping[str, tuple[int | None, tuple[str, ...]]] = {
    "full": (errno.ENOSPC, NEEDS_ROOM),
    "over quota": (errno.EDQUOT, NEEDS_ROOM),
    "broken": (errno.EIO, (*CHANGES, *READS)),
    "forbidden": (errno.EACCES, ("create", "open", "mkdir", "rename", "stat", "list")),
    "cannot be flushed": (errno.EIO, ("fsync", "fsync_folder")),
    "cannot be closed": (errno.EIO, ("close",)),
    "writes in pieces": (None, ("write",)),
    "writes a piece, then is full": (errno.ENOSPC, ("write",)),
}


def test_a_disk_that_fails_at_any_operation_is_an_error_from_which_the_run_continues(disks: Disks) -> None:
    _row(disks, 16)


@pytest.mark.faults
@pytest.mark.timeout(1800)
def test_a_disk_that_fails_at_each_of_many_operations_is_an_error_from_which_the_run_continues(
    disks: Disks,
) -> None:
    _row(disks, 300)


@pytest.mark.faults
@pytest.mark.skipif(os.geteuid() != 0, reason="a small disk needs a mount, so root")
def test_a_disk_that_is_full_at_any_size_is_an_error_from_which_the_run_continues(disks: Disks) -> None:
    skip_if_passed("D, a full disk")
    started = time.monotonic()
    disk = disks.new("small")
    mount = ["mount", "-t", "tmpfs", "-o", "size=16k", "none", str(disk)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("this machine does not let tests mount a small disk")
    try:
        kib = 16
        while (left := disks.run(disk)).code == FAILED:
            assert "No space left on device" in left.err and str(disk) in left.err, left.err
            kib += 8
            subprocess.run(["mount", "-o", f"remount,size={kib}k", str(disk)], check=True)
        assert left.code == WITH_REJECTED and kib > 100, f"with {kib} KiB: {left.err}"
        disks.check_recovery(disk, keep=True)
        found = {"cases": (kib - 16) // 8, "losses": 0, "kib_at_last": kib}
        record("D, a full disk", found, time.monotonic() - started)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def _row(disks: Disks, n_cases: int) -> None:
    half = disks.new("half")
    assert disks.run(half, Exit(at=180)).code == KILLED
    seen = {
        resumed: _operations(disks, disks.new("seen", half if resumed else None)) for resumed in (False, True)
    }

    def fail(case: str) -> None:
        seed, _, kind = case.partition(", the disk ")
        chance = random.Random(int(seed))
        resumed = chance.random() < 0.5
        fault = _fault(kind, seen[resumed], chance)
        disk = disks.new("case", half if resumed else None)
        left = disks.run(disk, fault)
        if fault.error is None:
            assert left.code == WITH_REJECTED, f"{fault} left with {left.code}: {left.err.strip()}"
        else:
            assert left.code == FAILED, f"{fault} left with {left.code}: {left.err.strip()}"
            assert left.err.startswith("Error: ") and "Traceback" not in left.err, f"{fault}: {left.err}"
            assert os.strerror(fault.error) in left.err, f"{fault} is told as {left.err.strip()}"
            assert str(disk) in left.err, f"{fault} does not name the place: {left.err.strip()}"
        disks.check_recovery(disk)

    kinds = list(FAILURES)
    sweep("D", (f"{seed}, the disk {kinds[seed % len(kinds)]}" for seed in range(n_cases)), fail)


def _operations(disks: Disks, disk: Path) -> Counter[str]:
    """Count the operations of a run there, by kind."""
    log = disk.with_suffix(".log")
    log.unlink(missing_ok=True)
    assert disks.run(disk, log=log).code == WITH_REJECTED
    return Counter(entry.kind for entry in read_log(log) if isinstance(entry, Operation))


def _fault(name: str, operations: Counter[str], chance: random.Random) -> Refuse:
    """Choose one kind of operation, so that rare ones get their turn, and one of that kind."""
    error, kinds = FAILURES[name]
    lasting = chance.random() < 0.5
    chosen = chance.choice([kind for kind in kinds if operations[kind]])
    return Refuse(
        at=chance.randrange(operations[chosen]),
        kinds=kinds if lasting else (chosen,),
        error=error,
        lasting=lasting,
        short="piece" in name,
    )
