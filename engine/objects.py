"""Where a store's objects are kept: whole-object, durable writes, on a disk or in a bucket.

An object is a key and its bytes, written whole, once. This module knows nothing about arrays or shards.
"""

from __future__ import annotations

import errno
import glob
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from zarr.abc.store import Store as ZarrStore
from zarr.storage import LocalStore

from mmextract.engine.direct import Buffer
from mmextract.engine.files import (
    beside,
    flush_folder,
    flush_name,
    flush_tree,
    make_folders,
    make_root,
    naming,
    raise_error,
    replace_files,
    write_new,
)
from mmextract.engine.processes import Process, this_process


class Objects(Protocol):
    """Objects under one root."""

    @property
    def url(self) -> str:
        """What the user calls the root."""

    def occupied(self) -> bool:
        """Tell whether anything is there at all."""

    def create(self, objects: Mapping[str, bytes], last: str) -> None:
        """Write all of `objects` where nothing is yet; `last` of them is seen last, and then the others are there.

        Where another writer is first, his objects stand. What an interrupted call left is taken up or done away with.
        Raises ValueError if anything else is there.
        """

    def put_new(self, key: str, data: bytes) -> bool:
        """Write an object unless there is one under `key`; of several writers one wins. Tell whether this one did."""

    def settle(self, prefix: str) -> None:
        """Make sure that what `list` names under `prefix` is there to stay, whatever became of the run that put it."""

    def put(self, key: str, parts: Sequence[Buffer]) -> None:
        """Write the concatenation of `parts` under `key`: a reader sees the old object or the new, never a part."""

    def put_all(
        self, objects: Mapping[str, Sequence[Buffer]], on_read: Callable[[], None] = lambda: None
    ) -> None:
        """Write several objects, each as `put` does; which of them is there first is open.

        on_read: called when the parts of the first one have been read for the last time, so that their memory may be
        used for others; perhaps long before they are there to stay. If this raises, it may not have been called.
        """

    def get(self, key: str) -> bytes | None:
        """Return the bytes under `key`, or None if there is no such object."""

    def read(self, key: str, offset: int, length: int) -> bytes:
        """Return `length` bytes from `offset`, which counts from the end if negative.

        Raises FileNotFoundError if there is no such object, ValueError if it is shorter.
        """

    def delete(self, key: str) -> None:
        """Remove an object; it is no error if there is none."""

    def sweep(self, prefix: str) -> None:
        """Remove what writers that were killed left directly under `prefix` and is no object."""

    def list(self, prefix: str) -> Iterator[str]:
        """Yield the names of what is directly under `prefix`: objects, and prefixes of further ones."""

    def count_bytes(self, prefix: str) -> int:
        """Return the size of everything under `prefix`."""

    def to_zarr(self) -> ZarrStore:
        """Return the same objects as Zarr reads them."""


