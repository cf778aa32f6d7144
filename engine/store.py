"""The store: hidden states and their labels in one Zarr v3 group that any Zarr reader opens. This is its reader.

    hidden_states   [sample, layer, position, hidden]   shard (S, L, P, D), inner chunk (S, 1, P, D)
    sample, layer, position                             coordinates
    image, question, answer, condition, …   [sample]    known before the run, written at its start
    record, rejected                        [sample]    found out by the run, one chunk a shard
    n_tokens, image_hash, …                 [sample]    copies of `record`, written in large chunks at the end
    shard_digest                            [shard]     xxh3 of a shard's objects: the commit
    digests, an attribute of the root                   xxh3 of everything else, see `integrity`

What is promised: a shard whose digest exists was written whole and flushed to disk before its digest was; a shard
without a digest does not exist, whatever lies in its place; an object that is missing or damaged is an error, never
zeros; the same run gives the same bytes however often it was interrupted; `verify` notices any byte that changed, and
the same run puts it back, writing nothing else. What is not: hidden states of another machine, thread count or library
version may differ in their last bits, and a disk that lies about flushing can lose what it was given.

`writer` writes a store, `layout` says what it looks like. This module knows nothing about models, images or watermarks.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.errors import GroupNotFoundError

from mmextract.engine import shards
from mmextract.engine.columns import WholeColumns
from mmextract.engine.integrity import examine, parse, sealed_digests
from mmextract.engine.layout import BFLOAT16_NAN, FORMAT
from mmextract.engine.objects import Objects, locate

if TYPE_CHECKING:
    import torch
    from dask.array import Array as DaskArray


@dataclass(frozen=True)
class Store:
    """A store, open for reading; see `open_store`."""

    objects: Objects
    group: zarr.Group = field(repr=False)

    @property
    def url(self) -> str:
        """Where it is."""
        return self.objects.url

    @cached_property
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
    def shard_samples(self) -> int:
        """S, the samples of a shard."""
        assert self.hidden_states.shards is not None
        return int(self.hidden_states.shards[0])

    @cached_property
    def layers(self) -> NDArray[np.int32]:
        """Decoder blocks along the `layer` axis; −1 is the embedding."""
        self._check_columns(["layer"])
        return np.asarray(_array(self.group, "layer")[:], np.int32)

    @cached_property
    def positions(self) -> list[str]:
        """Names along the `position` axis."""
        self._check_columns(["position"])
        return [str(name) for name in np.asarray(_array(self.group, "position")[:])]

    @cached_property
    def columns(self) -> Mapping[str, NDArray[Any]]:
        """Every one-dimensional array along `sample`, by name; ids are under `sample`, text is of dtype object.

        Raises ValueError if one is damaged or missing.
        """
        arrays = {
            name: array
            for name, array in sorted(self.group.arrays())
            if array.metadata.dimension_names == ("sample",)  # type: ignore[union-attr]
        }
        lost = {key.partition("/")[0] for key in self._digests} - {*self.group.array_keys()}
        self._check_columns([*arrays, *lost])
        return {name: _as_numpy(array) for name, array in arrays.items()}

    @cached_property
    def committed_shards(self) -> NDArray[np.int64]:
        """Ascending numbers of the shards that exist."""
        return np.sort(np.fromiter(map(int, self.objects.list("shard_digest/c")), np.int64))

    @cached_property
    def committed(self) -> NDArray[np.bool_]:
        """[n_samples], true where the sample's shard exists."""
        present = np.zeros(-(-self.n_samples // self.shard_samples), bool)
        present[self.committed_shards] = True
        return np.repeat(present, self.shard_samples)[: self.n_samples]

    @property
    def missing(self) -> int:
        """Number of samples that are not committed yet."""
        return int((~self.committed).sum())

    @property
    def finished(self) -> bool:
        """Whether every sample is committed and the run was finalised."""
        return not self.missing and self.group.metadata.consolidated_metadata is not None

    def read(self, layer: int, position: str, *, threads: int | None = None) -> NDArray[Any]:
        """Return [n_samples, hidden] of one layer (a value of `layers`) and position: float32, or float16 if stored so.

        Rows that were rejected or are not committed are NaN. `threads` read and decode, by default as many as there
        are cores. Raises LookupError with what there is; ValueError or FileNotFoundError for a shard that is damaged.
        """
        return self.read_positions(layer, [position], threads=threads)[:, 0]

    def read_positions(
        self, layer: int, positions: Sequence[str], *, as_stored: bool = False, threads: int | None = None
    ) -> NDArray[Any]:
        """Return [n_samples, len(positions), hidden] of one layer, like `read`, with one pass over the store.

        as_stored: leave bfloat16 as its uint16 bits, in place of widening it to float32.
        """
        chosen = self.find(layer, positions)
        dtype = self.hidden_states.dtype if as_stored else self.dtype
        states = np.empty((self.n_samples, len(positions), self.hidden_size), dtype)
        states[~self.committed] = BFLOAT16_NAN if dtype == np.uint16 else np.nan
        whole = chosen[1] == [*range(len(self.positions))]

        def fill(shard: int) -> None:
            start = shard * self.shard_samples
            rows = states[start : start + self.shard_samples]
            if len(rows) == self.shard_samples and rows.dtype == self.hidden_states.dtype and whole:
                self._read_chunk(shard, chosen[0], out=rows)  # straight into its place
            else:
                rows[:] = self.read_shard(shard, *chosen, as_stored=as_stored)

        with ThreadPoolExecutor(threads or os.cpu_count() or 1) as executor:
            for _ in executor.map(fill, self.committed_shards.tolist()):
                pass
        return states

    @property
    def dtype(self) -> np.dtype[Any]:
        """What `read` returns: float16 if stored so, else float32."""
        return np.dtype("<f2") if self.attributes["dtype"] == "float16" else np.dtype("<f4")

    def find(self, layer: int, positions: Sequence[str]) -> tuple[int, list[int]]:
        """Return the indices of a layer and of positions. Raises LookupError with what there is."""
        at = np.flatnonzero(self.layers == layer)
        if len(at) == 0:
            raise LookupError(f"{self.url} has no layer {layer}: it has {', '.join(map(str, self.layers))}")
        for position in positions:
            if position not in self.positions:
                raise LookupError(
                    f"{self.url} has no position {position!r}: it has {', '.join(self.positions)}"
                )
        return int(at[0]), [self.positions.index(position) for position in positions]

    def read_shard(
        self, shard: int, layer_index: int, position_indices: Sequence[int], *, as_stored: bool = False
    ) -> NDArray[Any]:
        """Return [rows of a committed shard, len(position_indices), hidden], which may be read-only.

        See `find` for the indices and `read_positions` for the values.
        """
        n_rows = min(self.shard_samples, self.n_samples - shard * self.shard_samples)
        first, n_positions = position_indices[0], len(position_indices)
        chosen: Any = list(position_indices)
        if chosen == [*range(first, first + n_positions)]:
            chosen = slice(first, first + n_positions)  # copies nothing
        chunk = self._read_chunk(shard, layer_index)[:n_rows, chosen]
        if chunk.dtype == np.uint16 and not as_stored:  # the bits of bfloat16
            widened: NDArray[np.float32] = np.left_shift(chunk, 16, dtype=np.uint32).view(np.float32)
            return widened
        return chunk

    def to_dask(self, layer: int, position: str) -> DaskArray:
        """Return what `read` returns as a dask.array [n_samples, hidden] that reads a shard when it is asked for."""
        from mmextract.engine.views import to_dask

        return to_dask(self, layer, position)

    def to_torch(self, layer: int, position: str, *, threads: int | None = None) -> torch.Tensor:
        """Return what `read` returns as a tensor [n_samples, hidden] on the CPU, bfloat16 if the store is."""
        from mmextract.engine.views import to_torch

        return to_torch(self, layer, position, threads=threads)

    def has_shard(self, shard: int) -> bool:
        """Tell whether a shard is committed now."""
        return self.objects.get(f"shard_digest/c/{shard}") is not None

    @cached_property
    def _digests(self) -> Mapping[str, str]:
        """What the columns should be, by key; empty for a store that does not say so."""
        return sealed_digests({"attributes": self.attributes})

    def _check_columns(self, names: Sequence[str]) -> None:
        """Raise ValueError unless these arrays are what the root says that they should be."""
        wanted = {key: digest for key, digest in self._digests.items() if key.partition("/")[0] in names}
        with ThreadPoolExecutor(max(1, min(_COLUMN_THREADS, len(wanted)))) as executor:
            reasons = executor.map(lambda key: examine(self.objects, key, wanted[key]), wanted)
            damage = [f"{key}: {reason}" for key, reason in zip(wanted, reasons, strict=True) if reason]
        if damage:
            raise ValueError(f"{self.url} is damaged ({damage[0]}): {_REPAIR}")

    def _read_chunk(self, shard: int, layer_index: int, out: NDArray[Any] | None = None) -> NDArray[Any]:
        """Return [S, P, D] as stored, in `out` if given: one layer of a committed shard, its checksums held true."""
        n_layers, n_positions = self.hidden_states.shape[1:3]
        shape = (self.shard_samples, n_positions, self.hidden_size)
        key = f"hidden_states/c/{shard}/0/0/0"
        try:
            length = shards.index_size(n_layers)
            offset, size = shards.find_chunk(self.objects.read(key, -length, length), layer_index)
            data = self.objects.read(key, offset, size)
            codec = str(self.attributes["codec"])
            flat = shards.decode_chunk(data, codec, self.hidden_states.dtype, out)
            return flat.reshape(shape)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{self.url} has lost shard {shard}: {_REPAIR}") from error
        except ValueError as error:
            raise ValueError(f"shard {shard} of {self.url} is damaged ({error}): {_REPAIR}") from error


_COLUMN_THREADS = 8
_REPAIR = "`mmextract verify` lists what is damaged, and the same `mmextract dump` again repairs it"


def open_store(place: str | Path | Objects) -> Store:
    """Open a store for reading. Raises ValueError if there is none at `place`, saying how to make one."""
    objects = locate(place)
    read_attributes(objects)
    try:
        group = zarr.open_group(WholeColumns(objects.to_zarr(), objects.url), mode="r", zarr_format=3)
    except GroupNotFoundError as error:  # after it was there a moment ago
        raise FileNotFoundError(f"{objects.url} has lost its zarr.json: {_REPAIR}") from error
    return Store(objects, group)


def read_attributes(objects: Objects) -> Mapping[str, Any]:
    """Return the attributes of a store, or raise ValueError if there is none of ours at that place."""
    metadata = objects.get("zarr.json")
    if metadata is None and not objects.occupied():
        raise ValueError(
            f"there is no store at {objects.url}: make one with `mmextract dump -o {objects.url}`"
        )
    if metadata is None:
        raise ValueError(
            f"{objects.url} exists and is not a store of mmextract (it has no zarr.json): give another path"
        )
    root = parse(metadata)
    if root is None:
        raise ValueError(f"{objects.url} is damaged (its zarr.json is not JSON): {_REPAIR}")
    attributes = root.get("attributes")
    version = attributes.get("mmextract_format") if isinstance(attributes, dict) else None
    if not isinstance(attributes, dict) or version != FORMAT:
        raise ValueError(
            f"{objects.url} is not a store that this version reads: expected mmextract_format {FORMAT}, found {version}"
        )
    return attributes


def _as_numpy(array: zarr.Array[Any]) -> NDArray[Any]:
    values = np.asarray(array[:])
    return values.astype(object) if values.dtype.kind == "T" else values


def _array(group: zarr.Group, name: str) -> zarr.Array[Any]:
    array = group[name]
    assert isinstance(array, zarr.Array)
    return array
