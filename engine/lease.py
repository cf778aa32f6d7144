"""One writer a store: a lease that its holder renews, and that others can take when the holder is gone.

The lease is an object beside the commits, made by exclusive create. It is never overwritten by anybody but its
holder: who finds it stale creates its *successor*, an object named after the stale holder, so that of any number of
takers exactly one wins, on a disk as in a bucket. The last link of that chain holds the store:

    shard_digest/lease                  the first holder, A
    shard_digest/lease-<id of A>        B, who found A gone
    shard_digest/lease-<id of B>        C, who found B gone, and holds the store

To release it is to delete the first link first: the others are then reachable from nowhere, and a taker that comes
late, and creates a link to one of them, sees that it stands in no chain.

A holder is gone if its process is (which shows on the same machine only), or if its lease has run out by the clock
of the one who asks; clocks are taken to agree within a few seconds. What is not promised: a holder that was stopped
between looking at its lease and renewing it, for longer than the lease runs, may for one renewal hold it beside
another. Shards are idempotent, so that costs work and no data. On S3 all of this holds where exclusive create does
(`If-None-Match: *`) and reads follow writes.

This module knows nothing about shards, plans or models.
"""

from __future__ import annotations

import json
import socket
import threading
import time
import uuid
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from types import TracebackType
from typing import Self

from mmextract.engine.objects import Objects
from mmextract.engine.processes import Process, this_process

FOLDER, NAME = "shard_digest", "lease"
"""Inside an array, where Zarr looks for no members and complains of none."""

SECONDS = 60.0
"""How long a lease runs without being renewed; it is renewed three times as often."""

ATTEMPTS = 5
SECONDS_TO_WRITE = 2.0
"""How long a lease may be unreadable because somebody is writing it at this moment."""


class StoreBusyError(OSError):
    """Another live run writes this store."""


class LeaseLostError(OSError):
    """This run no longer holds its store."""


@dataclass(frozen=True, kw_only=True)
class Holder:
    """Who holds, or held, a lease."""

    owner: str
    """Unique in the world."""
    host: str
    """For people."""
    pid: int
    """Its process, by the numbers of `kernel`."""
    process_started: int | None
    """Clock ticks from the kernel's start to that of the process, which tells it from a later one of the same pid."""
    kernel: str | None
    """See `processes.Process`; where it is None, only time tells."""
    since: float
    """When it got the lease, in UTC seconds."""
    until: float
    """When it runs out, in UTC seconds."""

    def is_gone(self) -> bool:
        """Tell whether the lease has run out, or its process is seen not to exist any more."""
        if time.time() > self.until:
            return True
        return Process(pid=self.pid, started=self.process_started, kernel=self.kernel).is_gone()

    def __str__(self) -> str:
        return (
            f"process {self.pid} on {self.host}, since {_clock(self.since)}, until {_clock(self.until)} "
            "unless it renews its lease"
        )


