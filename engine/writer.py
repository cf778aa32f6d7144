"""Write a store: create it or take it up again, shard by shard, and finish it.

This module knows nothing about models, images or watermarks; what it promises is written in `store`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmextract.engine import shards
from mmextract.engine.integrity import (
    ROOT,
    Identity,
    digests_of,
    fingerprint,
    identify,
    is_finished,
    lost_or_changed,
    root_last,
    sealed_digests,
    shard_seed,
    unseal,
)
from mmextract.engine.layout import Columns, Layout, first_objects, last_objects, shard_keys, to_plain
from mmextract.engine.objects import Objects, locate
from mmextract.engine.store import read_attributes


class OtherRunError(ValueError):
    """The store at this place was made by a run with other settings."""


@dataclass(frozen=True, kw_only=True)
class StoreWriter:
    """Writes the shards of one store; see `open_writer`."""

    layout: Layout
    objects: Objects
    executor: ThreadPoolExecutor = field(repr=False)
    guard: Callable[[], None] = lambda: None
    """Raises if this writer must not commit any more; asked before each commit."""

    def committed(self) -> set[int]:
        """Return the shards that exist."""
        return {int(name) for name in self.objects.list("shard_digest/c")}

    def sweep(self, committed: set[int]) -> None:
        """Remove what killed writers left that is no object; only the one who holds the store may do this."""
        folders = ("hidden_states/c", "record/c")  # a loss of power may have left either
        begun = {int(name) for folder in folders for name in self.objects.list(folder)} - committed
        prefixes = ["", "shard_digest/c", "rejected/c"]
        prefixes += [prefix for name in self.layout.record_fields for prefix in (name, f"{name}/c")]
        prefixes += [p for shard in begun for p in (f"hidden_states/c/{shard}/0/0", f"record/c/{shard}")]
        for prefix in prefixes:
            self.objects.sweep(prefix)

    def write_shard(
        self, shard: int, states: NDArray[Any], records: NDArray[np.int64], rejected: Mapping[int, str]
    ) -> int:
        """Encode one shard, write it, flush it to disk, then commit it. Returns the bytes of hidden states written."""
        return self.commit(shard, self.encode(states, records, rejected))

    def encode(
        self, states: NDArray[Any], records: NDArray[np.int64], rejected: Mapping[int, str]
    ) -> list[list[shards.Bytes]]:
        """Return a shard's objects in pieces, in the order of `shard_keys`.

        states: [L, S, P, D] in the store's dtype; uncompressed pieces are views of it. records: int64 [S, F].
        rejected: row within the shard → reason.
        """
        encoded = shards.encode_shard(states, self.layout.codec, self.executor)
        objects: list[list[shards.Bytes]] = [encoded, [np.ascontiguousarray(records, "<i8").tobytes()]]
        if rejected:
            reasons = [rejected.get(row, "") for row in range(self.layout.shard_samples)]
            objects.append([_encode_strings(reasons)])
        return objects

    def commit(
        self,
        shard: int,
        encoded: Sequence[Sequence[shards.Bytes]],
        on_read: Callable[[], None] = lambda: None,
    ) -> int:
        """Write what `encode` gave, flush it to disk, then its digest. Returns the bytes of hidden states.

        on_read: called when the pieces of the hidden states have been read for the last time; see `Objects.put_all`.
        """
        keys = shard_keys(shard)
        if len(encoded) < len(keys):  # an earlier attempt at this shard may have rejected some
            self.objects.delete(keys[2])
        digest = shards.digest(encoded, seed=shard_seed(self.run, shard))
        self.objects.put_all(dict(zip(keys, encoded, strict=False)), on_read)
        self.guard()
        self.objects.put(f"shard_digest/c/{shard}", [digest.to_bytes(8, "little")])
        return sum(map(len, encoded[0]))

    def rejected(self) -> dict[int, str]:
        """Return row → reason of every committed row that has no states."""
        with_any = sorted({int(name) for name in self.objects.list("rejected/c")} & self.committed())
        found: dict[int, str] = {}
        for shard in with_any:
            reasons = _decode_strings(self._get(f"rejected/c/{shard}"))
            found |= {row: why for row, why in zip(self.layout.rows(shard), reasons, strict=False) if why}
        return found

    def finalised(self) -> bool:
        """Tell whether `finalise` has been through."""
        return is_finished(json.loads(self._get(ROOT)))

    def finalise(self) -> None:
        """Copy the records into columns of their own and consolidate the metadata, once every shard is committed.

        Raises ValueError or FileNotFoundError if the metadata are damaged: nothing is built on them.
        """
        assert len(self.committed()) == self.layout.n_shards
        records = self._records()
        columns = {
            name: values.view(np.uint64) if name.endswith("_hash") else values
            for name, values in zip(self.layout.record_fields, records, strict=True)
        }
        made = last_objects(self._metadata(set(columns)), columns)
        self.objects.put_all({key: [made[key]] for key in made if key != ROOT})
        self.objects.put(ROOT, [made[ROOT]])  # the root is what says that it is finished

    def _metadata(self, without: set[str]) -> dict[str, bytes]:
        """Return key → `zarr.json` of the group and its arrays, those named left out, each what its digest says."""
        root = self._get(ROOT)
        digests = sealed_digests(unseal(root))
        arrays = [name for name, _, key in (key.partition("/") for key in digests) if key == ROOT]
        keys = [f"{name}/{ROOT}" for name in arrays if name not in without]
        metadata = {key: self._get(key) for key in keys}
        found = digests_of(metadata)
        changed = [key for key in keys if found[key] != digests[key]]
        if changed:
            raise ValueError(
                f"{', '.join(changed)} of {self.objects.url} changed during the run: run it again, to repair that"
            )
        return {ROOT: root, **metadata}

    @cached_property
    def run(self) -> str:
        """The run's fingerprint, which is written beside the digests."""
        return str(json.loads(self._get(f"shard_digest/{ROOT}"))["attributes"]["run"])

    def _records(self) -> NDArray[np.int64]:
        """Return int64 [F, n_samples], read in threads by blocks: a task a shard would cost more than its reading."""
        found = np.empty((len(self.layout.record_fields), self.layout.n_samples), np.int64)
        block = 256

        def read(first: int) -> None:
            for shard in range(first, min(first + block, self.layout.n_shards)):
                rows = self.layout.rows(shard)
                data = np.frombuffer(self._get(f"record/c/{shard}/0"), "<i8")
                records = data.reshape(self.layout.shard_samples, -1)
                found[:, rows.start : rows.stop] = records[: len(rows)].T

        for _ in self.executor.map(read, range(0, self.layout.n_shards, block)):
            pass
        return found

    def _get(self, key: str) -> bytes:
        data = self.objects.get(key)
        if data is None:
            raise FileNotFoundError(f"{self.objects.url} has lost {key}: run `mmextract verify` on it")
        return data


