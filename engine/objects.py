"""Where a store's objects are kept: whole-object, durable writes, on a disk or in a bucket.

An object is a key and its bytes, written whole, once. This module knows nothing about arrays or shards.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from zarr.abc.store import Store as ZarrStore
from zarr.storage import LocalStore

Buffer = bytes | bytearray | memoryview


class Objects(Protocol):
    """Objects under one root."""

    @property
    def url(self) -> str:
        """What the user calls the root."""

    def occupied(self) -> bool:
        """Tell whether anything is there at all."""

    def create(self, objects: Mapping[str, bytes], last: str) -> None:
        """Write all of `objects` where nothing is yet; `last` of them is seen last, and then the others are there.

        What an interrupted call left is taken up or done away with. Raises ValueError if anything else is there.
        """

    def put(self, key: str, parts: Sequence[Buffer]) -> None:
        """Write the concatenation of `parts` under `key`: a reader sees the old object or the new, never a part."""

    def get(self, key: str) -> bytes | None:
        """Return the bytes under `key`, or None if there is no such object."""

    def read(self, key: str, offset: int, length: int) -> bytes:
        """Return `length` bytes from `offset`, which counts from the end if negative.

        Raises FileNotFoundError if there is no such object, ValueError if it is shorter.
        """

    def delete(self, key: str) -> None:
        """Remove an object; it is no error if there is none."""

    def list(self, prefix: str) -> Iterator[str]:
        """Yield the names of what is directly under `prefix`: objects, and prefixes of further ones."""

    def count_bytes(self, prefix: str) -> int:
        """Return the size of everything under `prefix`."""

    def to_zarr(self) -> ZarrStore:
        """Return the same objects as Zarr reads them."""


@dataclass(frozen=True)
class LocalObjects:
    """Objects as files. What `put` returned from survives a kill of the process and a loss of power."""

    root: Path

    @property
    def url(self) -> str:
        """The path."""
        return str(self.root)

    def occupied(self) -> bool:
        """Tell whether anything is at the path."""
        return os.path.lexists(self.root)

    def create(self, objects: Mapping[str, bytes], last: str) -> None:
        """Make the folder beside its place, flush it, and move it there: it exists whole or not at all."""
        assert last in objects
        if self.occupied():
            raise ValueError(
                f"{self.url} exists and is not a store of mmextract (it has no {last}): give another path"
            )
        temporary = self.root.with_name(f".{self.root.name}.creating")
        shutil.rmtree(temporary, ignore_errors=True)
        make_folders(self.root.parent)
        for key, data in objects.items():
            file = temporary / key
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(data)
        flush_tree(temporary)
        temporary.rename(self.root)
        flush_folder(self.root.parent)

    def put(self, key: str, parts: Sequence[Buffer]) -> None:
        """Write the concatenation of `parts` under `key`.

        The bytes go to a temporary file, which is flushed to disk, renamed, and its folder flushed. Raises OSError if
        any of this fails; the key then holds what it held.
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
        except (FileNotFoundError, NotADirectoryError):
            return None

    def read(self, key: str, offset: int, length: int) -> bytes:
        """Return `length` bytes from `offset`, which counts from the end if negative."""
        with (self.root / key).open("rb", buffering=0) as file:
            file.seek(offset, os.SEEK_END if offset < 0 else os.SEEK_SET)
            data = file.read(length)
        if len(data) < length:
            raise ValueError(f"{self.root / key} is cut short: it should hold {length} bytes at {offset}")
        return data

    def delete(self, key: str) -> None:
        """Remove a file, durably."""
        target = self.root / key
        if target.exists():
            target.unlink()
            flush_folder(target.parent)

    def list(self, prefix: str) -> Iterator[str]:
        """Yield the names of the files and folders directly under `prefix`, hidden ones left out."""
        folder = self.root / prefix
        if folder.is_dir():
            with os.scandir(folder) as entries:
                yield from (entry.name for entry in entries if not entry.name.startswith("."))

    def count_bytes(self, prefix: str) -> int:
        """Return the size of every file under `prefix`."""
        return sum(
            (Path(base) / name).stat().st_size
            for base, _, names in os.walk(self.root / prefix)
            for name in names
        )

    def to_zarr(self) -> ZarrStore:
        """Return the folder as Zarr reads it."""
        return LocalStore(self.root, read_only=True)


def locate(place: str | Path | Objects) -> Objects:
    """Return the objects at a path, or at a URL `s3://bucket/name`, which must be a string.

    Raises ValueError for any other URL, ImportError if what the extra `s3` installs is not there.
    """
    if not isinstance(place, str | Path):
        return place
    scheme, separator, _ = str(place).partition(":/")
    if isinstance(place, Path) and separator and scheme == "s3":
        raise ValueError(f"{place} was made a Path, which has no room for a URL: give it as a string")
    if isinstance(place, Path) or not re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", place):
        return LocalObjects(Path(place))
    if scheme.lower() != "s3":
        raise ValueError(f"a store is a path or s3://bucket/name; {scheme}:// is not supported")
    try:
        from mmextract.engine.s3 import S3Objects
    except ModuleNotFoundError as error:
        if error.name != "obstore":
            raise
        raise ImportError("s3:// needs obstore: `pip install 'mmextract[s3]'`") from error
    return S3Objects(place.rstrip("/"))


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
