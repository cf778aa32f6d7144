"""A run without a model: small stores whose every byte is a function of the run, written by the real writer."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from mmextract.engine.layout import Layout
from mmextract.engine.writer import StoreWriter, open_writer

N_SAMPLES, SHARD_SAMPLES = 11, 3
REJECTED = {4: "no such file: é.png", 5: "not an image"}


def make_layout(dtype: str = "float32", codec: str = "lz4") -> Layout:
    """Return the layout of 11 samples in shards of 3, with 3 layers and 2 positions."""
    return Layout(
        n_samples=N_SAMPLES,
        layers=(-1, 0, 3),
        positions=("last", "image"),
        hidden_size=8,
        dtype=dtype,
        codec=codec,
        shard_samples=SHARD_SAMPLES,
        record_fields=("n_tokens", "image_hash"),
    )


def make_columns(seed: int = 0) -> dict[str, Any]:
    """Return ids, a text and a number of each sample."""
    return {
        "sample": [f"s{row}" for row in range(N_SAMPLES)],
        "question": [f"is it {seed + row}?" for row in range(N_SAMPLES)],
        "age": np.arange(N_SAMPLES) + seed,
    }


def run(
    path: Path, *, seed: int = 0, layout: Layout | None = None, stop_after: int | None = None
) -> list[int]:
    """Do as `dump` does: open, write the shards that are missing, finalise. Returns the shards it wrote.

    seed: another one is another run. stop_after: end, unfinished, after as many shards.
    """
    chosen = layout or make_layout()
    with ThreadPoolExecutor(1) as executor:
        attributes = {"run": {"model": {"name": "stub"}, "seed": seed}, "source": "nowhere"}
        writer = open_writer(path, chosen, make_columns(seed), attributes, executor)
        missing = sorted(set(range(chosen.n_shards)) - writer.committed())
        for shard in missing[:stop_after]:
            write_shard(writer, shard, seed)
        if stop_after is None and (missing or not writer.finalised()):
            writer.finalise()
    return missing[:stop_after]


def write_shard(writer: StoreWriter, shard: int, seed: int) -> None:
    """Write a shard of the run; its values depend on seed and row alone."""
    rows = writer.layout.rows(shard)
    states, records = writer.layout.empty_shard(), writer.layout.empty_records()
    rejected = {row - rows.start: why for row, why in REJECTED.items() if row in rows}
    for place, row in enumerate(rows):
        if place in rejected:
            continue
        values = np.random.default_rng((seed, row)).normal(size=states[:, place].shape)
        bits = values.astype(np.float32).view(np.uint32) >> 16
        states[:, place] = bits if states.dtype == np.uint16 else values
        records[place] = row + 1, -row
    writer.write_shard(shard, states, records, rejected)


def tree(path: Path) -> dict[str, bytes]:
    """Return key → bytes of every file."""
    return {
        str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()
    }
