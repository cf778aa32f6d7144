"""Files and folders that survive a loss of power once they are flushed, and errors that name what they are about.

This module knows nothing about objects or stores.
"""

from __future__ import annotations

import errno
import os
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

from mmextract.engine.direct import Buffer, write


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let an OSError name the path that it is about: those of write, fsync and close do not."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def replace_files(
    files: Mapping[Path, Sequence[Buffer]], base: Path, on_read: Callable[[], None] = lambda: None
) -> None:
    """Write files, each the concatenation of its parts, all of which are there to stay when this returns.

    A reader, and a loss of power, find a file as it was or as it will be: the bytes go to a temporary file beside it,
    which is flushed and then renamed, under a name that is new each time, so that of two processes that write the same
    file neither sees a part of the other's. Folders are flushed once, at the end, for every flush may wait for
    whatever else is on its way to the disk. Raises OSError if any of this fails; each file then is what it was, or new.

    base: a folder above all of them that is there to stay already. on_read: called once the first file is
    written, and not yet flushed: its parts are not read any more.
    """
    temporaries: dict[Path, Path] = {}
    unflushed: set[Path] = set()
    try:
        for target in files:
            with naming(target):
                unflushed |= {target.parent, *make_folders(target.parent, base)}
        for number, (target, parts) in enumerate(files.items()):
            temporaries[target] = beside(target)
            with naming(target), temporaries[target].open("wb", buffering=0) as opened:
                write(opened, parts)
                if number == 0:
                    on_read()
                os.fsync(opened.fileno())
        for target, temporary in temporaries.items():
            with naming(target):
                temporary.replace(target)
    except BaseException:
        for temporary in temporaries.values():
            temporary.unlink(missing_ok=True)
        raise
    for folder in sorted(unflushed, reverse=True):
        flush_folder(folder)


def beside(target: Path) -> Path:
    """Return a new name for what is to take the place of `target`."""
    return target.with_name(f".{target.name}.{uuid.uuid4().hex}.partial")


def make_folders(folder: Path, base: Path) -> list[Path]:
    """Create a folder and those above it, and return the folders to be flushed for all of them to stay.

    That a folder below `base` is there does not mean that it stays: a run that was stopped, or another thread, may have
    made it and not flushed it yet. So the name of what is found is flushed here, once a process.
    """
    below = [parent for parent in (folder, *folder.parents) if parent.is_relative_to(base) and parent != base]
    made = [parent for parent in below if not parent.is_dir()]
    for found in below[len(made) :]:
        flush_name(found)
    for missing in reversed(made):
        try:
            missing.mkdir(exist_ok=True)
        except FileExistsError as error:  # it is there, and no folder
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(missing)) from error
    return [missing.parent for missing in made]


def make_root(folder: Path) -> None:
    """Create a folder, and those above it, all of which are there to stay when this returns."""
    folder = folder.absolute()
    there = next(above for above in (folder, *folder.parents) if above.is_dir())
    for changed in make_folders(folder, there.parent):
        flush_folder(changed)


@lru_cache(maxsize=1024)
def flush_name(folder: Path) -> None:
    """Flush the name of a folder that was found; in a place where we cannot write, it is not of our making."""
    if os.access(folder.parent, os.W_OK):
        flush_folder(folder.parent)


def write_new(file: Path, data: bytes) -> None:
    """Write a file that must not be there yet, and flush it to disk. Raises FileExistsError."""
    with file.open("xb") as opened:
        opened.write(data)
        opened.flush()
        os.fsync(opened.fileno())


def flush_folder(folder: Path) -> None:
    """Flush a folder's entries to disk."""
    with naming(folder):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def flush_tree(folder: Path) -> None:
    """Flush every file and folder below `folder` to disk."""
    for base, _, names in os.walk(folder, onerror=raise_error):
        for name in names:
            with (Path(base) / name).open("rb") as file:
                os.fsync(file.fileno())
        flush_folder(Path(base))


def raise_error(error: OSError) -> None:
    """Raise it: os.walk leaves out what it cannot list, unless it is told otherwise."""
    raise error
