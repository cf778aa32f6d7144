"""Fit L2 logistic probes. Every solver minimises scikit-learn's objective, with an intercept that is not
penalised:

    ½‖w‖² + C · Σᵢ sᵢ · loss(yᵢ, xᵢ·w + b),  loss logistic for two classes, softmax cross-entropy for more,
    sᵢ the weight of the sample's class, 1 if not given

One solver is given all the jobs of a layer at once, so that it can share work between them. Here are what all
solvers share and scikit-learn's; `dual` and `primal` are our own, `cuml_solver` is cuML's, `choice` has them by
name. This module knows nothing about folds, labels' meaning or scores.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import sklearn
from numpy.typing import NDArray
from scipy.special import expit, softmax
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

KKT_TOLERANCE = 1e-5
"""A solution is called converged where its residual is at most this."""

LARGEST_NEWTON = 1000
"""Parameters up to which Newton's method, that factorises a matrix of them, is the faster one at equal
residual.

On one core, five values of C: 800 samples × 4096 correlated features (800 parameters) take 1.3 s and 1.7 s of
L-BFGS; from 1,600 parameters on Newton's method is several times slower.
"""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One training set and the values of C to fit on it."""

    rows: IntArray
    """[m] rows of X, none twice."""
    y: IntArray
    """[m] class of each, every class at least once."""
    penalties: tuple[float, ...]
    """Values of C, ascending."""
    scale: bool = True
    """Bring each feature to mean 0 and variance 1 over `rows` first; constant features stay constant."""
    class_weights: tuple[float, ...] = ()
    """Weight of the samples of each class; all 1 if empty."""

    @property
    def sample_weights(self) -> FloatArray:
        """[m] weight of each sample."""
        return np.array(self.class_weights)[self.y] if self.class_weights else np.ones(len(self.y))


@dataclass(frozen=True, kw_only=True)
class Solution:
    """A fitted probe, in the features as they were given."""

    penalty: float
    """C."""
    coefficients: FloatArray
    """[D, 1] for two classes, [D, n_classes] for more."""
    intercept: FloatArray
    """[1] or [n_classes]."""
    n_iter: int
    """Iterations."""
    method: str
    """What fitted it."""
    residual: float
    """KKT residual: largest absolute entry of the objective's gradient in the scaled features, over C·m."""

    @property
    def converged(self) -> bool:
        """Whether the residual says that this is the optimum."""
        return self.residual <= KKT_TOLERANCE

    def decide(self, x: FloatArray) -> FloatArray:
        """Return decision values [k, 1] or [k, n_classes] of samples x [k, D]: the logits."""
        return np.asarray(x @ self.coefficients + self.intercept)


class Solver(Protocol):
    """Fits probes on rows of one matrix."""

    def solve(self, x: FloatArray, jobs: Sequence[Job]) -> Iterator[list[Solution]]:
        """Yield, for each job in turn, a solution for each of its penalties. x: [n, D]."""


@dataclass(frozen=True)
class SklearnSolver:
    """scikit-learn's LogisticRegression, warm-started over C.

    A training set with fewer samples than features is first rotated into its row space, by a QR
    factorisation: the optimum lies there, so the problem is the same one with m features instead of D.
    """

    method: str = "auto"
    """`newton-cholesky`, `lbfgs`, or `auto`: the first where there are at most LARGEST_NEWTON parameters."""

    def solve(self, x: FloatArray, jobs: Sequence[Job]) -> Iterator[list[Solution]]:
        """Yield, for each job in turn, a solution for each of its penalties. x: [n, D]."""
        for job in jobs:
            yield self._solve(x[job.rows], job)

    def _solve(self, x: FloatArray, job: Job) -> list[Solution]:
        scaler = StandardScaler(with_mean=job.scale, with_std=job.scale).fit(x)
        center = scaler.mean_ if job.scale else np.zeros(x.shape[1])
        scale = scaler.scale_ if job.scale else np.ones(x.shape[1])
        z, basis = _rotate((x - center) / scale)
        n_outputs = 1 if (n_classes := len(np.unique(job.y))) == 2 else n_classes
        model = LogisticRegression(
            solver=self._choose(z.shape[1] * n_outputs),
            tol=1e-9,
            max_iter=10_000,
            warm_start=True,
            class_weight=dict(enumerate(job.class_weights)) or None,
        )
        solutions = []
        for penalty in job.penalties:
            model.C = penalty
            # the input was checked when it was read, and checking takes as long as a small fit
            with sklearn.config_context(assume_finite=True, skip_parameter_validation=True):
                model.fit(z, job.y)
            weights = model.coef_.T if basis is None else basis @ model.coef_.T
            coefficients = weights / scale[:, None]
            solutions.append(
                Solution(
                    penalty=penalty,
                    coefficients=coefficients,
                    intercept=model.intercept_ - center @ coefficients,
                    n_iter=int(np.max(model.n_iter_)),
                    method=f"sklearn {model.solver}",
                    residual=kkt_residual(
                        z, job.y, penalty, model.coef_.T, model.intercept_, job.sample_weights
                    ),
                )
            )
        return solutions

    def _choose(self, n_parameters: int) -> str:
        if self.method != "auto":
            return self.method
        return "newton-cholesky" if n_parameters <= LARGEST_NEWTON else "lbfgs"


def _rotate(x: FloatArray) -> tuple[FloatArray, FloatArray | None]:
    """Return x [m, D] in an orthonormal basis of its row space, [m, m], and that basis [D, m]; as it is if m ≥ D."""
    if x.shape[0] >= x.shape[1]:
        return x, None
    basis, triangle = np.linalg.qr(x.T)
    return np.ascontiguousarray(triangle.T), basis


def kkt_residual(
    x: FloatArray,
    y: IntArray,
    penalty: float,
    coefficients: FloatArray,
    intercept: FloatArray,
    sample_weights: FloatArray | None = None,
) -> float:
    """Return the largest absolute entry of ∇(½‖w‖² + C Σ s·loss) / (C·m), that of the intercept included.

    x: [m, D]. y: [m]. coefficients: [D, 1] for two classes, [D, n_classes] for more. sample_weights: [m] s, all
    1 if not given. Zero at the optimum.
    """
    logits = x @ coefficients + intercept
    if logits.shape[1] == 1:
        error = expit(logits) - y[:, None]
    else:
        error = softmax(logits, axis=1) - np.eye(logits.shape[1])[y]
    if sample_weights is not None:
        error *= sample_weights[:, None]
    slope = x.T @ error / len(y) + coefficients / (penalty * len(y))
    return float(max(np.abs(slope).max(), np.abs(error.mean(0)).max()))
