"""The exact solver for fewer samples than features.

The optimum lies in the space that the m training samples span, so all that is needed of D features is the Gram
matrix K = ZZᵀ of the centred training set. A few binary label vectors are fitted with it as it is, by `cholesky`.
For many, or for more classes, it is brought into orthogonal coordinates, in which `newton` solves: from the
eigenvectors of K, U = QΛ^½ with UUᵀ = K, from its solution the dual variables a, at the optimum C·(y − p), and
from these the weights Zᵀa.

Features that are not scaled share one Gram matrix a layer, of which training sets take submatrices. Scaling
by a training set's own statistics changes the kernel, to X·diag(σ⁻²)·Xᵀ, by a matrix of full rank; so each
scaled training set gets its own, at m²·D operations, half of a general product as it is symmetric. At m = 800
and D = 3584 that is 60 ms on one core, the eigenvectors 140 ms, and both are shared by all C and labels.

Kernel logistic regression: Zhu & Hastie 2005, doi 10.1198/106186005X25619. This module knows nothing about
folds or scores.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmextract.probes.batches import (
    LIVE_LOGITS,
    Features,
    Fitted,
    OrthogonalFeatures,
    RowSet,
    solve_in_batches,
    standardise,
)
from mmextract.probes.cholesky import DualOptimum, Problem, minimise
from mmextract.probes.newton import Labels, Optimum
from mmextract.probes.solvers import FloatArray, IntArray, Job, Solution
from mmextract.probes.systems import Gram

MOST_ELEMENTS = {"cpu": 1 << 21, "cuda": 1 << 29}
"""Elements of states, coordinates and logits of the training sets that are solved side by side: what a cache
holds, or a GPU."""

FEW_LABELS = 3
"""Binary label vectors of a training set up to which `cholesky` is the faster one on a processor.

