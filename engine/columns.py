"""Zarr's view of a store's columns, in which a chunk that is missing is an error.

Zarr fills in what it does not find, which for a column would be zeros or empty texts that nobody wrote. This module
knows nothing about hidden states: they are read, and checked, by `store`.
"""

from __future__ import annotations

from zarr.abc.store import ByteRequest
from zarr.abc.store import Store as ZarrStore
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import WrapperStore

COME_WITH_SHARDS = ("hidden_states", "record", "rejected", "shard_digest")
"""Arrays whose chunks may be missing: those of shards that are not committed, or that rejected nothing."""


class WholeColumns(WrapperStore[ZarrStore]):
    """A Zarr store that raises FileNotFoundError for a missing chunk of any other array, or missing metadata.

    url: what the user calls it.
    """

    def __init__(self, store: ZarrStore, url: str = "the store") -> None:
        super().__init__(store)
        self._url = url

    def _with_store(self, store: ZarrStore) -> WholeColumns:
        return WholeColumns(store, self._url)

    async def get(
        self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        """Return the value under `key`, None if there is none and that is no loss."""
        value = await super().get(key, prototype, byte_range)
        name, _, chunk = key.partition("/")
        must_be_there = key == "zarr.json" or (chunk.startswith("c/") and name not in COME_WITH_SHARDS)
        if value is None and must_be_there:
            raise FileNotFoundError(f"{self._url} has lost {key}: `mmextract verify` lists all that is lost")
        return value