def open_writer(
    place: str | Path | Objects,
    layout: Layout,
    columns: Columns,
    attributes: Mapping[str, Any],
    executor: ThreadPoolExecutor,
) -> StoreWriter:
    """Create the store at `place`, or open it again if the same run began it.

    columns: known before the run, one value a sample. attributes: everything that decides the store's bytes; must
    hold `run`, a JSON-able mapping, by whose equality two runs are the same.

    Metadata and columns that are damaged or missing are put back; the store is then to be finalised again. Columns
    are not read for this: of their damage this sees what `verify` removed.

    Raises OtherRunError, with what differs, if another run began it; ValueError if something else is at `place`.
    """
    objects = locate(place)
    identity = identify(objects)
    if identity.root is None and not identity.copies and objects.get(ROOT) is None:
        objects.create(first_objects(layout, columns, attributes), last=ROOT)
        identity = identify(objects)
    _refuse_other(objects, identity, to_plain(attributes["run"]))
    for prefix in ("", "shard_digest/c"):  # what makes a store, and a shard, exist
        objects.settle(prefix)
    if identity.digests is None or lost_or_changed(objects, identity.digests, executor):
        first = first_objects(layout, columns, identity.attributes or attributes)
        for key in root_last(first):  # so that an interrupted repair is taken up again
            if objects.get(key) != first[key]:
                objects.put(key, [first[key]])
    return StoreWriter(layout=layout, objects=objects, executor=executor)


def _refuse_other(objects: Objects, identity: Identity, run: Mapping[str, Any]) -> None:
    """Raise OtherRunError unless most of root and copies say that `run` made the store; ValueError if nothing does."""
    if identity.root is not None or not identity.copies:
        read_attributes(objects)  # raises if it is no store, or one that this version does not know
    if identity.run == fingerprint(run):
        return
    if identity.root is None:
        raise OtherRunError(
            f"{objects.url} is left as it is: its {ROOT} is damaged ({identity.why}), and what is left of the store "
            f"{'belongs to another run' if identity.run else 'does not say which run made it'}.\n"
            "Give the arguments of the run that made it, to repair it; or another -o."
        )
    differences = _differences(identity.root["attributes"].get("run"), run) or [
        f"{ROOT} is of this run, but {', '.join(identity.copies)} beside it are not"
    ]
    raise OtherRunError(
        f"{objects.url} was made by another run, and is left as it is. What differs:\n  "
        + "\n  ".join(differences)
        + "\nGive another -o, or remove it."
    )


def _encode_strings(values: Sequence[str]) -> bytes:
    """Encode strings as Zarr's `vlen-utf8` codec does: a count, then each string behind its length, in bytes."""
    pieces = [len(values).to_bytes(4, "little")]
    for value in values:
        data = value.encode()
        pieces += [len(data).to_bytes(4, "little"), data]
    return b"".join(pieces)


def _decode_strings(data: bytes) -> list[str]:
    """Undo `_encode_strings`."""
    values, at = [], 4
    for _ in range(int.from_bytes(data[:4], "little")):
        length = int.from_bytes(data[at : at + 4], "little")
        values.append(data[at + 4 : at + 4 + length].decode())
        at += 4 + length
    return values


def _differences(stored: Any, wanted: Any, where: str = "") -> list[str]:
    """Name each value in which two JSON values differ."""
    if isinstance(stored, dict) and isinstance(wanted, dict):
        return [
            line
            for key in sorted({*stored, *wanted})
            for line in _differences(stored.get(key), wanted.get(key), f"{where}.{key}" if where else key)
        ]
    if stored == wanted:
        return []
    return [f"{where}: the store has {_short(stored)}, this run has {_short(wanted)}"]


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}…"
