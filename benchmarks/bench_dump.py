"""A whole dump against the bare forward pass of the same batches: `python benchmarks/bench_dump.py`.

bare forward: the model without LM head and cache, inputs already in memory, no hooks, nothing kept. A dump decodes,
preprocesses, captures every layer, compresses and writes to a flushed store beside it; 1.00 would be free. Where
images are decoded on the same cores that run the model, decoding alone is shown too: their sum is what a machine
without a free core can reach.
"""

from __future__ import annotations

import argparse
import resource
import shutil
import tempfile
from pathlib import Path
from typing import Any

from harness import alternate, save, show
from mmextract.engine.dump import DumpPlan, DumpSpec, plan_dump, run_dump
from mmextract.engine.images import RejectedSample, decode
from mmextract.engine.models import Adapter, Encoded, load
from scenarios import SCENARIOS, Scenario


def prepare(plan: DumpPlan, adapter: Adapter) -> list[Encoded]:
    """Decode and encode every sample, one after the other; samples that are refused are left out."""
    ready = []
    for row in plan.rows:
        try:
            pixels = None if row.sample.image is None else decode(row.sample.image).pixels
            ready.append(adapter.encode(adapter.render(row.sample.turns), pixels))
        except RejectedSample:
            continue
    return ready


def batches(ready: list[Encoded], batch_size: int) -> list[list[Encoded]]:
    """Put samples together that can share a forward pass, as a dump does."""
    groups: dict[Any, list[Encoded]] = {}
    for encoded in ready:
        groups.setdefault(encoded.batch_key, []).append(encoded)
    return [g[i : i + batch_size] for g in groups.values() for i in range(0, len(g), batch_size)]


def measure(name: str, scenario: Scenario, scratch: Path, batch_size: int, repeats: int) -> dict[str, Any]:
    """Return the figures of one scenario."""
    adapter = load(scenario.model)
    spec = DumpSpec(
        dataset=scenario.dataset,
        model=scenario.model,
        layers=scenario.layers,
        positions=scenario.positions,
        batch_size=batch_size,
    )
    plan = plan_dump(spec, adapter)
    out = scratch / f"{name}.zarr"
    ready = prepare(plan, adapter)
    if not ready:
        raise SystemExit(f"{name}: every sample was rejected, so there is nothing to measure")
    loaded = [adapter.collate(batch) for batch in batches(ready, batch_size)]
    written: list[int] = []

    def bare_forward() -> None:
        for inputs in loaded:
            adapter.forward(inputs)

    def dump() -> None:
        shutil.rmtree(out, ignore_errors=True)
        written.append(run_dump(plan, adapter, out).bytes_written)

    timings = alternate(
        {"forward": bare_forward, "prepare": lambda: prepare(plan, adapter), "dump": dump}, repeats=repeats
    )
    forward, preparing, whole = (timings[key].median for key in ("forward", "prepare", "dump"))
    n_samples = len(plan.rows)
    return {
        "n_samples": n_samples,
        "n_rejected": n_samples - len(ready),
        "n_layers": len(plan.layout.layers),
        "positions": list(scenario.positions),
        "batch_size": batch_size,
        "samples_per_second": n_samples / whole,
        "dump_over_forward": whole / forward,
        "dump_over_forward_and_prepare": whole / (forward + preparing),
        "bytes_written": written[-1],
        "bytes_before_compression": plan.bytes_per_sample * n_samples,
        "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "seconds": {key: list(timing.seconds) for key, timing in timings.items()},
    }


def main() -> None:
    """Run the scenarios asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("scenarios", nargs="*", choices=[[], *SCENARIOS], help="all if none is named")
    parser.add_argument("--limit", type=int, help="take the first N samples only")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the figures there too")
    arguments = parser.parse_args()
    results = {}
    for name in arguments.scenarios or SCENARIOS:
        with tempfile.TemporaryDirectory() as folder:
            scenario = SCENARIOS[name](Path(folder), arguments.limit)
            results[name] = measure(name, scenario, Path(folder), arguments.batch_size, arguments.repeats)
    show(
        "dump against bare forward",
        (
            "scenario",
            "samples",
            "rejected",
            "layers",
            "samples/s",
            "÷ forward",
            "÷ (forward + prepare)",
            "MB written",
            "compression",
            "peak MiB",
        ),
        [
            (
                name,
                found["n_samples"],
                found["n_rejected"],
                found["n_layers"],
                found["samples_per_second"],
                found["dump_over_forward"],
                found["dump_over_forward_and_prepare"],
                found["bytes_written"] / 1e6,
                found["bytes_before_compression"] / found["bytes_written"],
                round(found["peak_memory_mib"]),
            )
            for name, found in results.items()
        ],
    )
    save(arguments.json, results)


if __name__ == "__main__":
    main()
