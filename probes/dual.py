"""The exact solver for fewer samples than features.

The optimum lies in the space that the m training samples span, so D features are replaced by m coordinates:
from the eigenvectors of the Gram matrix K = ZZᵀ of the centred training set, U = QΛ^½ with UUᵀ = K. In them
the problem is solved by `newton`; from its solution the dual variables a follow, at the optimum C·(y − p),
and from these the weights Zᵀa.

Features that are not scaled share one Gram matrix a layer, of which training sets take submatrices. Scaling
by a training set's own statistics changes the kernel, to X·diag(σ⁻²)·Xᵀ, by a matrix of full rank; so each
scaled training set gets its own, at m²·D operations, half of a general product as it is symmetric. At m = 800
and D = 3584 that is 64 ms on one core, the eigenvectors 144 ms, and both are shared by all C and labels.

Kernel logistic regression: Zhu & Hastie 2005, doi 10.1198/106186005X25619. This module knows nothing about
folds or scores.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mmextract.probes.batches import LIVE_LOGITS, RowSet, find_moments, solve_in_batches
from mmextract.probes.newton import Optimum
from mmextract.probes.solvers import FloatArray, IntArray, Job, Solution

MOST_ELEMENTS = {"cpu": 1 << 21, "cuda": 1 << 29}
"""Elements of states, coordinates and logits of the training sets that are solved side by side: what a cache
holds, or a GPU."""


@dataclass(frozen=True)
class DualSolver:
    """L2 logistic regression through the Gram matrix, to a KKT residual of `newton.TOLERANCE`."""

    device: str = "cpu"
    """A torch device."""

    def solve(self, x: FloatArray, jobs: Sequence[Job]) -> Iterator[list[Solution]]:
        """Yield, for each job in turn, a solution for each of its penalties. x: [n, D]."""
        states = torch.from_numpy(np.ascontiguousarray(x)).to(self.device)
        gram = None if all(job.scale for job in jobs) else _multiply(states - states.mean(0))
        return solve_in_batches(
            jobs,
            lambda batch: _Coordinates(states, batch, gram),
            lambda row_set: (
                len(row_set.rows) * (len(row_set.rows) + x.shape[1] + LIVE_LOGITS * row_set.n_columns)
            ),
            MOST_ELEMENTS[states.device.type],
            f"dual {states.device.type}",
        )


class _Coordinates:
    """`batches.Features` of fewer samples than features."""

    def __init__(self, states: Tensor, batch: Sequence[RowSet], gram: Tensor | None) -> None:
        rows = [torch.from_numpy(row_set.rows).to(states.device) for row_set in batch]
        self.places: Sequence[IntArray] = [np.arange(len(row_set.rows)) for row_set in batch]
        self.n_places = max(map(len, rows))
        self.n_rows = states.new_tensor([len(r) for r in rows])
        shape = (len(batch), self.n_places, self.n_places + 1)
        self.features, self.gram = states.new_zeros(shape), states.new_zeros(shape[0], shape[2])
        moments = [find_moments(states, r, row_set.scale) for r, row_set in zip(rows, batch, strict=True)]
        self.center, self.scale = map(torch.stack, zip(*moments, strict=True))
        self.samples = [(states[r] - self.center[at]) / self.scale[at] for at, r in enumerate(rows)]
        for at, r in enumerate(rows):
            kernel = _multiply(self.samples[at]) if batch[at].scale else _center(gram, r)
            squares, vectors = torch.linalg.eigh(kernel)
            # what is smaller is the rounding error of a zero
            squares = torch.where(squares > squares[-1] * len(r) * 2.0**-52, squares, 0.0)
            self.features[at, : len(r), : len(r)] = vectors * squares.sqrt()
            self.features[at, : len(r), -1] = 1
            self.gram[at, : len(r)] = squares
        self.gram[:, -1] = self.n_rows

    def apply(self, v: Tensor) -> Tensor:
        return v.matmul(self.features.mT)

    def adjoint(self, errors: Tensor) -> Tensor:
        return errors.matmul(self.features)

    def dense(self, at: int) -> Tensor:
        return self.features[at]

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
