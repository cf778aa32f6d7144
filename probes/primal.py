"""The exact solver for more samples than features.

All training sets are rows of one matrix, that is neither copied nor scaled, and is gone through a block of samples
at a time: samples outside a training set have weight 0, centring and scaling are applied to the parameters, and a
product serves all training sets, labels and classes at once. The coordinates that `newton` works in come from the
eigenvectors of the features' D × D second moments, for which samples are summed up by the training sets they are
in, each once.

Memory: a block, or the states if they are held; for each training set D² elements and a few logits a sample and
label. Out of memory, each product is a pass over the store, so that `solve_stored` does all C of all training sets
in the same passes: D² operations a sample once, then some hundred passes of 4·D a sample and logit. Newton's method
proper, whose Hessians take D² operations a sample in each step of each fit, would take 10⁶ samples × 4096 days.

This module knows nothing about folds or scores.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, groupby, islice

import numpy as np
import torch
from torch import Tensor

from mmextract.probes.batches import (
    CACHED,
    LIVE_LOGITS,
    OrthogonalFeatures,
    RowSet,
    count_outputs,
    find_scale,
    solve_in_batches,
)
from mmextract.probes.blocks import Blocks, HeldStates
from mmextract.probes.newton import Optimum
from mmextract.probes.solvers import FloatArray, IntArray, Job, Solution

SIDES, LEAST_SIDE = 8, 128
"""Parts of a side of second moments, whose blocks below the diagonal are left out, and what one has at least."""

MOST_ELEMENTS = {"cpu": 1 << 26, "cuda": 1 << 29}
"""Elements of the logits and second moments of the training sets that are solved side by side."""


@dataclass(frozen=True)
class PrimalSolver:
    """L2 logistic regression on the features themselves, to a KKT residual of `newton.TOLERANCE`."""

    device: str = "cpu"
    """A torch device."""
    most_elements: int | None = None
    """What MOST_ELEMENTS is for this solver; None for that."""

    def solve(self, x: FloatArray, jobs: Sequence[Job]) -> Iterator[list[Solution]]:
        """Yield, for each job in turn, a solution for each of its penalties. x: [n, D]."""
        return self.solve_blocks(HeldStates(torch.from_numpy(np.ascontiguousarray(x)).to(self.device)), jobs)

    def solve_blocks(self, states: Blocks, jobs: Sequence[Job]) -> Iterator[list[Solution]]:
        """Do what `solve` does for states that come in blocks, the penalties of a job one after the other."""
        n, d = states.shape
        return solve_in_batches(
            jobs,
            lambda batch: _Coordinates(states, batch),
            lambda row_set: 2 * d * d + LIVE_LOGITS * n * row_set.n_columns,
            self._most_elements(states),
            f"primal {states.device.type}",
        )

    def solve_stored(self, states: Blocks, jobs: Sequence[Job]) -> Iterator[list[Solution]]:
        """Do what `solve` does in few passes over the states: the penalties of a job at once, each from zero.

        Labels of one training set whose logits alone would take more than `most_elements` come one part after the
        other.
        """
        single = [replace(job, penalties=(penalty,)) for job in jobs for penalty in job.penalties]
        most = self._most_elements(states) // (LIVE_LOGITS * states.shape[0])
        found = chain.from_iterable(self.solve_blocks(states, part) for part in _cut(single, most))
        for job in jobs:
            yield [solution for solutions in islice(found, len(job.penalties)) for solution in solutions]

    def _most_elements(self, states: Blocks) -> int:
        return self.most_elements or MOST_ELEMENTS[states.device.type]


def _cut(jobs: Sequence[Job], most: int) -> Iterator[list[Job]]:
    """Yield the jobs in parts in which no training set has more than `most` logits a sample, or only one job."""
    part: list[Job] = []
    n_columns: Counter[int] = Counter()
    for job in jobs:
        key, width = hash(job.rows.tobytes()), count_outputs(job)
        if n_columns[key] and n_columns[key] + width > most:
            yield part
            part, n_columns = [], Counter()
        part.append(job)
        n_columns[key] += width
    if part:
        yield part


Asked = tuple[Sequence[Solution], IntArray]
"""Solutions, and the samples [k] that are to be decided by each of them."""


def decide_stored(states: Blocks, asked: Sequence[Asked]) -> list[list[FloatArray]]:
    """Return, for all that is asked, each solution's decision values [k, outputs], in one pass."""
    # questions about the same samples, as those of many label vectors are, share their products
    runs = [list(some) for _, some in groupby(asked, key=lambda one: id(one[1]))]
    decisions = [_Decisions([s for solutions, _ in run for s in solutions], run[0][1]) for run in runs]
    for block, x in states:
        for decided in decisions:
            decided.fill(block, x)
    found = chain.from_iterable(decided.split() for decided in decisions)
    return [list(islice(found, len(solutions))) for solutions, _ in asked]


class _Decisions:
    """Decision values of some samples by some solutions, filled in block by block."""

    def __init__(self, solutions: Sequence[Solution], rows: IntArray) -> None:
        self.order = np.argsort(rows, kind="stable")
        self.rows = rows[self.order]
        self.coefficients = torch.from_numpy(np.concatenate([s.coefficients for s in solutions], axis=1))
        self.intercept = np.concatenate([s.intercept for s in solutions])
        self.n_solutions = len(solutions)
        self.values = np.empty((len(rows), len(self.intercept)))  # [k, s·outputs]

    def fill(self, block: slice, x: Tensor) -> None:
        first, last = np.searchsorted(self.rows, (block.start, block.stop))
        if first == last:
            return
        chosen = x[torch.from_numpy(self.rows[first:last] - block.start).to(x.device)]
        product = chosen @ self.coefficients.to(x.device)
        self.values[self.order[first:last]] = product.cpu().numpy() + self.intercept

    def split(self) -> list[FloatArray]:
        return np.split(self.values, self.n_solutions, axis=1)


