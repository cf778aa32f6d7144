"""Small real stores for the tests of probes: the paired design, with a signal where it is asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmextract.engine.layout import Layout
from mmextract.engine.writer import open_writer

Columns = dict[str, list[Any]]
PAIRED_RUN = {
    "model": {"name": "tiny", "class": "LlavaForConditionalGeneration"},
    "data": {"format": "jsonl", "n_samples": 60, "n_images": 60},
    "watermark": {"design": "paired", "n_pairs": 30},
}


def make_store(
    path: Path,
    states: NDArray[Any],
    *,
    layers: Sequence[int],
    positions: Sequence[str],
    columns: Columns,
    run: Mapping[str, Any] = PAIRED_RUN,
    rejected: Mapping[int, str] | None = None,
    n_shards_written: int | None = None,
) -> Path:
    """Write states [n, L, P, D] and columns as a store in shards of 32, all or only the first few of them."""
    n, _, _, hidden_size = states.shape
    layout = Layout(
        n_samples=n,
        layers=tuple(layers),
        positions=tuple(positions),
        hidden_size=hidden_size,
        shard_samples=32,
    )
    with ThreadPoolExecutor(1) as executor:
        writer = open_writer(path, layout, columns, {"run": {"positions": list(positions), **run}}, executor)
        shards = range(layout.n_shards if n_shards_written is None else n_shards_written)
        for shard in shards:
            rows = layout.rows(shard)
            data, records = layout.empty_shard(), layout.empty_records()
            data[:, : len(rows)] = states[rows.start : rows.stop].swapaxes(0, 1)
            records[: len(rows)] = 7
            reasons = {row - rows.start: why for row, why in (rejected or {}).items() if row in rows}
            writer.write_shard(shard, data, records, reasons)
        if len(shards) == layout.n_shards:
            writer.finalise()
    return path


def paired_columns(n_images: int, n_pairs: int, *, seed: int = 0) -> Columns:
    """Return the columns of a paired run: each image with the seen and with the unseen identity of one pair."""
    pair = np.random.default_rng(seed).permutation(np.arange(n_images) % n_pairs)
    names = ["seen", "unseen"] * n_images
    return {
        "sample": [f"{row // 2}#{name}" for row, name in enumerate(names)],
        "source_sample": [str(row // 2) for row in range(2 * n_images)],
        "image": [f"{row // 2}.png" for row in range(2 * n_images)],
        "answer": [("yes", "no")[row // 2 % 2] for row in range(2 * n_images)],
        "condition": names,
        "identity_set": names,
        "pair": np.repeat(pair, 2).tolist(),
    }


def paired_states(
    columns: Columns, hidden_size: int, *, signal: float = 0.0, identity: float = 0.3, seed: int = 0
) -> NDArray[np.float32]:
    """Return [n, D]: what an image and an identity share, some noise, and the signal, along the first feature."""
    rng = np.random.default_rng(seed)
    seen = np.array([name == "seen" for name in columns["identity_set"]])
    person = 2 * np.array(columns["pair"]) + seen
    image = np.array([int(name) for name in columns["source_sample"]])
    states = rng.normal(size=(image.max() + 1, hidden_size))[image]
    states += identity * rng.normal(size=(person.max() + 1, hidden_size))[person]
    states += 0.3 * rng.normal(size=states.shape)
    states[:, 0] += np.where(seen, signal, -signal)
    return np.asarray(states, np.float32)


def make_paired_store(path: Path, *, signals: Sequence[Sequence[float]], seed: int = 0, **more: Any) -> Path:
    """Write a store of 60 images and 30 pairs. signals: one a (layer, position); layers count from the embedding."""
    columns = paired_columns(60, 30, seed=seed)
    states = np.stack(
        [
            np.stack(
                [paired_states(columns, 12, signal=s, seed=100 * i + j + seed) for j, s in enumerate(row)],
                axis=1,
            )
            for i, row in enumerate(signals)
        ],
        axis=1,
    )
    layers, positions = range(-1, len(signals) - 1), ("last", "image", "prompt")[: states.shape[2]]
    return make_store(path, states, layers=layers, positions=positions, columns=columns, **more)
