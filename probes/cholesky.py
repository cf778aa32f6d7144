"""Minimise one binary L2 logistic objective at a time through the Gram matrix K = ZZᵀ of its training set.

With w = Zᵀa the logits are f = Ka + b, and Newton's step on the objective is, for D = C·s·p(1 − p), errors
e = C·s·(p − y) and r = a + e, which is zero at the optimum:

    δa = D^½u,    B·u + δb·D^½1 = −D^−½r,    1ᵀD^½u = −1ᵀa,    B = 1 + D^½KD^½

(Rasmussen & Williams 2006, section 3.4, with the unpenalised intercept as a constraint). B is factorised in
single precision, and seldom: conjugate gradients in double precision within the constraint (Gould, Hribar &
Nocedal 2001, algorithm 2.1) make up for what the factor lacks, be it digits or that it is a few steps old.

From one penalty to the next the optimum is followed along its tangent: da/d log C solves the same system, with a in
place of −r. Its bend is guessed from the tangent and the chord from the optimum before; the lowest of what this gives
is where the search starts, three or four steps from its end where the last optimum would be six.

K is not decomposed, which would take as long as some thirty such factors. `newton` needs that, and then serves
any number of label vectors and classes with the same two products. This module knows nothing about folds,
scaling or devices.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import lapack
from scipy.linalg.blas import dtrsv, strsv
from scipy.special import expit, logit

from mmextract.probes.newton import ENOUGH, MOST_HALVINGS, MOST_STEPS, TOLERANCE
from mmextract.probes.solvers import FloatArray

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

MOST_ITERATIONS = 300
"""Conjugate-gradient iterations of a step whose factor is new."""


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
class Point:
    """Parameters of a probe, or a direction in which they may go."""

    a: FloatArray
    """[m]: w = Zᵀa."""
    image: FloatArray
    """[m] Ka."""
    b: float
    """Intercept."""

    def moved(self, direction: Point, length: float) -> Point:
        """Return self + length·direction."""
        return Point(
            a=self.a + length * direction.a,
            image=self.image + length * direction.image,
            b=self.b + length * direction.b,
        )


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


class GramNewton:
    """Newton's method on one training set."""

    def __init__(self, gram: FloatArray) -> None:
        """gram: [m, m] of centred features, symmetric."""
        self.gram = gram.T  # as a symmetric matrix it is itself, in the order that LAPACK wants
        self.single = self.gram.astype(np.float32, order="F")
        self.workspace = np.empty_like(self.single)
        self.factor: _Factor | None = None
        """The last one that was made."""

    def minimise(self, problem: Problem, start: DualOptimum | None = None) -> DualOptimum:
        """Return the minimum of ½aᵀKa + C·Σ s·loss(y, Ka + b).

        start: the optimum of the same labels for another penalty. It helps most if nothing else was solved since.
        """
        return _Search(self, problem, start).run()

    def times(self, v: FloatArray) -> FloatArray:
        """Return Kv."""
        product: FloatArray = self.gram @ v
        return product

    def factorise(self, root: FloatArray) -> _Factor:
        """Return the factor of B for D^½ = root [m]; it lives in a workspace, until the next one is made."""
        self.factor = self._factorise(root)
        return self.factor

    def _factorise(self, root: FloatArray) -> _Factor:
        scale = root.astype(np.float32)
        np.multiply(self.single, scale, out=self.workspace)
        self.workspace *= scale[:, None]
        self.workspace.ravel("F")[:: len(root) + 1] += 1
        factor, failed = lapack.spotrf(self.workspace, lower=1, clean=0, overwrite_a=1)
        if not failed:
            return _Factor(factor)
        exact = self.gram * root * root[:, None]
        exact.ravel("K")[:: len(root) + 1] += 1
        factor, failed = lapack.dpotrf(exact, lower=1, clean=0)
        if failed:  # iterations make up for this, too
            exact.ravel("K")[:: len(root) + 1] += 1e-10 * np.diagonal(exact).max()
            factor = lapack.dpotrf(exact, lower=1, clean=0)[0]
        return _Factor(factor)


