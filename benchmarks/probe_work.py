"""What `bench_probe.py` compares: problems, our solvers, and scikit-learn's in a loop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from mmextract.probes.solvers import FloatArray, IntArray, Job, Solution, Solver, kkt_residual

PENALTIES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
FOLDS = 5
FLAT, STEEP = 0.5, 1.0
"""Decay of the spectrum: on a flat one L-BFGS has an easy time, on a steep one it needs thousands of iterations."""


def make_states(
    n: int, d: int, n_classes: int = 2, *, decay: float = STEEP, seed: int = 0
) -> tuple[FloatArray, IntArray]:
    """Return states [n, d], whose k-th direction has size k^−decay, and classes [n] that the first 20 hint at."""
    rng = np.random.default_rng(seed)
    rank = min(n, d)
    latent = rng.normal(size=(n, rank)) * np.arange(1, rank + 1) ** -decay
    first = latent[:, :20]
    logits = first @ rng.normal(size=(first.shape[1], n_classes)) / 2 + rng.gumbel(size=(n, n_classes))
    x = latent @ rng.normal(size=(rank, d)) + 0.01 * rng.normal(size=(n, d))
    return x * rng.lognormal(size=d) + rng.normal(size=d), logits.argmax(1)


def make_jobs(y: IntArray, n_sets: int, labels: int = 1, *, scale: bool = True) -> list[Job]:
    """Return one job a fold and label: the label itself first, then shuffled ones. scale: see `Job.scale`."""
    rng = np.random.default_rng(1)
    shuffled = [y, *(rng.permutation(y) for _ in range(labels - 1))]
    rows = [np.flatnonzero(np.arange(len(y)) % FOLDS != fold) for fold in range(n_sets)]
    return [Job(rows=r, y=some[r], penalties=PENALTIES, scale=scale) for r in rows for some in shuffled]


def solve(solver: Solver, x: FloatArray, jobs: Sequence[Job]) -> list[list[Solution]]:
    """Return what the solver finds."""
    return list(solver.solve(x, jobs))


def loop(x: FloatArray, jobs: Sequence[Job], **options: Any) -> list[list[Solution]]:
    """Fit each penalty of each job by itself, as people do: features standardised, or left as they are.

    The residual is that in centred features, in which ours is measured.
    """
    found = []
    for job in jobs:
        scaler = StandardScaler(with_mean=job.scale, with_std=job.scale).fit(x[job.rows])
        z = scaler.transform(x[job.rows])
        models = [LogisticRegression(C=c, max_iter=100_000, **options).fit(z, job.y) for c in job.penalties]
        found.append([_convert(model, scaler, z, job.y) for model in models])
    return found


def _convert(model: LogisticRegression, scaler: StandardScaler, z: FloatArray, y: IntArray) -> Solution:
    weights, intercept, center = model.coef_.T, model.intercept_, z.mean(0)
    coefficients = weights if scaler.scale_ is None else weights / scaler.scale_[:, None]
    return Solution(
        penalty=model.C,
        coefficients=coefficients,
        intercept=intercept if scaler.mean_ is None else intercept - scaler.mean_ @ coefficients,
        n_iter=int(model.n_iter_.max()),
        method="loop",
        residual=kkt_residual(z - center, y, model.C, weights, intercept + center @ weights),
    )


def objective(x: FloatArray, job: Job, solution: Solution) -> float:
    """Return ½‖w‖² + C·Σ loss of a binary probe, in scaled features if the job scales them."""
    w = solution.coefficients[:, 0]
    if job.scale:
        w = w * StandardScaler().fit(x[job.rows]).scale_
    logits = solution.decide(x[job.rows])[:, 0]
    return float(w @ w / 2 + solution.penalty * np.logaddexp(0, np.where(job.y == 1, -logits, logits)).sum())
