"""cuML's logistic regression, fit by fit on a GPU.

It has no warm start and stops where the gradient is small against the loss, so the residual that is returned
says how near to the optimum that was. This module knows nothing about folds or scores.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from sklearn.preprocessing import StandardScaler

from mmextract.probes.solvers import FloatArray, Job, Solution, kkt_residual

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
        try:
            self._model: Any = importlib.import_module("cuml.linear_model").LogisticRegression
        except ImportError as error:
            raise ValueError(
                "the solver cuml needs the package cuml: pip install 'mmextract[gpu]', or take auto"
            ) from error

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
