"""Gradients of nested batches: one pass over the examples gives batches of every size.

The gradient of a batch is the sum of its examples' gradients, so a batch of 64 costs nothing once its two batches of
32 are known. Sums are kept one a size, as the digits of a counter, so memory is views × sizes × parameters and does
not grow with the number of examples. This module knows nothing about models or what a view is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import torch

Products = np.ndarray[tuple[int, int, int], np.dtype[np.float64]]

_BLOCK = 1 << 18
"""Elements that are multiplied at once in float64: they stay in a core's cache."""


def check_sizes(sizes: Sequence[int]) -> None:
    """Raise ValueError unless sizes rise, and each divides the next, so that batches can nest."""
    if not sizes or min(sizes) < 1:
        raise ValueError(f"batch sizes must be at least 1, got {', '.join(map(str, sizes)) or 'none'}")
    for small, big in pairwise(sizes):
        if big <= small or big % small:
            raise ValueError(
                f"each batch size must be a multiple of the one before, so that batches nest; {big} is none of {small}"
            )


@dataclass(frozen=True, kw_only=True)
class Measured:
    """The inner products of all batches of one size. V views, of which 0 is the one compared with; U units."""

    size: int
    """Examples of a batch."""
    own: Products
    """float64 [batches, V, U]: squared norms of the batch's summed gradients."""
    cross: Products
    """float64 [batches, V, U]: inner products with view 0."""


@dataclass
class NestedSums:
    """Adds gradients up and multiplies them, one size after another; `measured` is what came of it."""

    sizes: tuple[int, ...]
    """Batch sizes, see `check_sizes`."""
    unit_sizes: tuple[int, ...]
    """Elements of each unit of a gradient, in order."""
    _sums: dict[int, torch.Tensor] = field(default_factory=dict)
    _counts: dict[int, int] = field(default_factory=dict)
    _products: dict[int, list[tuple[np.ndarray, np.ndarray]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_sizes(self.sizes)
        self._products = {size: [] for size in self.sizes}

    def add(self, gradients: torch.Tensor) -> None:
        """Take the next batch of the smallest size: float32 [V, P], summed over its examples, one row a view."""
        self._take(0, gradients)

    def measured(self) -> list[Measured]:
        """Return the products of every size, smallest first."""
        found = []
        for size in self.sizes:
            own, cross = zip(*self._products[size], strict=True)
            found.append(Measured(size=size, own=np.stack(own), cross=np.stack(cross)))
        return found

    def _take(self, level: int, gradients: torch.Tensor) -> None:
        self._products[self.sizes[level]].append(multiply(gradients, self.unit_sizes))
        above = level + 1
        if above == len(self.sizes):
            return
        if above in self._sums:
            self._sums[above] += gradients
        else:
            self._sums[above] = gradients.clone()
        self._counts[above] = self._counts.get(above, 0) + 1
        if self._counts[above] == self.sizes[above] // self.sizes[level]:
            del self._counts[above]
            self._take(above, self._sums.pop(above))


def multiply(gradients: torch.Tensor, unit_sizes: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Return each view's squared norm and its inner product with view 0, by unit: twice float64 [V, U].

    gradients: [V, P]. Two equal rows get equal numbers, to the last bit.
    """
    own = torch.zeros(len(gradients), len(unit_sizes), dtype=torch.float64)
    cross = torch.zeros_like(own)
    start = 0
    for unit, size in enumerate(unit_sizes):
        for at in range(start, start + size, _BLOCK):
            block = gradients[:, at : min(at + _BLOCK, start + size)].double()
            own[:, unit] += (block * block).sum(1).cpu()
            cross[:, unit] += (block * block[0]).sum(1).cpu()
        start += size
    return own.numpy(), cross.numpy()
