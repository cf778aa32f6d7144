"""A dump of a stub model, in a process of its own: memory along the way, seconds to resume. Prints JSON.

Arguments: store, samples, layers, samples of a shard.
"""

from __future__ import annotations

import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil

from mmextract.engine.layout import Layout
from mmextract.engine.writer import open_writer

HIDDEN_SIZE = 16


def main(path: Path, n_samples: int, n_layers: int, shard_samples: int) -> None:
    """Write, forget and resume."""
    layout = Layout(
        n_samples=n_samples,
        layers=tuple(range(n_layers)),
        positions=("last",),
        hidden_size=HIDDEN_SIZE,
        shard_samples=min(shard_samples, n_samples),
    )
    columns = {"sample": [f"s{i}" for i in range(n_samples)]}
    process = psutil.Process()
    rng = np.random.default_rng(0)
    memory, started = [], time.perf_counter()
    with ThreadPoolExecutor(2) as executor:
        writer = open_writer(path, layout, columns, {"run": {}}, executor)
        tenth = max(1, layout.n_shards // 10)
        for shard in range(layout.n_shards):
            states, records = layout.empty_shard(), layout.empty_records()
            states[:] = rng.standard_normal(states.shape, np.float32)
            writer.write_shard(shard, states, records, {})
            if (shard + 1) % tenth == 0:
                memory.append(process.memory_info().rss)
        written = time.perf_counter() - started
        resume = _seconds(lambda: open_writer(path, layout, columns, {"run": {}}, executor).committed())
        finalise = _seconds(writer.finalise)
        done = open_writer(path, layout, columns, {"run": {}}, executor)
        finished = _seconds(lambda: (done.committed(), done.finalised(), done.rejected()))
    found = {
        "n_shards": layout.n_shards,
        "write_seconds_a_shard": written / layout.n_shards,
        "memory_at_the_end_over_after_a_tenth": memory[-1] / memory[0],
        "memory_mib": [round(size / 2**20) for size in memory],
        "open_files": process.num_fds(),
        "resume_seconds": resume,
        "finalise_seconds": finalise,
        "finished_run_seconds": finished,
    }
    print(json.dumps(found))


def _seconds(work: object) -> float:
    assert callable(work)
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:5]))
