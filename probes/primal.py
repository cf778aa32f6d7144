"""The exact solver for more samples than features.

All training sets are rows of one matrix, that is neither copied nor scaled: samples outside a training set
have weight 0, centring and scaling are applied to the parameters, and a product serves all training sets, labels
and classes at once. The coordinates that `newton` works in come from the eigenvectors of the features'
D × D second moments, for which samples are summed up by the training sets they are in, each once.

Memory: the states, and for each training set D² elements and a few logits a sample and label. This module
knows nothing about folds or scores.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mmextract.probes.batches import LIVE_LOGITS, OrthogonalFeatures, RowSet, find_moments, solve_in_batches
from mmextract.probes.newton import Optimum
from mmextract.probes.solvers import FloatArray, IntArray, Job, Solution

MOST_ELEMENTS = {"cpu": 1 << 26, "cuda": 1 << 29}
"""Elements of the logits and second moments of the training sets that are solved side by side."""


@dataclass(frozen=True)
class PrimalSolver:
    """L2 logistic regression on the features themselves, to a KKT residual of `newton.TOLERANCE`."""

    device: str = "cpu"
    """A torch device."""

    def solve(self, x: FloatArray, jobs: Sequence[Job]) -> Iterator[list[Solution]]:
        """Yield, for each job in turn, a solution for each of its penalties. x: [n, D]."""
        states = torch.from_numpy(np.ascontiguousarray(x)).to(self.device)
        n, d = states.shape

        return solve_in_batches(
            jobs,
            lambda batch: _Coordinates(states, batch),
            lambda row_set: 2 * d * d + LIVE_LOGITS * n * row_set.n_columns,
            MOST_ELEMENTS[states.device.type],
            f"primal {states.device.type}",
        )


class _Coordinates(OrthogonalFeatures):
    """`batches.Features` of more samples than features."""

    def __init__(self, states: Tensor, batch: Sequence[RowSet]) -> None:
        self.states = states
        self.n_places = len(states)
        self.places: Sequence[IntArray] = [row_set.rows for row_set in batch]
        self.n_rows = states.new_tensor([len(rows) for rows in self.places])
        moments = [
            find_moments(states, torch.from_numpy(row_set.rows).to(states.device), row_set.scale)
            for row_set in batch
        ]
        self.center, self.scale = map(torch.stack, zip(*moments, strict=True))  # [F, D]
        members = torch.zeros(len(batch), self.n_places, dtype=torch.bool)
        for at, rows in enumerate(self.places):
            members[at, torch.from_numpy(rows)] = True
        second = _sum_squares(states, members)  # [F, D, D]
        second -= self.n_rows[:, None, None] * self.center[:, :, None] * self.center[:, None]
        second /= self.scale[:, :, None] * self.scale[:, None]
        squares, self.vectors = torch.linalg.eigh(second)
        self.gram = torch.cat([squares.clamp(min=0), self.n_rows[:, None]], 1)

    def apply(self, v: Tensor) -> Tensor:
        return self.forward(v[..., :-1].matmul(self.vectors.mT)) + v[..., -1:]

    def adjoint(self, errors: Tensor) -> Tensor:
        return torch.cat([self.backward(errors).matmul(self.vectors), errors.sum(2, keepdim=True)], 2)

    def dense(self, at: int) -> Tensor:
        rotated = (self.states - self.center[at]) @ (self.vectors[at] / self.scale[at, :, None])
        return torch.cat([rotated, torch.ones_like(rotated[:, :1])], 1)

    def forward(self, w: Tensor) -> Tensor:
        coefficients = w / self.scale[:, None]
        logits = coefficients.flatten(0, 1).matmul(self.states.T).unflatten(0, w.shape[:2])
        shift = (self.center[:, None] * coefficients).sum(2, keepdim=True)
        return torch.sub(logits, shift)

    def backward(self, errors: Tensor) -> Tensor:
        product = errors.flatten(0, 1).matmul(self.states).unflatten(0, errors.shape[:2])
        centered: Tensor = product - self.center[:, None] * errors.sum(2, keepdim=True)
        return centered / self.scale[:, None]

    def weights(self, optimum: Optimum) -> Tensor:
        return optimum.v[..., :-1].flatten(1, 2).matmul(self.vectors.mT)


def _sum_squares(x: Tensor, members: Tensor) -> Tensor:
    """Return Σ xxᵀ over each training set's samples, [F, D, D]. members: [F, n] whether a sample is in it.

    Samples that are in the same training sets are summed once for all of them; with so many such kinds that
    this does not pay, each training set is summed by itself.
    """
    kinds, kind = torch.unique(members, dim=1, return_inverse=True)  # [F, n_kinds], [n]
    if kinds.shape[1] > 4 * len(members):
        return torch.stack([x[m].T @ x[m] for m in members.to(x.device)])
    total = x.new_zeros(len(members), x.shape[1], x.shape[1])
    for number in range(kinds.shape[1]):
        rows = (kind == number).nonzero()[:, 0].to(x.device)
        total[kinds[:, number].to(x.device)] += x[rows].T @ x[rows]
    return total
