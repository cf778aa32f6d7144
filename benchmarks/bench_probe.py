"""Our solvers against loops of scikit-learn fits: `python benchmarks/bench_probe.py`.

One core, and processor seconds, which a busy machine distorts less than time on the clock; the run over a whole
store takes as many workers as there are cores, and time on the clock. Figures are ratios at the KKT residual that is
printed beside them; a residual is the largest entry of the gradient over C·m in the features as fitted, an excess how
far the objective stands above the lowest one found. The limit is the arithmetic that is left: a Gram matrix for each
training set and a factor for each fit, at the speed of a matrix product measured here. States are synthetic, with a
spectrum that falls as a power law, and with --real those of SmolLM2, whose exponent is printed too. Of calibration
a first look is taken, at groups of noise; `bench_calibration.py` measures it in full.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_calibration import SHAPES, measure
from sklearn.exceptions import ConvergenceWarning
from sklearn.preprocessing import StandardScaler
from states import sentence_states
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from harness import alternate, save, show
from mmextract.probes.choice import DUAL_BELOW, choose, find_device
from mmextract.probes.dual import FEW_LABELS, DualSolver
from mmextract.probes.primal import PrimalSolver
from mmextract.probes.settings import ProbeSettings
from mmextract.probes.solvers import FloatArray, IntArray, Job, SklearnSolver, Solution
from probe_store import measure_memory, probe_layers, solve_stored, write_store
from probe_work import FLAT, FOLDS, PENALTIES, STEEP, loop, make_jobs, make_states, objective, solve

PAPER_LAYERS = 33
CONTROLS = 4
"""Shuffled labels, each fitted 5 × 5 times: 100 control fits."""

CALIBRATED = "40 groups of 3"
"""The shape, of `bench_calibration.SHAPES`, that takes least time."""


def measure_flops() -> float:
    """Return the double-precision operations a second of a matrix product."""
    x = np.random.default_rng(0).normal(size=(1500, 1500))
    seconds = alternate({"product": lambda: x @ x.copy().T}, repeats=3, clock=time.process_time)["product"]
    return 2 * 1500**3 / min(seconds.seconds)


def measure_decay(x: FloatArray, scale: bool) -> float:
    """Return the exponent of the power law by which the singular values fall of centred, or scaled, features."""
    values = np.linalg.svd(StandardScaler(with_std=scale).fit_transform(x), compute_uv=False)
    k = np.arange(3, max(5, int(0.8 * len(values))))
    return float(-np.polyfit(np.log(k), np.log(values[k - 1]), 1)[0])


def compare(
    x: FloatArray, y: IntArray, n_sets: int, repeats: int, flops: float, *, scale: bool = True
) -> dict[str, Any]:
    """Return speed and residuals of `auto`'s choice and of scikit-learn's L-BFGS at two tolerances."""
    n, d = x.shape
    jobs = make_jobs(y, n_sets, scale=scale)
    solver = DualSolver() if choose(len(jobs[0].rows), d, "cpu") == "dual" else PrimalSolver()
    found: dict[str, list[list[Solution]]] = {}
    work: dict[str, Callable[[], object]] = {
        "ours": lambda: found.update(ours=solve(solver, x, jobs)),
        "lbfgs, default": lambda: found.update({"lbfgs, default": loop(x, jobs)}),
        "lbfgs, tol 1e-8": lambda: found.update({"lbfgs, tol 1e-8": loop(x, jobs, tol=1e-8)}),
    }
    timings = alternate(work, repeats=repeats, warm_up=False, clock=time.process_time)
    flat = {name: [s for solutions in groups for s in solutions] for name, groups in found.items()}
    owner = [job for job in jobs for _ in PENALTIES]
    values = {
        name: np.array([objective(x, j, s) for j, s in zip(owner, solutions, strict=True)])
        for name, solutions in flat.items()
    }
    best = np.min(list(values.values()), axis=0)
    ours = timings["ours"].median
    decided = {name: np.stack([s.decide(x)[:, 0] for s in solutions]) for name, solutions in flat.items()}
    tight = decided["lbfgs, tol 1e-8"]
    m = len(jobs[0].rows)
    gram = len(jobs) * m**2 * d if scale else n**2 * d  # half a product, which is symmetric
    least = (gram + len(jobs) * len(PENALTIES) * m**3 / 3) / flops
    return {
        "shape": [n, d],
        "decay": measure_decay(x, scale),
        "seconds at the limit": least,
        "limit over ours": least / ours,
        "fits": len(owner),
        "method": flat["ours"][0].method,
        "seconds": {name: list(timing.seconds) for name, timing in timings.items()},
        "ours over": {name: ours / timing.median for name, timing in timings.items()},
        "largest residual": {name: max(s.residual for s in solutions) for name, solutions in flat.items()},
        "largest excess": {name: float((value / best - 1).max()) for name, value in values.items()},
        "most steps": {name: max(s.n_iter for s in solutions) for name, solutions in flat.items()},
        "predictions that differ": {name: int(((v > 0) != (tight > 0)).sum()) for name, v in decided.items()},
        "predictions": int(tight.size),
    }


def agree(n: int, d: int) -> dict[str, float]:
    """Return how far coefficients are from scikit-learn's newton-cholesky, at most, over the largest of them."""
    found = {}
    for n_classes in (2, 3):
        x, y = make_states(n, d, n_classes)
        jobs = make_jobs(y, FOLDS)
        want = loop(x, jobs, solver="newton-cholesky", tol=1e-13)
        for solver in (DualSolver(), PrimalSolver()):
            got = solve(solver, x, jobs)
            distances = [
                float(np.abs(g.coefficients - w.coefficients).max() / np.abs(w.coefficients).max())
                for some, others in zip(got, want, strict=True)
                for g, w in zip(some, others, strict=True)
            ]
            found[f"{got[0][0].method}, {n_classes} classes"] = max(distances)
    return found


