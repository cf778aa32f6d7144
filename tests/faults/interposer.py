"""See, stop or break every file operation below a folder, from outside of the code that does it.

Python's own file functions are replaced for the rest of the process, so this belongs into a process of its own. It
knows nothing of stores. What it cannot see, code that calls the system without Python, would show when a recorded run
is replayed (see `disk`) and the tree differs.
"""

from __future__ import annotations

import builtins
import io
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

READS = ("open", "read", "stat", "list")
CHANGES = ("create", "write", "fsync", "fsync_folder", "close", "rename", "link", "mkdir", "unlink", "rmdir")


@dataclass(kw_only=True)
class Operation:
    """One file operation that is about to happen."""

    kind: str
    """One of READS and CHANGES. `create` opens for writing, and empties what was there."""
    path: Path
    """What it is done to."""
    target: Path | None = None
    """Where a rename or a link leads."""
    data: bytes = b""
    """What is written; a handler may shorten it."""
    offset: int = 0
    """Where it is written."""


Handler = Callable[[Operation, Callable[[], Any]], Any]
"""handler(operation, perform): calls `perform` and returns its result, or does not and raises or exits."""


def interpose(root: Path, handler: Handler) -> None:
    """Send every operation below `root` through `handler`, from now on."""
    _Interposer(root.resolve(), handler).install()


class _Interposer:
    def __init__(self, root: Path, handler: Handler) -> None:
        self._root = root
        self._handler = handler
        self._fstat = os.fstat

    def install(self) -> None:
        os.write = self._writing(os.write)
        os.fsync = self._flushing(os.fsync)
        os.fdatasync = self._flushing(os.fdatasync)
        os.rename = self._to_target("rename", os.rename)
        os.replace = self._to_target("rename", os.replace)
        os.link = self._to_target("link", os.link)
        os.open = self._opening(os.open)
        for name, kind in (
            ("mkdir", "mkdir"),
            ("unlink", "unlink"),
            ("remove", "unlink"),
            ("rmdir", "rmdir"),
            ("stat", "stat"),
            ("lstat", "stat"),
            ("scandir", "list"),
            ("listdir", "list"),
        ):
            setattr(os, name, self._on_path(kind, getattr(os, name)))
        builtins.open = io.open = self._open_file(io.open)
        for name in ("writev", "pwrite", "pwritev", "symlink", "truncate", "ftruncate", "sendfile"):
            setattr(os, name, _not_seen(name))

    def handle(self, operation: Operation, perform: Callable[[], Any]) -> Any:
        if not operation.path.is_relative_to(self._root):
            return perform()
        return self._handler(operation, perform)

    def _path(self, given: Any, folder: int | None = None) -> Path:
        """Return the absolute path of a path, a descriptor, or a name within an open folder."""
        if isinstance(given, int):
            return _opened(given)
        base = Path.cwd() if folder is None else _opened(folder)
        return base / str(os.fspath(given))

    def _on_path(self, kind: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(path: Any = ".", *rest: Any, **more: Any) -> Any:
            operation = Operation(kind=kind, path=self._path(path, more.get("dir_fd")))
            return self.handle(operation, lambda: real(path, *rest, **more))

        return wrapped

    def _to_target(self, kind: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(source: Any, target: Any, **more: Any) -> Any:
            operation = Operation(kind=kind, path=self._path(source), target=self._path(target))
            return self.handle(operation, lambda: real(source, target, **more))

        return wrapped

    def _opening(self, real: Callable[..., int]) -> Callable[..., int]:
        def wrapped(path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
            kind = "create" if flags & (os.O_CREAT | os.O_TRUNC) else "open"
            operation = Operation(kind=kind, path=self._path(path, dir_fd))
            opened: int = self.handle(operation, lambda: real(path, flags, mode, dir_fd=dir_fd))
            return opened

        return wrapped

    def _flushing(self, real: Callable[..., None]) -> Callable[..., None]:
        def wrapped(descriptor: Any) -> None:
            number = descriptor if isinstance(descriptor, int) else descriptor.fileno()
            kind = "fsync_folder" if stat.S_ISDIR(self._fstat(number).st_mode) else "fsync"
            self.handle(Operation(kind=kind, path=self._path(number)), lambda: real(number))

        return wrapped

    def _writing(self, real: Callable[[int, Any], int]) -> Callable[[int, Any], int]:
        def wrapped(descriptor: int, data: Any) -> int:
            path = self._path(descriptor)
            if not path.is_relative_to(self._root):
                return real(descriptor, data)
            offset = os.lseek(descriptor, 0, os.SEEK_CUR)
            operation = Operation(kind="write", path=path, data=bytes(data), offset=offset)
            written: int = self.handle(operation, lambda: real(descriptor, _shortened(data, operation)))
            return written

        return wrapped

    def _open_file(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(file: Any, mode: str = "r", buffering: int = -1, *text: Any, **more: Any) -> Any:
            if isinstance(file, int) or not self._path(file).is_relative_to(self._root):
                return real(file, mode, buffering, *text, **more)
            writes = any(letter in mode for letter in "wxa+")
            operation = Operation(kind="create" if writes else "open", path=self._path(file))
            raw = self.handle(operation, lambda: _Watched(self, operation.path, mode.replace("b", "")))
            if buffering == 0:
                return raw
            buffered = io.BufferedWriter(raw) if writes else io.BufferedReader(raw)
            return buffered if "b" in mode else io.TextIOWrapper(buffered, *text, **more)

        return wrapped


class _Watched(io.FileIO):
    """A file whose reads, writes and closing are operations."""

    def __init__(self, interposer: _Interposer, path: Path, mode: str) -> None:
        self._interposer = interposer
        self._path = path
        super().__init__(path, mode.replace("t", ""))

    def write(self, data: Any, /) -> int:
        operation = Operation(kind="write", path=self._path, data=bytes(data), offset=self.tell())
        written: int = self._interposer.handle(
            operation, lambda: super(_Watched, self).write(_shortened(data, operation))
        )
        return written

    def readinto(self, buffer: Any, /) -> Any:
        return self._reading(lambda: super(_Watched, self).readinto(buffer))

    def readall(self) -> Any:
        return self._reading(lambda: super(_Watched, self).readall())

    def read(self, size: int | None = -1, /) -> Any:
        return self._reading(lambda: super(_Watched, self).read(-1 if size is None else size))

    def _reading(self, perform: Callable[[], Any]) -> Any:
        return self._interposer.handle(Operation(kind="read", path=self._path), perform)

    def close(self) -> None:
        if self.closed or not self.writable():
            super().close()
        else:
            self._interposer.handle(Operation(kind="close", path=self._path), super().close)


def _shortened(data: Any, operation: Operation) -> memoryview:
    """Return what is to be written of data, in its own memory: direct writes want it aligned."""
    return memoryview(data).cast("B")[: len(operation.data)]


def _opened(descriptor: int) -> Path:
    return Path(f"/proc/self/fd/{descriptor}").readlink()


def _not_seen(name: str) -> Callable[..., Any]:
    def refuse(*arguments: Any, **more: Any) -> Any:
        raise NotImplementedError(f"os.{name} is used now: teach the interposer about it")

    return refuse