@dataclass(frozen=True)
class LocalObjects:
    """Objects as files. What `put` returned from survives a kill of the process and a loss of power.

    Only `create` makes the root. Where it is missing, writes raise FileNotFoundError: a disk that went away, or a store
    that was moved, is not begun anew in its old place.
    """

    root: Path

    @property
    def url(self) -> str:
        """The path."""
        return str(self.root)

    def occupied(self) -> bool:
        """Tell whether anything is at the path."""
        try:
            os.lstat(self.root)  # not lexists, which takes a disk that does not answer for an empty place
        except (FileNotFoundError, NotADirectoryError):
            return False
        return True

    def create(self, objects: Mapping[str, bytes], last: str) -> None:
        """Make the folder beside its place, flush it, and move it there: it exists whole or not at all."""
        assert last in objects
        if self.occupied():
            if self.get(last) is not None:
                return  # another writer was first
            raise ValueError(
                f"{self.url} exists and is not a store of mmextract (it has no {last}): give another path"
            )
        temporary = self.root.with_name(f".{self.root.name}.{this_process()}.{uuid.uuid4().hex}.creating")
        with naming(self.root):
            make_root(self.root.parent)
            self._sweep_beside()
            try:
                for key, data in objects.items():
                    file = temporary / key
                    file.parent.mkdir(parents=True, exist_ok=True)
                    file.write_bytes(data)
                flush_tree(temporary)
                temporary.rename(self.root)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
                return  # another writer was first
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
            flush_folder(self.root.parent)

    def settle(self, prefix: str) -> None:
        """Flush a folder and its name: a run that was stopped may have renamed something and not flushed that."""
        folder = self.root / prefix
        if folder.is_dir():
            for changed in (folder.parent, folder):
                if os.access(changed, os.W_OK):  # where we cannot write, nothing is of our making
                    flush_folder(changed)

    def _sweep_beside(self) -> None:
        """Remove what killed processes left of a `create`."""
        for left in self.root.parent.glob(f".{glob.escape(self.root.name)}.*.creating"):
            if _is_of_a_dead_process(left.name):
                shutil.rmtree(left, ignore_errors=True)

    def put_new(self, key: str, data: bytes) -> bool:
        """Write a file unless there is one, whole and durably; of several writers one wins.

        It is written aside and linked into its place, which fails if that is taken. A file system without links
        creates it in place, where a reader may for a moment see it short.
        """
        target = self.root / key
        temporary = beside(target)
        with naming(target):
            flush_name(self.root)
            for folder in make_folders(target.parent, self.root):
                flush_folder(folder)
            try:
                write_new(temporary, data)
                try:
                    target.hardlink_to(temporary)
                except OSError as error:
                    if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS):
                        raise
                    write_new(target, data)
            except FileExistsError:
                return False
            except FileNotFoundError:
                if not target.parent.is_dir():
                    raise
                return False  # another writer was first, and swept
            finally:
                temporary.unlink(missing_ok=True)
            flush_folder(target.parent)
        return True

    def put(self, key: str, parts: Sequence[Buffer]) -> None:
        """Write the concatenation of `parts` under `key`; see `files.replace_files`."""
        self.put_all({key: parts})

    def put_all(
        self, objects: Mapping[str, Sequence[Buffer]], on_read: Callable[[], None] = lambda: None
    ) -> None:
        """Write several objects; see `files.replace_files`."""
        flush_name(self.root)
        replace_files({self.root / key: parts for key, parts in objects.items()}, self.root, on_read)

    def get(self, key: str) -> bytes | None:
        """Return the bytes under `key`, or None if there is no such object."""
        try:
            with naming(self.root / key):
                return (self.root / key).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None

    def read(self, key: str, offset: int, length: int) -> bytes:
        """Return `length` bytes from `offset`, which counts from the end if negative."""
        with naming(self.root / key), (self.root / key).open("rb", buffering=0) as file:
            file.seek(offset, os.SEEK_END if offset < 0 else os.SEEK_SET)
            data = file.read(length)
        if len(data) < length:
            raise ValueError(f"{self.root / key} is cut short: it should hold {length} bytes at {offset}")
        return data

    def delete(self, key: str) -> None:
        """Remove a file, durably."""
        target = self.root / key
        with naming(target):
            if target.exists():
                target.unlink(missing_ok=True)
                flush_folder(target.parent)

    def sweep(self, prefix: str) -> None:
        """Remove the temporary files directly under `prefix`. One that is being written fails its writer."""
        folder = self.root / prefix
        if folder.is_dir():
            with os.scandir(folder) as entries:
                left = [
                    entry.path
                    for entry in entries
                    if entry.name.startswith(".") and entry.name.endswith(".partial")
                ]
            for path in left:
                Path(path).unlink(missing_ok=True)

    def list(self, prefix: str) -> Iterator[str]:
        """Yield the names of the files and folders directly under `prefix`, hidden ones left out."""
        folder = self.root / prefix
        if folder.is_dir():
            with os.scandir(folder) as entries:
                yield from (entry.name for entry in entries if not entry.name.startswith("."))

    def count_bytes(self, prefix: str) -> int:
        """Return the size of every file under `prefix`."""
        if not (self.root / prefix).exists():
            return 0
        return sum(
            (Path(base) / name).stat().st_size
            for base, _, names in os.walk(self.root / prefix, onerror=raise_error)
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


def make_local(folder: Path) -> LocalObjects:
    """Return the objects of a folder that is no store, made if it is not there."""
    make_root(folder)
    return LocalObjects(folder)


def _is_of_a_dead_process(name: str) -> bool:
    try:
        return Process.parse(name.split(".")[-3]).is_gone()
    except (ValueError, IndexError):
        return False  # somebody else's
