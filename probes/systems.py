"""The linear systems of a training set's Gram matrix K that Newton's method and its tangents ask for.

For D^½ = root and B = 1 + D^½KD^½,

    B·u + δb·D^½1 = right,    1ᵀD^½u = total

gives the direction δa = D^½u, δb (Rasmussen & Williams 2006, section 3.4, with the unpenalised intercept as a
constraint). B is factorised in single precision, and seldom: conjugate gradients in double precision within the
constraint (Gould, Hribar & Nocedal 2001, algorithm 2.1) make up for what the factor lacks, be it digits or that it is
a few steps old. This module knows nothing about labels or what is minimised.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import lapack
from scipy.linalg.blas import dtrsv, strsv

from mmextract.probes.solvers import FloatArray

MOST_ITERATIONS = 300
"""Conjugate-gradient iterations of a step whose factor is new."""


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


class Gram:
    """The Gram matrix of a training set, and the last factor that was made with it."""

    def __init__(self, matrix: FloatArray) -> None:
        """matrix: [m, m] of centred features, symmetric."""
        self.matrix = matrix.T  # as a symmetric matrix it is itself, in the order that LAPACK wants
        self.single = self.matrix.astype(np.float32, order="F")
        self.workspace = np.empty_like(self.single)
        self.factor: Factor | None = None
        """The last one that was made."""

    def times(self, v: FloatArray) -> FloatArray:
        """Return Kv."""
        product: FloatArray = self.matrix @ v
        return product

    def factorise(self, root: FloatArray) -> Factor:
        """Return the factor of B for D^½ = root [m]; it lives in a workspace, until the next one is made."""
        self.factor = self._factorise(root)
        return self.factor

    def _factorise(self, root: FloatArray) -> Factor:
        scale = root.astype(np.float32)
        np.multiply(self.single, scale, out=self.workspace)
        self.workspace *= scale[:, None]
        self.workspace.ravel("F")[:: len(root) + 1] += 1
        factor, failed = lapack.spotrf(self.workspace, lower=1, clean=0, overwrite_a=1)
        if not failed:
            return Factor(factor)
        exact = self.matrix * root * root[:, None]
        exact.ravel("K")[:: len(root) + 1] += 1
        factor, failed = lapack.dpotrf(exact, lower=1, clean=0)
        if failed:  # iterations make up for this, too
            exact.ravel("K")[:: len(root) + 1] += 1e-10 * np.diagonal(exact).max()
            factor = lapack.dpotrf(exact, lower=1, clean=0)[0]
        return Factor(factor)


@dataclass
class Factor:
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


@dataclass(frozen=True, kw_only=True)
class System:
    """B·u + δb·D^½1 = right and 1ᵀD^½u = total, whose solution is the direction δa = D^½u, δb."""

    gram: Gram
    root: FloatArray
    """[m] D^½."""
    right: FloatArray
    """[m]."""
    total: float

    def solve(self, factor: Factor, forcing: float, most: int) -> Point | None:
        """Solve it to a relative error of `forcing`; None if `most` iterations do not do.

        By projected conjugate gradients; MOST_ITERATIONS always do.
        """
        root = self.root
        first, border = factor.solve(self.right), factor.solve(root)
        norm = float(root @ border)
        shift = (float(root @ first) - self.total) / norm
        u = first - shift * border
        image = self.gram.times(root * u)
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
            reach = self.gram.times(root * direction)
            product = direction + root * reach
            rate = new / float(direction @ product)
            u += rate * direction
            image += rate * reach
            residual -= rate * product
            length = new
        return None
