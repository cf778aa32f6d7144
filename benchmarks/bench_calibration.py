"""Do intervals cover what they promise, and are p-values of noise spread evenly? Simulated, through the whole protocol.

Each draw is a new data set: samples in groups, features that the samples of a group share in part, and a signal of a
given size, or none. The truth of a score is what it is on average over draws (for AUROC without a signal it is ½). A
coverage counts the draws whose 95 % interval holds the truth; with 500 draws it is known to ±1.9 %, with 150 to ±3.5 %.

    python benchmarks/bench_calibration.py --draws 150 --noise-draws 500 --json benchmarks/results/calibration.json
    python benchmarks/bench_calibration.py    # 100 of each
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.stats import kstest

from harness import save, show
from mmextract.probes.design import Design
from mmextract.probes.rows import Row, make_rows
from mmextract.probes.run import ProbePlan
from mmextract.probes.scoring import hold_states, score_states
from mmextract.probes.settings import ProbeSettings
from mmextract.probes.tasks import make_task

METRICS = ("auroc", "accuracy", "balanced_accuracy")
"""Those that have an interval."""

N_LAYERS = 2
"""Layers of a draw; the signal is in the last one alone."""

COMPARED = "30 pairs of 4"
"""Shape of which each draw has a second checkpoint, with other noise and the same signal: what differs is chance."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """How the samples of a draw lie."""

    structure: str
    """paired: every group has every class; between: every group has one; rows: no groups."""
    n_groups: int
    group_size: int
    n_features: int
    shared: float
    """Standard deviation of what the samples of a group (paired: of a group and class) share; their own is 1."""


SHAPES = {
    "30 pairs of 4": Shape(structure="paired", n_groups=30, group_size=4, n_features=48, shared=0.8),
    "60 pairs of 10": Shape(structure="paired", n_groups=60, group_size=10, n_features=32, shared=2.0),
    "40 groups of 3": Shape(structure="between", n_groups=40, group_size=3, n_features=24, shared=1.0),
    "100 samples": Shape(structure="rows", n_groups=100, group_size=1, n_features=48, shared=0.0),
}

SIGNALS = (0.0, 0.4, 1.0)
"""Half of the distance between the classes' means along one feature."""


@dataclass(frozen=True, kw_only=True)
class Draw:
    """A data set to be made; pickled to a worker."""

    shape: Shape
    signal: float
    seed: int
    settings: ProbeSettings
    compare: bool


