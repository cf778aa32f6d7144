"""Folders that stand for a disk, stub runs on them, and what must hold of the store that is left there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Self

from mmextract.engine import shards
from mmextract.engine.integrity import shard_seed
from mmextract.engine.objects import LocalObjects
from tests.faults.injection import Fault
from tests.faults.launch import Launcher, Left, Request

STORE = "results/a.zarr"
WITH_REJECTED = 3
"""Exit code of a run that is done: the stub rejects some samples."""


@dataclass(frozen=True, kw_only=True)
class Disks:
    """Makes disks and runs the stub on them."""

    launcher: Launcher
    scratch: Path
    oracle: Mapping[str, bytes | None] = field(default_factory=dict)
    """What an uninterrupted run leaves on a disk."""

    def with_oracle(self, oracle: Mapping[str, bytes | None]) -> Self:
        """Return the same with something to compare with."""
        return replace(self, oracle=oracle)

    def new(self, name: str, like: Path | None = None) -> Path:
        """Return a fresh empty disk, or a copy of one."""
        folder = self.scratch / name
        shutil.rmtree(folder, ignore_errors=True)
        if like is not None:
            return Path(shutil.copytree(like, folder))
        folder.mkdir()
        return folder

    def request(self, disk: Path, fault: Fault | None = None, log: Path | None = None) -> Request:
        """Return what runs the stub there."""
        return Request(arguments=("-o", str(disk / STORE)), folder=disk, fault=fault, log=log)

    def run(self, disk: Path, fault: Fault | None = None, log: Path | None = None) -> Left:
        """Run the stub there, to its end."""
        return self.launcher.run(self.request(disk, fault, log))

    def check_recovery(self, disk: Path, *, keep: bool = False) -> None:
        """Run the stub again, undisturbed; the disk must then hold the bytes of an uninterrupted run, and no others.

        The disk is removed then, unless it is kept.
        """
        check_committed(disk / STORE)
        left = self.run(disk)
        assert left.code == WITH_REJECTED, f"recovery left with {left.code}: {left.err.strip()}"
        differs = different(tree(disk), self.oracle)
        assert not differs, f"after recovery these differ: {differs}"
        if not keep:
            shutil.rmtree(disk)


def tree(disk: Path) -> dict[str, bytes | None]:
    """Return path → bytes of everything on a disk; None is a folder."""
    return {
        str(path.relative_to(disk)): None if path.is_dir() else path.read_bytes() for path in disk.rglob("*")
    }


def different(one: Mapping[str, bytes | None], other: Mapping[str, bytes | None]) -> list[str]:
    """Return the paths that are not the same in both."""
    return sorted(path for path in {*one, *other} if one.get(path, b"?") != other.get(path, b"?"))


def check_committed(store: Path) -> None:
    """Hold every shard that has a digest to it."""
    for shard in committed(store):
        assert is_whole(store, shard), f"shard {shard} is committed, and is not what its digest says"


def committed(store: Path) -> set[int]:
    """Return the shards that have a digest."""
    return {int(path.name) for path in store.glob("shard_digest/c/*") if not path.name.startswith(".")}


def is_whole(store: Path, shard: int) -> bool:
    """Tell whether a shard's objects are those that its digest was made of."""
    objects = LocalObjects(store)
    keys = (f"hidden_states/c/{shard}/0/0/0", f"record/c/{shard}/0", f"rejected/c/{shard}")
    found = [data for key in keys if (data := objects.get(key)) is not None]
    run = json.loads(objects.get("shard_digest/zarr.json") or b"")["attributes"]["run"]
    digest = shards.digest([found], seed=shard_seed(run, shard))
    return objects.get(f"shard_digest/c/{shard}") == digest.to_bytes(8, "little")
