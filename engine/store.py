"""The store: hidden states and their labels in one Zarr v3 group that any Zarr reader opens.

    hidden_states   [sample, layer, position, hidden]   shard (S, L, P, D), inner chunk (S, 1, P, D)
    sample, layer, position                             coordinates
    image, question, answer, condition, …   [sample]    known before the run, written at its start
    record, rejected                        [sample]    found out by the run, one chunk a shard
    n_tokens, image_hash, …                 [sample]    copies of `record`, written in large chunks at the end
    shard_digest                            [shard]     xxh3 of a shard's objects: the commit

What is promised: a shard whose digest exists was written whole and flushed to disk before its digest was; a shard
without a digest does not exist, whatever lies in its place; the same run gives the same bytes however often it was
interrupted. What is not: hidden states of another machine, thread count or library version may differ in their last
bits, and a disk that lies about flushing can lose what it was given.

This module knows nothing about models, images or watermarks.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.errors import ZarrUserWarning

from mmextract.engine import shards
from mmextract.engine.objects import LocalObjects, flush_folder, flush_tree

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

    def empty_shard(self) -> NDArray[Any]:
        """Return [L, S, P, D] of NaN, to be filled and given to `StoreWriter.write_shard`."""
        shape = (len(self.layers), self.shard_samples, len(self.positions), self.hidden_size)
        return np.full(shape, BFLOAT16_NAN if self.dtype == "bfloat16" else np.nan, DTYPES[self.dtype])

    def empty_records(self) -> NDArray[np.int64]:
        """Return [S, F] of −1, to be filled and given to `StoreWriter.write_shard`."""
        return np.full((self.shard_samples, len(self.record_fields)), -1, np.int64)


class OtherRunError(ValueError):
    """The store at this path was made by a run with other settings."""


@dataclass(frozen=True, kw_only=True)
class StoreWriter:
    """Writes the shards of one store; see `open_writer`."""

    path: Path
    layout: Layout
    objects: LocalObjects
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
        array = _array(zarr.open_group(self.path, mode="r"), "rejected")
        shards_with_any = sorted({int(name) for name in self.objects.list("rejected/c")} & self.committed())
        return {
            row: str(reason)
            for rows in map(self.layout.rows, shards_with_any)
            for row, reason in zip(rows, np.asarray(array[rows.start : rows.stop]), strict=True)
            if reason
        }

    def finalised(self) -> bool:
        """Tell whether `finalise` has been through."""
        return "consolidated_metadata" in json.loads((self.path / "zarr.json").read_text("utf-8"))

    def finalise(self) -> None:
        """Copy the records into columns of their own and consolidate the metadata, once every shard is committed."""
        assert len(self.committed()) == self.layout.n_shards
        group = zarr.open_group(self.path, mode="r+")
        records = np.asarray(_array(group, "record")[:])
        for index, name in enumerate(self.layout.record_fields):
            values = records[:, index]
            _write_column(group, name, values.view(np.uint64) if name.endswith("_hash") else values)
        with warnings.catch_warnings():  # xarray opens a consolidated v3 group faster, and silently
            warnings.filterwarnings("ignore", "Consolidated metadata", ZarrUserWarning)
            zarr.consolidate_metadata(self.path)
        flush_tree(self.path)


def open_writer(
    path: Path, layout: Layout, columns: Columns, attributes: Mapping[str, Any], executor: ThreadPoolExecutor
) -> StoreWriter:
    """Create the store at `path`, or open it again if the same run began it.

    columns: known before the run, one value a sample. attributes: everything that decides the store's bytes; must
    hold `run`, a JSON-able mapping, by whose equality two runs are the same.

    Raises OtherRunError, with what differs, if another run began it; ValueError if something else is at `path`.
    """
    writer = StoreWriter(path=path, layout=layout, objects=LocalObjects(path), executor=executor)
    if path.exists():
        differences = _differences(_read_attributes(path).get("run"), _plain(attributes["run"]))
        if differences:
            raise OtherRunError(
                f"{path} was made by another run, and is left as it is. What differs:\n  "
                + "\n  ".join(differences)
                + "\nGive another -o, or remove it."
            )
        return writer
    _create(path, layout, columns, attributes)
    return writer


def _create(path: Path, layout: Layout, columns: Columns, attributes: Mapping[str, Any]) -> None:
    """Make the empty store beside its place, flush it, and move it there: it exists whole or not at all."""
    temporary = path.with_name(f".{path.name}.creating")
    shutil.rmtree(temporary, ignore_errors=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    plain = {"mmextract_format": FORMAT, "dtype": layout.dtype, "codec": layout.codec, **_plain(attributes)}
    group = zarr.create_group(temporary, zarr_format=3, attributes=plain)
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
    n_fields = len(layout.record_fields)
    group.create_array(
        "record",
        shape=(layout.n_samples, n_fields),
        chunks=(layout.shard_samples, n_fields),
        dtype=np.dtype("<i8"),
        fill_value=-1,
        compressors=None,
        dimension_names=("sample", "record_field"),
        attributes={"fields": list(layout.record_fields)},
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
    )
    _write_column(group, "layer", np.asarray(layout.layers, np.int32), dimension="layer")
    _write_column(group, "position", list(layout.positions), dimension="position")
    for name, values in columns.items():
        _write_column(group, name, values)
    flush_tree(temporary)
    temporary.rename(path)
    flush_folder(path.parent)


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


def _encode_strings(values: Sequence[str]) -> bytes:
    """Encode strings as Zarr's `vlen-utf8` codec does: a count, then each string behind its length, in bytes."""
    pieces = [len(values).to_bytes(4, "little")]
    for value in values:
        data = value.encode()
        pieces += [len(data).to_bytes(4, "little"), data]
    return b"".join(pieces)


