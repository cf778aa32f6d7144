"""The store against the disk and its peers: `python benchmarks/bench_store.py`.

write: hidden states in batches, as a model hands them over, through staging, assembly, encoding and durable writes,
over a raw write of the same bytes (file by file, each flushed to disk), once through the page cache and once past it.
With a codec, over the slower of the codec alone and that raw write through the page cache; then over the slower of the
codec and the faster way to write what it gives; and what the latter would be if nothing but the codec, that write and
one copy, from the order of samples into that of layers, kept all cores busy all the time. read: one layer of all
samples, over zarr-python's default pipeline on the same store, from the page cache. memory: what a run holds at its
end, over what it held after a tenth of the samples. resume: seconds until a run knows what is left of a store of many
shards. Peers write as they come; none of them flushes to disk or could resume.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import store_work as work
import zarr
from numpy.typing import NDArray
from states import real_states

from harness import Timing, alternate, save, show
from mmextract.engine.allocation import keep_freed_memory
from mmextract.engine.shards import CODECS, encode_shard, join
from mmextract.engine.store import open_store


def measure_writes(states: NDArray[Any], scratch: Path, repeats: int) -> dict[str, Any]:
    """Return seconds of every way to write, and the bytes that each codec gives."""
    keep_freed_memory()  # as a dump does, so that all are measured alike
    parts = work.shard_arrays(states)
    with ThreadPoolExecutor() as executor:
        encoded = {
            codec: [join(encode_shard(part, codec, executor)) for part in parts]
            for codec in CODECS
            if codec != "none"
        }
        n_encoded = {codec: sum(map(len, pieces)) for codec, pieces in encoded.items()}
        n_encoded["none"] = sum(
            len(piece) for part in parts for piece in encode_shard(part, "none", executor)
        )
        jobs: dict[str, Any] = {
            "raw": partial(work.write_raw, [part.data for part in parts]),
            "raw direct": partial(
                work.write_raw_direct, [part.reshape(-1).view(np.uint8).data for part in parts]
            ),
            "safetensors": partial(work.write_safetensors, parts),
        }
        in_memory: dict[str, Any] = {"copy": partial(work.copy_to_shards, states, np.empty_like(parts[0]))}
        for codec in CODECS:
            jobs[f"ours {codec}"] = partial(work.write_ours, states, codec)
            jobs[f"zarr-python {codec}"] = partial(work.write_zarr_python, states, codec)
            jobs[f"tensorstore {codec}"] = partial(work.write_tensorstore, states, codec)
            if codec != "none":
                jobs[f"raw {codec}"] = partial(work.write_raw, encoded[codec])
                jobs[f"raw direct {codec}"] = partial(work.write_raw_direct, encoded[codec])
                in_memory[f"codec {codec}"] = partial(work.encode_only, parts, codec, executor)
        jobs = {name: partial(job, scratch / name) for name, job in jobs.items()} | in_memory
        timings = alternate(jobs, repeats=repeats, before=partial(_clear, scratch))
    return {
        "n_bytes": states.nbytes,
        "encoded_bytes": n_encoded,
        "seconds": {name: list(timing.seconds) for name, timing in timings.items()},
        "processor_seconds": {name: list(timing.processor_seconds) for name, timing in timings.items()},
        "ratios": write_ratios(timings),
    }


def _clear(scratch: Path, name: str) -> None:
    """Remove what this job wrote last time, and let the disk come to rest."""
    shutil.rmtree(scratch / name, ignore_errors=True)
    os.sync()


def write_ratios(timings: dict[str, Timing]) -> dict[str, float]:
    """Return speeds over their limits: 1 is the limit."""
    ratios = {
        f"ours none ÷ {name} write": timings[name].median / timings["ours none"].median
        for name in ("raw", "raw direct")
    }
    for codec in CODECS:
        if codec != "none":
            ours, encoding = timings[f"ours {codec}"], timings[f"codec {codec}"]
            limit = max(encoding.median, timings["raw"].median)
            ratios[f"ours {codec} ÷ min(codec, raw write)"] = limit / ours.median
            writing = min(
                (timings[f"{way} {codec}"] for way in ("raw", "raw direct")), key=attrgetter("median")
            )
            limit = max(encoding.median, writing.median)
            ratios[f"ours {codec} ÷ min(codec, fastest write of the result)"] = limit / ours.median
            needed = sum(timing.median_processor for timing in (timings["copy"], encoding, writing))
            bound = max(limit, needed / (os.cpu_count() or 1))
            ratios[f"… at most, {codec}, by processor time"] = limit / bound
    for name, timing in timings.items():
        if name.startswith(("zarr-python", "tensorstore")):
            codec = name.split()[1]
            ratios[f"ours {codec} ÷ {name}"] = timing.median / timings[f"ours {codec}"].median
    ratios["ours none ÷ safetensors"] = timings["safetensors"].median / timings["ours none"].median
    return ratios


def measure_reads(states: NDArray[Any], scratch: Path, repeats: int) -> dict[str, Any]:
    """Return seconds of reading one layer from what `measure_writes` left, each checked against the states."""
    layer = states.shape[1] // 2
    seconds: dict[str, list[float]] = {}
    ratios: dict[str, float] = {}
    for codec in CODECS:
        path = scratch / f"ours {codec}"
        jobs: dict[str, Any] = {
            "ours": partial(_read_ours, path, layer),
            "zarr-python": partial(_read_zarr_python, path, layer),
            "tensorstore": partial(_read_tensorstore, path, layer),
        }
        if codec == "none":
            jobs["safetensors"] = partial(work.read_safetensors, scratch / "safetensors", layer)
        for name, job in jobs.items():
            assert np.array_equal(job().reshape(-1), states[:, layer].reshape(-1)), f"{name} {codec}"
        timings = alternate(jobs, repeats=repeats)
        seconds |= {f"{name} {codec}": list(timing.seconds) for name, timing in timings.items()}
        ratios |= {
            f"ours ÷ {name}, {codec}": timing.median / timings["ours"].median
            for name, timing in timings.items()
            if name != "ours"
        }
    return {"seconds": seconds, "ratios": ratios}


def _read_ours(path: Path, layer: int) -> NDArray[Any]:
    store = open_store(path)
    return store.read(layer, store.positions[0])


def _read_zarr_python(path: Path, layer: int) -> NDArray[Any]:
    array = zarr.open_group(path, mode="r")["hidden_states"]
    assert isinstance(array, zarr.Array)
    return np.asarray(array[:, layer, 0])


def _read_tensorstore(path: Path, layer: int) -> NDArray[Any]:
    return np.asarray(work.open_tensorstore(path / "hidden_states")[:, layer, 0].read().result())


def measure_run(*options: object, scratch: Path) -> dict[str, Any]:
    """Run row J of the fault matrix in a process of its own: memory along the way, and what resuming costs."""
    script = Path(__file__).parent.parent / "tests/faults/scale.py"
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        command = [str(part) for part in (sys.executable, script, folder, *options)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{script.name} failed:\n{done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def main() -> None:
    """Measure everything and print ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--states", default="smollm2", choices=("smollm2", "easyvqa"), help="whose states")
    parser.add_argument("--vectors", type=int, default=40_000, help="samples, each a token's states")
    parser.add_argument("--samples", type=int, default=100_000, help="samples of the run with a stub model")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--folder", type=Path, default=Path(), help="where to write: the disk that is measured"
    )
    parser.add_argument("--json", type=Path, help="write the figures there too")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="bench-store-") as folder:
        scratch = Path(folder)
        states = work.whole_shards(real_states(options.states, options.vectors, scratch))
        results: dict[str, Any] = {
            "states": f"{options.states}, {' × '.join(map(str, states.shape))}",
            "write": measure_writes(states, scratch, options.repeats),
            "read": measure_reads(states, scratch, options.repeats),
            "run": measure_run(
                options.samples, "--layers", 32, "--hidden-size", 16, "--shard-samples", 64, scratch=scratch
            ),
            "many shards": measure_run(options.samples, "--fill", scratch=scratch),
        }
        growth = results["run"]["resident_bytes"]
        results["run"]["memory_at_the_end_over_after_a_tenth"] = growth[-1] / growth[0]
    print_results(results)
    save(options.json, results)


def print_results(results: dict[str, Any]) -> None:
    """Print the ratios."""
    for part in ("write", "read"):
        show(f"{part}: speed over", ("", "ratio"), list(results[part]["ratios"].items()))
    n_bytes = results["write"]["n_bytes"]
    encoded = results["write"]["encoded_bytes"]
    show("size", ("codec", "ratio"), [(codec, n_bytes / size) for codec, size in encoded.items()])
    ratio = results["run"]["memory_at_the_end_over_after_a_tenth"]
    show("memory", ("", "ratio"), [("end ÷ after a tenth of the samples", ratio)])
    found = results["many shards"]
    seconds = [(name, found[name]) for name in found if name.endswith("_seconds")]
    show(f"{found['n_shards']} shards", ("", "seconds"), seconds)


if __name__ == "__main__":
    main()
