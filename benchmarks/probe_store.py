"""The parts of `bench_probe.py` that need a store: a whole run, a worker's memory, a layer larger than memory."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmextract.engine.layout import Layout
from mmextract.engine.store import open_store
from mmextract.engine.writer import open_writer
from mmextract.probes.blocks import StoredStates
from mmextract.probes.cost import predict_seconds
from mmextract.probes.planning import choose_workers, predict_bytes
from mmextract.probes.primal import PrimalSolver
from mmextract.probes.rounds import list_rounds
from mmextract.probes.run import plan_probe, run_probe
from mmextract.probes.scoring import score_cell
from mmextract.probes.settings import ProbeSettings
from mmextract.probes.solvers import Job

SHARD = 64


def write_store(path: Path, n: int, n_layers: int, d: int, decay: float) -> Path:
    """Write hidden states of a paired design, n/2 images, whose spectrum falls as a power law; the label is chance."""
    rng = np.random.default_rng(0)
    layout = Layout(
        n_samples=n, layers=tuple(range(n_layers)), positions=("last",), hidden_size=d, shard_samples=SHARD
    )
    row, names = np.arange(n), ["seen", "unseen"]
    columns: dict[str, list[Any]] = {
        "sample": [f"{r // 2}#{names[r % 2]}" for r in row],
        "image": [f"{r // 2}.png" for r in row],
        "pair": (row // 2).tolist(),
        "identity_set": [names[r % 2] for r in row],
        "third": [str(r // 2 % 3) for r in row],
    }
    rank = min(n, d)
    basis = rng.normal(size=(rank, d)).astype(np.float32)
    with ThreadPoolExecutor(1) as executor:
        writer = open_writer(path, layout, columns, {"run": {"positions": ["last"]}}, executor)
        for shard in range(layout.n_shards):
            rows = layout.rows(shard)
            data, records = layout.empty_shard(), layout.empty_records()
            latent = rng.normal(size=(n_layers, len(rows), rank)) * np.arange(1, rank + 1) ** -decay
            data[:, : len(rows), 0] = latent.astype(np.float32) @ basis
            records[: len(rows)] = 1
            writer.write_shard(shard, data, records, {})
        writer.finalise()
    return path


def probe_layers(store: Path, settings: ProbeSettings, workers: int) -> dict[str, Any]:
    """Return what a run over all layers took, through the code behind `mmextract probe`."""
    plan = plan_probe(store, settings)
    n_fits = sum(one.n_fits for one in list_rounds(plan))
    started = time.perf_counter()
    run_probe(plan, workers=workers)
    seconds = time.perf_counter() - started
    return {
        "layers": len(plan.layers),
        "samples": plan.design.n_samples,
        "features": plan.hidden_size,
        "fits a layer": n_fits,
        "of these, of shuffled labels": n_fits - n_fits // len(plan.tasks),
        "workers": choose_workers(plan, workers, workers),
        "seconds": seconds,
        "seconds predicted": predict_seconds(plan) / workers,
    }


def measure_memory(store: Path, settings: ProbeSettings) -> dict[str, Any]:
    """Return the peak resident memory of a process that scores one layer, and what was predicted."""
    command = [sys.executable, __file__, str(store), json.dumps(asdict(settings))]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    peak, predicted = json.loads(done.stdout)
    return {"peak bytes": peak, "predicted bytes": predicted, "peak ÷ predicted": peak / predicted}


class _Counted(StoredStates):
    """Counts the passes over a store."""

    passes = 0

    def __iter__(self) -> Iterator[tuple[slice, Tensor]]:
        _Counted.passes += 1
        return super().__iter__()


def solve_stored(store: Path, penalties: tuple[float, ...], folds: int, flops: float) -> dict[str, Any]:
    """Return what grouped folds × C of a layer cost that is read block by block, and what 10⁶ × 4096 would.

    flops: double-precision operations a second of a matrix product, on the cores in use.
    """
    opened = open_store(store)
    n, d = opened.n_samples, opened.hidden_size
    states = _Counted(opened, 0, "last", np.arange(n))
    y, groups = np.arange(n) % 2, np.arange(n) // 2
    rows = [np.flatnonzero(groups % folds != fold) for fold in range(folds)]
    jobs = [Job(rows=r, y=y[r], penalties=penalties) for r in rows]
    started = time.perf_counter()
    for _ in states:
        pass
    reading = time.perf_counter() - started
    _Counted.passes = 0
    started = time.perf_counter()
    found = list(PrimalSolver().solve_stored(states, jobs))
    seconds = time.perf_counter() - started
    large, wide = 10**6, 4096
    columns = folds * len(penalties)
    arithmetic = 2 * large * wide**2 + folds * 25 * wide**3 + _Counted.passes * 2 * large * wide * columns
    bytes_a_second = n * d * 4 / reading
    return {
        "samples": n,
        "features": d,
        "fits": columns,
        "passes": _Counted.passes,
        "seconds": seconds,
        "of these, reading": reading * _Counted.passes,
        "largest residual": max(s.residual for some in found for s in some),
        "hours of 10⁶ × 4096 by the same passes, computed": (
            arithmetic / flops + _Counted.passes * large * wide * 4 / bytes_a_second
        )
        / 3600,
    }


def _report_peak(store: str, settings: str) -> None:
    plan = plan_probe(store, ProbeSettings(**json.loads(settings)))
    torch.set_num_threads(1)
    score_cell(plan, plan.layers[0], "last")
    peak = int(Path("/proc/self/status").read_text("utf-8").partition("VmHWM:")[2].split()[0]) << 10
    print(json.dumps([peak, predict_bytes(plan)]))


if __name__ == "__main__":
    _report_peak(*sys.argv[1:])
