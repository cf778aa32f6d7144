"""Minimise many L2 logistic objectives at once: Newton's method, its systems solved by preconditioned
conjugate gradients.

Every problem is given in coordinates in which its features are orthogonal (see `dual` and `primal`, that find
them). There the Hessian I + C·UᵀWU is close to diagonal as long as the weights W do not differ much between
samples, so that its approximation 1 + C·w̄·gram serves every C and label without a factorisation, and an
iteration is two matrix products, shared by all label vectors of a training set. Of several classes, w̄ is the
mean of diag(p) − ppᵀ, in whose eigenvectors the approximation is diagonal again. Where weights differ too much
for that, the Hessian is factorised after all.

Truncated Newton: Nocedal & Wright, Numerical Optimization, ch. 7.1. This module knows nothing about folds,
scaling or NumPy.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import softplus

TOLERANCE = 1e-10
"""Norm of the gradient, over C·m, at which a problem is solved. At 1e-8 weights were right to 3e-6."""

ENOUGH = 1e-8
"""The same, for a problem whose gradient no longer halves, since rounding errors are of its size."""

MOST_STEPS = 100
"""Newton steps before a problem is given up; its residual then says so."""

MOST_HALVINGS = 40
"""Halvings of a step before it is given up: no step lowers the objective by more than its rounding error."""

PATIENCE = 100
"""Conjugate-gradient iterations a class after which a problem's own Hessian is factorised instead.

At 800 samples an iteration takes 0.3 ms on one core, the factorisation with its matrix product 40 ms. With c
classes an iteration has c times the operations and a factorisation up to c³ times, some c² iterations' worth more;
c is where the two balance for as many parameters as are factorised at all.
"""

LARGEST_HESSIAN = 4096
"""Parameters up to which a Hessian is factorised; with more, conjugate gradients have to do."""

MOST_ITERATIONS = 2000
"""Conjugate-gradient iterations where that is so."""


class Basis(Protocol):
    """The features of F training sets of at most m samples in R orthogonal coordinates, the last one constant 1.

    Samples beyond a training set's own are padding, of weight 0. Samples and coordinates come last: of two
    memory layouts of a product with few columns, that is by far the faster one.
    """

    gram: Tensor
    """[F, R] squared norm of each coordinate."""
    n_rows: Tensor
    """[F] samples of each training set."""

    def apply(self, v: Tensor) -> Tensor:
        """Return logits [F, q, m] of parameters v [F, q, R]."""

    def adjoint(self, errors: Tensor) -> Tensor:
        """Return the transposed product, [F, q, R], of errors [F, q, m]."""

    def second(self, at: int, weights: Tensor) -> Tensor:
        """Return Σ weight·uuᵀ, [R, R], over the samples of one training set. weights: [m]."""


@dataclass(frozen=True, kw_only=True)
class Labels:
    """L label vectors for each of F training sets."""

    targets: Tensor
    """[F, L, c, m] 0 or 1: the positive class, c = 1, or each of c > 2 classes."""
    weights: Tensor
    """[F, L, m] weight of each sample; 0 for padding."""
    penalty: Tensor
    """[F, L] C."""

    @property
    def strength(self) -> Tensor:
        """[F, L, 1, m] what each sample's loss is multiplied by."""
        return (self.weights * self.penalty[:, :, None])[:, :, None]

    def probabilities(self, logits: Tensor) -> Tensor:
        """Return those of the targets, [F, L, c, m], for logits of that shape."""
        return logits.sigmoid() if logits.shape[2] == 1 else logits.softmax(2)

    def losses(self, logits: Tensor) -> Tensor:
        """Return C·Σ loss, [F, L]."""
        if logits.shape[2] == 1:
            loss = softplus(logits) - self.targets * logits
        else:
            loss = logits.logsumexp(2, keepdim=True) - (self.targets * logits).sum(2, keepdim=True)
        return (self.strength * loss).sum((2, 3))

    def curve(self, probabilities: Tensor, images: Tensor) -> Tensor:
        """Return the losses' second derivative times images, both [F, L, c, m]."""
        if images.shape[2] == 1:
            return self.strength * probabilities * (1 - probabilities) * images
        weighted = probabilities * images
        return self.strength * (weighted - probabilities * weighted.sum(2, keepdim=True))


