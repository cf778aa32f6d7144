"""What a dump of 10^6 and 10^8 samples would cost besides its model: `python benchmarks/bench_scale.py`.

The real store and resume code, with states that no model made, runs at growing numbers of shards, each size in a
process of its own; a straight line through its figures says what one shard and one row cost. Shards are tiny and lie
in --folder, by default in memory where there is any, so that the number of shards is what grows; what a disk's flush
adds is measured beside it, in --disk. The rows of a plan, the tasks of dask.distributed and a whole dump on a dask
worker, of a tiny model, are measured too. Costs at 10^6 and 10^8 samples are computed from these, and said to be.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(1, str(Path(__file__).parent.parent))  # the stub that the tests run

from harness import save, show

SCALE = Path(__file__).parent.parent / "tests/faults/scale.py"
LAYERS, HIDDEN_SIZE, SHARD_BYTES = 33, 4096, 64 << 20
OBJECTS_A_SHARD = 3
"""States, record and digest; a shard with rejected rows has one more."""
TARGETS = (10**6, 10**8)


def run_store(n_shards: int, base: Path) -> dict[str, Any]:
    """Write, resume and finish a store of one sample a shard, in a process of its own."""
    with tempfile.TemporaryDirectory(dir=base) as folder:
        command = [sys.executable, str(SCALE), folder, str(n_shards)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def time_tasks(n_tasks: int) -> float:
    """Return seconds of empty tasks through dask.distributed, a window of them at a time, released when done."""
    from distributed import Client, LocalCluster

    with (
        LocalCluster(n_workers=1, threads_per_worker=2, dashboard_address=":0") as cluster,
        Client(cluster) as client,
    ):
        client.submit(abs, -1).result()
        started = time.perf_counter()
        window = deque(client.submit(abs, -1 - task, pure=False) for task in range(min(8, n_tasks)))
        for task in range(len(window), n_tasks + len(window)):
            future = window.popleft()
            future.result()
            future.release()
            if task < n_tasks:
                window.append(client.submit(abs, -1 - task, pure=False))
        return time.perf_counter() - started


def compare_with_cluster(n_shards: int, base: Path) -> float:
    """Return how many times as long as in this process a dump of a tiny model takes on one dask worker."""
    from mmextract.engine.distributed import plan_distributed, run_distributed
    from tests.engine.cluster_runs import dump_here, local_cluster, make_spec, write_data
    from tests.engine.tiny_models import save_text_model

    with tempfile.TemporaryDirectory(dir=base) as name:
        folder = Path(name)
        spec = make_spec(write_data(folder, 4 * n_shards), save_text_model(folder / "model"))
        here = dump_here(spec, folder / "here.zarr").seconds
        with local_cluster(1) as client:
            there = run_distributed(plan_distributed(spec, client), client, folder / "there.zarr").seconds
    return there / here


def measure_rows(n_rows: int) -> float:
    """Return the bytes a row that a plan holds: samples, rows and columns."""
    import tracemalloc

    from mmextract.engine.conversations import Turn
    from mmextract.engine.rows import make_columns, make_rows
    from mmextract.engine.samples import Dataset, Sample

    tracemalloc.start()
    samples = [
        Sample(
            id=f"images/{number:09}.jpg",
            image=None,
            turns=(Turn(role="user", text=f"What is in picture {number}?"),),
            answer=f"answer {number}",
            columns={},
        )
        for number in range(n_rows)
    ]
    rows = make_rows(Dataset(samples=samples, format="jsonl", source="", fingerprint=""), None)
    columns = make_columns(rows, None)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(columns["sample"]) == n_rows
    return held / n_rows


def slope(sizes: Sequence[int], values: Sequence[float]) -> float:
    """Return the cost of one more, from a straight line through measurements, weighted to fit small sizes as well."""
    if len(sizes) == 1:
        return values[0] / sizes[0]
    return float(max(0.0, np.polyfit(sizes, values, 1, w=1 / np.asarray(sizes))[0]))


def fit(
    found: Mapping[int, Mapping[str, Any]], on_disk: Mapping[str, Any], n_on_disk: int
) -> dict[str, float]:
    """Return what one shard and one row cost."""
    sizes = sorted(found)
    costs = {
        f"{name}_a_shard": slope(sizes, [found[n][f"{name}_seconds"] for n in sizes])
        for name in ("write", "resume", "finalise", "finished")
    }
    costs["write_on_disk_a_shard"] = on_disk["write_seconds"] / n_on_disk
    grown = [found[n]["after_bytes"] - found[n]["before_bytes"] for n in sizes]
    costs["store_bytes_a_shard"] = slope(sizes, grown)  # that of its one row in it
    return costs


def extrapolate(n_samples: int, costs: Mapping[str, float]) -> dict[str, float]:
    """Compute what so many samples of a real size cost."""
    sample_bytes = LAYERS * HIDDEN_SIZE * 4
    n_shards = -(-n_samples // (SHARD_BYTES // sample_bytes))
    return {
        "samples": n_samples,
        "bytes": n_samples * sample_bytes,
        "shards": n_shards,
        "objects": OBJECTS_A_SHARD * n_shards,
        "store_seconds": n_shards * costs["write_a_shard"],
        "flush_seconds": n_shards * max(0.0, costs["write_on_disk_a_shard"] - costs["write_a_shard"]),
        "scheduler_seconds": n_shards * costs["task"],
        "resume_seconds": n_shards * costs["resume_a_shard"],
        "finalise_seconds": n_shards * costs["finalise_a_shard"],
        "client_bytes": n_samples * costs["plan_bytes_a_row"] + n_shards * costs["store_bytes_a_shard"],
    }


def main() -> None:
    """Measure, fit, and print both."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, nargs="+", default=[10**3, 10**4, 10**5])
    shared = Path("/dev/shm")
    in_memory = shared if shared.is_dir() else Path(tempfile.gettempdir())
    parser.add_argument("--folder", type=Path, default=in_memory, help="where the stores lie")
    parser.add_argument("--disk", type=Path, default=Path(tempfile.gettempdir()), help="where flushes count")
    parser.add_argument("--tasks", type=int, default=5000, help="empty ones, of dask.distributed")
    parser.add_argument("--shards", type=int, default=500, help="shards of the run on a dask cluster")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    arguments = parser.parse_args()
    found = {n: run_store(n, arguments.folder) for n in sorted(arguments.samples)}
    smallest = min(found)
    costs = fit(found, run_store(smallest, arguments.disk), smallest)
    costs["task"] = time_tasks(arguments.tasks) / arguments.tasks
    cluster = compare_with_cluster(arguments.shards, arguments.folder)
    costs["plan_bytes_a_row"] = measure_rows(min(max(found), 10**5))
    targets = {str(n): extrapolate(n, costs) for n in TARGETS}
    _print(found, costs, targets)
    print(
        f"A dump of {arguments.shards} small shards on one dask worker took {cluster:.2f} × as long as in one process."
    )
    measured = {str(n): values for n, values in found.items()}
    save(
        arguments.json,
        {"measured": measured, "cluster_over_here": cluster, "fitted": costs, "computed": targets},
    )


