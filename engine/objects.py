"""Durable whole-object writes below one folder.

An object is a key and its bytes, written whole, once. This module knows nothing about arrays or shards.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

Buffer = bytes | bytearray | memoryview


@dataclass(frozen=True)
class LocalObjects:
    """Objects as files. What `put` returned from survives a kill of the process and a loss of power."""

    root: Path

    def put(self, key: str, parts: Sequence[Buffer]) -> None:
        """Write the concatenation of `parts` under `key`.

        A reader sees the old object or the new one, never a part: the bytes go to a temporary file, which is flushed
        to disk, renamed, and its folder flushed. Raises OSError if any of this fails; the key then holds what it held.
        """
        target = self.root / key
        make_folders(target.parent)
        temporary = target.with_name(f".{target.name}.partial")
        try:
            with temporary.open("wb") as file:
                for part in parts:
                    file.write(part)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        flush_folder(target.parent)

    def get(self, key: str) -> bytes | None:
        """Return the bytes under `key`, or None if there is no such object."""
        try:
            return (self.root / key).read_bytes()
        except FileNotFoundError:
            return None

    def list(self, prefix: str) -> Iterator[str]:
        """Yield the names of the objects directly under `prefix`."""
        folder = self.root / prefix
        if folder.is_dir():
            with os.scandir(folder) as entries:
                yield from (entry.name for entry in entries if not entry.name.startswith("."))


def make_folders(folder: Path) -> None:
    """Create a folder and its parents, so that they survive a loss of power."""
    if folder.is_dir():
        return
    make_folders(folder.parent)
    folder.mkdir(exist_ok=True)
    flush_folder(folder.parent)


def flush_folder(folder: Path) -> None:
    """Flush a folder's entries to disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flush_tree(folder: Path) -> None:
    """Flush every file and folder below `folder` to disk."""
    for base, _, names in os.walk(folder):
        for name in names:
            with (Path(base) / name).open("rb") as file:
                os.fsync(file.fileno())
        flush_folder(Path(base))
