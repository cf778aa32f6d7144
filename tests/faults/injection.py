"""What can be made to happen at a file operation: the process ends, the system refuses, or it is written down."""

from __future__ import annotations

import os
import pickle
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from tests.faults.interposer import CHANGES, Handler, Operation

KILLED = 137


@dataclass(frozen=True, kw_only=True)
class Exit:
    """Ends the process at one operation, as a kill would."""

    at: int
    """Which of the operations that change something, from 0."""
    when: str = "before"
    """`before` or `after` the operation; `within` is after half of a write."""


@dataclass(frozen=True, kw_only=True)
class Refuse:
    """Makes operations fail as a full, broken or forbidden disk does."""

    at: int
    """Which of the operations of these kinds is the first, from 0."""
    kinds: tuple[str, ...]
    """Kinds of operations that are concerned."""
    error: int | None
    """What is raised, an `errno`; None raises nothing."""
    lasting: bool = False
    """Whether all that follow fail too."""
    short: bool = False
    """Whether a write takes half of its bytes first."""


Fault = Exit | Refuse


def make_handler(fault: Fault | None, log: BinaryIO | None) -> Handler:
    """Return what does this, and pickles every operation that was carried out into `log`."""
    counter = _Counter()

    def handle(operation: Operation, perform: Callable[[], Any]) -> Any:
        if operation.kind == "mkdir" and operation.path.exists():
            return perform()  # which changes nothing: the system says so before it looks for room
        if isinstance(fault, Exit) and operation.kind in CHANGES and counter.next() == fault.at:
            _exit(operation, perform, fault.when)
        if isinstance(fault, Refuse) and operation.kind in fault.kinds:
            number = counter.next()
            if number == fault.at or (fault.lasting and number > fault.at):
                return _refuse(operation, perform, fault)
        result = perform()
        if log is not None:
            pickle.dump(operation, log)
            log.flush()
        return result

    return handle


def read_log(path: Path) -> list[Any]:
    """Return the operations, and the shards that were promised in between, in their order."""
    entries = []
    with path.open("rb") as file:
        while file.peek(1):
            entries.append(pickle.load(file))
    return entries


class _Counter:
    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._n = 0

    def next(self) -> int:
        with self._lock:
            self._n += 1
            return self._n - 1


def _exit(operation: Operation, perform: Callable[[], Any], when: str) -> None:
    if when == "within":
        operation.data = operation.data[: len(operation.data) // 2]
    if when != "before":
        perform()
    os._exit(KILLED)


def _refuse(operation: Operation, perform: Callable[[], Any], fault: Refuse) -> Any:
    if operation.kind == "close":
        perform()  # a descriptor is gone even if closing it reports an error
    elif fault.short and operation.kind == "write":
        operation.data = operation.data[: max(1, len(operation.data) // 2)]
        written = perform()
        if fault.error is None:
            return written
    if fault.error is None:
        return perform()
    named = operation.kind not in ("write", "read", "fsync", "fsync_folder", "close")
    raise OSError(fault.error, os.strerror(fault.error), *([str(operation.path)] if named else []))
