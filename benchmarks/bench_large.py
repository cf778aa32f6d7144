"""A layer that no memory here holds, probed as a user would: `python benchmarks/bench_large.py`.

By default 10⁶ samples × 4096, 33 GB in double precision, at one C and without permutations: some forty minutes and
10 GB of disk. The states are noise about a few directions in which samples differ a lot, and the classes stand
`--distance` apart along another direction, so that the AUROC of the best probe is known, and what a probe of this
many samples loses by having to find it.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.special import ndtr

from harness import save, show
from mmextract.engine.assembly import to_numpy
from mmextract.engine.layout import Layout
from mmextract.engine.writer import open_writer
from mmextract.probes.command_cost import predict_command_bytes
from mmextract.probes.cost import predict_seconds
from mmextract.probes.description import DescriptionSettings
from mmextract.probes.run import plan_probe
from mmextract.probes.settings import ProbeSettings

WIDE = 64
"""Directions in which samples differ a lot."""
SHARD = 2048
CLASSES = ["seen", "unseen"]


def write_store(path: Path, n: int, d: int, distance: float) -> Path:
    """Write one layer of bfloat16 states of n/2 images, each of which is in both classes."""
    layout = Layout(
        n_samples=n, layers=(0,), positions=("last",), hidden_size=d, dtype="bfloat16", shard_samples=SHARD
    )
    rng = np.random.default_rng(0)
    wide = rng.normal(size=(WIDE, d)).astype(np.float32)
    apart = rng.normal(size=d)
    directions = np.linalg.qr(wide.T)[0]
    apart -= directions @ (directions.T @ apart)
    apart *= distance / np.linalg.norm(apart)
    shift = apart.astype(np.float32)
    columns: dict[str, list[Any]] = {
        "sample": [f"{row // 2}#{CLASSES[row % 2]}" for row in range(n)],
        "image": [f"{row // 2}.png" for row in range(n)],
        "pair": [row // 2 for row in range(n)],
        "identity_set": [CLASSES[row % 2] for row in range(n)],
    }
    with ThreadPoolExecutor() as executor:
        writer = open_writer(path, layout, columns, {"run": {"positions": ["last"]}}, executor)
        for shard in range(layout.n_shards):
            n_rows = len(layout.rows(shard))
            states = rng.standard_normal((n_rows, d), np.float32)
            states += rng.standard_normal((n_rows, WIDE), np.float32) @ wide
            states += np.where(np.arange(n_rows) % 2, 0.5, -0.5)[:, None].astype(np.float32) * shift
            data, records = layout.empty_shard(), layout.empty_records()
            data[0, :n_rows, 0] = to_numpy(torch.from_numpy(states).to(torch.bfloat16))
            records[:n_rows] = 1
            writer.write_shard(shard, data, records, {})
        writer.finalise()
    return path


def expect(n_training: int, d: int, distance: float) -> tuple[float, float]:
    """Return the AUROC of the best probe, and that of a linear discriminant from so many samples.

    Both for classes of unit noise, that stand apart in a direction of their own.
    """
    found = distance**2 / math.sqrt(distance**2 + 4 * d / n_training)
    return float(ndtr(distance / math.sqrt(2))), float(ndtr(found / math.sqrt(2)))


def probe(store: Path, out: Path, penalty: float, folds: int, stream: str) -> dict[str, Any]:
    """Return what the command took, and found."""
    settings = ProbeSettings(
        label="identity_set", penalties=(penalty,), folds=folds, repeats=1, permutations=0, stream=stream
    )
    plan = plan_probe(store, settings)
    program = str(Path(sys.executable).parent / "mmextract")
    command = [program, "probe", str(store), "--label", "identity_set"]
    command += ["--c", str(penalty), "--folds", str(folds), "--repeats", "1", "--permutations", "0"]
    command += ["--stream", stream]
    command += ["--no-separability", "--projections", "none", "-o", str(out)]
    started = time.perf_counter()
    subprocess.run(command, check=True)
    seconds, used = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    record = json.loads((out / "probe.json").read_text("utf-8"))
    described = DescriptionSettings(separability=False, projections=())
    peak, predicted = used.ru_maxrss << 10, predict_command_bytes([plan], described)
    return {
        "states": record["states"],
        "fits": record["fits"]["n"],
        "solvers": record["fits"]["solvers"],
        "largest residual": record["fits"]["worst_residual"],
        "seconds": seconds,
        "processor seconds": used.ru_utime + used.ru_stime,
        "processor seconds predicted": predict_seconds(plan),
        "peak bytes": peak,
        "predicted bytes": predicted,
        "peak ÷ predicted": peak / predicted,
        "auroc": next(
            row["value"] for row in record["rows"] if row["task"] == "label" and row["metric"] == "auroc"
        ),
        "headline": record["headline"],
    }


def main() -> None:
    """Write a store, probe it, and print what that took."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--features", type=int, default=4096)
    parser.add_argument("--distance", type=float, default=0.5, help="of the classes, in units of the noise")
    parser.add_argument("--c", type=float, default=0.1)
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument(
        "--stream", choices=("auto", "always"), default="auto", help="as `mmextract probe` has it"
    )
    parser.add_argument(
        "--folder", type=Path, help="where the store is written; a temporary folder by default"
    )
    parser.add_argument("--json", type=Path, help="write the figures there too")
    arguments = parser.parse_args()
    n, d = arguments.samples, arguments.features
    if d <= WIDE:
        parser.error(f"--features must be more than {WIDE}")
    best, expected = expect(n * (arguments.folds - 1) // arguments.folds, d, arguments.distance)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        started = time.perf_counter()
        store = write_store(Path(folder) / "a.zarr", n, d, arguments.distance)
        written = time.perf_counter() - started
        n_bytes = sum(file.stat().st_size for file in store.rglob("*") if file.is_file())
        found = probe(store, Path(folder) / "probe", arguments.c, arguments.folds, arguments.stream)
    results = {
        "samples": n,
        "features": d,
        "bytes of the store": n_bytes,
        "seconds to make it": written,
        "auroc of the best probe": best,
        "auroc expected of one from as many samples": expected,
        **found,
    }
    show("a layer larger than memory", ("", ""), list(results.items()))
    save(arguments.json, results)


if __name__ == "__main__":
    main()