@dataclass(kw_only=True)
class Lease:
    """A context manager that holds a store; see `hold`."""

    objects: Objects
    seconds: float = SECONDS
    _key: str = ""
    _holder: Holder = field(default_factory=lambda: _this_process())
    _ended: threading.Event = field(default_factory=threading.Event)
    _lost: str = ""
    _renewer: threading.Thread | None = None

    def __enter__(self) -> Self:
        """Take the lease. Raises StoreBusyError, saying who has it; OSError if it cannot be written."""
        self._key = self._acquire()
        self.objects.sweep(FOLDER)
        self._renewer = threading.Thread(target=self._renew, name="mmextract-lease", daemon=True)
        self._renewer.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._renewer is not None
        self._ended.set()
        self._renewer.join()
        try:
            if is_held(self.objects, self.owner):
                self._release()
        except (OSError, ValueError):
            if kind is None:
                raise
            # what ended the run is what its user is to hear of; the lease ends with the process, or by its time

    @property
    def owner(self) -> str:
        """The id by which `is_held` knows this lease."""
        return self._holder.owner

    def check(self) -> None:
        """Raise LeaseLostError if the lease is no longer this run's, or could not be renewed in time."""
        if self._lost:
            raise LeaseLostError(
                f"this run no longer holds {self.objects.url}: {self._lost}. It stops, so that two do not write "
                "one store; run the same command again to continue"
            )

    def confirm(self) -> None:
        """Do as `check` does, and look at the store: a run that slept, or whose disk is gone, commits nothing more."""
        if not self._lost and not is_held(self.objects, self.owner):
            self._lost = (
                "its lease is not there any more (was the store moved or removed, or is its disk gone?)"
            )
        self.check()

    def _acquire(self) -> str:
        for _ in range(ATTEMPTS):
            chain = _chain(self.objects)
            if chain and not chain[-1].is_gone():
                raise StoreBusyError(
                    f"{self.objects.url} is being written by another run: {chain[-1]}. Wait for it, or use "
                    "another store"
                )
            key = _link(chain[-1] if chain else None)
            if self.objects.put_new(key, self._record()):
                if self._holder.owner in (holder.owner for holder in _chain(self.objects)):
                    return key
                self.objects.delete(key)  # the chain ended while we looked at it
        raise StoreBusyError(f"{self.objects.url} changes hands all the time: try again")

    def _record(self) -> bytes:
        return json.dumps({**asdict(self._holder), "until": time.time() + self.seconds}).encode()

    def _renew(self) -> None:
        deadline = time.monotonic() + self.seconds
        while not self._ended.wait(self.seconds / 3):
            try:
                began = time.monotonic()
                chain = _chain(self.objects)
                if not chain or chain[-1].owner != self._holder.owner:
                    self._lost = f"it was taken over by {chain[-1]}" if chain else "its lease was removed"
                    return
                self.objects.put(self._key, [self._record()])
                deadline = began + self.seconds
            except (OSError, ValueError) as error:
                if time.monotonic() > deadline:
                    self._lost = f"its lease could not be renewed ({error})"
                    return

    def _release(self) -> None:
        """Delete the chain, its first link first, and what was left by others that broke off while releasing."""
        for name in sorted(filter(_is_link, self.objects.list(FOLDER))):  # `lease` comes before `lease-…`
            self.objects.delete(f"{FOLDER}/{name}")


def is_held(objects: Objects, owner: str) -> bool:
    """Tell whether the lease of this id still stands, be its holder alive or not."""
    chain = _chain(objects)
    return bool(chain) and chain[-1].owner == owner


def sweep(objects: Objects) -> None:
    """Remove what a run left behind that was killed while it released its lease. Reads only, if there is nothing."""
    if any(_is_link(name) for name in objects.list(FOLDER)):
        with suppress(StoreBusyError), Lease(objects=objects):
            pass


def _chain(objects: Objects) -> list[Holder]:
    """Return the holders from the first to the one that has the lease, if any."""
    chain: list[Holder] = []
    while (holder := _read(objects, _link(chain[-1] if chain else None))) is not None:
        chain.append(holder)
    return chain


def _is_link(name: str) -> bool:
    return name == NAME or name.startswith(f"{NAME}-")


def _link(previous: Holder | None) -> str:
    return f"{FOLDER}/{NAME}" if previous is None else f"{FOLDER}/{NAME}-{previous.owner}"


def _read(objects: Objects, key: str) -> Holder | None:
    deadline = time.monotonic() + SECONDS_TO_WRITE
    while (data := objects.get(key)) is not None:
        try:
            return Holder(**json.loads(data))
        except (ValueError, TypeError) as error:
            if time.monotonic() > deadline:
                raise ValueError(
                    f"the lease {key} of {objects.url} is damaged: remove it if no other run writes this store"
                ) from error
            time.sleep(0.05)
    return None


def _this_process() -> Holder:
    now, process = time.time(), this_process()
    return Holder(
        owner=uuid.uuid4().hex,
        host=socket.gethostname(),
        pid=process.pid,
        process_started=process.started,
        kernel=process.kernel,
        since=now,
        until=now,
    )


def _clock(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