def extrapolate(n: int, d: int, n_layers: int) -> dict[str, float]:
    """Return what 5 × 5 fits of a label, and of CONTROLS shuffled ones, take on a layer, and on all of them."""
    x, y = make_states(n, d)
    jobs = make_jobs(y, FOLDS, 1 + CONTROLS)
    started = time.process_time()
    solutions = solve(DualSolver(), x, jobs)
    layer = time.process_time() - started
    return {
        "fits a layer": float(sum(map(len, solutions))),
        "processor seconds a layer": layer,
        "layers": float(n_layers),
        "minutes on two cores, estimated": layer * n_layers / 120,
        "largest residual": max(s.residual for some in solutions for s in some),
    }


def cross(d: int, shares: Sequence[float]) -> dict[str, dict[str, float]]:
    """Return processor milliseconds a fit of each solver, by training samples per feature: where `auto` turns."""
    found = {}
    for share in shares:
        x, y = make_states(round(share * d * FOLDS / (FOLDS - 1)), d)
        jobs = make_jobs(y, FOLDS)
        work = {
            type(solver).__name__: partial(solve, solver, x, jobs)
            for solver in (DualSolver(), PrimalSolver(), SklearnSolver())
        }
        timings = alternate(work, repeats=1, clock=time.process_time)
        fits = len(jobs) * len(PENALTIES)
        found[f"{share:g}"] = {name: timing.median / fits * 1e3 for name, timing in timings.items()}
    return found


def cross_labels(m: int, d: int, counts: Sequence[int]) -> dict[str, dict[str, float]]:
    """Return processor ms a fit of `dual`, with factors and with eigenvectors, by label vectors of a training set."""
    x, y = make_states(m, d)
    found = {}
    for count in counts:
        rng = np.random.default_rng(2)
        jobs = [Job(rows=np.arange(m), y=rng.permutation(y), penalties=PENALTIES) for _ in range(count)]
        ways = {"factors": DualSolver(few_labels=count), "eigenvectors": DualSolver(few_labels=0)}
        work = {name: partial(solve, solver, x, jobs) for name, solver in ways.items()}
        timings = alternate(work, repeats=1, clock=time.process_time)
        found[str(count)] = {
            name: timing.median / count / len(PENALTIES) * 1e3 for name, timing in timings.items()
        }
    return found


