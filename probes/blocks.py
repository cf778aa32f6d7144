"""Hidden states a block of samples at a time, as often as they are asked for: held in memory, or read from a store.

So a layer may be larger than memory: 10⁶ samples × 4096 are 33 GB in double precision. This module knows nothing
about labels or solvers.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmextract.engine.store import Store
from mmextract.probes.solvers import FloatArray, IntArray

BLOCK_ELEMENTS = 1 << 23
"""Elements of a block that is put together from a store's shards: 64 MiB."""

READERS = 4
"""Threads that decode shards: what works on a block on one core seldom keeps more of them busy."""

CPU = torch.device("cpu")


class Blocks(Protocol):
    """States [n, D], in blocks of samples."""

    @property
    def shape(self) -> tuple[int, int]:
        """n, D."""

    @property
    def device(self) -> torch.device:
        """Where blocks lie."""

    def __iter__(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield, in order, the samples of a block and their states, float64 [k, D]."""


@dataclass(frozen=True)
class HeldStates:
    """States that fit into memory, in a single block."""

    states: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return (self.states.shape[0], self.states.shape[1])

    @property
    def device(self) -> torch.device:
        return self.states.device

    def __iter__(self) -> Iterator[tuple[slice, Tensor]]:
        yield slice(0, len(self.states)), self.states


@dataclass(frozen=True)
class StoredStates:
    """States of one layer and position, read anew each time.

    Shards are decoded by READERS threads, twice as many ahead of what is worked on.
    """

    store: Store
    layer: int
    position: str
    rows: IntArray
    """[n] rows of the store, ascending."""
    device: torch.device = CPU

    @property
    def shape(self) -> tuple[int, int]:
        return (len(self.rows), self.store.hidden_size)

    def __iter__(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield blocks. Raises ValueError for states that are not finite, or rows that the store lacks."""
        n_bad, first = 0, 0
        for rows, states in self.read():
            bad = np.flatnonzero(~np.isfinite(states).all(1))
            if len(bad) and not n_bad:
                first = rows.start + int(bad[0])
            n_bad += len(bad)
            if not n_bad:  # else the rest is read for the message alone
                yield rows, torch.from_numpy(states).to(self.device)
        if n_bad:
            raise not_finite(self.store, self.layer, self.position, self.rows, n_bad, first)

    def read(self) -> Iterator[tuple[slice, FloatArray]]:
        """Yield blocks as they are stored, NaN included. Raises ValueError for rows that the store lacks."""
        most = max(1, BLOCK_ELEMENTS // self.store.hidden_size)
        start, parts, n_parts = 0, [], 0
        for part in self._read_shards():
            parts.append(part)
            n_parts += len(part)
            if n_parts >= most:
                yield slice(start, start + n_parts), np.concatenate(parts, dtype=np.float64)
                start, parts, n_parts = start + n_parts, [], 0
        if parts:
            yield slice(start, start + n_parts), np.concatenate(parts, dtype=np.float64)

    def _read_shards(self) -> Iterator[NDArray[np.floating]]:
        """Yield the wanted rows of each shard that has some."""
        layer, positions = self.store.find(self.layer, [self.position])
        size = self.store.shard_samples
        if not self.store.committed[self.rows].all():
            raise ValueError(f"{self.store.url} lacks some of the samples: finish the dump first")

        def read(shard: int) -> NDArray[np.floating]:
            first, last = np.searchsorted(self.rows, (shard * size, (shard + 1) * size))
            chosen = self.rows[first:last] - shard * size
            return np.asarray(self.store.read_shard(shard, layer, positions)[chosen, 0])

        n_threads = count_readers()
        shards = iter(np.unique(self.rows // size).tolist())
        with ThreadPoolExecutor(n_threads) as executor:
            waiting = deque(executor.submit(read, shard) for shard in islice(shards, 2 * n_threads))
            while waiting:
                yield waiting.popleft().result()
                waiting.extend(executor.submit(read, shard) for shard in islice(shards, 1))


def count_readers() -> int:
    """Return the number of threads that decode shards for one reader."""
    return min(READERS, os.cpu_count() or 1)


def read_rows(store: Store, layer: int, position: str, rows: IntArray) -> FloatArray:
    """Return float64 [n, D]: the states of rows [n] of the store, in any order, and in memory nothing but those.

    Raises ValueError for rows that the store lacks.
    """
    order = np.argsort(rows, kind="stable")
    states = np.empty((len(rows), store.hidden_size))
    for block, part in StoredStates(store, layer, position, rows[order]).read():
        states[order[block]] = part
    return states


def not_finite(store: Store, layer: int, position: str, rows: IntArray, n_bad: int, first: int) -> ValueError:
    """Return the error that n_bad of the states of rows [n] of the store are not finite, rows[first] being one."""
    return ValueError(
        f"{store.url}, layer {layer}, position {position}: {n_bad} of {len(rows)} samples hold NaN or infinite "
        f"states (the first is {store.columns['sample'][rows[first]]}): leave them out with --where, or this layer "
        "or position out"
    )
