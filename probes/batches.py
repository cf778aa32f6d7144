"""From jobs to batches of problems that `newton` solves together, and back to solutions.

Jobs with the same rows share their features, whatever their labels; training sets of like shape are solved
side by side. This module knows nothing about how features are brought into orthogonal coordinates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from mmextract.probes.newton import Basis, Labels, Optimum, minimise
from mmextract.probes.solvers import IntArray, Job, Solution

CACHED = {"cpu": 1 << 16, "cuda": 1 << 26}
"""Elements of samples that are worked on at once: what the second cache holds, or what keeps a GPU busy."""

LIVE_LOGITS = 12
"""Arrays of the logits' shape that a Newton step keeps."""


MEASURED_COLUMNS = 16
"""Logits of a sample that are computed together where there are more: by so many, a product with the features takes
little longer than by one, as it takes as long as these take to come from memory."""


@dataclass(frozen=True, kw_only=True)
class RowSet:
    """A training set and the jobs that use it."""

    rows: IntArray
    """[m] rows of X."""
    scale: bool
    """See `Job.scale`."""
    jobs: tuple[int, ...]
    """Their numbers; all with as many classes and as many penalties."""
    n_columns: int
    """Logits of a sample: one a job, or one a job and class if there are more than two."""


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """The optima of one penalty for each job, in centred and scaled features."""

    w: Tensor
    """[F, L, c, D]."""
    intercept: Tensor
    """[F, L, c]."""
    n_steps: Tensor
    """[F, L] Newton steps taken."""


class Features(Protocol):
    """The features [m, D] of F training sets: centred, and divided by `scale`."""

    center: Tensor
    """[F, D]."""
    scale: Tensor
    """[F, D]."""
    n_rows: Tensor
    """[F] samples of each training set."""
    places: Sequence[IntArray]
    """Where in m rows each sample of each training set stands."""
    n_places: int
    """m."""

    def forward(self, w: Tensor) -> Tensor:
        """Return features times w [F, q, D]: [F, q, m]."""

    def backward(self, errors: Tensor) -> Tensor:
        """Return their transposed product with errors [F, q, m]: [F, q, D]."""

    def minimise(self, labels: Sequence[Labels], state: Any) -> tuple[list[Fitted], Any]:
        """Return the optima of labels that differ in penalties, and where a search for the next may start.

        state: what was returned for the penalties before, or None.
        """


class OrthogonalFeatures(Features, Basis, Protocol):
    """Features that know orthogonal coordinates of themselves; `newton` searches in these."""

    def weights(self, optimum: Optimum) -> Tensor:
        """Return the optimum's parameters as weights of centred and scaled features: [F, L·c, D]."""

    def minimise(self, labels: Sequence[Labels], state: Any) -> tuple[list[Fitted], Any]:
        """Return the optima and, for the next call, the last ones' coordinates."""
        found = []
        for some in labels:
            optimum = minimise(self, some, state)
            w = self.weights(optimum).unflatten(1, some.targets.shape[1:3])
            found.append(Fitted(w=w, intercept=optimum.v[..., -1], n_steps=optimum.n_steps))
            state = optimum.v
        return found, state


def solve_in_batches(
    jobs: Sequence[Job],
    find_features: Callable[[Sequence[RowSet]], Features],
    size: Callable[[RowSet], int],
    most: int,
    method: str,
) -> Iterator[list[Solution]]:
    """Yield, for each job in turn, a solution for each of its penalties.

    find_features: the features of training sets that are all scaled, or all not. size: elements that a
    training set takes in a batch of at most `most`. method: see `Solution.method`.
    """
    found: dict[int, list[Solution]] = {}
    for batch in make_batches(jobs, size, most):
        found.update(_solve_batch(jobs, batch, find_features(batch), method))
    for number in range(len(jobs)):
        yield found.pop(number)


def make_batches(jobs: Sequence[Job], size: Callable[[RowSet], int], most: int) -> Iterator[list[RowSet]]:
    """Yield lists of training sets, each with as many jobs, classes and penalties as the others of its list."""
    members: dict[tuple[bytes, bool, int, int], list[int]] = {}
    for number, job in enumerate(jobs):
        key = (job.rows.tobytes(), job.scale, _count_classes(job), len(job.penalties))
        members.setdefault(key, []).append(number)
    alike: dict[tuple[bool, int, int, int], list[RowSet]] = {}
    for (_, *shape), numbers in members.items():
        first = jobs[numbers[0]]
        row_set = RowSet(
            rows=first.rows,
            scale=first.scale,
            jobs=tuple(numbers),
            n_columns=count_outputs(first) * len(numbers),
        )
        alike.setdefault((*shape, len(numbers)), []).append(row_set)  # type: ignore[arg-type]
    for row_sets in alike.values():
        row_sets.sort(key=size)  # so that little is padding
        batch: list[RowSet] = []
        for row_set in row_sets:
            if batch and size(row_set) * (len(batch) + 1) > most:
                yield batch
                batch = []
            batch.append(row_set)
        yield batch


def count_outputs(job: Job) -> int:
    """Return the logits of a sample: one for two classes, one a class for more."""
    return 1 if (n_classes := _count_classes(job)) == 2 else n_classes


def _count_classes(job: Job) -> int:
    return int(job.y.max()) + 1