def _print(
    found: Mapping[int, Mapping[str, Any]],
    costs: Mapping[str, float],
    targets: Mapping[str, Mapping[str, float]],
) -> None:
    names = ("create", "write", "resume", "finalise", "finished")
    show(
        "measured: seconds of a store of one sample a shard",
        ("shards", *names, "MiB at the first tenth", "MiB at the last"),
        [
            (
                str(n),
                *(float(values[f"{name}_seconds"]) for name in names),
                *(values["resident_bytes"][at] / 2**20 for at in (0, -1)),
            )
            for n, values in found.items()
        ],
    )
    show("fitted to what was measured: the cost of one more", ("what", "cost"), list(costs.items()))
    show(
        f"computed from the fits: {LAYERS} layers × {HIDDEN_SIZE}, float32 before compression, shards of 64 MiB",
        (
            "samples",
            "TB",
            "objects",
            "store h",
            "flush h",
            "scheduler h",
            "resume s",
            "finalise s",
            "client GB",
        ),
        [
            (
                f"{n:.0e}",
                t["bytes"] / 1e12,
                f"{t['objects']:,}",
                *(t[f"{name}_seconds"] / 3600 for name in ("store", "flush", "scheduler")),
                t["resume_seconds"],
                t["finalise_seconds"],
                t["client_bytes"] / 1e9,
            )
            for n, t in ((value["samples"], value) for value in targets.values())
        ],
    )
    print(_first_to_break(targets[str(TARGETS[-1])]))


def _first_to_break(target: Mapping[str, float]) -> str:
    """Say what of the largest run is furthest beyond one machine."""
    memory = target["client_bytes"] / (64 << 30)
    hours = (target["store_seconds"] + target["scheduler_seconds"]) / 3600
    return (
        f"Computed, at {target['samples']:.0e} samples: the launching process holds every row and needs "
        f"{target['client_bytes'] / 1e9:.0f} GB, {memory:.1f} × a machine of 64 GiB; listing {target['shards']:,.0f} "
        f"commits takes {target['resume_seconds']:.0f} s, writing and scheduling them {hours:.1f} h beside the model. "
        + ("Memory of the launcher breaks first." if memory > 1 else "The bytes themselves are what costs.")
    )


if __name__ == "__main__":
    main()
