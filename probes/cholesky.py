"""Minimise one binary L2 logistic objective at a time through the Gram matrix K = ZZᵀ of its training set.

With w = Zᵀa the logits are f = Ka + b, and Newton's step on the objective is, for D = C·s·p(1 − p), errors
e = C·s·(p − y) and r = a + e, which is zero at the optimum:

    δa = D^½u,    B·u + δb·D^½1 = −D^−½r,    1ᵀD^½u = −1ᵀa,    B = 1 + D^½KD^½

(Rasmussen & Williams 2006, section 3.4, with the unpenalised intercept as a constraint). B is factorised in
single precision, and seldom: conjugate gradients in double precision within the constraint (Gould, Hribar &
Nocedal 2001, algorithm 2.1) make up for what the factor lacks, be it digits or that it is a few steps old.

K is not decomposed, which would take as long as some thirty such factors. `newton` needs that, and then serves
any number of label vectors and classes with the same two products. This module knows nothing about folds,
scaling or devices.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import lapack
from scipy.linalg.blas import dtrsv, strsv
from scipy.special import expit, logit

from mmextract.probes.newton import ENOUGH, MOST_HALVINGS, MOST_STEPS, TOLERANCE
from mmextract.probes.solvers import FloatArray

PATIENCE = 12
"""Conjugate-gradient iterations of a step after which its factor is made anew.

At 800 samples an iteration takes 0.2 ms on one core, a factor 3 ms.
"""

LEAST_CURVATURE = 1e-9
"""Least p(1 − p) of a sample, so that it can be divided by; saturated samples count as little as that."""

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
class DualOptimum:
    """Where the minimiser stopped."""

    a: FloatArray
    """[m]: w = Zᵀa."""
    b: float
    """Intercept."""
    n_steps: int
    """Newton steps taken."""


class GramNewton:
    """Newton's method on one training set."""

    def __init__(self, gram: FloatArray) -> None:
        """gram: [m, m] of centred features, symmetric."""
        self.gram = gram.T  # as a symmetric matrix it is itself, in the order that LAPACK wants
        self.single = self.gram.astype(np.float32, order="F")
        self.workspace = np.empty_like(self.single)

    def minimise(self, problem: Problem, start: DualOptimum | None = None) -> DualOptimum:
        """Return the minimum of ½aᵀKa + C·Σ s·loss(y, Ka + b)."""
        return _Search(self, problem, start).run()

    def times(self, v: FloatArray) -> FloatArray:
        """Return Kv."""
        product: FloatArray = self.gram @ v
        return product

    def factorise(self, root: FloatArray) -> _Factor:
        """Return the factor of B for D^½ = root [m]. It lives in a workspace, until the next one is made."""
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


@dataclass(frozen=True)
class _Factor:
    """A lower Cholesky factor in single or double precision."""

    matrix: NDArray[Any]

    def solve(self, right: FloatArray) -> FloatArray:
        """Return B⁻¹·right, to the factor's precision. right: [m]."""
        # LAPACK's potrs packs the factor for many right-hand sides, which takes four times as long for one
        trsv = strsv if self.matrix.dtype == np.float32 else dtrsv
        half = trsv(self.matrix, right.astype(self.matrix.dtype), lower=1)
        return np.asarray(trsv(self.matrix, half, lower=1, trans=1, overwrite_x=1), np.float64)


class _Search:
    """One problem on its way."""

    def __init__(self, newton: GramNewton, problem: Problem, start: DualOptimum | None) -> None:
        self.newton, self.y = newton, problem.y
        self.strength = problem.penalty * problem.weights
        self.least = LEAST_CURVATURE * float(self.strength.max())
        self.unit = problem.penalty * len(problem.y)  # what residuals are measured in
        share = float(problem.weights @ problem.y / problem.weights.sum())
        cold = DualOptimum(a=np.zeros(len(problem.y)), b=float(logit(share)), n_steps=0)
        self.a, self.b = (start or cold).a, (start or cold).b
        self.product = newton.times(self.a)  # Ka
        self.factor: _Factor | None = None

    def run(self) -> DualOptimum:
        last = np.inf
        for n_steps in range(MOST_STEPS + 1):
            probabilities = expit(self.product + self.b)
            errors = self.strength * (probabilities - self.y)
            r, total = self.a + errors, float(errors.sum())
            rise = self.newton.times(r)
            size = float(np.sqrt(max(r @ rise, 0.0) + total**2)) / self.unit
            if size <= TOLERANCE or n_steps == MOST_STEPS or (size <= ENOUGH and size > last / 2):
                break
            last = size
            root = np.sqrt(np.maximum(self.strength * probabilities * (1 - probabilities), self.least))
            # superlinear convergence, but no more digits than are asked for
            forcing = max(min(size**0.5, 0.1), 0.3 * TOLERANCE / size)
            u, image, shift = self._solve(root, -r / root, forcing)
            if not self._move(root * u, image, shift, float(r @ image) + total * shift):
                break
        return DualOptimum(a=self.a, b=self.b, n_steps=n_steps)

    def _solve(
        self, root: FloatArray, right: FloatArray, forcing: float
    ) -> tuple[FloatArray, FloatArray, float]:
        """Return u, K·D^½u and δb for a right-hand side, to a relative error of `forcing`."""
        if self.factor is not None:
            solved = self._iterate(self.factor, root, right, forcing, PATIENCE)
            if solved is not None:
                return solved
        self.factor = self.newton.factorise(root)
        solved = self._iterate(self.factor, root, right, forcing, MOST_ITERATIONS)
        assert solved is not None
        return solved

    def _iterate(
        self, factor: _Factor, root: FloatArray, right: FloatArray, forcing: float, most: int
    ) -> tuple[FloatArray, FloatArray, float] | None:
        """Do what `_solve` says, by projected conjugate gradients; None if PATIENCE iterations do not do."""
        first, border = factor.solve(right), factor.solve(root)
        norm = float(root @ border)
        shift = (float(root @ first) + float(self.a.sum())) / norm
        u = first - shift * border
        image = self.newton.times(root * u)
        residual = right - u - root * image - shift * root
        target = forcing * np.linalg.norm(root * right)
        direction, length = np.zeros_like(u), 1.0
        for number in range(most + 1):
            scaled = factor.solve(residual)
            level = float(root @ scaled) / norm
            scaled -= level * border
            residual -= level * root
            shift += level
            new = float(residual @ scaled)
            if np.linalg.norm(root * residual) <= target or number == MOST_ITERATIONS:
                return u, image, shift
            if number == most:
                return None
            direction = scaled + (new / length if number else 0.0) * direction
            reach = self.newton.times(root * direction)
            product = direction + root * reach
            rate = new / float(direction @ product)
            u += rate * direction
            image += rate * reach
            residual -= rate * product
            length = new
        return None

    def _move(self, step: FloatArray, image: FloatArray, shift: float, slope: float) -> bool:
        """Take the step, halved until the objective falls. Return False if it does not."""
        before = self._objective(self.a, self.product, self.b)
        length = 1.0
        for _ in range(MOST_HALVINGS):
            a, product = self.a + length * step, self.product + length * image
            b = self.b + length * shift
            if self._objective(a, product, b) <= before + 1e-4 * length * slope + 1e-13 * abs(before):
                self.a, self.product, self.b = a, product, b
                return True
            length /= 2
        return False

    def _objective(self, a: FloatArray, product: FloatArray, b: float) -> float:
        logits = product + b
        loss = np.logaddexp(0.0, logits) - self.y * logits
        return float(a @ product / 2 + self.strength @ loss)