def draw_design(shape: Shape, rng: np.random.Generator) -> Design:
    """Return samples, classes and groups, each class as frequent as the other."""
    groups = np.repeat(np.arange(shape.n_groups), shape.group_size)
    if shape.structure == "paired":
        y = np.tile([0, 1], len(groups) // 2)
    else:
        y = rng.permutation(np.arange(shape.n_groups) % 2)[groups]
    group = "g" if shape.structure != "rows" else None
    return Design(label="y", classes=("a", "b"), group=group, rows=np.arange(len(y)), y=y, groups=groups)


def draw_states(shape: Shape, design: Design, signal: float, rng: np.random.Generator) -> NDArray[np.float64]:
    """Return [n, D]: what groups share, in the paired design images of both classes too, noise, and the signal."""
    n, d = design.n_samples, shape.n_features
    person = 2 * design.groups + design.y if shape.structure == "paired" else design.groups
    states = shape.shared * rng.normal(size=(int(person.max()) + 1, d))[person]
    if shape.structure == "paired":
        states += rng.normal(size=(n // 2, d))[np.arange(n) // 2] + 0.3 * rng.normal(size=(n, d))
    else:
        states += rng.normal(size=(n, d))
    states[:, 0] += signal * (2 * design.y - 1)
    return np.asarray(states)


def run_draw(draw: Draw) -> list[Row]:
    """Return the label's rows and, if there is a second checkpoint, the difference's."""
    rng = np.random.default_rng([draw.seed, 7])
    design = draw_design(draw.shape, rng)
    settings = replace(draw.settings, seed=draw.seed)
    plan = ProbePlan(
        store="",
        attributes={},
        n_stored=design.n_samples,
        hidden_size=draw.shape.n_features,
        settings=settings,
        design=design,
        tasks=(make_task("label", design.y, design.groups, settings),),
        layers=tuple(range(N_LAYERS)),
        positions=("last",),
        samples=(),
        group_names=(),
    )
    signals = [0.0] * (N_LAYERS - 1) + [draw.signal]
    scores = {
        (layer, "last"): score_states(
            plan,
            *(
                hold_states(plan, draw_states(draw.shape, design, signal, rng))
                for _ in range(1 + draw.compare)
            ),
        )
        for layer, signal in enumerate(signals)
    }
    return [row for row in make_rows(plan, scores) if row.task in ("label", "difference")]


def summarise(draws: Sequence[Sequence[Row]], signal: float) -> dict[str, float]:
    """Return coverages of the layer with the signal, and how p-values and findings came out."""
    last = N_LAYERS - 1

    def column(task: str, metric: str, name: str, layer: int = last) -> NDArray[np.float64]:
        found = (
            next(r for r in rows if (r.task, r.metric, r.layer) == (task, metric, layer)) for rows in draws
        )
        return np.array([getattr(row, name) for row in found], np.float64)

    def covers(task: str, metric: str, truth: float, prefix: str = "") -> float:
        low, high = (column(task, metric, prefix + name) for name in ("low", "high"))
        return float(((low <= truth) & (truth <= high)).mean())

    auroc = column("label", "auroc", "value")
    truth = {metric: float(column("label", metric, "value").mean()) for metric in METRICS}
    if not signal:
        truth["auroc"] = 0.5
    others = [column("label", "auroc", "p_corrected", layer) for layer in range(last)]
    found = column("label", "auroc", "p_corrected") <= 0.05
    results = {
        "draws": len(draws),
        "auroc": float(auroc.mean()),
        **{f"coverage of {metric}": covers("label", metric, truth[metric]) for metric in METRICS},
        "found": float(found.mean()),
        "found elsewhere": float((np.min(others, axis=0) <= 0.05).mean()),
        "detectable": float(column("label", "auroc", "detectable").mean()),
        "uniform p of noise (KS)": float(kstest(column("label", "auroc", "p", 0), "uniform").pvalue),
    }
    if any(row.task == "difference" for row in draws[0]):
        p = column("difference", "auroc", "p")
        results |= {
            "coverage of the difference": covers("difference", "auroc", 0.0),
            "uniform p of the difference (KS)": float(kstest(p, "uniform").pvalue),
            "difference found": float((p <= 0.05).mean()),
        }
    return results


def measure(
    shapes: Mapping[str, Shape],
    signals: Sequence[float],
    n_draws: int,
    n_noise_draws: int,
    *,
    settings: ProbeSettings,
    workers: int,
) -> dict[str, dict[str, float]]:
    """Return a summary for each shape and signal, from `n_noise_draws` where there is none."""
    results = {}
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        for name, shape in shapes.items():
            for signal in signals:
                n = n_draws if signal else n_noise_draws
                draws = [
                    Draw(
                        shape=shape,
                        signal=signal,
                        seed=seed,
                        settings=settings,
                        compare=name == COMPARED,
                    )
                    for seed in range(n)
                ]
                rows = list(pool.map(run_draw, draws, chunksize=max(1, n // (4 * workers))))
                found = results[f"{name}, signal {signal:g}"] = summarise(rows, signal)
                print(f"{name}, signal {signal:g}:", json.dumps(found), file=sys.stderr, flush=True)
    return results


def main() -> None:
    """Measure, print a table, and save it if there is a path."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--draws", type=int, default=100)
    parser.add_argument("--noise-draws", type=int, help="those without a signal; as many if not given")
    parser.add_argument("--permutations", type=int, default=99)
    parser.add_argument("--shape", action="append", choices=list(SHAPES))
    parser.add_argument("--signal", action="append", type=float)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--c", action="append", type=float, help="the default grid if not given")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    results = measure(
        {name: SHAPES[name] for name in arguments.shape or SHAPES},
        arguments.signal or SIGNALS,
        arguments.draws,
        arguments.noise_draws or arguments.draws,
        settings=ProbeSettings(
            permutations=arguments.permutations,
            repeats=arguments.repeats,
            penalties=tuple(arguments.c or ProbeSettings().penalties),
        ),
        workers=arguments.workers,
    )
    names = list(dict.fromkeys(name for row in results.values() for name in row))
    show("Calibration", ["", *results], [[n, *(row.get(n, "") for row in results.values())] for n in names])
    save(arguments.json, results)


if __name__ == "__main__":
    main()