def _solve_batch(
    jobs: Sequence[Job], batch: Sequence[RowSet], features: Features, method: str
) -> dict[int, list[Solution]]:
    """Return a solution for each penalty of each job, by the job's number; each penalty starts from the last."""
    targets, weights = _label(jobs, batch, features)
    penalties = np.array([[jobs[number].penalties for number in row_set.jobs] for row_set in batch])
    labels = [
        Labels(targets=targets, weights=weights, penalty=targets.new_tensor(penalty))
        for penalty in np.moveaxis(penalties, 2, 0)  # [F, L]
    ]
    found: dict[int, list[Solution]] = {number: [] for row_set in batch for number in row_set.jobs}
    together = _count_together(targets.shape[1] * targets.shape[2])
    state = None
    for first in range(0, len(labels), together):
        some = labels[first : first + together]
        optima, state = features.minimise(some, state)
        if targets.shape[2] > 1:
            optima = [replace(o, intercept=o.intercept - o.intercept.mean(2, keepdim=True)) for o in optima]
        for one, fitted, residual in zip(some, optima, _measure(features, some, optima), strict=True):
            coefficients = fitted.w / features.scale[:, None, None]
            intercept = fitted.intercept - (features.center[:, None, None] * coefficients).sum(3)
            for at, row_set in enumerate(batch):
                columns = coefficients[at].mT.cpu().numpy()  # [L, D, c]
                for label, number in enumerate(row_set.jobs):
                    found[number].append(
                        Solution(
                            penalty=float(one.penalty[at, label]),
                            coefficients=np.ascontiguousarray(columns[label]),
                            intercept=intercept[at, label].cpu().numpy(),
                            n_iter=int(fitted.n_steps[at, label]),
                            method=method,
                            residual=float(residual[at, label]),
                        )
                    )
    return found


def standardise(states: Tensor, rows: Tensor, scale: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return states[rows] [m, D] about their mean, and over their standard deviation if they are to be scaled.

    Returns the mean [D] and what they were divided by [D] too, ones if they were not; see `find_scale`.
    """
    samples = states.new_empty(len(rows), states.shape[1])
    size = max(1, CACHED[states.device.type] // states.shape[1])
    parts = samples.split(size)
    mean, squares = states.new_zeros(2, states.shape[1])
    for part, some in zip(parts, rows.split(size), strict=True):
        torch.index_select(states, 0, some, out=part)
        mean += part.sum(0)
    mean /= len(rows)
    for part in parts:
        part.sub_(mean)
        if scale:
            squares += part.square().sum(0)
    if not scale:
        return samples, mean, torch.ones_like(mean)
    divisor = find_scale(mean, squares / len(rows), len(rows))
    for part in parts:
        part.div_(divisor)
    return samples, mean, divisor


def _count_together(n_columns: int) -> int:
    """Return how many penalties, of n_columns logits a sample, are measured together: within LIVE_LOGITS of them."""
    return max(1, min(MEASURED_COLUMNS // n_columns, LIVE_LOGITS // 2 - 1))


def find_scale(mean: Tensor, variance: Tensor, n_rows: Tensor | float) -> Tensor:
    """Return the standard deviation, or 1 of a feature that is constant up to rounding.

    The bound is scikit-learn's, and that of Chan, Golub & LeVeque 1983 (doi 10.1080/00031305.1983.10483115).
    """
    epsilon = torch.finfo(mean.dtype).eps
    constant = variance <= n_rows * epsilon * variance + (n_rows * mean * epsilon) ** 2
    return torch.where(constant, 1.0, variance.sqrt())


def _label(jobs: Sequence[Job], batch: Sequence[RowSet], features: Features) -> tuple[Tensor, Tensor]:
    """Return targets [F, L, c, m] and weights [F, L, m]."""
    n_labels, n_classes = len(batch[0].jobs), _count_classes(jobs[batch[0].jobs[0]])
    y = np.zeros((len(batch), n_labels, features.n_places), np.int64)
    weights = np.zeros(y.shape)
    for at, row_set in enumerate(batch):
        for label, number in enumerate(row_set.jobs):
            y[at, label, features.places[at]] = jobs[number].y
            weights[at, label, features.places[at]] = jobs[number].sample_weights
    device = features.center.device
    classes = torch.arange(1, 2) if n_classes == 2 else torch.arange(n_classes)
    targets = torch.from_numpy(y)[:, :, None] == classes[:, None]
    return targets.to(device, torch.float64), torch.from_numpy(weights).to(device)


def _measure(features: Features, labels: Sequence[Labels], optima: Sequence[Fitted]) -> Iterator[Tensor]:
    """Yield the KKT residuals, [F, L], in the features themselves (see `solvers.kkt_residual`)."""
    shape = (len(optima), *optima[0].w.shape[1:3])
    logits = features.forward(torch.cat([fitted.w.flatten(1, 2) for fitted in optima], 1)).unflatten(1, shape)
    errors = torch.empty_like(logits)  # [F, P, L, c, m]
    for at, (one, fitted) in enumerate(zip(labels, optima, strict=True)):
        wrong = one.probabilities(logits[:, at] + fitted.intercept[..., None]) - one.targets
        errors[:, at] = one.strength * wrong
    slopes = features.backward(errors.flatten(1, 3)).unflatten(1, shape)
    for at, (one, fitted) in enumerate(zip(labels, optima, strict=True)):
        slope, total = fitted.w + slopes[:, at], errors[:, at].sum(3)
        largest = torch.maximum(slope.abs().amax((2, 3)), total.abs().amax(2))
        yield largest / (one.penalty * features.n_rows[:, None])
