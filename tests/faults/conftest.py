"""What every row of the fault matrix needs: runs as processes, the bytes they must end in, and room for them."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.launch import Launcher
from tests.faults.stores import Disks, tree


@pytest.fixture(scope="session")
def launcher() -> Iterator[Launcher]:
    """A server that starts runs."""
    with Launcher() as started:
        yield started


@pytest.fixture(scope="session")
def memory_folder() -> Iterator[Path]:
    """A folder in memory where there is one: these rows are not about the disk's speed."""
    shared = Path("/dev/shm")
    base = shared if os.access(shared, os.W_OK) else None
    folder = Path(tempfile.mkdtemp(prefix="mmextract-faults-", dir=base))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def disks(launcher: Launcher, memory_folder: Path) -> Disks:
    """Makes folders that stand for a disk, and runs the stub on them."""
    made = Disks(launcher=launcher, scratch=memory_folder)
    whole = made.new("oracle")
    assert made.run(whole).code == 3
    return made.with_oracle(tree(whole))
