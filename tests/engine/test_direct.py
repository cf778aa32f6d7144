"""Direct writes: the same bytes whatever the sizes are, and whatever the file system takes."""

import errno
import fcntl
import io
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from mmextract.engine.direct import BLOCK_BYTES, BUFFER_BYTES, FEWEST_BYTES, write

O_DIRECT = getattr(os, "O_DIRECT", 0)

SIZES = [
    (0,),
    (1, 0, 4),
    (FEWEST_BYTES - 1,),
    (FEWEST_BYTES,),
    (FEWEST_BYTES - 4, 4, 4),
    (BLOCK_BYTES * 300 + 1,),
    (BUFFER_BYTES - 1, 1),
    (BUFFER_BYTES, 1),
    (0, 3, BUFFER_BYTES, 4, 2 * BUFFER_BYTES, 5, 0),
]


class File(io.FileIO):
    """A file that says how it was written, and may take less than it is given."""

    most: int | None = None
    """Bytes that one call takes."""
    refuses_direct = False

    def __init__(self, path: Path) -> None:
        super().__init__(path, "w")
        self.calls: list[tuple[int, bool]] = []
        """Bytes taken, and whether past the page cache, of each call."""

    def write(self, data: object, /) -> int:
        assert isinstance(data, memoryview)
        direct = bool(fcntl.fcntl(self, fcntl.F_GETFL) & O_DIRECT)
        if direct and self.refuses_direct:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        taken = super().write(data[: self.most])
        self.calls.append((taken, direct))
        return taken


def random_parts(sizes: Sequence[int]) -> list[bytes]:
    rng = np.random.default_rng(len(sizes))
    return [rng.bytes(size) for size in sizes]


def takes_direct_writes(folder: Path) -> bool:
    try:
        os.close(os.open(folder / "probe", os.O_CREAT | os.O_WRONLY | O_DIRECT, 0o600))
    except OSError:
        return False
    return bool(O_DIRECT)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_a_file_holds_its_parts(sizes: Sequence[int], tmp_path: Path) -> None:
    parts = random_parts(sizes)
    with File(tmp_path / "file") as file:
        write(file, [parts[0], *(memoryview(part) for part in parts[1:])])
    assert (tmp_path / "file").read_bytes() == b"".join(parts)


def test_a_large_file_is_written_in_blocks_past_the_page_cache(tmp_path: Path) -> None:
    sizes = (BUFFER_BYTES, BLOCK_BYTES, 5)
    with File(tmp_path / "file") as file:
        write(file, random_parts(sizes))
    direct = takes_direct_writes(tmp_path)
    assert file.calls == [(BUFFER_BYTES, direct), (BLOCK_BYTES, direct), (5, False)]


def test_a_small_file_is_one_write_through_it(tmp_path: Path) -> None:
    with File(tmp_path / "file") as file:
        write(file, random_parts((100, 4, 100)))
    assert file.calls == [(204, False)]


def test_a_file_system_without_direct_writes_gets_the_same_bytes(tmp_path: Path) -> None:
    parts = random_parts((BUFFER_BYTES, 5))
    with File(tmp_path / "file") as file:
        file.refuses_direct = True
        write(file, parts)
    assert (tmp_path / "file").read_bytes() == b"".join(parts)
    assert not any(direct for _, direct in file.calls)


@pytest.mark.parametrize("most", (BLOCK_BYTES * 7, BLOCK_BYTES * 1000 + 512, 1_000_003), ids=str)
def test_what_a_short_write_leaves_is_written_too(most: int, tmp_path: Path) -> None:
    parts = random_parts((BUFFER_BYTES, BLOCK_BYTES, 5))
    with File(tmp_path / "file") as file:
        file.most = most
        write(file, parts)
    assert (tmp_path / "file").read_bytes() == b"".join(parts)
    assert len(file.calls) > 2


@pytest.mark.parametrize("size", (10, BUFFER_BYTES), ids=str)
@pytest.mark.parametrize("number", (errno.ENOSPC, errno.EIO, errno.EINVAL), ids=os.strerror)
def test_what_goes_wrong_is_raised(
    size: int, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(file: File, data: memoryview) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(File, "write", fail)
    with File(tmp_path / "file") as file, pytest.raises(OSError, match=os.strerror(number)):
        write(file, random_parts((size,)))
