"""What `mmextract probe --dry-run` promises against what it takes: `python benchmarks/bench_cost.py`.

Layers of many shapes are scored in this process, on one core: processor seconds predicted over those taken, of scores
and of permutations, with states held in memory and streamed. Memory is held against its prediction by the tests, and by
`bench_probe.py` and `bench_large.py`.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from sklearn.exceptions import ConvergenceWarning
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from harness import save, show
from mmextract.probes.cost import predict_permutation, predict_seconds
from mmextract.probes.run import ProbePlan, plan_probe
from mmextract.probes.scoring import score_cell
from mmextract.probes.settings import ProbeSettings
from probe_store import write_store

SHAPES = (
    *((60, 16), (200, 512), (400, 4096), (600, 600), (1000, 64), (1000, 256), (1000, 1024), (1000, 3584)),
    *((1800, 1800), (2000, 600), (3000, 1000), (4000, 400), (10_000, 100)),
)
"""Samples × features of a layer that is held."""
STREAMED = ((20_000, 100), (20_000, 1000), (60_000, 400))
DECAYS = (0.0, 0.5)
"""Powers by which spectra fall."""
PERMUTATIONS = 20
LEAST_SECONDS = 0.01
"""That a permutation must be predicted to take to be measured: the difference of two runs."""
PROTOCOLS: dict[str, dict[str, Any]] = {
    "default": {},
    "one C, once": {"penalties": (0.01,), "repeats": 1},
    "no groups, once": {"group": "none", "repeats": 1},
    "three classes, once": {"label": "third", "repeats": 1},
}
STREAMED_PROTOCOLS: dict[str, dict[str, Any]] = {
    "one C, once": {"penalties": (0.01,), "repeats": 1},
    "two C": {"penalties": (0.01, 1.0), "inner_folds": 3},
}


def measure(
    folder: Path, shapes: tuple[tuple[int, int], ...], protocols: dict[str, dict[str, Any]], stream: str
) -> Iterator[dict[str, Any]]:
    """Yield, for each shape, spectrum and protocol, seconds predicted and taken."""
    for n, d in shapes:
        for decay in DECAYS:
            store = write_store(folder / f"{n}-{d}-{decay}.zarr", n, 1, d, decay)
            for name, options in protocols.items():
                settings = ProbeSettings(
                    **{"label": "identity_set", "permutations": 0, **options}, stream=stream
                )
                plan = plan_probe(store, settings)
                taken = _time(plan)
                found = {
                    "samples": n,
                    "features": d,
                    "decay": decay,
                    "protocol": name,
                    "streamed": stream == "always",
                    "seconds": taken,
                    "predicted": predict_seconds(plan),
                }
                if name == "default" and predict_permutation(plan) > LEAST_SECONDS:
                    tested = replace(plan, settings=replace(settings, permutations=PERMUTATIONS))
                    found["seconds a permutation"] = (_time(tested) - taken) / PERMUTATIONS
                    found["predicted a permutation"] = predict_permutation(plan)
                yield found


def _time(plan: ProbePlan) -> float:
    started = time.process_time()
    score_cell(plan, 0, "last")
    return time.process_time() - started


def summarise(runs: list[dict[str, Any]]) -> list[tuple[str, float]]:
    """Return the least, the median and the largest of predicted ÷ measured, of each kind of run."""
    kinds = {
        "held": [run["predicted"] / run["seconds"] for run in runs if not run["streamed"]],
        "streamed": [run["predicted"] / run["seconds"] for run in runs if run["streamed"]],
        "a permutation": [
            run["predicted a permutation"] / run["seconds a permutation"]
            for run in runs
            if "seconds a permutation" in run
        ],
    }
    return [
        (f"{kind}, {name}", pick(ratios))
        for kind, ratios in kinds.items()
        for name, pick in (("least", min), ("median", statistics.median), ("largest", max))
        if ratios
    ]


def main() -> None:
    """Measure all shapes and print ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--smallest", type=int, help="measure only so many of the first shapes, none streamed"
    )
    parser.add_argument("--json", type=Path, help="write the figures there too")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore", ConvergenceWarning)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, threadpool_limits(1):
        runs = list(measure(Path(folder), SHAPES[: arguments.smallest], PROTOCOLS, "never"))
        if arguments.smallest is None:
            runs += measure(Path(folder), STREAMED, STREAMED_PROTOCOLS, "always")
    ratios = summarise(runs)
    show("processor seconds, predicted ÷ measured", ("", "ratio"), ratios)
    save(arguments.json, {"ratios": dict(ratios), "runs": runs})


if __name__ == "__main__":
    main()
