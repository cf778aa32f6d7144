"""Minimise one binary L2 logistic objective at a time through the Gram matrix K = ZZᵀ of its training set.

With w = Zᵀa the logits are f = Ka + b, and Newton's step on the objective is, for D = C·s·p(1 − p), errors
e = C·s·(p − y) and r = a + e, which is zero at the optimum, the direction of `systems` for right = −D^−½r and
total = −1ᵀa. Its factor is made anew only if the last one does not do.

From one penalty to the next the optimum is followed along its tangent: da/d log C solves the same system, with a in
place of −r. Its bend is guessed from the tangent and the chord from the optimum before; the lowest of what this gives
is where the search starts, three or four steps from its end where the last optimum would be six.

K is not decomposed, which would take as long as some thirty such factors. `newton` needs that, and then serves
any number of label vectors and classes with the same two products. This module knows nothing about folds,
scaling or devices.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from scipy.special import expit, logit

from mmextract.probes.newton import ENOUGH, MOST_HALVINGS, MOST_STEPS, TOLERANCE
from mmextract.probes.solvers import FloatArray
from mmextract.probes.systems import MOST_ITERATIONS, Factor, Gram, Point, System

PATIENCE = 12
"""Conjugate-gradient iterations of a step for which its factor is not made anew, if they seem to do.

At 800 samples an iteration takes 0.2 ms on one core, a factor 3 ms.
"""

LEAST_CURVATURE = 1e-9
"""Least p(1 − p) of a sample, so that it can be divided by; saturated samples count as little as that."""

BENDS = (0.5, 1.0)
"""Shares of the bend of the parabola through two optima along the second one's tangent; all of it is often too much."""

TANGENT_ERROR = 0.01
"""Relative error of a tangent."""

LOOSEST = 0.1
"""Relative error of a step, at most. With PATIENCE and TANGENT_ERROR the fastest of 24, by up to 8 %, on 3 spectra."""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Labels of a training set and the strength of the penalty."""

    y: FloatArray
    """[m] 0 or 1."""
    weights: FloatArray
    """[m] s."""
    penalty: float
    """C."""


@dataclass(frozen=True, kw_only=True)
class Chord:
    """What changed between two optima."""

    slope: Point
    """A unit of log C."""
    way: float
    """Change of log C; not 0."""


@dataclass(frozen=True, kw_only=True)
class DualOptimum:
    """Where the minimiser stopped."""

    at: Point
    penalty: float
    """C."""
    n_steps: int
    """Newton steps taken."""
    chord: Chord | None
    """From the optimum of another penalty, where the search for this one began."""


def minimise(gram: Gram, problem: Problem, start: DualOptimum | None = None) -> DualOptimum:
    """Return the minimum of ½aᵀKa + C·Σ s·loss(y, Ka + b).

    start: the optimum of the same labels for another penalty. It helps most if nothing else was solved since.
    """
    return _Search(gram, problem, start).run()


class _Search:
    """One problem on its way."""

    def __init__(self, gram: Gram, problem: Problem, start: DualOptimum | None) -> None:
        self.gram, self.problem, self.start = gram, problem, start
        self.strength = problem.penalty * problem.weights
        self.unit = problem.penalty * len(problem.y)  # what residuals are measured in
        self.factor: Factor | None = None
        guesses = [_cold(problem)] if start is None else self._guess(start)
        lowest: Point = min(guesses, key=self._objective)
        self.at = replace(lowest, image=gram.times(lowest.a))  # without the rounding errors of steps so far

    def run(self) -> DualOptimum:
        last = np.inf
        for n_steps in range(MOST_STEPS + 1):
            root, errors = _weigh(self.problem, self.at)
            r, total = self.at.a + errors, float(errors.sum())
            rise = self.gram.times(r)
            size = float(np.sqrt(max(float(r @ rise), 0.0) + total**2)) / self.unit
            if size <= TOLERANCE or n_steps == MOST_STEPS or (size <= ENOUGH and size > last / 2):
                break
            last = size
            # quadratic convergence in the end, but no more digits than are asked for
            forcing = max(min(size, LOOSEST), 0.3 * TOLERANCE / size)
            step = self._solve(root, r, forcing)
            if not self._move(step, float(r @ step.image) + total * step.b):
                break
        return DualOptimum(
            at=self.at, penalty=self.problem.penalty, n_steps=n_steps, chord=self._find_chord()
        )

    def _guess(self, start: DualOptimum) -> list[Point]:
        """Return where the optimum may be, from that of another penalty and the last factor that was made."""
        guesses = [start.at]
        if self.gram.factor is None or start.penalty == self.problem.penalty:
            return guesses
        root, _ = _weigh(replace(self.problem, penalty=start.penalty), start.at)
        system = System(gram=self.gram, root=root, right=start.at.a / root, total=0.0)
        tangent = system.solve(self.gram.factor, TANGENT_ERROR, PATIENCE)
        if tangent is not None:
            way = float(np.log(self.problem.penalty / start.penalty))
            ahead = start.at.moved(tangent, way)
            guesses.append(ahead)
            if start.chord is not None:
                bend = tangent.moved(start.chord.slope, -1)
                guesses += [ahead.moved(bend, share * way * way / start.chord.way) for share in BENDS]
        return guesses

    def _find_chord(self) -> Chord | None:
        if self.start is None:
            return None
        if self.start.penalty == self.problem.penalty:
            return self.start.chord
        change = self.at.moved(self.start.at, -1)
        way = float(np.log(self.problem.penalty / self.start.penalty))
        return Chord(slope=Point(a=change.a / way, image=change.image / way, b=change.b / way), way=way)

    def _solve(self, root: FloatArray, r: FloatArray, forcing: float) -> Point:
        """Return Newton's step, to a relative error of `forcing`."""
        system = System(gram=self.gram, root=root, right=-r / root, total=-float(self.at.a.sum()))
        if self.factor is not None and self.factor.expect(forcing) <= PATIENCE:
            solved = system.solve(self.factor, forcing, PATIENCE)
            if solved is not None:
                return solved
        self.factor = self.gram.factorise(root)
        solved = system.solve(self.factor, forcing, MOST_ITERATIONS)
        assert solved is not None
        return solved

    def _move(self, step: Point, slope: float) -> bool:
        """Take the step, halved until the objective falls. Return False if it does not."""
        before = self._objective(self.at)
        length = 1.0
        for _ in range(MOST_HALVINGS):
            after = self.at.moved(step, length)
            if self._objective(after) <= before + 1e-4 * length * slope + 1e-13 * abs(before):
                self.at = after
                return True
            length /= 2
        return False

    def _objective(self, at: Point) -> float:
        logits = at.image + at.b
        loss = np.logaddexp(0.0, logits) - self.problem.y * logits
        return float(at.a @ at.image / 2 + self.strength @ loss)


def _cold(problem: Problem) -> Point:
    """Return the optimum for a penalty that lets no weight grow."""
    zero = np.zeros(len(problem.y))
    share = float(problem.weights @ problem.y / problem.weights.sum())
    return Point(a=zero, image=zero, b=float(logit(share)))


def _weigh(problem: Problem, at: Point) -> tuple[FloatArray, FloatArray]:
    """Return D^½ and the errors e, both [m]."""
    strength = problem.penalty * problem.weights
    probabilities = expit(at.image + at.b)
    curvature = np.maximum(
        strength * probabilities * (1 - probabilities), LEAST_CURVATURE * float(strength.max())
    )
    return np.sqrt(curvature), strength * (probabilities - problem.y)
