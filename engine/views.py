"""A layer of a store as a Dask array or a torch tensor, in the store's own precision where that can be had.

Dask and torch are imported when they are asked for. This module knows nothing about how a shard is stored.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import dask.array
    import torch

    from mmextract.engine.store import Store


def to_dask(store: Store, layer: int, position: str) -> dask.array.Array:
    """Return [n_samples, hidden], one chunk a shard, of the dtype that `Store.read` returns.

    A chunk is read, and its checksums are checked, where and when it is computed; rows that were rejected or are not
    committed are NaN. Raises LookupError with what there is.
    """
    import dask.array
    from dask.tokenize import tokenize

    layer_index, (position_index,) = store.find(layer, [position])
    size = store.shard_samples
    rows = [min(size, store.n_samples - start) for start in range(0, store.n_samples, size)]
    array: dask.array.Array = dask.array.map_blocks(
        _read_block,
        store=replace(store),  # without the columns that it may have read already
        layer_index=layer_index,
        position_index=position_index,
        chunks=(tuple(rows), (store.hidden_size,)),
        dtype=store.dtype,
        meta=np.empty((0, 0), store.dtype),
        name=f"hidden-states-{tokenize(store.url, dict(store.attributes), layer, position)}",
    )
    return array


def _read_block(
    *, store: Store, layer_index: int, position_index: int, block_id: tuple[int, int]
) -> NDArray[Any]:
    shard = block_id[0]
    if store.has_shard(shard):
        return np.array(store.read_shard(shard, layer_index, [position_index])[:, 0])
    n_rows = min(store.shard_samples, store.n_samples - shard * store.shard_samples)
    return np.full((n_rows, store.hidden_size), np.nan, store.dtype)


def to_torch(store: Store, layer: int, position: str, *, threads: int | None = None) -> torch.Tensor:
    """Return [n_samples, hidden] on the CPU: float32, float16 or bfloat16, as stored, so to the bit what was dumped.

    Rows that were rejected or are not committed are NaN. Raises what `Store.read` raises.
    """
    import torch

    states = store.read_positions(layer, [position], as_stored=True, threads=threads)[:, 0]
    if states.dtype == np.uint16:
        return torch.from_numpy(states.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(states)
