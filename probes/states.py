"""States of one layer and position as the protocol sees them: probes are fitted on them, and decide held-out samples.

They are held in memory, or streamed: read from the store in each pass, with as few passes as bounded memory allows.
Both give the same optima, to the solvers' tolerance. This module knows nothing about folds, labels' meaning or
scores.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch

from mmextract.engine.store import Store
from mmextract.probes.batches import find_scale
from mmextract.probes.blocks import StoredStates
from mmextract.probes.metrics import BoolArray
from mmextract.probes.primal import Asked, PrimalSolver, decide_stored
from mmextract.probes.solvers import FloatArray, IntArray, Job, Solution, Solver

MOST_DECIDED = 1 << 25
"""Elements of decisions, or of projections, that a pass over a store makes: 256 MiB."""

Fitted = tuple[list[Solution], list[FloatArray]]
"""A solution for each penalty of a job, and what each decides: [k, 1 or n_classes] logits of k samples."""


class States(Protocol):
    """States [n, D]."""

    @property
    def shape(self) -> tuple[int, int]:
        """n, D."""

    def fit(self, jobs: Sequence[Job], tests: Iterable[IntArray]) -> Iterator[Fitted]:
        """Yield, for each job in turn, its solutions and their decisions on its test samples [k]; one test a job."""

    def deviations(self, parts: Iterable[IntArray]) -> Iterator[FloatArray]:
        """Yield, for each part [m] of the samples, the standard deviation [D] of its features, 1 of a constant one."""

    def project(self, directions: Iterable[FloatArray]) -> Iterator[FloatArray]:
        """Yield the states times each of several directions [D, q], all of one q: [n, q]."""


@dataclass(frozen=True)
class ArrayStates:
    """States in memory, and the solver of probes on them."""

    x: FloatArray
    """[n, D]."""
    solver: Solver

    @property
    def shape(self) -> tuple[int, int]:
        return (self.x.shape[0], self.x.shape[1])

    def fit(self, jobs: Sequence[Job], tests: Iterable[IntArray]) -> Iterator[Fitted]:
        held_out, last = self.x[:0], None
        for solutions, test in zip(self.solver.solve(self.x, jobs), tests, strict=True):
            if test is not last:  # label vectors of one training set share theirs
                held_out, last = self.x[test], test
            yield solutions, [solution.decide(held_out) for solution in solutions]

    def deviations(self, parts: Iterable[IntArray]) -> Iterator[FloatArray]:
        for part in parts:
            x = torch.from_numpy(self.x[part])
            yield find_scale(x.mean(0), x.var(0, correction=0), len(part)).numpy()

    def project(self, directions: Iterable[FloatArray]) -> Iterator[FloatArray]:
        return (self.x @ chosen for chosen in directions)


@dataclass(frozen=True)
class StreamedStates:
    """States that stay in the store; see `stream`."""

    stored: StoredStates
    place: IntArray | None
    """[n] where each sample stands among the stored ones; None if that is its own number."""
    solver: PrimalSolver

    @property
    def shape(self) -> tuple[int, int]:
        return self.stored.shape

    def fit(self, jobs: Sequence[Job], tests: Iterable[IntArray]) -> Iterator[Fitted]:
        if self.place is not None:
            jobs = [replace(job, rows=self.place[job.rows]) for job in jobs]
        solving = self.solver.solve_stored(self.stored, jobs)
        for asked in _gather(zip(solving, tests, strict=True)):
            placed = self._place([test for _, test in asked])
            decided = decide_stored(
                self.stored, [(s, test) for (s, _), test in zip(asked, placed, strict=True)]
            )
            yield from ((list(s), values) for (s, _), values in zip(asked, decided, strict=True))

    def _place(self, tests: Sequence[IntArray]) -> list[IntArray]:
        """Return where the samples of each test stand; of tests that are one object, one object again."""
        place = self.place
        if place is None:
            return list(tests)
        found = {id(test): place[test] for test in {id(test): test for test in tests}.values()}
        return [found[id(test)] for test in tests]

    def deviations(self, parts: Iterable[IntArray]) -> Iterator[FloatArray]:
        """Yield what the protocol says; two passes, all parts in the same."""
        members = [self._mark(part) for part in parts]
        inside = torch.from_numpy(np.stack(members)).to(self.stored.device)  # [F, n]
        n_rows = inside.sum(1, dtype=torch.float64)[:, None]
        n, d = self.shape
        center = inside.new_zeros(d, dtype=torch.float64)
        for _, x in self.stored:
            center += x.sum(0)
        center /= n
        # moments about a centre that is near to every part's own mean lose no digits
        first, second = n_rows.new_zeros(len(members), d), n_rows.new_zeros(len(members), d)
        for block, x in self.stored:
            weights, away = inside[:, block].double(), x - center
            first += weights @ away
            second += weights @ away.square_()
        mean = first / n_rows
        variance = (second / n_rows - mean.square()).clamp(min=0)
        scale = find_scale(center + mean, variance, n_rows)
        return iter(scale.cpu().numpy())

    def project(self, directions: Iterable[FloatArray]) -> Iterator[FloatArray]:
        """Yield what the protocol says, as many at a time as MOST_DECIDED allows."""
        n = self.shape[0]
        some: list[FloatArray] = []
        for chosen in directions:
            some.append(chosen)
            if n * sum(one.shape[1] for one in some) >= MOST_DECIDED:
                yield from self._project(some)
                some = []
        if some:
            yield from self._project(some)

    def _project(self, directions: Sequence[FloatArray]) -> Iterator[FloatArray]:
        together = torch.from_numpy(np.concatenate(directions, axis=1)).to(self.stored.device)
        along = np.empty((self.shape[0], together.shape[1]))
        for block, x in self.stored:
            along[block] = (x @ together).cpu().numpy()
        for part in np.split(along, len(directions), axis=1):
            yield part if self.place is None else part[self.place]

    def _mark(self, part: IntArray) -> BoolArray:
        inside = np.zeros(self.shape[0], bool)
        inside[part if self.place is None else self.place[part]] = True
        return inside


def stream(
    store: Store, layer: int, position: str, rows: IntArray, *, device: str = "cpu", most_elements: int
) -> StreamedStates:
    """Return states of rows [n] of a store, in any order, that are read in each pass.

    most_elements: see `PrimalSolver.most_elements`. Raises ValueError, in the first pass, for states that are not
    finite, saying where, and for rows that the store lacks.
    """
    order = np.argsort(rows, kind="stable")
    in_order = bool((order == np.arange(len(rows))).all())
    stored = StoredStates(store, layer, position, rows if in_order else rows[order], torch.device(device))
    solver = PrimalSolver(device, most_elements)
    return StreamedStates(stored, None if in_order else np.argsort(order), solver)


def _gather(asked: Iterable[Asked]) -> Iterator[list[Asked]]:
    """Yield solutions and their test samples in parts whose decisions take some MOST_DECIDED elements."""
    part: list[Asked] = []
    size = 0
    for solutions, test in asked:
        part.append((solutions, test))
        size += len(test) * sum(len(solution.intercept) for solution in solutions)
        if size >= MOST_DECIDED:
            yield part
            part, size = [], 0
    if part:
        yield part
