"""What a store looks like: its shapes, and the objects it begins with before any sample is done.

Everything here is a pure function of its arguments: the same run always begins with the same bytes. This module
knows nothing about where objects are kept.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.core.buffer import Buffer, default_buffer_prototype
from zarr.errors import ZarrUserWarning
from zarr.storage import MemoryStore

from mmextract.engine import shards
from mmextract.engine.integrity import ROOT, digests_of, fingerprint, seal, sealed_digests

FORMAT = 1
COLUMN_CHUNK = 1 << 16
DTYPES: Mapping[str, np.dtype[Any]] = {
    "float32": np.dtype("<f4"),
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype("<u2"),
}
BFLOAT16_NAN = 0x7FC0


Columns = Mapping[str, Sequence[str] | Sequence[int] | Sequence[float] | Sequence[bool] | NDArray[Any]]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Shape and encoding of a store."""

    n_samples: int
    """Rows, rejected ones included."""
    layers: tuple[int, ...]
    """Decoder blocks in the order of the `layer` axis; −1 is the input of block 0."""
    positions: tuple[str, ...]
    """Names along the `position` axis."""
    hidden_size: int
    """D."""
    dtype: str = "float32"
    """`float32`, `float16`, or `bfloat16`, which is stored as its uint16 bits."""
    shard_samples: int = 1024
    """S, the samples of a shard."""
    codec: str = "lz4"
    """One of `shards.CODECS`."""
    record_fields: tuple[str, ...] = ("n_tokens",)
    """What the run finds out about each sample, in the order of the `record_field` axis."""

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"store dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        if self.codec not in shards.CODECS:
            raise ValueError(f"codec must be one of {', '.join(shards.CODECS)}, got {self.codec!r}")
        sizes = (self.n_samples, len(self.layers), len(self.positions), self.hidden_size, self.shard_samples)
        if min(sizes) < 1:
            raise ValueError(
                f"a store needs at least one sample, layer, position and hidden unit; got {sizes}"
            )

    @property
    def n_shards(self) -> int:
        """Number of shards, the last of which may be part full."""
        return -(-self.n_samples // self.shard_samples)

    def rows(self, shard: int) -> range:
        """Return the rows of a shard."""
        start = shard * self.shard_samples
        return range(start, min(start + self.shard_samples, self.n_samples))

    @property
    def nan(self) -> float | int:
        """What stands where there is no state, as stored."""
        return BFLOAT16_NAN if self.dtype == "bfloat16" else np.nan

    def empty_shard(self) -> NDArray[Any]:
        """Return [L, S, P, D] of NaN, to be filled and given to `StoreWriter.write_shard`."""
        shape = (len(self.layers), self.shard_samples, len(self.positions), self.hidden_size)
        return np.full(shape, self.nan, DTYPES[self.dtype])

    def empty_records(self) -> NDArray[np.int64]:
        """Return [S, F] of −1, to be filled and given to `StoreWriter.write_shard`."""
        return np.full((self.shard_samples, len(self.record_fields)), -1, np.int64)


def shard_keys(shard: int) -> tuple[str, str, str]:
    """Return the objects of a shard in the order of its digest; the last is there only if samples were rejected."""
    return f"hidden_states/c/{shard}/0/0/0", f"record/c/{shard}/0", f"rejected/c/{shard}"


def first_objects(layout: Layout, columns: Columns, attributes: Mapping[str, Any]) -> dict[str, bytes]:
    """Return key → bytes of a store without samples: its metadata and what is known of each sample.

    attributes: must hold `run`, as that of `writer.open_writer`.
    """
    memory: dict[str, Buffer] = {}
    plain = {"mmextract_format": FORMAT, "dtype": layout.dtype, "codec": layout.codec, **to_plain(attributes)}
    group = zarr.create_group(MemoryStore(memory), zarr_format=3, attributes=plain)
    run = fingerprint(plain["run"])
    _create_states(group, layout)
    n_fields = len(layout.record_fields)
    group.create_array(
        "record",
        shape=(layout.n_samples, n_fields),
        chunks=(layout.shard_samples, n_fields),
        dtype=np.dtype("<i8"),
        fill_value=-1,
        compressors=None,
        dimension_names=("sample", "record_field"),
        attributes={"fields": list(layout.record_fields), "run": run},
    )
    group.create_array(
        "rejected",
        shape=(layout.n_samples,),
        chunks=(layout.shard_samples,),
        dtype=str,
        compressors=None,
        dimension_names=("sample",),
    )
    group.create_array(
        "shard_digest",
        shape=(layout.n_shards,),
        chunks=(1,),
        dtype=np.dtype("<u8"),
        fill_value=0,
        compressors=None,
        dimension_names=("shard",),
        attributes={"digest": "xxh3-64 of the shard's objects, seeded with run + shard number", "run": run},
    )
    _write_column(group, "layer", np.asarray(layout.layers, np.int32), dimension="layer")
    _write_column(group, "position", list(layout.positions), dimension="position")
    for name, values in columns.items():
        _write_column(group, name, values)
    objects = _to_bytes(memory)
    root = json.loads(objects.pop(ROOT))
    return {**objects, ROOT: seal(root, digests_of(objects))}


def last_objects(metadata: Mapping[str, bytes], columns: Columns) -> dict[str, bytes]:
    """Return key → bytes of what a finished store has besides: more columns, and consolidated metadata.

    metadata: `zarr.json` of the group and of each of its arrays, by key.
    """
    make = default_buffer_prototype().buffer.from_bytes
    memory: dict[str, Buffer] = {key: make(data) for key, data in metadata.items()}
    store = MemoryStore(memory)
    group = zarr.open_group(store, mode="r+", use_consolidated=False)
    for name, values in columns.items():
        _write_column(group, name, values)
    with warnings.catch_warnings():  # xarray opens a consolidated v3 group faster, and silently
        warnings.filterwarnings("ignore", "Consolidated metadata", ZarrUserWarning)
        zarr.consolidate_metadata(store)
    made = {key: data for key, data in _to_bytes(memory).items() if metadata.get(key) != data}
    root = json.loads(made.pop(ROOT, metadata[ROOT]))
    return {**made, ROOT: seal(root, {**sealed_digests(root), **digests_of(made)})}


def _to_bytes(memory: Mapping[str, Buffer]) -> dict[str, bytes]:
    return {key: memory[key].to_bytes() for key in sorted(memory)}


def _create_states(group: zarr.Group, layout: Layout) -> None:
    length, positions, size = len(layout.layers), len(layout.positions), layout.hidden_size
    dtype = DTYPES[layout.dtype]
    group.create_array(
        "hidden_states",
        shape=(layout.n_samples, length, positions, size),
        shards=(layout.shard_samples, length, positions, size),
        chunks=(layout.shard_samples, 1, positions, size),
        dtype=dtype,
        fill_value=BFLOAT16_NAN if layout.dtype == "bfloat16" else np.nan,
        compressors=shards.zarr_compressors(layout.codec, dtype.itemsize),
        dimension_names=("sample", "layer", "position", "hidden"),
        attributes={"stored_as": "bfloat16 bits"} if layout.dtype == "bfloat16" else {},
    )


def _write_column(group: zarr.Group, name: str, values: Any, *, dimension: str = "sample") -> None:
    array = np.asarray(values)
    text = array.dtype.kind in "OUT"
    target = group.create_array(
        name,
        shape=array.shape,
        chunks=(min(len(array), COLUMN_CHUNK),),
        dtype=str if text else array.dtype,
        dimension_names=(dimension,),
        config={"write_empty_chunks": True},
        overwrite=True,
    )
    target[:] = array.astype(object) if text else array


def to_plain(value: Mapping[str, Any]) -> dict[str, Any]:
    """Return what JSON makes of a mapping, so that what was written and what is compared are of one kind."""
    plain = json.loads(json.dumps(value, sort_keys=True))
    assert isinstance(plain, dict)
    return plain
