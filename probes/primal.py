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

from mmextract.probes.batches import RowSet, find_moments, solve_in_batches
from mmextract.probes.newton import Optimum
from mmextract.probes.solvers import FloatArray, Job, Solution

MOST_ELEMENTS = {"cpu": 1 << 26, "cuda": 1 << 29}
"""Elements of the logits and second moments of the training sets that are solved side by side."""

LIVE_LOGITS = 12
"""Arrays of the logits' shape that a Newton step keeps."""


@dataclass(frozen=True)
class PrimalSolver:
    """L2 logistic regression on the features themselves, to a KKT residual of `newton.TOLERANCE`."""

    device: str = "cpu"
    """A torch device."""

    def solve(self, x: FloatArray, jobs: Sequence[Job]) -> Iterator[list[Solution]]:
        """Yield, for each job in turn, a solution for each of its penalties. x: [n, D]."""
        states = torch.from_numpy(np.ascontiguousarray(x)).to(self.device)
        n, d = states.shape

        def size(row_set: RowSet) -> int:
            n_classes = int(jobs[row_set.jobs[0]].y.max()) + 1
            n_outputs = 1 if n_classes == 2 else n_classes
            return int(2 * d * d + LIVE_LOGITS * n * len(row_set.jobs) * n_outputs)

        return solve_in_batches(
            jobs,
            lambda batch: _Coordinates(states, batch),
            size,
            MOST_ELEMENTS[states.device.type],
            f"primal {states.device.type}",
        )


class _Coordinates:
    """`batches.Features` of more samples than features."""

    def __init__(self, states: Tensor, batch: Sequence[RowSet]) -> None:
        self.states = states
        self.n_places = len(states)
        self.places = [row_set.rows for row_set in batch]
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
        return self.forward(self.vectors @ v[:, :-1]) + v[:, -1:]

    def adjoint(self, errors: Tensor) -> Tensor:
        return torch.cat([self.vectors.mT @ self.backward(errors), errors.sum(1, keepdim=True)], 1)

    def dense(self, at: int) -> Tensor:
        rotated = (self.states - self.center[at]) @ (self.vectors[at] / self.scale[at, :, None])
        return torch.cat([rotated, torch.ones_like(rotated[:, :1])], 1)

    def forward(self, w: Tensor) -> Tensor:
        coefficients = w / self.scale[:, :, None]
        wide = coefficients.movedim(1, 0).flatten(1)  # [D, F·q]
        logits = (self.states @ wide).unflatten(1, (len(w), -1)).movedim(1, 0)
        return logits - (self.center[:, :, None] * coefficients).sum(1, keepdim=True)

    def backward(self, errors: Tensor) -> Tensor:
        wide = errors.movedim(1, 0).flatten(1)  # [n, F·q]
        product = (self.states.T @ wide).unflatten(1, (len(errors), -1)).movedim(1, 0)
        return (product - self.center[:, :, None] * errors.sum(1, keepdim=True)) / self.scale[:, :, None]

    def weights(self, optimum: Optimum) -> Tensor:
        return self.vectors @ optimum.v[:, :-1].flatten(2)


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
