"""Solvers by name, and which of them suits a shape and a device.

This module knows nothing about folds or scores. torch is loaded with the first solver that computes with it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from mmextract.probes.solvers import FloatArray, Job, SklearnSolver, Solution, Solver

SOLVER_NAMES = ("auto", "dual", "primal", "sklearn", "cuml")

DUAL_BELOW = {"cpu": 1.5, "cuda": 1.5}
"""Training samples per feature below which `dual` is the faster one, by device.

Processor ms a fit on one core of an AMD EPYC that others used too, 5 folds × 5 C of a binary label
(`benchmarks/bench_probe.py` measures them, and scikit-learn's). For more classes the two meet at about 1.3. On CUDA
nothing was measured: the figure is the processor's.

    samples/feature   dual, 64 features   primal   dual, 512 features   primal
                1                   2.3      3.5                   13       39
                1.5                 2.3      3.3                   24       29
                2                   2.4      2.8                   42       30
                3                   3.4      3.1                  113       34
"""


@dataclass(frozen=True)
class AutoSolver:
    """Takes `dual` or `primal` for each job by the shape of its training set: see DUAL_BELOW."""

    device: str

    def solve(self, x: FloatArray, jobs: Sequence[Job]) -> Iterator[list[Solution]]:
        """Yield, for each job in turn, a solution for each of its penalties. x: [n, D]."""
        names = [choose(len(job.rows), x.shape[1], self.device) for job in jobs]
        solving = {
            name: _make(name, self.device).solve(
                x, [job for job, chosen in zip(jobs, names, strict=True) if chosen == name]
            )
            for name in set(names)
        }
        for name in names:
            yield next(solving[name])


def choose(n_samples: int, n_features: int, device: str) -> str:
    """Return the name of the fastest solver for training sets of that shape."""
    return "dual" if n_samples < DUAL_BELOW[device] * n_features else "primal"


def find_device() -> str:
    """Return `cuda` if there is a GPU that torch can use, else `cpu`."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def check_name(name: str) -> None:
    """Raise LookupError unless it is one of SOLVER_NAMES."""
    if name not in SOLVER_NAMES:
        raise LookupError(f"there is no solver {name!r}: choose one of {', '.join(SOLVER_NAMES)}")


def make_solver(name: str) -> Solver:
    """Return the solver of that name, one of SOLVER_NAMES, for the process that calls.

    Raises LookupError for another name, ValueError for `cuml` where there is no GPU or no cuML.
    """
    check_name(name)
    return _make(name, "cpu" if name == "sklearn" else find_device())


@contextmanager
def one_thread() -> Iterator[None]:
    """Keep torch to one thread, as `threadpool_limits` does for NumPy: the cores are filled by other tasks."""
    import torch

    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(n_threads)


def _make(name: str, device: str) -> Solver:
    if name == "sklearn":
        return SklearnSolver()
    if name == "cuml":
        from mmextract.probes.cuml_solver import CumlSolver

        return CumlSolver(device)
    if name == "dual":
        from mmextract.probes.dual import DualSolver

        return DualSolver(device)
    if name == "primal":
        from mmextract.probes.primal import PrimalSolver

        return PrimalSolver(device)
    return AutoSolver(device)
