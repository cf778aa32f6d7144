"""Which process did something, and whether it is still there, as far as that can be told from here.

This module knows nothing about what processes do.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2s
from pathlib import Path
from typing import Self


@dataclass(frozen=True, kw_only=True)
class Process:
    """A process, told from a later one of the same number; see `this_process`."""

    pid: int
    """Its number among those of `kernel`."""
    started: int | None
    """Clock ticks from the kernel's start to its own."""
    kernel: str | None
    """A digest of the boot and the pid namespace; None where the system does not say."""

    def is_gone(self) -> bool:
        """Tell whether it is known to have ended: False for one of another machine, or container."""
        if self.kernel is None or self.kernel != _kernel():
            return False
        started = _find_start(self.pid)
        if started is not None:
            return started != self.started
        try:
            os.kill(self.pid, 0)  # /proc may hide the processes of other users
        except ProcessLookupError:
            return True
        except PermissionError:
            return False
        return _find_start(self.pid) != self.started  # it began, or ended and was not waited for yet

    def __str__(self) -> str:
        return f"{self.pid}-{self.started}-{self.kernel}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """Undo `str`. Raises ValueError for anything else."""
        pid, started, kernel = text.split("-")
        return cls(
            pid=int(pid),
            started=None if started == "None" else int(started),
            kernel=None if kernel == "None" else kernel,
        )


def this_process() -> Process:
    """Return the process that asks."""
    return Process(pid=os.getpid(), started=_find_start(os.getpid()), kernel=_kernel())


@lru_cache(maxsize=1)
def _kernel() -> str | None:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
        namespace = Path("/proc/self/ns/pid").readlink()
    except OSError:
        return None
    return blake2s(f"{boot} {namespace}".encode(), digest_size=8).hexdigest()


def _find_start(pid: int) -> int | None:
    """Return the start of a live process in clock ticks; None if there is none, or it has ended (a zombie has)."""
    try:
        # the name in brackets may hold anything, brackets too
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return None
    return None if fields[0] in (b"Z", b"X") else int(fields[19])
