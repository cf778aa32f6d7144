"""Write a store: create it or take it up again, shard by shard, and finish it.

This module knows nothing about models, images or watermarks; what it promises is written in `store`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmextract.engine import shards
from mmextract.engine.layout import Columns, Layout, first_objects, last_objects, to_plain
from mmextract.engine.objects import Objects, locate
from mmextract.engine.store import read_attributes

ROOT = "zarr.json"


class OtherRunError(ValueError):
    """The store at this place was made by a run with other settings."""


@dataclass(frozen=True, kw_only=True)
class StoreWriter:
    """Writes the shards of one store; see `open_writer`."""

    layout: Layout
    objects: Objects
    executor: ThreadPoolExecutor = field(repr=False)

    def committed(self) -> set[int]:
        """Return the shards that exist."""
        return {int(name) for name in self.objects.list("shard_digest/c")}

    def write_shard(
        self, shard: int, states: NDArray[Any], records: NDArray[np.int64], rejected: Mapping[int, str]
    ) -> int:
        """Write one shard, flush it to disk, then commit it. Returns the bytes of hidden states written.

        states: [L, S, P, D] in the store's dtype. records: int64 [S, F]. rejected: row within the shard → reason.
        """
        encoded = shards.encode_shard(states, self.layout.codec, self.executor)
        parts = [encoded, [np.ascontiguousarray(records, "<i8").tobytes()]]
        keys = [f"hidden_states/c/{shard}/0/0/0", f"record/c/{shard}/0"]
        if rejected:
            reasons = [rejected.get(row, "") for row in range(self.layout.shard_samples)]
            parts.append([_encode_strings(reasons)])
            keys.append(f"rejected/c/{shard}")
        for key, pieces in zip(keys, parts, strict=True):
            self.objects.put(key, pieces)
        self.objects.put(f"shard_digest/c/{shard}", [shards.digest(parts).to_bytes(8, "little")])
        return sum(map(len, encoded))

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
        return "consolidated_metadata" in json.loads(self._get(ROOT))

    def finalise(self) -> None:
        """Copy the records into columns of their own and consolidate the metadata, once every shard is committed."""
        assert len(self.committed()) == self.layout.n_shards
        records = np.concatenate(list(self.executor.map(self._records, range(self.layout.n_shards))))
        columns = {
            name: values.view(np.uint64) if name.endswith("_hash") else values
            for name, values in zip(self.layout.record_fields, np.ascontiguousarray(records.T), strict=True)
        }
        arrays = (f"{name}/{ROOT}" for name in sorted(self.objects.list("")) if name not in (ROOT, *columns))
        metadata = {key: self._get(key) for key in (ROOT, *arrays)}
        made = last_objects(metadata, columns)
        for key in sorted(made, key=lambda key: key == ROOT):  # the root is what says that it is finished
            self.objects.put(key, [made[key]])

    def _records(self, shard: int) -> NDArray[np.int64]:
        """Return int64 [rows of the shard, F]."""
        data = np.frombuffer(self._get(f"record/c/{shard}/0"), "<i8")
        return data.reshape(self.layout.shard_samples, -1)[: len(self.layout.rows(shard))]

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

    Raises OtherRunError, with what differs, if another run began it; ValueError if something else is at `place`.
    """
    objects = locate(place)
    if objects.get(ROOT) is None:
        objects.create(first_objects(layout, columns, attributes), last=ROOT)
    else:
        differences = _differences(read_attributes(objects).get("run"), to_plain(attributes["run"]))
        if differences:
            raise OtherRunError(
                f"{objects.url} was made by another run, and is left as it is. What differs:\n  "
                + "\n  ".join(differences)
                + "\nGive another -o, or remove it."
            )
    return StoreWriter(layout=layout, objects=objects, executor=executor)


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
