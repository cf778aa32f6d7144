"""From a store that lacks shards to a finished one: held by a lease, tidied, its missing shards written, finalised.

Every run goes through here, whoever computes its shards. This module knows nothing about models, rows or clusters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from mmextract.engine import lease
from mmextract.engine.lease import Lease
from mmextract.engine.writer import StoreWriter

Compute = Callable[[StoreWriter, Sequence[int], Lease], None]
"""Writes shards of a store, all that it is given, and checks the lease often."""


def complete(writer: StoreWriter, compute: Compute) -> set[int]:
    """Have `compute` write what is missing of a store, and finalise it. Returns the shards that were there already.

    A finished store is only looked at. Raises `lease.StoreBusyError` if another run writes it, `lease.LeaseLostError`
    if another one has taken it over meanwhile, and what `compute` raises. Whatever stops it, a later call continues.
    """
    committed = writer.committed()
    if len(committed) == writer.layout.n_shards and writer.finalised():
        lease.sweep(writer.objects)
        return committed
    with Lease(objects=writer.objects) as held:
        writer = replace(writer, guard=held.confirm)
        committed = writer.committed()  # another run may have gone on until now
        writer.sweep(committed)
        missing = [shard for shard in range(writer.layout.n_shards) if shard not in committed]
        if missing:
            compute(writer, missing, held)
        held.confirm()
        writer.finalise()
    return committed
