"""The places that an image's bytes can lie in: a file under the image root, a Parquet row, a row of a saved
data set.

Paths come from data that nobody has vetted, so a file is read only if it is a regular file inside its root.
What the text of a path shows (`..`, an absolute path elsewhere, a URL) is an error of the data set, raised
when it is read; what only the file system shows (missing, a link that leads out, a FIFO) rejects one sample,
when its turn comes.

This module knows nothing about pixels, questions or the formats that name these places.
"""

from __future__ import annotations

import errno
import os
import re
import stat
import threading
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from mmextract.engine.images import RejectedSample

MAX_BYTES = 2**30
"""Largest encoded image that is read: more than the most pixels that are decoded need in a usual encoding."""

SAMPLE_ERRORS = {
    errno.ENOENT: "the image file is missing",
    errno.ENOTDIR: "the image file is missing",
    errno.EACCES: "the image file must not be read (permission denied)",
    errno.EPERM: "the image file must not be read (permission denied)",
    errno.ELOOP: "the image file is a link that leads back to itself",
    errno.ENAMETOOLONG: "the image file's name is too long",
    errno.ENXIO: "the image is not a regular file",
    errno.EISDIR: "the image is not a regular file",
}
"""Errors that are about one file. Others (a failing disk, too many open files) hit all, and end the run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FileImage:
    """An image file inside `root`; make it with `file_image`, which checks the name."""

    root: Path
    """Folder that the file must lie in, after all links are followed."""
    name: str
    """Path relative to `root`."""

    def read(self) -> bytes:
        """Return the file's bytes. Raises RejectedSample, or FileNotFoundError if the root itself is gone."""
        root = os.path.realpath(self.root)
        try:
            path = Path(os.path.realpath(self.root / self.name, strict=True))
            if not path.is_relative_to(root):
                raise RejectedSample("the image file is a link that leads out of the image root")
            return _read_regular(path)
        except OSError as error:
            if error.errno not in SAMPLE_ERRORS:
                raise
            if not self.root.is_dir():
                raise FileNotFoundError(
                    errno.ENOENT, "the image root has vanished", str(self.root)
                ) from error
            raise RejectedSample(SAMPLE_ERRORS[error.errno]) from error

    def is_listed(self) -> bool:
        """Return whether the file system has an entry of that name, whatever it is."""
        return os.path.lexists(self.root / self.name)


def _read_regular(path: Path) -> bytes:
    with open(path, "rb", opener=_open_without_waiting) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise RejectedSample(SAMPLE_ERRORS[errno.EISDIR])
        if status.st_size > MAX_BYTES:
            raise RejectedSample(
                f"the image file has {status.st_size:,} bytes, more than the limit of {MAX_BYTES:,}"
            )
        return file.read()


def _open_without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # opening a FIFO would wait for its writer


def file_image(root: Path, name: str) -> FileImage:
    """Return the image at `name`, which may be relative to `root`, absolute inside it, or a `file://` URL of
    either.

    Raises ValueError if it names another place.
    """
    if re.match(r"(?!file:)[a-z][a-z0-9+.-]*://|data:image", name, re.IGNORECASE):
        raise ValueError(f"image {name[:80]!r} is not a local file: save it as one and give its path")
    path = Path(name.removeprefix("file://"))
    if "\0" in name or not path.name:
        raise ValueError(f"image {name!r} is not a path of a file")
    if path.is_absolute():
        bases = (root.absolute(), root.resolve())
        path = next((path.relative_to(base) for base in bases if path.is_relative_to(base)), path)
    if path.is_absolute() or Path(os.path.normpath(path)).parts[:1] == (os.pardir,):
        raise ValueError(
            f"image {name!r} lies outside of the image root {root}: give paths inside it, or --image-root"
        )
    return FileImage(root=root, name=path.as_posix())


@dataclass(frozen=True, slots=True, kw_only=True)
class ParquetImage:
    """An image in a binary column, or a `{bytes, path}` struct column, of a Parquet file."""

    path: Path
    """The Parquet file."""
    column: str
    """Path of the column that holds the bytes, such as `image` or `image.bytes`."""
    row_group: int
    """Row group, from 0."""
    row: int
    """Row in the row group, from 0."""
    name: str
    """What the user calls it."""

    def read(self) -> bytes:
        """Return the image's bytes. The whole row group is read, and kept for its next rows.

        Raises ValueError if it is damaged, since that is not about one sample.
        """
        modified = self.path.stat().st_mtime_ns
        with _row_group_lock:  # threads that need the same row group must not all load it
            images = _read_row_group(self.path, modified, self.row_group, self.column)
        return bytes(images[self.row].as_py())


_row_group_lock = threading.Lock()


@lru_cache(maxsize=2)  # threads that decode rows on both sides of a border need both
def _read_row_group(path: Path, _modified: int, row_group: int, column: str) -> Any:
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            values = file.read_row_group(row_group, columns=[column]).column(0)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"row group {row_group} of {path} cannot be read: {error}") from error
    return pc.struct_field(values, "bytes") if values.type.num_fields else values


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetImage:
    """An image in a column of a Hugging Face data set saved on disk."""

    path: Path
    """Folder of the data set."""
    column: str
    """Name of its image column."""
    row: int
    """Row, from 0."""
    name: str
    """What the user calls it."""

    def read(self) -> bytes:
        """Return the image's bytes. The data set is opened once a process and stays memory-mapped."""
        value = open_dataset(self.path)[self.row : self.row + 1].column(self.column)[0].as_py()
        return bytes(value["bytes"] if isinstance(value, dict) else value)


def open_dataset(path: Path) -> Any:
    """Open a data set saved by `datasets.Dataset.save_to_disk`, to give Arrow tables, once a process.

    Raises ValueError if the optional package is missing or the folder is damaged.
    """
    try:
        return _open_dataset(path, (path / "state.json").stat().st_mtime_ns)
    except ImportError as error:
        raise ValueError(
            f'{path} is a Hugging Face data set: to read it, run pip install "mmextract[datasets]"'
        ) from error
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{path} is not a readable Hugging Face data set: {error}") from error


@lru_cache(maxsize=2)
def _open_dataset(path: Path, _modified: int) -> Any:
    import datasets

    return datasets.Dataset.load_from_disk(str(path)).with_format("arrow")
