"""What a store of many shards costs: memory, descriptors and seconds of a stub run, in a process of its own.

`python tests/faults/scale.py FOLDER N_SAMPLES` prints figures as JSON. Row J and `benchmarks/bench_scale.py` run it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
if __name__ == "__main__":
    sys.path[0] = str(ROOT)

from mmextract.engine import shards  # noqa: E402
from mmextract.engine.integrity import shard_seed  # noqa: E402
from tests.faults.workload import Stub  # noqa: E402


def write_shards(stub: Stub, place: Path) -> dict[str, Any]:
    """Write every shard as a dump does; returns seconds, and memory and descriptors after each tenth of them."""
    memory, descriptors = [], []
    with ThreadPoolExecutor(2) as executor:
        started = time.perf_counter()
        writer = stub.open(place, executor)
        opened = time.perf_counter()
        n_shards = writer.layout.n_shards
        shard = stub.shard(0)
        for index in range(n_shards):
            writer.write_shard(index, *shard)
            if (index + 1) % max(1, n_shards // 10) == 0:
                memory.append(resident_bytes())
                descriptors.append(len(list(Path("/proc/self/fd").iterdir())))
        written = time.perf_counter()
    return {
        "create_seconds": opened - started,
        "write_seconds": written - opened,
        "resident_bytes": memory,
        "descriptors": descriptors,
    }


def fill(stub: Stub, place: Path) -> None:
    """Make the files of every shard, quickly: all are the same bytes, and nothing is flushed."""
    with ThreadPoolExecutor(2) as executor:
        run = stub.open(place, executor).run
        states, records, _ = stub.shard(0)
        encoded = shards.encode_shard(states, stub.codec, executor)
    parts: list[list[shards.Bytes]] = [encoded, [records.tobytes()]]
    (place / "shard_digest/c").mkdir()
    for index in range(stub.layout.n_shards):
        digest = shards.digest(parts, seed=shard_seed(run, index)).to_bytes(8, "little")
        for key, data in (
            (f"hidden_states/c/{index}/0/0/0", shards.join(encoded)),
            (f"record/c/{index}/0", records.tobytes()),
            (f"shard_digest/c/{index}", digest),
        ):
            file = place / key
            if file.name == "0":
                os.makedirs(file.parent, exist_ok=True)  # noqa: PTH103 (twice as fast)
            file.write_bytes(data)


def take_up(stub: Stub, place: Path) -> dict[str, Any]:
    """Resume a store whose shards are all committed, finish it, and resume it once more; returns seconds."""
    seconds = {}
    with ThreadPoolExecutor(2) as executor:
        started = time.perf_counter()
        writer = stub.open(place, executor)
        committed = writer.committed()
        missing = [shard for shard in range(writer.layout.n_shards) if shard not in committed]
        seconds["resume_seconds"] = time.perf_counter() - started
        assert not missing and not writer.finalised()
        started = time.perf_counter()
        writer.finalise()
        seconds["finalise_seconds"] = time.perf_counter() - started
    started = time.perf_counter()
    summary = stub.dump(place)
    seconds["finished_seconds"] = time.perf_counter() - started
    assert summary.n_written == 0
    return seconds


def resident_bytes() -> int:
    """Return the memory that this process holds."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    """Measure what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("samples", type=int)
    parser.add_argument("--shard-samples", type=int, default=1)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--hidden-size", type=int, default=8)
    parser.add_argument("--fill", action="store_true", help="make the shards without the writer")
    arguments = parser.parse_args()
    stub = Stub(
        n_samples=arguments.samples,
        n_layers=arguments.layers,
        hidden_size=arguments.hidden_size,
        shard_samples=arguments.shard_samples,
        reject_every=0,
    )
    before = resident_bytes()
    place = arguments.folder / "a.zarr"
    written: dict[str, Any] = {}
    if arguments.fill:
        fill(stub, place)
    else:
        written = write_shards(stub, place)
    found = {"n_shards": stub.layout.n_shards, "before_bytes": before, **written, **take_up(stub, place)}
    print(json.dumps({**found, "after_bytes": resident_bytes()}))


if __name__ == "__main__":
    main()
