"""Dumps of a tiny text model on a real dask cluster of processes, and what they must come to.

It is shared by the tests of distribution and by row H of the fault matrix; run as a program it is a client of its own,
that can be killed:

    python cluster_runs.py DATA MODEL STORE SCHEDULER SHARDS
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from distributed import Client, LocalCluster

from mmextract.engine.dump import DumpPlan, DumpSpec, DumpSummary, plan_dump, run_dump
from mmextract.engine.models import ModelSpec, load
from mmextract.engine.samples import read_samples

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def write_data(folder: Path, n_samples: int) -> Path:
    """Write questions of three lengths, one of which is too long for the model, as JSON Lines."""
    file = folder / "questions.jsonl"
    rows = [{"id": f"q{i}", "question": f"{'why ' * (i % 3)}number {i}?"} for i in range(n_samples)]
    rows[n_samples // 2]["question"] = "why " * 200
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def make_spec(data: Path, model: Path, **settings: Any) -> DumpSpec:
    """Return a run of shards of 4 samples, in batches of 2."""
    chosen: dict[str, Any] = {
        "shard_samples": 4,
        "batch_size": 2,
        "threads": 2,
        "torch_threads": 1,
        **settings,
    }
    return DumpSpec(
        dataset=read_samples(data),
        model=ModelSpec(model=str(model), device="cpu"),
        layers="embed,all",
        **chosen,
    )


def dump_here(spec: DumpSpec, store: Path) -> DumpSummary:
    """Do the run in this process, and to its end."""
    adapter = load(spec.model)
    return run_dump(plan_dump(spec, adapter), adapter, store)


@contextmanager
def local_cluster(n_workers: int, **settings: Any) -> Iterator[Client]:
    """Start a scheduler in this process and workers in processes of their own.

    dask leaves OMP_NUM_THREADS=1 in the environment of the process that starts workers; other processes that a test
    starts are not to compute otherwise for it.
    """
    before = {name: os.environ.get(name) for name in THREADS}
    chosen: dict[str, Any] = {
        "threads_per_worker": 1,
        "memory_limit": None,
        "silence_logs": "CRITICAL",
        **settings,
    }
    try:
        with (
            LocalCluster(
                n_workers=n_workers,
                processes=True,
                host="127.0.0.1",
                dashboard_address="127.0.0.1:0",
                **chosen,
            ) as cluster,
            Client(cluster, set_as_default=False) as client,
        ):
            yield client
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def worker_pids(client: Client) -> dict[str, int]:
    """Return address → process of the workers that there are."""
    return {address: int(pid) for address, pid in client.run(os.getpid, on_error="ignore").items()}


def plan_on(client: Client, spec: DumpSpec) -> DumpPlan:
    """Plan on a worker."""
    from mmextract.engine.distributed import plan_distributed

    return plan_distributed(spec, client)


def main(data: str, model: str, store: str, scheduler: str, n_shards: str) -> None:
    """Run, as a client of a scheduler that is there; says when so many shards are done."""
    from mmextract.engine.distributed import run_distributed

    done = 0

    def advance(n_rows: int) -> None:
        nonlocal done
        done += n_rows
        if done >= 4 * int(n_shards):
            print("there", flush=True)

    spec = make_spec(Path(data), Path(model))
    with Client(scheduler, timeout=30, set_as_default=False) as client:
        print("connected", flush=True)
        run_distributed(plan_on(client, spec), client, Path(store), advance)
    print("finished", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