def _plain(value: Mapping[str, Any]) -> dict[str, Any]:
    """Return what JSON makes of a mapping, so that what was written and what is compared are of one kind."""
    plain = json.loads(json.dumps(value, sort_keys=True))
    assert isinstance(plain, dict)
    return plain


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


def _read_attributes(path: Path) -> Mapping[str, Any]:
    """Return the attributes of a store, or raise ValueError if there is none of ours at `path`."""
    metadata = path / "zarr.json"
    if not metadata.is_file():
        raise ValueError(
            f"{path} exists and is not a store of mmextract (it has no zarr.json): give another path"
        )
    attributes = json.loads(metadata.read_text("utf-8")).get("attributes", {})
    if attributes.get("mmextract_format") != FORMAT:
        raise ValueError(
            f"{path} is not a store that this version reads: expected mmextract_format {FORMAT}, "
            f"found {attributes.get('mmextract_format')}"
        )
    assert isinstance(attributes, dict)
    return attributes


def _as_numpy(array: zarr.Array[Any]) -> NDArray[Any]:
    values = np.asarray(array[:])
    return values.astype(object) if values.dtype.kind == "T" else values


def _array(group: zarr.Group, name: str) -> zarr.Array[Any]:
    array = group[name]
    assert isinstance(array, zarr.Array)
    return array


@dataclass(frozen=True)
class Store:
    """A store, open for reading; see `open_store`."""

    path: Path
    group: zarr.Group = field(repr=False)

    @property
    def attributes(self) -> Mapping[str, Any]:
        """Everything needed to repeat the run."""
        return self.group.attrs.asdict()

    @cached_property
    def hidden_states(self) -> zarr.Array[Any]:
        """[sample, layer, position, hidden], as stored (bfloat16 as uint16 bits)."""
        return _array(self.group, "hidden_states")

    @property
    def n_samples(self) -> int:
        """Rows, rejected ones included."""
        return int(self.hidden_states.shape[0])

    @property
    def hidden_size(self) -> int:
        """D."""
        return int(self.hidden_states.shape[3])

    @cached_property
    def layers(self) -> NDArray[np.int32]:
        """Decoder blocks along the `layer` axis; −1 is the embedding."""
        return np.asarray(_array(self.group, "layer")[:], np.int32)

    @cached_property
    def positions(self) -> list[str]:
        """Names along the `position` axis."""
        return [str(name) for name in np.asarray(_array(self.group, "position")[:])]

    @cached_property
    def columns(self) -> Mapping[str, NDArray[Any]]:
        """Every one-dimensional array along `sample`, by name; ids are under `sample`, text is of dtype object."""
        return {
            name: _as_numpy(array)
            for name, array in sorted(self.group.arrays())
            if array.metadata.dimension_names == ("sample",)  # type: ignore[union-attr]
        }

    @cached_property
    def committed(self) -> NDArray[np.bool_]:
        """[n_samples], true where the sample's shard exists."""
        shard_samples = (self.hidden_states.shards or self.hidden_states.chunks)[0]
        present = np.zeros(-(-self.n_samples // shard_samples), bool)
        present[[int(name) for name in LocalObjects(self.path).list("shard_digest/c")]] = True
        return np.repeat(present, shard_samples)[: self.n_samples]

    @property
    def missing(self) -> int:
        """Number of samples that are not committed yet."""
        return int((~self.committed).sum())

    def read(self, layer: int, position: str) -> NDArray[Any]:
        """Return [n_samples, hidden] of one layer (a value of `layers`) and position: float32, or float16 if stored so.

        Rows that were rejected or are not committed are NaN. Raises LookupError with what there is.
        """
        at = np.flatnonzero(self.layers == layer)
        if len(at) == 0:
            raise LookupError(f"{self.path} has no layer {layer}: it has {', '.join(map(str, self.layers))}")
        if position not in self.positions:
            raise LookupError(f"{self.path} has no position {position!r}: it has {', '.join(self.positions)}")
        states = np.asarray(self.hidden_states[:, int(at[0]), self.positions.index(position), :])
        if self.attributes.get("dtype") == "bfloat16":
            states = (states.astype(np.uint32) << 16).view(np.float32)
        states[~self.committed] = np.nan
        return states


def open_store(path: str | Path) -> Store:
    """Open a store for reading. Raises ValueError if there is none at `path`, saying how to make one."""
    path = Path(path)
    if not path.exists():
        raise ValueError(f"there is no store at {path}: make one with `mmextract dump -o {path}`")
    _read_attributes(path)
    return Store(path, zarr.open_group(path, mode="r"))