@dataclass
class _Factor:
    """A lower Cholesky factor in single or double precision."""

    matrix: NDArray[Any]
    gain: float = np.inf
    """Logarithm by which an iteration shrank the residual when it was used last: what was asked for, over their number.
    Infinite if it was not used yet, or needed none."""

    def expect(self, forcing: float) -> float:
        """Return about how many iterations make the residual so small."""
        return -float(np.log(forcing)) / self.gain

    def solve(self, right: FloatArray) -> FloatArray:
        """Return B⁻¹·right, to the factor's precision. right: [m]."""
        # LAPACK's potrs packs the factor for many right-hand sides, which takes four times as long for one
        trsv = strsv if self.matrix.dtype == np.float32 else dtrsv
        half = trsv(self.matrix, right.astype(self.matrix.dtype), lower=1)
        return np.asarray(trsv(self.matrix, half, lower=1, trans=1, overwrite_x=1), np.float64)


class _Search:
    """One problem on its way."""

    def __init__(self, newton: GramNewton, problem: Problem, start: DualOptimum | None) -> None:
        self.newton, self.problem, self.start = newton, problem, start
        self.strength = problem.penalty * problem.weights
        self.unit = problem.penalty * len(problem.y)  # what residuals are measured in
        self.factor: _Factor | None = None
        guesses = [_cold(problem)] if start is None else self._guess(start)
        lowest: Point = min(guesses, key=self._objective)
        self.at = replace(lowest, image=newton.times(lowest.a))  # without the rounding errors of steps so far

    def run(self) -> DualOptimum:
        last = np.inf
        for n_steps in range(MOST_STEPS + 1):
            root, errors = _weigh(self.problem, self.at)
            r, total = self.at.a + errors, float(errors.sum())
            rise = self.newton.times(r)
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
        if self.newton.factor is None or start.penalty == self.problem.penalty:
            return guesses
        root, _ = _weigh(replace(self.problem, penalty=start.penalty), start.at)
        system = _System(newton=self.newton, root=root, right=start.at.a / root, total=0.0)
        tangent = system.solve(self.newton.factor, TANGENT_ERROR, PATIENCE)
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
        system = _System(newton=self.newton, root=root, right=-r / root, total=-float(self.at.a.sum()))
        if self.factor is not None and self.factor.expect(forcing) <= PATIENCE:
            solved = system.solve(self.factor, forcing, PATIENCE)
            if solved is not None:
                return solved
        self.factor = self.newton.factorise(root)
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


@dataclass(frozen=True, kw_only=True)
class _System:
    """B·u + δb·D^½1 = right and 1ᵀD^½u = total, whose solution is the direction δa = D^½u, δb."""

    newton: GramNewton
    root: FloatArray
    """[m] D^½."""
    right: FloatArray
    """[m]."""
    total: float

    def solve(self, factor: _Factor, forcing: float, most: int) -> Point | None:
        """Solve it to a relative error of `forcing`; None if `most` iterations do not do.

        By projected conjugate gradients; MOST_ITERATIONS always do.
        """
        root = self.root
        first, border = factor.solve(self.right), factor.solve(root)
        norm = float(root @ border)
        shift = (float(root @ first) - self.total) / norm
        u = first - shift * border
        image = self.newton.times(root * u)
        residual = self.right - u - root * image - shift * root
        target = forcing * np.linalg.norm(root * self.right)
        direction, length = np.zeros_like(u), 1.0
        squares = root**2
        for number in range(most + 1):
            rest = root * residual
            level = float(squares @ rest) / float(
                squares @ squares
            )  # the change of shift that leaves least of it
            if np.linalg.norm(rest - level * squares) <= target or number == MOST_ITERATIONS:
                factor.gain = -float(np.log(forcing)) / number if number else np.inf
                return Point(a=root * u, image=image, b=shift + level)
            if number == most:
                return None
            scaled = factor.solve(residual)
            level = float(root @ scaled) / norm
            scaled -= level * border
            residual -= level * root
            shift += level
            new = float(residual @ scaled)
            direction = scaled + (new / length if number else 0.0) * direction
            reach = self.newton.times(root * direction)
            product = direction + root * reach
            rate = new / float(direction @ product)
            u += rate * direction
            image += rate * reach
            residual -= rate * product
            length = new
        return None