class _Coordinates(OrthogonalFeatures):
    """`batches.Features` of more samples than features."""

    def __init__(self, states: Blocks, batch: Sequence[RowSet]) -> None:
        self.states, device = states, states.device
        self.n_places, self.n_features = states.shape
        self.places: Sequence[IntArray] = [row_set.rows for row_set in batch]
        self.n_rows = torch.tensor([len(rows) for rows in self.places], dtype=torch.float64, device=device)
        members = torch.zeros(len(batch), self.n_places, dtype=torch.bool)
        for at, rows in enumerate(self.places):
            members[at, torch.from_numpy(rows)] = True
        self.center, self.scale, second = _find_moments(states, members, batch[0].scale)
        second -= self.n_rows[:, None, None] * self.center[:, :, None] * self.center[:, None]
        second /= self.scale[:, :, None] * self.scale[:, None]
        squares, self.vectors = torch.linalg.eigh(second)
        self.gram = torch.cat([squares.clamp(min=0), self.n_rows[:, None]], 1)

    def apply(self, v: Tensor) -> Tensor:
        return self.forward(v[..., :-1].matmul(self.vectors.mT)) + v[..., -1:]

    def adjoint(self, errors: Tensor) -> Tensor:
        return torch.cat([self.backward(errors).matmul(self.vectors), errors.sum(2, keepdim=True)], 2)

    def second(self, at: int, weights: Tensor) -> Tensor:
        total = self.gram.new_zeros(self.n_features + 1, self.n_features + 1)
        for rows, x in self.states:
            z = torch.cat([(x - self.center[at]) / self.scale[at], torch.ones_like(x[:, :1])], 1)
            total += z.T @ (z * weights[rows, None])
        rotation = torch.block_diag(self.vectors[at], torch.ones_like(total[:1, :1]))
        rotated: Tensor = rotation.T @ total @ rotation
        return rotated

    def forward(self, w: Tensor) -> Tensor:
        coefficients = w / self.scale[:, None]
        shift = (self.center[:, None] * coefficients).sum(2, keepdim=True)
        logits = w.new_empty(*w.shape[:2], self.n_places)
        for rows, x in self.states:
            product = coefficients.flatten(0, 1).matmul(x.T).unflatten(0, w.shape[:2])
            torch.sub(product, shift, out=logits[:, :, rows])
        return logits

    def backward(self, errors: Tensor) -> Tensor:
        product = errors.new_zeros(*errors.shape[:2], self.n_features)
        for rows, x in self.states:
            product += errors[:, :, rows].flatten(0, 1).matmul(x).unflatten(0, errors.shape[:2])
        centered: Tensor = product - self.center[:, None] * errors.sum(2, keepdim=True)
        return centered / self.scale[:, None]

    def weights(self, optimum: Optimum) -> Tensor:
        return optimum.v[..., :-1].flatten(1, 2).matmul(self.vectors.mT)


def _find_moments(states: Blocks, members: Tensor, scale: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return means and scales [F, D] (see `batches.find_scale`), and Σ xxᵀ [F, D, D], over each training set.

    members: [F, n] whether a sample is in it. Two passes. Samples that are in the same training sets are summed
    once for all of them; with so many such kinds that this does not pay, each training set is summed by itself.
    """
    inside = members.to(states.device)
    n_rows = inside.sum(1, dtype=torch.float64)[:, None]
    mean = torch.zeros(len(members), states.shape[1], dtype=torch.float64, device=states.device)
    for rows, x in states:
        for at in range(len(members)):
            mean[at] += x[inside[at, rows]].sum(0)
    mean /= n_rows
    kinds, kind = torch.unique(members, dim=1, return_inverse=True)  # [F, n_kinds], [n]
    if kinds.shape[1] > 4 * len(members):
        kinds, kind = torch.eye(len(members), dtype=torch.bool), None
    sums = mean.new_zeros(kinds.shape[1], *mean.shape[1:], states.shape[1])  # [n_kinds, D, D]
    wanted = torch.nonzero(kinds.any(0)).flatten().tolist()  # there may be samples in no training set
    variance = torch.zeros_like(mean)
    for rows, x in states:
        for number in wanted:
            part = x[inside[number, rows] if kind is None else (kind[rows] == number).to(x.device)]
            _add_square(sums[number], part)
        for at in range(len(members)) if scale else ():
            for part in x[inside[at, rows]].split(max(1, CACHED[x.device.type] // x.shape[1])):
                variance[at] += part.sub_(mean[at]).square_().sum(0)
    second = mean.new_zeros(len(members), *sums.shape[1:])
    for total, kind_of in zip(second, kinds, strict=True):
        for number in torch.nonzero(kind_of).flatten().tolist():
            total += sums[number]
        total.copy_(total.triu() + total.triu(1).T)
    deviation = find_scale(mean, variance / n_rows, n_rows) if scale else torch.ones_like(mean)
    return mean, deviation, second


def _add_square(total: Tensor, x: Tensor) -> None:
    """Add xᵀx to the upper triangle of total [D, D], in place, at little more than half of a product's operations.

    What of the lower triangle lies in blocks on the diagonal is added too. x: [k, D].
    """
    # BLAS's dsyrk does it at half, but SciPy's holds the interpreter's lock meanwhile
    size = max(LEAST_SIDE, -(-x.shape[1] // SIDES))
    parts = x.split(size, 1)
    for i, left in enumerate(parts):
        for j in range(i, len(parts)):
            rows, columns = (slice(at * size, (at + 1) * size) for at in (i, j))
            total[rows, columns].addmm_(left.T, parts[j])
