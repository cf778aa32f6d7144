"""cuML's logistic regression, fit by fit: on one GPU, or on all of a Dask cluster's for a layer larger than one holds.

It has no warm start and stops where the gradient is small against the loss, so the residual that is returned
says how near to the optimum that was. This module knows nothing about folds or scores.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scipy.special import expit, softmax
from sklearn.preprocessing import StandardScaler

from mmextract.probes.batches import find_scale
from mmextract.probes.blocks import Blocks, StoredStates
from mmextract.probes.solvers import FloatArray, Job, Solution, kkt_residual

if TYPE_CHECKING:
    from distributed import Client

TOLERANCE = 1e-10
"""Of cuML: norm of the gradient over the loss. Its default, 1e-4, stops far from the optimum."""

MOST_ITERATIONS = 10_000


class CumlSolver:
    """cuml.linear_model.LogisticRegression.

    Raises ValueError where there is no GPU, or no cuML.
    """

    def __init__(self, device: str) -> None:
        if device != "cuda":
            raise ValueError(
                "the solver cuml needs a GPU, and there is none that torch can use: take auto, which solves "
                "the same problems exactly on the processor"
            )
        self._model = _import_model("cuml.linear_model")

    def solve(self, x: FloatArray, jobs: Sequence[Job]) -> Iterator[list[Solution]]:
        """Yield, for each job in turn, a solution for each of its penalties. x: [n, D]."""
        for job in jobs:
            scaler = StandardScaler(with_std=job.scale).fit(x[job.rows])
            z = np.asarray(scaler.transform(x[job.rows]))
            scale = scaler.scale_ if job.scale else np.ones(x.shape[1])
            yield [self._fit(z, job, penalty, scaler.mean_, scale) for penalty in job.penalties]

    def _fit(
        self, z: FloatArray, job: Job, penalty: float, center: FloatArray, scale: FloatArray
    ) -> Solution:
        model = self._model(C=penalty, tol=TOLERANCE, max_iter=MOST_ITERATIONS, output_type="numpy")
        model.fit(z, job.y, sample_weight=job.sample_weights if job.class_weights else None)
        weights, intercept = np.asarray(model.coef_).T, np.asarray(model.intercept_)
        coefficients = weights / scale[:, None]
        return Solution(
            penalty=penalty,
            coefficients=coefficients,
            intercept=intercept - center @ coefficients,
            n_iter=int(np.max(model.n_iter_)),
            method="cuml",
            residual=kkt_residual(z, job.y, penalty, weights, intercept, job.sample_weights),
        )


class ClusterCumlSolver:
    """cuml.dask.linear_model.LogisticRegression: a fit is shared by all workers, each with a GPU of its own.

    Written from cuML's documentation: no cluster of GPUs was there to run it on. Raises ValueError where a worker
    has no GPU, or there is no cuML.
    """

    def __init__(self, client: Client) -> None:
        without = [address for address, there in client.run(_has_gpu).items() if not there]
        if without or not client.scheduler_info(n_workers=-1)["workers"]:
            raise ValueError(
                f"the solver cuml needs a GPU for each worker, and {', '.join(without) or 'there are no workers'}"
                f"{' has none' if without else ''}: start workers with `dask cuda worker`, or take primal"
            )
        self._client, self._model = client, _import_model("cuml.dask.linear_model")

    def solve_stored(self, states: StoredStates, jobs: Sequence[Job]) -> Iterator[list[Solution]]:
        """Yield, for each job in turn, a solution for each of its penalties. Raises ValueError for class weights."""
        for job in jobs:
            if job.class_weights:
                raise ValueError("cuml.dask knows no class weights: take primal")
            train = replace(states, rows=states.rows[job.rows])
            center, scale = measure_features(train, job.scale)
            yield [self._fit(train, job, penalty, center, scale) for penalty in job.penalties]

    def _fit(
        self, train: StoredStates, job: Job, penalty: float, center: FloatArray, scale: FloatArray
    ) -> Solution:
        cupy, dask_array = importlib.import_module("cupy"), importlib.import_module("dask.array")
        stored = train.store.to_dask(train.layer, train.position)[train.rows]
        z = ((stored.astype(np.float64) - center) / scale).map_blocks(cupy.asarray)
        y = dask_array.from_array(job.y.astype(np.float64), chunks=(z.chunks[0],)).map_blocks(cupy.asarray)
        model = self._model(
            client=self._client, C=penalty, tol=TOLERANCE, max_iter=MOST_ITERATIONS, output_type="numpy"
        ).fit(z, y)
        weights = np.asarray(model.coef_, np.float64).reshape(-1, len(center)).T
        intercept = np.asarray(model.intercept_, np.float64).ravel()
        coefficients = weights / scale[:, None]
        return Solution(
            penalty=penalty,
            coefficients=coefficients,
            intercept=intercept - center @ coefficients,
            n_iter=int(np.max(model.n_iter_)),
            method="cuml.dask",
            residual=stored_residual(train, job, penalty, weights, intercept, center, scale),
        )


def measure_features(states: Blocks, scale: bool) -> tuple[FloatArray, FloatArray]:
    """Return means and standard deviations [D] of states; ones if they are not to be scaled, or constant."""
    n = states.shape[0]
    mean = sum((x.sum(0) for _, x in states), torch.zeros(states.shape[1], dtype=torch.float64)) / n
    if not scale:
        return mean.numpy(), np.ones(len(mean))
    variance = sum((((x - mean) ** 2).sum(0) for _, x in states), torch.zeros_like(mean)) / n
    return mean.numpy(), find_scale(mean, variance, n).numpy()


def stored_residual(
    states: Blocks,
    job: Job,
    penalty: float,
    weights: FloatArray,
    intercept: FloatArray,
    center: FloatArray,
    scale: FloatArray,
) -> float:
    """Return `solvers.kkt_residual` of states that come in blocks: those of the job's rows, in order."""
    n_outputs = len(intercept)
    slope, total = weights / (penalty * len(job.y)), np.zeros(n_outputs)
    for rows, x in states:
        z = (x.numpy() - center) / scale
        logits = z @ weights + intercept
        y = job.y[rows]
        error = (
            expit(logits) - y[:, None] if n_outputs == 1 else softmax(logits, axis=1) - np.eye(n_outputs)[y]
        )
        slope, total = slope + z.T @ error / len(job.y), total + error.sum(0) / len(job.y)
    return float(max(np.abs(slope).max(), np.abs(total).max()))


def _import_model(module: str) -> Any:
    try:
        return importlib.import_module(module).LogisticRegression
    except ImportError as error:
        raise ValueError(
            "the solver cuml needs the package cuml: pip install 'mmextract[gpu]', or take auto"
        ) from error


def _has_gpu() -> bool:
    return torch.cuda.is_available()
