"""Places where a store cannot be, or no longer: one clear message, exit code 1, and a run that can be continued.

A full and a failing disk are row D's.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.launch import Launcher, Left, Request
from tests.faults.stores import STORE, WITH_REJECTED, Disks, check_committed, committed, different, tree

FAILED = 1
MANY = ("--samples", "120", "--shard-samples", "1")
"""A run that takes a while."""


@pytest.fixture(scope="module")
def second_launcher() -> Iterator[Launcher]:
    with Launcher() as started:
        yield started


@pytest.fixture(scope="module")
def whole(disks: Disks) -> dict[str, bytes | None]:
    """What an uninterrupted run of MANY samples leaves on a disk."""
    disk = disks.new("many")
    assert disks.launcher.run(many(disk)).code == WITH_REJECTED
    return tree(disk)


def many(disk: Path) -> Request:
    return Request(arguments=("-o", str(disk / STORE), *MANY), folder=disk)


def stop_after_a_commit(launcher: Launcher, disk: Path) -> int:
    """Start a run of MANY samples, stop it (as Ctrl-Z does) when something is committed, and return its process."""
    process = launcher.start(many(disk))
    deadline = time.monotonic() + 60
    while not committed(disk / STORE) and time.monotonic() < deadline:
        time.sleep(0.001)
    os.kill(process, signal.SIGSTOP)
    return process


def check_message(left: Left, *parts: str) -> None:
    assert left.code == FAILED, f"it left with {left.code}: {left.err}"
    assert left.err.startswith("Error: ") and "Traceback" not in left.err, left.err
    assert all(part in left.err for part in parts), left.err


def test_a_file_where_the_store_should_be_is_refused_and_left_alone(disks: Disks) -> None:
    disk = disks.new("file")
    (disk / STORE).parent.mkdir()
    (disk / STORE).write_text("precious")
    before = tree(disk)
    check_message(disks.run(disk), str(disk / STORE), "not a store of mmextract", "give another path")
    assert tree(disk) == before


def test_a_file_where_a_folder_should_be_is_named(disks: Disks) -> None:
    disk = disks.new("file")
    (disk / STORE).parent.write_text("precious")
    before = tree(disk)
    check_message(disks.run(disk), "Not a directory", str((disk / STORE).parent))
    assert tree(disk) == before


def test_a_store_that_a_live_run_writes_is_refused_and_that_run_goes_on(
    disks: Disks, second_launcher: Launcher, whole: dict[str, bytes | None]
) -> None:
    disk = disks.new("busy")
    process = stop_after_a_commit(second_launcher, disk)
    refused = disks.launcher.run(Request(arguments=many(disk).arguments, folder=disk.with_name("beside")))
    check_message(refused, f"{disk / STORE} is being written by another run: process {process} on")
    os.kill(process, signal.SIGCONT)
    assert second_launcher.wait().code == WITH_REJECTED
    assert not different(tree(disk), whole)


def test_a_disk_that_vanishes_ends_the_run_and_what_it_holds_is_continued_when_it_is_back(
    disks: Disks, whole: dict[str, bytes | None]
) -> None:
    disk = disks.new("vanishing")
    elsewhere = disk.with_name("elsewhere")
    process = stop_after_a_commit(disks.launcher, disk)
    (disk / STORE).rename(elsewhere)
    os.kill(process, signal.SIGCONT)
    left = disks.launcher.wait()
    check_message(left, str(disk / STORE))
    # the second, if it was stopped in the middle of a write
    assert "is its disk gone?" in left.err or "No such file or directory" in left.err, left.err
    assert not committed(disk / STORE), "it went on beside the place"
    shutil.rmtree(disk / STORE, ignore_errors=True)
    elsewhere.rename(disk / STORE)
    check_committed(disk / STORE)
    left = disks.launcher.run(many(disk))
    assert left.code == WITH_REJECTED, left.err
    assert not different(tree(disk), whole)


@pytest.mark.skipif(os.geteuid() != 0, reason="a read-only disk needs a mount, so root")
def test_a_read_only_disk_is_an_error_from_which_the_run_continues(disks: Disks) -> None:
    disk = disks.new("read-only")
    if subprocess.run(
        ["mount", "-t", "tmpfs", "none", str(disk)], check=False, capture_output=True
    ).returncode:
        pytest.skip("this machine does not let tests mount a disk")
    try:
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        check_message(disks.run(disk), "Read-only file system", str(disk))
        subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
        disks.check_recovery(disk, keep=True)
    finally:
        subprocess.run(["umount", str(disk)], check=True)
