"""What a loss of power may leave of a disk, given the operations that came before it.

The model is the strictest that POSIX allows, stricter than most file systems: a file's bytes are safe once the file was
flushed; its name is safe once its folder was, and so is that folder's own name only once *its* folder was. What was
not flushed may be there, or not, or in part, in any order. It knows nothing of stores.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tests.faults.interposer import Operation


@dataclass(kw_only=True)
class _File:
    """A file's bytes."""

    flushed: bytes = b""
    """What is on the disk for certain."""
    waiting: list[tuple[int, bytes] | None] = field(default_factory=list)
    """Writes (offset, bytes) that may be, in order; None empties the file."""

    def content(self) -> bytes:
        return _replay(self.flushed, self.waiting)

    def flush(self) -> None:
        self.flushed, self.waiting = self.content(), []

    def left_by_crash(self, chance: random.Random) -> bytes:
        kept = [write for write in self.waiting if chance.random() < 0.6]
        if chance.random() < 0.3:
            chance.shuffle(kept)
        torn = [
            (write[0], write[1][: chance.randrange(len(write[1]) + 1)])
            if write is not None and chance.random() < 0.3
            else write
            for write in kept
        ]
        content = _replay(self.flushed, torn)
        lengthened = len(self.content()) > len(content) and chance.random() < 0.3
        return content.ljust(len(self.content()), b"\0") if lengthened else content


@dataclass(kw_only=True)
class _Folder:
    """A folder's names."""

    entries: dict[str, _File | _Folder] = field(default_factory=dict)
    """As a process sees them."""
    flushed: dict[str, _File | _Folder] = field(default_factory=dict)
    """On the disk for certain."""
    waiting: list[dict[str, _File | _Folder | None]] = field(default_factory=list)
    """Changes that may be, each whole or not at all: name → what it names then, None for nothing."""

    def change(self, change: dict[str, _File | _Folder | None]) -> None:
        self.waiting.append(change)
        _apply(self.entries, change)

    def flush(self) -> None:
        self.flushed, self.waiting = dict(self.entries), []

    def left_by_crash(self, chance: random.Random) -> dict[str, _File | _Folder]:
        entries = dict(self.flushed)
        keep = chance.choice((0.0, 0.5, 1.0))
        for change in self.waiting:
            if chance.random() < keep:
                _apply(entries, change)
        return entries


class Disk:
    """A folder that begins empty and safe, and what has been done below it."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._top = _Folder()

    def apply(self, operation: Operation) -> None:
        """Take note of an operation that was carried out."""
        match operation.kind:
            case "create":
                self._create(operation.path)
            case "write":
                self._file(operation.path).waiting.append((operation.offset, operation.data))
            case "fsync":
                self._file(operation.path).flush()
            case "fsync_folder":
                self._folder(operation.path).flush()
            case "mkdir":
                self._folder(operation.path.parent).change({operation.path.name: _Folder()})
            case "unlink" | "rmdir":
                self._folder(operation.path.parent).change({operation.path.name: None})
            case "rename" | "link":
                self._rename(operation.path, operation.target, keep=operation.kind == "link")

    def tree(self) -> dict[str, bytes | None]:
        """Return path → bytes as a process sees them; None is a folder."""
        return _walk(self._top, lambda folder: folder.entries, _File.content)

    def safe(self) -> dict[str, bytes | None]:
        """Return path → bytes of what every loss of power leaves."""
        return _walk(self._top, lambda folder: folder.flushed, lambda file: file.flushed)

    def left_by_crash(self, chance: random.Random) -> dict[str, bytes | None]:
        """Return path → bytes as a loss of power may leave them."""
        return _walk(
            self._top, lambda folder: folder.left_by_crash(chance), lambda file: file.left_by_crash(chance)
        )

    def _create(self, path: Path) -> None:
        folder = self._folder(path.parent)
        file = folder.entries.get(path.name)
        if isinstance(file, _File):
            file.waiting.append(None)
        else:
            folder.change({path.name: _File()})

    def _rename(self, path: Path, target: Path | None, *, keep: bool) -> None:
        assert target is not None and target.parent == path.parent, "renames between folders are not modelled"
        folder = self._folder(path.parent)
        entry = folder.entries[path.name]
        folder.change({target.name: entry} if keep else {path.name: None, target.name: entry})

    def _folder(self, path: Path) -> _Folder:
        found: _File | _Folder = self._top
        for name in path.relative_to(self._root).parts:
            assert isinstance(found, _Folder)
            found = found.entries[name]
        assert isinstance(found, _Folder)
        return found

    def _file(self, path: Path) -> _File:
        found = self._folder(path.parent).entries[path.name]
        assert isinstance(found, _File)
        return found


def materialise(tree: Mapping[str, bytes | None], folder: Path) -> None:
    """Make files and folders of a tree."""
    for path, data in sorted(tree.items()):
        if data is None:
            (folder / path).mkdir(parents=True)
        else:
            (folder / path).write_bytes(data)


def _walk(
    folder: _Folder,
    entries: Callable[[_Folder], Mapping[str, _File | _Folder]],
    content: Callable[[_File], bytes],
) -> dict[str, bytes | None]:
    found: dict[str, bytes | None] = {}
    for name, entry in entries(folder).items():
        if isinstance(entry, _File):
            found[name] = content(entry)
        else:
            found[name] = None
            found |= {f"{name}/{path}": data for path, data in _walk(entry, entries, content).items()}
    return found


def _apply(entries: dict[str, _File | _Folder], change: Mapping[str, _File | _Folder | None]) -> None:
    for name, entry in change.items():
        if entry is None:
            entries.pop(name, None)
        else:
            entries[name] = entry


def _replay(content: bytes, writes: list[tuple[int, bytes] | None]) -> bytes:
    result = bytearray(content)
    for write in writes:
        if write is None:
            result.clear()
            continue
        offset, data = write
        result.extend(bytes(max(0, offset - len(result))))
        result[offset : offset + len(data)] = data
    return bytes(result)