def compare_real(n: int, d: int, n_sets: int, repeats: int, flops: float) -> dict[str, dict[str, Any]]:
    """Return what `compare` finds for a layer of SmolLM2, at as few samples a feature, and for layers side by side."""
    with tempfile.TemporaryDirectory() as folder:
        states, y = sentence_states(n, Path(folder))  # [n, L, D]
    layer = states[: round(n * states.shape[2] / d), states.shape[1] // 2].astype(np.float64)
    side = states[:, :: max(1, states.shape[1] * states.shape[2] // d)].reshape(n, -1)[:, :d]
    return {
        "SmolLM2, middle layer": compare(layer, y[: len(layer)], n_sets, repeats, flops),
        "SmolLM2, layers side by side": compare(side.astype(np.float64), y, n_sets, repeats, flops),
        "SmolLM2, layers side by side, not scaled": compare(
            side.astype(np.float64), y, n_sets, repeats, flops, scale=False
        ),
    }


def run_store_parts(arguments: argparse.Namespace, flops: float) -> dict[str, Any]:
    """Return what `probe_store` measures on stores of the sizes asked for."""
    cores = os.cpu_count() or 1
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        store = write_store(
            Path(folder) / "a.zarr", arguments.samples, arguments.layers, arguments.layer_features, STEEP
        )
        n, n_layers, d = arguments.stored
        tall = write_store(Path(folder) / "b.zarr", n, n_layers, d, STEEP)
        settings = ProbeSettings(penalties=PENALTIES, repeats=1)
        return {
            "memory": measure_memory(store, settings),
            "stored": solve_stored(tall, PENALTIES, FOLDS, flops),
            "layers": probe_layers(store, settings, cores),
        }


def calibrate(n_draws: int) -> dict[str, Any]:
    """Return how many intervals hold the truth, and how even p-values are, in groups of noise."""
    settings = ProbeSettings(permutations=99)
    shapes = {CALIBRATED: SHAPES[CALIBRATED]}
    (found,) = measure(
        shapes, (0.0,), n_draws, n_draws, settings=settings, workers=os.cpu_count() or 1
    ).values()
    return {"shape": CALIBRATED, **found}


def show_speed(name: str, found: dict[str, Any]) -> None:
    """Print what `compare` found."""
    n, d = found["shape"]
    show(
        f"{found['fits']} fits, {n} samples × {d} features, {name}, decay {found['decay']:.2f} "
        f"({found['method']}; limit ÷ ours {found['limit over ours']:.2f})",
        ("", "processor s", "ours ÷ it", "KKT residual", "excess", "most steps", "predictions that differ"),
        [
            (
                work,
                float(np.median(seconds)),
                found["ours over"][work],
                found["largest residual"][work],
                found["largest excess"][work],
                found["most steps"][work],
                f"{found['predictions that differ'][work]} of {found['predictions']}",
            )
            for work, seconds in found["seconds"].items()
        ],
    )


def main() -> None:
    """Run all comparisons."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--features", type=int, default=3584)
    parser.add_argument("--sets", type=int, default=FOLDS, choices=range(1, FOLDS + 1), help="folds compared")
    parser.add_argument("--layer-features", type=int, default=4096, help="of the layer that is extrapolated")
    parser.add_argument(
        "--cross", type=int, nargs="*", default=[64, 512], help="features at which solvers cross"
    )
    parser.add_argument("--labels", type=int, nargs="*", default=[1, 4, 8, 16], help="at which `dual` turns")
    parser.add_argument(
        "--layers", type=int, default=PAPER_LAYERS, help="of the store that is probed as a whole"
    )
    parser.add_argument(
        "--stored",
        type=int,
        nargs=3,
        default=[20_000, 1, 512],
        metavar=("SAMPLES", "LAYERS", "FEATURES"),
        help="of the store that is read block by block",
    )
    parser.add_argument("--draws", type=int, default=100, help="data sets of noise, for the calibration")
    parser.add_argument("--real", action="store_true", help="measure SmolLM2's states too")
    parser.add_argument("--folder", type=Path, help="where stores are written; a temporary folder by default")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the figures there too")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        agreement = agree(300, 20)
        crossings = {str(d): cross(d, (0.5, 1, 2, 4)) for d in arguments.cross}
        turns = cross_labels(round(arguments.samples * 0.8), arguments.features, arguments.labels)
        layer = extrapolate(arguments.samples, arguments.layer_features, PAPER_LAYERS)
        flops, sizes = measure_flops(), (arguments.sets, arguments.repeats)
        speed = {
            name: compare(*make_states(arguments.samples, arguments.features, decay=decay), *sizes, flops)
            for name, decay in (("flat", FLAT), ("steep", STEEP))
        }
        flat = make_states(arguments.samples, arguments.features, decay=FLAT)
        speed["flat, not scaled"] = compare(*flat, *sizes, flops, scale=False)
        if arguments.real:
            speed |= compare_real(arguments.samples, arguments.features, *sizes, flops)
        stored = run_store_parts(arguments, flops)
    calibration = calibrate(arguments.draws)
    for name, found in speed.items():
        show_speed(name, found)
    show("coefficients against newton-cholesky", ("", "largest relative distance"), list(agreement.items()))
    show("one layer with controls", ("", ""), list(layer.items()))
    for d_text, shares in crossings.items():
        names = list(next(iter(shares.values())))
        show(
            f"processor ms a fit, {d_text} features, by training samples per feature",
            ("", *names),
            [(share, *(row[name] for name in names)) for share, row in shares.items()],
        )
    show(
        "processor ms a fit of `dual`, by label vectors a training set",
        ("", "factors", "eigenvectors"),
        [(count, row["factors"], row["eigenvectors"]) for count, row in turns.items()],
    )
    print(
        f"auto takes dual below {DUAL_BELOW['cpu']} training samples a feature; with factors to {FEW_LABELS} labels"
    )
    for title, name in (
        ("a whole run over a store, on all cores", "layers"),
        ("peak memory of a worker", "memory"),
        ("a layer that is read block by block, on one core", "stored"),
    ):
        show(title, ("", ""), list(stored[name].items()))
    show("calibration, in noise", ("", ""), list(calibration.items()))
    print(f"limits are those of {flops / 1e9:.0f} GFLOP/s in double precision, on one core")
    if find_device() == "cpu":
        print("cuML: not measured, there is no GPU")
    results = {
        "speed": speed,
        "agreement": agreement,
        "layer": layer,
        "crossings": crossings,
        "labels": turns,
        "calibration": calibration,
    }
    save(arguments.json, results | stored | {"flops": flops, "cuml": None})


if __name__ == "__main__":
    main()