Processor ms a fit on one core, 800 samples × 3584 features, five C: of 1, 4, 8, 16 labels 25, 19, 19, 20 with
`cholesky`, 48, 16, 9.8, 6.4 with eigenvectors (`benchmarks/bench_probe.py`).
"""


@dataclass(frozen=True)
class DualSolver:
    """L2 logistic regression through the Gram matrix, to a KKT residual of `newton.TOLERANCE`."""

    device: str = "cpu"
    """A torch device."""
    few_labels: int = FEW_LABELS
    """See FEW_LABELS; 0 brings all training sets into orthogonal coordinates."""

    def solve(self, x: FloatArray, jobs: Sequence[Job]) -> Iterator[list[Solution]]:
        """Yield, for each job in turn, a solution for each of its penalties. x: [n, D]."""
        states = torch.from_numpy(np.ascontiguousarray(x)).to(self.device)
        gram = None if all(job.scale for job in jobs) else _multiply(states - states.mean(0))
        most = MOST_ELEMENTS[states.device.type]

        def prepare(batch: Sequence[RowSet]) -> Features:
            samples = [_Samples(states, row_set, gram) for row_set in batch]
            return _Gram(samples[0]) if self._is_direct(batch[0]) else _Coordinates(samples)

        def size(row_set: RowSet) -> int:
            if self._is_direct(row_set):
                return most  # one training set at a time
            n_rows, n_features = len(row_set.rows), int(x.shape[1])
            return n_rows * (n_rows + n_features + LIVE_LOGITS * row_set.n_columns)

        return solve_in_batches(jobs, prepare, size, most, f"dual {states.device.type}")

    def _is_direct(self, row_set: RowSet) -> bool:
        """Whether it is solved by `cholesky`."""
        return self.device == "cpu" and row_set.n_columns == len(row_set.jobs) <= self.few_labels


class _Samples:
    """The training samples of one set, centred and scaled, and their Gram matrix."""

    def __init__(self, states: Tensor, row_set: RowSet, gram: Tensor | None) -> None:
        rows = torch.from_numpy(row_set.rows).to(states.device)
        self.z, self.center, self.scale = standardise(states, rows, row_set.scale)
        self.gram = _multiply(self.z) if row_set.scale else _center(gram, rows)


class _Gram(Features):
    """`batches.Features` of one training set, whose problems are solved one by one."""

    def __init__(self, samples: _Samples) -> None:
        self.z = samples.z
        self.center, self.scale = samples.center[None], samples.scale[None]
        self.n_places = len(self.z)
        self.n_rows = self.z.new_tensor([self.n_places])
        self.places: Sequence[IntArray] = [np.arange(self.n_places)]
        self.gram = Gram(samples.gram.numpy())

    def forward(self, w: Tensor) -> Tensor:
        return w @ self.z.T

    def backward(self, errors: Tensor) -> Tensor:
        return torch.from_numpy(errors.numpy() @ self.z.numpy())  # for a few errors twice as fast as torch

    def minimise(self, labels: Sequence[Labels], state: Any) -> tuple[list[Fitted], Any]:
        """Return the optima, the penalties of each label vector one after the other."""
        last: list[DualOptimum | None] = state or [None] * labels[0].targets.shape[1]
        found = [self._follow(labels, number, start) for number, start in enumerate(last)]  # [L][P]
        optima = list(zip(*found, strict=True))  # [P][L]
        a = torch.from_numpy(np.array([[optimum.at.a for optimum in some] for some in optima]))
        w = self.backward(a.flatten(0, 1)).unflatten(0, a.shape[:2])  # [P, L, D]
        fitted = [
            Fitted(
                w=w[at][None, :, None],
                intercept=w.new_tensor([optimum.at.b for optimum in some])[None, :, None],
                n_steps=torch.tensor([[optimum.n_steps for optimum in some]]),
            )
            for at, some in enumerate(optima)
        ]
        return fitted, list(optima[-1])

    def _follow(self, labels: Sequence[Labels], number: int, last: DualOptimum | None) -> list[DualOptimum]:
        """Return the optima of one label vector, one penalty after the other."""
        found = []
        for some in labels:
            problem = Problem(
                y=some.targets[0, number, 0].numpy(),
                weights=some.weights[0, number].numpy(),
                penalty=float(some.penalty[0, number]),
            )
            last = minimise(self.gram, problem, last)
            found.append(last)
        return found


class _Coordinates(OrthogonalFeatures):
    """`batches.Features` of fewer samples than features."""

    def __init__(self, sets: Sequence[_Samples]) -> None:
        self.samples = [one.z for one in sets]
        self.places: Sequence[IntArray] = [np.arange(len(z)) for z in self.samples]
        self.n_places = max(map(len, self.samples))
        self.n_rows = sets[0].z.new_tensor([len(z) for z in self.samples])
        shape = (len(sets), self.n_places, self.n_places + 1)
        self.features, self.gram = self.n_rows.new_zeros(shape), self.n_rows.new_zeros(shape[0], shape[2])
        self.center = torch.stack([one.center for one in sets])
        self.scale = torch.stack([one.scale for one in sets])
        for at, one in enumerate(sets):
            m = len(one.z)
            squares, vectors = torch.linalg.eigh(one.gram)
            # what is smaller is the rounding error of a zero
            squares = torch.where(squares > squares[-1] * m * 2.0**-52, squares, 0.0)
            self.features[at, :m, :m] = vectors * squares.sqrt()
            self.features[at, :m, -1] = 1
            self.gram[at, :m] = squares
        self.gram[:, -1] = self.n_rows

    def apply(self, v: Tensor) -> Tensor:
        return v.matmul(self.features.mT)

    def adjoint(self, errors: Tensor) -> Tensor:
        return errors.matmul(self.features)

    def second(self, at: int, weights: Tensor) -> Tensor:
        return self.features[at].T @ (self.features[at] * weights[:, None])

    def forward(self, w: Tensor) -> Tensor:
        out = w.new_zeros(*w.shape[:2], self.n_places)
        for at, samples in enumerate(self.samples):
            out[at, :, : len(samples)] = w[at] @ samples.T
        return out

    def backward(self, errors: Tensor) -> Tensor:
        return torch.stack([errors[at, :, : len(z)] @ z for at, z in enumerate(self.samples)])

    def weights(self, optimum: Optimum) -> Tensor:
        """Return Zᵀa for a = C·(y − p) + QΛ^−½·gradient, which holds however small an eigenvalue is."""
        correction = torch.where(
            self.gram[:, None] > 0, optimum.gradient.flatten(1, 2) / self.gram[:, None], 0.0
        )
        correction[..., -1] = 0
        return self.backward(self.apply(correction) - optimum.errors.flatten(1, 2))


def _multiply(x: Tensor) -> Tensor:
    """Return xxᵀ. NumPy knows that it is symmetric, which halves the work; torch does not."""
    if x.device.type == "cpu":
        states = x.numpy()
        return torch.from_numpy(states @ states.T)
    return x @ x.T


def _center(gram: Tensor | None, rows: Tensor) -> Tensor:
    """Return the Gram matrix of a training set's samples about their own mean."""
    assert gram is not None
    kernel = gram[rows][:, rows]
    kernel = kernel - kernel.mean(0)
    return kernel - kernel.mean(1, keepdim=True)