@dataclass(kw_only=True)
class Optimum:
    """Where the minimiser stopped."""

    v: Tensor
    """[F, L, c, R] parameters."""
    gradient: Tensor
    """[F, L, c, R] of the objective, there."""
    errors: Tensor
    """[F, L, c, m] C·weight·(probability − target) of each sample, there."""
    n_steps: Tensor
    """[F, L] Newton steps taken."""


def minimise(basis: Basis, labels: Labels, start: Tensor | None = None) -> Optimum:
    """Return the minimum of ½‖v‖² + C·Σ weight·loss over v, whose last coordinate is not penalised.

    start: [F, L, c, R], zero if not given.
    """
    return _Newton(basis, labels).run(start)


class _Newton:
    """The problems of one call. R coordinates, q = L·c columns: products with the basis see [F, q, ·]."""

    def __init__(self, basis: Basis, labels: Labels) -> None:
        self.basis, self.labels = basis, labels
        self.n_sets, self.n_labels, self.n_outputs, _ = labels.targets.shape
        self.n_coordinates = basis.gram.shape[1]
        self.ridge = torch.ones_like(basis.gram[0])  # [R]
        self.ridge[-1] = 0
        self.unit = labels.penalty * basis.n_rows[:, None]  # [F, L] what residuals are measured in
        self.factorise = torch.zeros_like(labels.penalty, dtype=torch.bool)  # where iterating took too long
        self.may_factorise = self.n_coordinates * self.n_outputs <= LARGEST_HESSIAN
        self.patience = PATIENCE * self.n_outputs if self.may_factorise else MOST_ITERATIONS

    def apply(self, v: Tensor) -> Tensor:
        return self.basis.apply(v.flatten(1, 2)).reshape(self.n_sets, self.n_labels, self.n_outputs, -1)

    def adjoint(self, errors: Tensor) -> Tensor:
        return self.basis.adjoint(errors.flatten(1, 2)).reshape(
            self.n_sets, self.n_labels, self.n_outputs, -1
        )

    def run(self, start: Tensor | None) -> Optimum:
        shape = (self.n_sets, self.n_labels, self.n_outputs, self.n_coordinates)
        v = self.labels.targets.new_zeros(shape) if start is None else start
        logits = self.apply(v)
        n_steps = torch.zeros_like(self.factorise, dtype=torch.int64)
        stuck = torch.zeros_like(self.factorise)
        last = torch.full_like(self.unit, torch.inf)
        while True:
            probabilities = self.labels.probabilities(logits)
            errors = self.labels.strength * (probabilities - self.labels.targets)
            gradient = self.ridge * v + self.adjoint(errors)
            size = gradient.square().sum((2, 3)).sqrt() / self.unit
            stuck |= (size <= ENOUGH) & (size > last / 2)
            last = size
            active = (size > TOLERANCE) & (n_steps < MOST_STEPS) & ~stuck
            if not active.any():
                return Optimum(v=v, gradient=gradient, errors=errors, n_steps=n_steps)
            step, image = self._step(gradient, probabilities, size, active)
            length = self._search(v, logits, gradient, step, image) * active
            stuck |= active & (length == 0)
            n_steps += active
            v = v + length[:, :, None, None] * step
            logits = logits + length[:, :, None, None] * image

    def _step(
        self, gradient: Tensor, probabilities: Tensor, size: Tensor, active: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return Newton's step [F, L, c, R] and its logits [F, L, c, m]."""
        # superlinear convergence, but no more digits than are asked for
        forcing = torch.maximum(size.sqrt().clamp(max=0.1), 0.3 * TOLERANCE / size.clamp(min=TOLERANCE))
        step, image, slow = self._iterate(gradient, probabilities, forcing, active & ~self.factorise)
        if self.may_factorise:
            self.factorise |= slow
            for at, label in (self.factorise & active).nonzero().tolist():
                step[at, label] = self._solve(gradient, probabilities, at, label)
            if self.factorise.any():
                image = self.apply(step)
        return step, image

    def _iterate(
        self, gradient: Tensor, probabilities: Tensor, forcing: Tensor, wanted: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Solve H·step = −gradient to a relative error of `forcing` [F, L] in the preconditioner's norm.

        Returns the steps, their logits, and which problems [F, L] were given up.
        """
        precondition = self._precondition(probabilities)
        step, image = torch.zeros_like(gradient), torch.zeros_like(probabilities)
        residual = -gradient
        direction = precondition(residual)
        length = (residual * direction).sum((2, 3))  # [F, L]
        target = forcing.square() * length
        going = wanted & (length > 0)
        for _ in range(self.patience):
            if not going.any():
                break
            reach = self.apply(direction)
            product = self.ridge * direction + self.adjoint(self.labels.curve(probabilities, reach))
            bend = (direction * product).sum((2, 3))
            going = going & (bend > 0)
            rate = torch.where(going, length / bend, 0.0)[:, :, None, None]
            step += rate * direction
            image += rate * reach
            residual -= rate * product
            scaled = precondition(residual)
            new = (residual * scaled).sum((2, 3))
            going = going & (new > target)
            direction = scaled + torch.where(going, new / length, 0.0)[:, :, None, None] * direction
            length = new
        return step, image, going

    def _precondition(self, probabilities: Tensor) -> Callable[[Tensor], Tensor]:
        """Return what solves the systems [F, L, c, R] of weights that are the same, their mean, in all samples."""
        n_rows = self.basis.n_rows[:, None, None, None]
        weighted = self.labels.strength * probabilities
        gram = self.basis.gram[:, None, None]
        if self.n_outputs == 1:
            mean = (weighted * (1 - probabilities)).sum(3, keepdim=True) / n_rows  # [F, L, 1, 1]
            inverse = 1 / (self.ridge + mean * gram).clamp(min=1e-300)
            return lambda residual: inverse * residual
        mean = (torch.diag_embed(weighted.sum(3)) - weighted @ probabilities.mT) / n_rows  # [F, L, c, c]
        # a shift of all classes changes no probability and is in no gradient: any weight does, but for 0
        mean += mean.diagonal(dim1=2, dim2=3).mean(2)[..., None, None] / self.n_outputs
        weights, classes = torch.linalg.eigh(mean)
        weights = weights.clamp(min=0)[..., None]
        inverse = 1 / (self.ridge + weights.maximum(1e-15 * weights[:, :, -1:]) * gram).clamp(min=1e-300)
        return lambda residual: classes @ (inverse * (classes.mT @ residual))

    def _solve(self, gradient: Tensor, probabilities: Tensor, at: int, label: int) -> Tensor:
        """Return the step [c, R] of one problem, by Cholesky's factorisation of its Hessian."""
        p = probabilities[at, label]  # [c, m]
        strength = self.labels.strength[at, label, 0]  # [m]
        size = self.n_coordinates
        hessian = p.new_zeros(self.n_outputs * size, self.n_outputs * size)
        for k in range(self.n_outputs):
            for other in range(k + 1):  # the factorisation reads the lower triangle
                weights = strength * p[k] * (float(k == other) - p[other])
                hessian[k * size : (k + 1) * size, other * size : (other + 1) * size] = self.basis.second(
                    at, weights
                )
        ridge = self.ridge.repeat(self.n_outputs)
        # the intercepts' common shift changes nothing, and saturated samples leave no curvature
        hessian.diagonal().add_(ridge + 1e-12 * hessian.diagonal().mean())
        factor, failed = torch.linalg.cholesky_ex(hessian)
        if failed:
            hessian.diagonal().add_(1e-8 * hessian.diagonal().mean())
            factor = torch.linalg.cholesky(hessian)
        right = -gradient[at, label].reshape(-1, 1)
        return torch.cholesky_solve(right, factor).reshape(self.n_outputs, -1)

    def _search(self, v: Tensor, logits: Tensor, gradient: Tensor, step: Tensor, image: Tensor) -> Tensor:
        """Return the length of each step, [F, L]: 1, halved until the objective falls; 0 if it does not."""
        before = self._objective(v, logits)
        slope = (gradient * step).sum((2, 3))
        rounding = 1e-13 * before.abs()
        length = torch.ones_like(before)
        for _ in range(MOST_HALVINGS):
            wide = length[:, :, None, None]
            after = self._objective(v + wide * step, logits + wide * image)
            falls = after <= before + 1e-4 * length * slope + rounding
            if falls.all():
                return length
            length = torch.where(falls, length, length / 2)
        return torch.where(falls, length, 0.0)

    def _objective(self, v: Tensor, logits: Tensor) -> Tensor:
        return (self.ridge * v.square()).sum((2, 3)) / 2 + self.labels.losses(logits)
