"""What a store's metadata and columns should be, written into its own root: by this, damage to them is found.

Three things, all of them plain Zarr attributes:

- `digests`, of the root group: the xxh3-64 of every object that is neither a shard's nor the root's, by its key; and,
  last and under the root's own key, that of the root's text as it is without this one entry.
- `run`, of the arrays in COPIES: the fingerprint of the run, so that a root that is damaged, or another store's, does
  not take the knowledge of whose store it is with it.
- the fingerprint also seeds the digests of shards (`shard_seed`), so that a shard of another run, or another shard of
  the same run, does not pass even if its digest came along.

Everything here works on bytes. This module does not know what is in a shard, nor how anything is repaired.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any

import xxhash

from mmextract.engine.objects import Objects

ROOT = "zarr.json"
COPIES = ("record", "shard_digest")
"""Arrays whose attribute `run` repeats the run's fingerprint."""

_DIGESTS = "digests"
_CONSOLIDATED = "consolidated_metadata"


def fingerprint(run: Any) -> str:
    """Return the xxh3-64 of a JSON value as 16 hex digits: two runs have the same if they are the same."""
    return xxhash.xxh3_64_hexdigest(json.dumps(run, sort_keys=True).encode())


def shard_seed(run: str, shard: int) -> int:
    """Return the seed of a shard's digest. run: the run's fingerprint."""
    return (int(run, 16) + shard) % (1 << 64)


def digests_of(objects: Mapping[str, bytes]) -> dict[str, str]:
    """Return key → xxh3-64 in hex."""
    return {key: xxhash.xxh3_64_hexdigest(data) for key, data in objects.items()}


def seal(root: Mapping[str, Any], digests: Mapping[str, str]) -> bytes:
    """Return the text of a root whose attributes hold `digests` and, last, its own."""
    entries = {key: digests[key] for key in sorted(digests)}
    attributes = {name: value for name, value in root["attributes"].items() if name != _DIGESTS}
    sealed = {**root, "attributes": {**attributes, _DIGESTS: entries}}
    entries[ROOT] = xxhash.xxh3_64_hexdigest(_text(sealed))
    return _text(sealed)


def unseal(data: bytes) -> dict[str, Any]:
    """Return the root that `seal` made this text of. Raises ValueError, saying what is wrong, if it did not."""
    root = parse(data)
    if root is None:
        raise ValueError("it is not JSON")
    digests = _attributes(root).get(_DIGESTS)
    if not isinstance(digests, dict) or not isinstance(digests.get(ROOT), str):
        raise ValueError("it holds no digests")
    if seal(root, {key: value for key, value in digests.items() if key != ROOT}) != data:
        raise ValueError("its own digest does not match")
    return root


def sealed_digests(root: Mapping[str, Any]) -> dict[str, str]:
    """Return key → digest of a root, its own left out; empty if it holds none."""
    return {key: value for key, value in _attributes(root).get(_DIGESTS, {}).items() if key != ROOT}


def is_finished(root: Mapping[str, Any]) -> bool:
    """Tell whether a root is that of a finished store."""
    return _CONSOLIDATED in root


def unfinish(root: Mapping[str, Any]) -> bytes:
    """Return the text of the same root, but of a store that is still to be finished."""
    return seal({name: value for name, value in root.items() if name != _CONSOLIDATED}, sealed_digests(root))


def parse(data: bytes | None) -> dict[str, Any] | None:
    """Return a JSON object, or None for what is none."""
    try:
        value = json.loads(data) if data is not None else None
    except ValueError:  # JSON or UTF-8
        return None
    return value if isinstance(value, dict) else None


def _attributes(metadata: Mapping[str, Any]) -> dict[str, Any]:
    attributes = metadata.get("attributes")
    return attributes if isinstance(attributes, dict) else {}


def _text(root: Mapping[str, Any]) -> bytes:
    return json.dumps(root, indent=2).encode()


@dataclass(frozen=True, kw_only=True)
class Identity:
    """What a store says of itself; see `identify`."""

    root: Mapping[str, Any] | None
    """The root's metadata, None if they are missing or damaged."""
    why: str
    """What is wrong with the root; empty if nothing."""
    copies: Mapping[str, str]
    """Array → the run's fingerprint there, for those of COPIES that have one."""

    @property
    def run(self) -> str | None:
        """The fingerprint that most of root and copies agree on; None if there is none."""
        votes = self._votes()
        best = max(votes, key=votes.count, default=None)
        return best if best is not None and 2 * votes.count(best) > len(votes) else None

    @property
    def foreign_root(self) -> bool:
        """Whether the root is sound, but of another run than the rest."""
        return self._root_run is not None and self.run is not None and self._root_run != self.run

    @property
    def attributes(self) -> Mapping[str, Any] | None:
        """The root's attributes if they can be trusted."""
        return None if self.root is None or self.foreign_root else _attributes(self.root)

    @property
    def digests(self) -> Mapping[str, str] | None:
        """What the other metadata and the columns should be, if the root can be trusted."""
        return None if self.root is None or self.foreign_root else sealed_digests(self.root)

    @property
    def _root_run(self) -> str | None:
        return None if self.root is None else fingerprint(_attributes(self.root).get("run"))

    def _votes(self) -> list[str]:
        return [*([self._root_run] if self._root_run else []), *self.copies.values()]


def identify(objects: Objects) -> Identity:
    """Read what a store says of itself. Raises nothing for damage: that is in what is returned."""
    data, root, why = objects.get(ROOT), None, "it is missing"
    if data is not None:
        try:
            root, why = unseal(data), ""
        except ValueError as error:
            why = str(error)
    copies = {name: _attributes(parse(objects.get(f"{name}/{ROOT}")) or {}).get("run") for name in COPIES}
    return Identity(
        root=root, why=why, copies={name: run for name, run in copies.items() if isinstance(run, str)}
    )


def examine(objects: Objects, key: str, digest: str) -> str | None:
    """Read an object and say what is wrong with it, if anything."""
    data = objects.get(key)
    if data is None:
        return "it is missing"
    return None if xxhash.xxh3_64_hexdigest(data) == digest else "it is not what was written"


def lost_or_changed(objects: Objects, digests: Mapping[str, str], executor: Executor) -> list[str]:
    """Return the keys of metadata that are not what they should be, and of columns' chunks that are missing.

    The chunks are listed and not read, so that this is quick: `verify` reads them, and removes those that are damaged.
    """
    arrays: dict[str, set[str]] = {}
    for key in digests:
        arrays.setdefault(key.partition("/")[0], set()).add(key)

    def look(name: str) -> list[str]:
        metadata = f"{name}/{ROOT}"
        chunks = arrays[name] - {metadata}
        present = {f"{name}/c/{chunk}" for chunk in objects.list(f"{name}/c")} if chunks else set()
        changed = metadata in digests and examine(objects, metadata, digests[metadata])
        return [*([metadata] if changed else []), *sorted(chunks - present)]

    return [key for found in executor.map(look, sorted(arrays)) for key in found]


def root_last(keys: Iterable[str]) -> list[str]:
    """Return keys in order, the root's behind all others."""
    return sorted(keys, key=lambda key: (key == ROOT, key))
