"""What a dump of 10^6 and 10^8 samples would cost besides its model: `python benchmarks/bench_scale.py`.

The real store and resume code, with states that no model made, runs at growing numbers of shards and of rows, each
size in a process of its own. Non-negative least squares on the relative errors say what a run, a shard and a row cost,
and how far the fit is from what was measured. Shards are tiny and lie in --folder, by default in memory where there is
any, so that their number is what grows; what a disk's flush adds is measured beside it, in --disk. The rows of a plan,
the tasks of dask.distributed and a whole dump on a dask worker, of a tiny model, are measured too.

Whatever is said of 10^6 and 10^8 samples is computed from these fits: nothing of that size was run, and no model's or
network's time, and no disk's bandwidth, is in it.
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
from dataclasses import dataclass
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
ROWS_A_SHARD = (1, 100)
"""Two, so that the cost of a shard can be told from that of a row."""
STEPS = ("create", "write", "resume", "finalise", "finished")
LIMITS = {"launcher_bytes": 64 << 30, "resume_seconds": 3600.0, "scheduler_seconds": 86_400.0}
"""What a machine has, and what a run of weeks can bear: 64 GiB of memory, an hour to be taken up again, a day."""


@dataclass(frozen=True, kw_only=True)
class Fit:
    """What something costs, by a plane through measurements, and how far they lie from it."""

    constant: float
    a_shard: float
    a_row: float
    residual: float
    """The largest distance of a measurement from the plane, by the measurement."""

    def at(self, n_shards: float, n_rows: float) -> float:
        """Return the cost of so many."""
        return self.constant + self.a_shard * n_shards + self.a_row * n_rows


def run_store(n_rows: int, rows_a_shard: int, base: Path) -> dict[str, Any]:
    """Write, resume and finish a store, in a process of its own."""
    with tempfile.TemporaryDirectory(dir=base) as folder:
        command = [sys.executable, str(SCALE), folder, str(n_rows), "--shard-samples", str(rows_a_shard)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return {"n_rows": n_rows, "rows_a_shard": rows_a_shard, **found}


def fit_plane(shards: Sequence[int], rows: Sequence[int], values: Sequence[float]) -> Fit:
    """Fit constant + shards + rows, none of them negative, to values > 0, so that relative errors are least."""
    from scipy.optimize import nnls

    measured = np.asarray(values, float)
    terms = np.stack([np.ones(len(shards)), shards, rows], 1).astype(float)
    scale = np.maximum(terms.max(0), 1)
    solved, _ = nnls(terms / scale / measured[:, None], np.ones(len(measured)))
    costs = solved / scale
    residual = float(np.abs(terms @ costs / measured - 1).max())
    return Fit(constant=costs[0], a_shard=costs[1], a_row=costs[2], residual=residual)


def fit_store(found: Sequence[Mapping[str, Any]]) -> dict[str, Fit]:
    """Return what the steps of a store cost in seconds, and what its run holds in memory, in bytes."""
    shards, rows = [run["n_shards"] for run in found], [run["n_rows"] for run in found]
    fits = {name: fit_plane(shards, rows, [run[f"{name}_seconds"] for run in found]) for name in STEPS}
    grown = [max(1, run["after_bytes"] - run["before_bytes"]) for run in found]
    return {**fits, "store memory": fit_plane(shards, rows, grown)}


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


def compare_with_cluster(n_shards: int, base: Path) -> dict[str, float]:
    """Return seconds of a dump of a tiny model in this process, and on one dask worker."""
    from mmextract.engine.distributed import plan_distributed, run_distributed
    from tests.engine.cluster_runs import dump_here, local_cluster, make_spec, write_data
    from tests.engine.tiny_models import save_text_model

    with tempfile.TemporaryDirectory(dir=base) as name:
        folder = Path(name)
        spec = make_spec(write_data(folder, 4 * n_shards), save_text_model(folder / "model"))
        here = dump_here(spec, folder / "here.zarr").seconds
        with local_cluster(1) as client:
            there = run_distributed(plan_distributed(spec, client), client, folder / "there.zarr").seconds
    return {"shards": n_shards, "here_seconds": here, "there_seconds": there}


def measure_rows(n_rows: int, base: Path) -> dict[str, float]:
    """Read a data set of questions about images, and make rows and columns of it; returns bytes held, and at most."""
    import tracemalloc

    from mmextract.engine.rows import make_columns, make_rows
    from mmextract.engine.samples import read_samples

    with tempfile.TemporaryDirectory(dir=base) as folder:
        (Path(folder) / "train").mkdir()
        (Path(folder) / "train/000000000.jpg").touch()  # a data set with none of its images is refused
        file = Path(folder) / "data.jsonl"
        with file.open("w") as lines:
            for n in range(n_rows):
                row = {"id": f"q{n}", "image": f"train/{n:09}.jpg", "question": f"What is in picture {n}?"}
                lines.write(json.dumps({**row, "answer": f"answer {n}"}) + "\n")
        tracemalloc.start()
        rows = make_rows(read_samples(file), None)
        columns = make_columns(rows, None)
        held, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert len(columns["sample"]) == n_rows
    return {"rows": n_rows, "held_bytes": held, "most_bytes": most}


def extrapolate(
    n_rows: int, fits: Mapping[str, Fit], task: float, flush: float, row_bytes: float
) -> dict[str, float]:
    """Compute what so many samples of a real size cost."""
    sample_bytes = LAYERS * HIDDEN_SIZE * 4
    n_shards = -(-n_rows // (SHARD_BYTES // sample_bytes))
    steps = {f"{name}_seconds": fits[name].at(n_shards, n_rows) for name in STEPS}
    return {
        "samples": n_rows,
        "bytes": n_rows * sample_bytes,
        "shards": n_shards,
        "objects": OBJECTS_A_SHARD * n_shards,
        **steps,
        "flush_seconds": n_shards * flush,
        "scheduler_seconds": n_shards * task,
        "launcher_bytes": n_rows * row_bytes + fits["store memory"].at(n_shards, n_rows),
    }


def main() -> None:
    """Measure, fit, compute, and print all three."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, nargs="+", default=[10**3, 10**4, 10**5])
    shared = Path("/dev/shm")
    in_memory = shared if shared.is_dir() else Path(tempfile.gettempdir())
    parser.add_argument("--folder", type=Path, default=in_memory, help="where the stores lie")
    parser.add_argument("--disk", type=Path, default=Path(tempfile.gettempdir()), help="where flushes count")
    parser.add_argument("--tasks", type=int, default=5000, help="empty ones, of dask.distributed")
    parser.add_argument("--shards", type=int, default=500, help="shards of the run on a dask cluster")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    parser.add_argument("--markdown", action="store_true", help="print the README's table, too")
    arguments = parser.parse_args()
    sizes = sorted(arguments.samples)
    started = time.monotonic()
    found = [run_store(n, each, arguments.folder) for each in ROWS_A_SHARD for n in sizes]
    fits = fit_store(found)
    on_disk = run_store(sizes[0], 1, arguments.disk)
    flush = max(0.0, (on_disk["write_seconds"] - found[0]["write_seconds"]) / on_disk["n_shards"])
    tasks = {n: time_tasks(n) for n in (max(1, arguments.tasks // 5), arguments.tasks)}
    few, many = tasks
    task = (tasks[many] - tasks[few]) / (many - few)
    rows = [measure_rows(n, arguments.folder) for n in sizes]
    row_bytes = max(run["most_bytes"] for run in rows[-1:]) / rows[-1]["rows"]
    targets = [extrapolate(n, fits, task, flush, row_bytes) for n in TARGETS]
    cluster = compare_with_cluster(arguments.shards, arguments.folder)
    results = {
        "measured": found,
        "measured on disk": on_disk,
        "tasks": {str(n): seconds for n, seconds in tasks.items()},
        "rows": rows,
        "cluster": cluster,
        "fitted": {name: vars(fit) for name, fit in fits.items()},
        "fitted besides": {"task_seconds": task, "flush_seconds": flush, "row_bytes": row_bytes},
        "computed": targets,
        "breaks first": first_to_break(targets[-1]),
        "seconds": time.monotonic() - started,
    }
    _print(results, fits)
    if arguments.markdown:
        print(markdown(targets))
    save(arguments.json, results)


def first_to_break(target: Mapping[str, float]) -> str:
    """Say what of a run is furthest beyond its limit, and from how many samples on it is."""
    name = max(LIMITS, key=lambda name: target[name] / LIMITS[name])
    times = target[name] / LIMITS[name]
    said = {
        "launcher_bytes": f"the launcher, which holds every row, needs {target[name] / 1e9:.0f} GB of memory",
        "resume_seconds": f"taking the run up again takes {_time(target[name])}",
        "scheduler_seconds": f"the scheduler is busy for {_time(target[name])}",
    }[name]
    if times <= 1:
        return f"At {target['samples']:.0e} samples nothing is beyond its limit; nearest to it: {said}."
    return (
        f"At {target['samples']:.0e} samples {said}, {times:.1f} × its limit: that breaks first, at about "
        f"{target['samples'] / times:.0e} samples."
    )


def markdown(targets: Sequence[Mapping[str, float]]) -> str:
    """Return the table of the README."""
    lines: Mapping[str, Sequence[str]] = {
        "states, float32 before compression": [f"{t['bytes'] / 1e12:.1f} TB" for t in targets],
        "shards of 64 MiB; objects": [f"{t['shards']:,}; {t['objects']:,}" for t in targets],
        "our own time beside the model's, shards written": [
            _time(t["write_seconds"] + t["flush_seconds"]) for t in targets
        ],
        "scheduler's time, all tasks": [_time(t["scheduler_seconds"]) for t in targets],
        "create; resume; finalise": [
            "; ".join(_time(t[f"{name}_seconds"]) for name in ("create", "resume", "finalise"))
            for t in targets
        ],
        "launcher's memory": [f"{t['launcher_bytes'] / 1e9:.3g} GB" for t in targets],
    }
    head = [
        f"| | {' | '.join(format(t['samples'], '.0e') + ' samples' for t in targets)} |",
        "|---|" + "---|" * len(targets),
    ]
    body = [f"| {name} | {' | '.join(cells)} |" for name, cells in lines.items()]
    return "\n".join([*head, *body, "", first_to_break(targets[-1])])


def _time(seconds: float) -> str:
    """Return two digits and a unit."""
    size, unit = next((s, u) for limit, s, u in _UNITS if seconds < limit)
    return f"{float(format(seconds / size, '.2g')):g} {unit}"


_UNITS = ((120, 1, "s"), (7200, 60, "min"), (float("inf"), 3600, "h"))


def _print(results: Mapping[str, Any], fits: Mapping[str, Fit]) -> None:
    show(
        "measured: seconds of a store",
        ("rows", "shards", *STEPS, "MiB at the first tenth", "MiB at the last"),
        [
            (
                str(run["n_rows"]),
                str(run["n_shards"]),
                *(float(run[f"{name}_seconds"]) for name in STEPS),
                *(run["resident_bytes"][at] / 2**20 for at in (0, -1)),
            )
            for run in results["measured"]
        ],
    )
    show(
        "fitted: seconds, and bytes of memory, and how far the furthest measurement is from the fit",
        ("what", "constant", "a shard", "a row", "residual"),
        [(name, fit.constant, fit.a_shard, fit.a_row, f"{fit.residual:.0%}") for name, fit in fits.items()],
    )
    others, cluster = results["fitted besides"], results["cluster"]
    flush = others["flush_seconds"] * 1e3
    print(
        f"An empty task costs {others['task_seconds'] * 1e3:.2f} ms, a shard on disk {flush:.2f} "
        f"ms more than in memory, a row {others['row_bytes']:.0f} bytes at most. A dump of {cluster['shards']} small "
        f"shards of a tiny model took {cluster['there_seconds']:.1f} s on one dask worker, "
        f"{cluster['here_seconds']:.1f} s in one process."
    )
    show(
        f"computed, not run: {LAYERS} layers × {HIDDEN_SIZE}, float32 before compression, shards of 64 MiB",
        (
            "samples",
            "TB",
            "objects",
            "write",
            "flush",
            "scheduler",
            "create",
            "resume",
            "finalise",
            "launcher GB",
        ),
        [
            (
                f"{t['samples']:.0e}",
                t["bytes"] / 1e12,
                f"{t['objects']:,}",
                *(
                    _time(t[f"{name}_seconds"])
                    for name in ("write", "flush", "scheduler", "create", "resume", "finalise")
                ),
                t["launcher_bytes"] / 1e9,
            )
            for t in results["computed"]
        ],
    )
    print(results["breaks first"])


if __name__ == "__main__":
    main()
