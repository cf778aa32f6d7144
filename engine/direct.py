"""Write large files past the kernel's page cache, from memory of their own.

What a dump writes is not read again while it runs, so a copy in the page cache costs processor time, and drives out
what is read: inputs, and the model's own weights. With O_DIRECT the device takes the bytes from a buffer that is
aligned as it wants; the file system may refuse, and then the page cache is used. This module knows nothing about what
is written, and promises nothing about when it is on the disk: flush the file.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import threading
from collections.abc import Iterator, Sequence
from io import RawIOBase

import numpy as np

Buffer = bytes | bytearray | memoryview

FEWEST_BYTES = 1 << 20
"""Smaller files go through the page cache: they are read again soon, and a device waits longer for each."""

BUFFER_BYTES = 8 << 20
"""Written at a time. Whole blocks of any device: theirs have 512 or 4,096 bytes."""

BLOCK_BYTES = 4096
"""What direct writes are aligned to, in memory and in the file."""

_O_DIRECT = getattr(os, "O_DIRECT", 0)  # not everywhere
_of_thread = threading.local()


def write(file: RawIOBase, parts: Sequence[Buffer]) -> None:
    """Write the concatenation of parts to an unbuffered file that was just opened. Raises OSError."""
    if sum(map(len, parts)) < FEWEST_BYTES:
        _write_all(file, memoryview(b"".join(parts)))
        return
    _set_direct(file, True)
    for block in _gather(parts):
        whole = len(block) // BLOCK_BYTES * BLOCK_BYTES
        _write_all(file, block[:whole])
        if whole < len(block):  # the end
            _set_direct(file, False)
            _write_all(file, block[whole:])


def _gather(parts: Sequence[Buffer]) -> Iterator[memoryview]:
    """Yield the concatenation of parts in pieces of BUFFER_BYTES, the last one shorter, each in the same buffer."""
    buffer = _buffer()
    used = 0
    for part in parts:
        rest = np.frombuffer(part, np.uint8)
        while len(rest):
            some = rest[: BUFFER_BYTES - used]
            buffer[used : used + len(some)] = some
            used, rest = used + len(some), rest[len(some) :]
            if used == BUFFER_BYTES:
                yield buffer.data
                used = 0
    if used:
        yield buffer[:used].data


def _buffer() -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    """Return this thread's buffer: memory that is fresh each time costs as much as writing it."""
    if not hasattr(_of_thread, "buffer"):
        _of_thread.buffer = np.frombuffer(mmap.mmap(-1, BUFFER_BYTES), np.uint8)  # begins with a page
    found: np.ndarray[tuple[int], np.dtype[np.uint8]] = _of_thread.buffer
    return found


def _write_all(file: RawIOBase, data: memoryview) -> None:
    while data:
        try:
            written = file.write(data)
        except OSError as error:
            if error.errno != errno.EINVAL or not _set_direct(file, False):
                raise
            continue  # this file system, or what a short write left, takes no direct ones
        assert written is not None
        data = data[written:]


def _set_direct(file: RawIOBase, direct: bool) -> bool:
    """Turn direct writing on or off; tell whether that changed anything."""
    flags = fcntl.fcntl(file, fcntl.F_GETFL)
    wanted = flags | _O_DIRECT if direct else flags & ~_O_DIRECT
    if wanted == flags:
        return False
    try:
        fcntl.fcntl(file, fcntl.F_SETFL, wanted)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return False
    return True
