"""Read a whole store back and hold it against its digests; withdraw what is damaged, so that its run repairs it.

What is looked at: the root's own digest; every other object of metadata and columns against the digests in the root;
every shard against its digest, and the checksum of each of its inner chunks. This module knows nothing about models
or about writing shards: what is withdrawn is put back by the same run (`writer.open_writer`).
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mmextract.engine import shards
from mmextract.engine.integrity import (
    ROOT,
    Identity,
    examine,
    identify,
    is_finished,
    parse,
    shard_seed,
    unfinish,
)
from mmextract.engine.layout import shard_keys
from mmextract.engine.lease import Lease
from mmextract.engine.objects import Objects, locate
from mmextract.engine.store import read_attributes

_WINDOW = 1024


@dataclass(frozen=True, kw_only=True)
class Damage:
    """One thing that is wrong with a store."""

    key: str
    """The object."""
    why: str
    """What is wrong with it."""
    shard: int | None = None
    """The shard that it takes with it; None for metadata and columns."""


@dataclass(frozen=True, kw_only=True)
class VerifyPlan:
    """What there is to read; see `plan_verify`."""

    objects: Objects
    identity: Identity
    keys: tuple[str, ...]
    """Metadata and columns."""
    shards: tuple[int, ...]
    """Those that are committed, and in a finished store those that should be."""
    n_committed: int
    """How many are committed."""
    n_shards: int | None
    """Shards of the whole store, None if what says so is damaged."""
    n_layers: int | None
    """Inner chunks of a shard, None if what says so is damaged."""

    @property
    def finished(self) -> bool:
        """Whether the root is that of this store, finished."""
        return _finished(self.identity)

    @property
    def n_checks(self) -> int:
        """How many things `run_verify` looks at."""
        return len(self.keys) + len(self.shards)


@dataclass(frozen=True, kw_only=True)
class Report:
    """What `run_verify` found."""

    damage: tuple[Damage, ...]
    """Everything that is wrong, metadata first, then by shard."""
    n_shards: int | None
    """Shards of the whole store, None if what says so is damaged."""
    n_committed: int
    """Shards that were read."""
    finished: bool
    """Whether the run that made the store came to its end; what it should hold and does not is then damage."""
    bytes_read: int
    """Bytes of shards."""

    @property
    def sound(self) -> bool:
        """Whether the store is whole: finished, and nothing is wrong with it."""
        return self.finished and not self.damage

    @property
    def bad_shards(self) -> list[int]:
        """Ascending numbers of the shards that something is wrong with."""
        return sorted({found.shard for found in self.damage if found.shard is not None})


def plan_verify(place: str | Path | Objects) -> VerifyPlan:
    """Work out what there is to read. Raises ValueError if there is no store of ours at `place`."""
    objects = locate(place)
    identity = identify(objects)
    if identity.root is None and not identity.copies:
        read_attributes(objects)  # raises if there is no store, or something else
    committed = {int(name) for name in objects.list("shard_digest/c")}
    n_shards, n_layers = (
        _shape(objects, identity, "shard_digest", 0),
        _shape(objects, identity, "hidden_states", 1),
    )
    expected = set(range(n_shards or 0)) if _finished(identity) else set()
    return VerifyPlan(
        objects=objects,
        identity=identity,
        keys=tuple(identity.digests or ()),
        shards=tuple(sorted(committed | expected)),
        n_committed=len(committed),
        n_shards=n_shards,
        n_layers=n_layers,
    )


def run_verify(
    plan: VerifyPlan, *, threads: int | None = None, on_progress: Callable[[int], None] = lambda n: None
) -> Report:
    """Read everything back in `threads` threads, each of which holds one shard; by default as many as there are cores.

    on_progress is called with the number of things looked at since the last call. Raises OSError if the store cannot
    be reached; a part of a disk that cannot be read any more is damage.
    """
    damage, bytes_read = _root_damage(plan), 0
    with ThreadPoolExecutor(threads or os.cpu_count() or 1) as executor:
        for found in _in_windows(executor, partial(_check_key, plan), plan.keys):
            damage += found
            on_progress(1)
        for found, size in _in_windows(executor, partial(_check_shard, plan), plan.shards):
            damage += found
            bytes_read += size
            on_progress(1)
    return Report(
        damage=tuple(damage),
        n_shards=plan.n_shards,
        n_committed=plan.n_committed,
        finished=plan.finished,
        bytes_read=bytes_read,
    )


def withdraw(plan: VerifyPlan, report: Report) -> bool:
    """Make what is damaged count as not written, so that the same run writes it again; nothing else is touched.

    Digests of bad shards and damaged metadata and columns are deleted, and the store is no longer a finished one. A
    damaged root stays, since there would be no store without it. This takes the store's lease, and then looks again at
    what was damaged, which a run may have repaired meanwhile. Returns whether anything was withdrawn. Raises
    StoreBusyError, with nothing changed, if a run is writing the store, OSError if it cannot be written.
    """
    if not report.damage:
        return False
    with Lease(objects=plan.objects):
        plan = plan_verify(plan.objects)
        shards = [shard for shard in report.bad_shards if _check_shard(plan, shard)[0]]
        found = {damage.key for damage in report.damage if damage.shard is None}
        keys = [key for key in plan.keys if key in found and _check_key(plan, key)]
        if plan.finished and plan.identity.root is not None and (shards or keys):
            plan.objects.put(ROOT, [unfinish(plan.identity.root)])
        for shard in shards:
            plan.objects.delete(f"shard_digest/c/{shard}")
        for key in keys:
            plan.objects.delete(key)
    return bool(shards or keys or _root_damage(plan))


def _finished(identity: Identity) -> bool:
    return identity.root is not None and not identity.foreign_root and is_finished(identity.root)


def _shape(objects: Objects, identity: Identity, name: str, axis: int) -> int | None:
    """Return a length of an array, if its metadata are what they should be."""
    key = f"{name}/{ROOT}"
    digest = (identity.digests or {}).get(key)
    if digest is None or examine(objects, key, digest):
        return None
    metadata = parse(objects.get(key))
    assert metadata is not None
    return int(metadata["shape"][axis])


def _root_damage(plan: VerifyPlan) -> list[Damage]:
    identity = plan.identity
    if identity.root is None:
        lost = "columns" if identity.run else "columns and shards"
        return [
            Damage(key=ROOT, why=f"{identity.why}; other metadata, {lost} could not be checked without it")
        ]
    if identity.foreign_root:
        return [Damage(key=ROOT, why="it is that of another run's store")]
    return []


def _check_key(plan: VerifyPlan, key: str) -> list[Damage]:
    assert plan.identity.digests is not None
    try:
        why = examine(plan.objects, key, plan.identity.digests[key])
    except OSError as error:
        why = _unreadable(error)
    return [Damage(key=key, why=why)] if why else []


def _check_shard(plan: VerifyPlan, shard: int) -> tuple[list[Damage], int]:
    """Return what is wrong with a shard, and how many bytes it has."""
    key = f"shard_digest/c/{shard}"
    if plan.n_shards is not None and shard >= plan.n_shards:
        return [Damage(key=key, shard=shard, why=f"the store has only {plan.n_shards} shards")], 0
    states, record, rejected = shard_keys(shard)
    try:
        stored = plan.objects.get(key)
        if stored is None:
            return [Damage(key=key, shard=shard, why="it is missing")], 0
        found = {name: plan.objects.get(name) for name in (states, record, rejected)}
    except OSError as error:
        return [Damage(key=states, shard=shard, why=_unreadable(error))], 0
    missing = [name for name in (states, record) if found[name] is None]
    if missing:
        return [Damage(key=name, shard=shard, why="it is missing") for name in missing], 0
    data = [content for content in found.values() if content is not None]
    damage = _check_chunks(shard, states, data[0], plan.n_layers)
    if not damage and plan.identity.run is not None:
        digest = shards.digest([data], seed=shard_seed(plan.identity.run, shard))
        if digest.to_bytes(8, "little") != stored:
            damage = [Damage(key=key, shard=shard, why=_MISMATCH)]
    return damage, sum(map(len, data))


_MISMATCH = (
    "what is in the shard does not match it: some of it is not what was written, or is of another shard"
)


def _check_chunks(shard: int, key: str, data: bytes, n_layers: int | None) -> list[Damage]:
    """Return which inner chunks fail their checksum; the digest finds this too, but not where."""
    if n_layers is None:
        return []
    try:
        damaged = shards.damaged_chunks(data, n_layers)
    except ValueError:
        return [Damage(key=key, shard=shard, why="its index is damaged, or it is cut short")]
    layers = ", ".join(map(str, damaged))
    return [Damage(key=key, shard=shard, why=f"damaged at index {layers} of the layers")] if damaged else []


def _unreadable(error: OSError) -> str:
    """Return the reason for a part of a disk that cannot be read; raise again what another attempt may not see."""
    if error.errno != errno.EIO:
        raise error
    return f"it cannot be read: {error.strerror}"


def _in_windows(
    executor: ThreadPoolExecutor, work: Callable[[Any], Any], items: Sequence[Any]
) -> Iterator[Any]:
    """Map in threads, in order, with a bounded number of items begun."""
    for start in range(0, len(items), _WINDOW):
        yield from executor.map(work, items[start : start + _WINDOW])
