"""Make the golden stores: `python -m tests.golden.make tests/golden/v1`, once a release, into a folder that is new.

They are never made again: what this version wrote must open for ever, and hold what is written down here.
"""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmextract.engine.layout import Layout
from mmextract.engine.writer import open_writer

N_SAMPLES, SHARD_SAMPLES, HIDDEN_SIZE = 5, 2, 4
LAYERS = (-1, 0, 2)
POSITIONS = ("last", "image")
CODECS = {"float32": "lz4", "float16": "none", "bfloat16": "zstd"}
REJECTED = {3: "no such file: café.png"}
COLUMNS: dict[str, list[Any]] = {
    "sample": ["a", "b", "ç", "d", "日本"],
    "question": ["what is it?", "", "who?", "why?", "où?"],
    "age": [31, 0, -7, 2**40, 5],
    "score": [0.5, -1.25, 1e300, 0.0, 3.0],
    "seen": [True, False, True, True, False],
}
RECORDS = {"n_tokens": [9, 8, 7, -1, 5], "image_hash": [2**64 - 1, 1, 2**63, 2**64 - 1, 0]}
"""What the run finds out of each sample; −1, or all bits set, where it was rejected."""


def states() -> NDArray[np.float32]:
    """Return [N, L, P, D]: (1 + row/8 + layer index/32 + position index/64) / 2**(hidden index), NaN where rejected.

    Seven bits of mantissa do for each, so that float16 and bfloat16 hold it exactly.
    """
    row, layer, position, hidden = np.indices((N_SAMPLES, len(LAYERS), len(POSITIONS), HIDDEN_SIZE))
    values = (1 + row / 8 + layer / 32 + position / 64) / 2.0**hidden
    values[list(REJECTED)] = np.nan
    return np.asarray(values, np.float32)


def make(path: Path, dtype: str) -> None:
    """Write one store."""
    layout = Layout(
        n_samples=N_SAMPLES,
        layers=LAYERS,
        positions=POSITIONS,
        hidden_size=HIDDEN_SIZE,
        dtype=dtype,
        codec=CODECS[dtype],
        shard_samples=SHARD_SAMPLES,
        record_fields=tuple(RECORDS),
    )
    with ThreadPoolExecutor(1) as executor:
        writer = open_writer(path, layout, COLUMNS, {"run": {"golden": dtype}, "source": "make.py"}, executor)
        for shard in range(layout.n_shards):
            rows = list(layout.rows(shard))
            chunks, records = layout.empty_shard(), layout.empty_records()
            values = states()[rows].swapaxes(0, 1)
            if dtype == "bfloat16":
                chunks[:, : len(rows)] = values.view(np.uint32) >> 16
            else:
                chunks[:, : len(rows)] = values
            for place, row in enumerate(rows):
                image_hash = np.uint64(RECORDS["image_hash"][row]).astype(np.int64)
                records[place] = RECORDS["n_tokens"][row], image_hash
            rejected = {row - rows[0]: why for row, why in REJECTED.items() if row in rows}
            writer.write_shard(shard, chunks, records, rejected)
        writer.finalise()


if __name__ == "__main__":
    for name in CODECS:
        make(Path(sys.argv[1]) / name, name)
