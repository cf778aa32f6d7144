"""Batches in as large parts as a GPU has room for.

A part is tried twice, the second time with all memory given back that nobody uses, because what is left over from
other shapes is the commonest reason for an allocation to fail. Then the parts halve. How many samples fit is
remembered by shape, so that what did not fit is not tried for every batch again. This module knows nothing about
models, images or stores.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Hashable
from typing import TypeVar

import torch

Result = TypeVar("Result")


class NoRoomError(ValueError):
    """A GPU has no room for a single sample."""


class Parts:
    """Splits batches where memory runs out.

    Parts halve from `batch_size` on, whatever the size of the batch that failed. So a run in which no more than k
    samples of any shape fit gives, to the bit, what a run with k as its batch size gives, k being one of these halves.
    """

    def __init__(self, batch_size: int) -> None:
        self._batch_size = batch_size
        self._fitting: dict[Hashable, int] = {}
        self.n_split = 0
        """Batches that did not run as a whole."""

    def run(self, shape: Hashable, n_samples: int, work: Callable[[slice], Result]) -> list[Result]:
        """Call `work` with slices that together are the batch, in order, and return its results.

        work: may be called again for what it has done already. shape: equal for batches whose samples take the same
        memory. Raises NoRoomError if a single sample does not fit.
        """
        size = self._fitting.get(shape, self._batch_size)
        while True:
            slices = [slice(at, min(at + size, n_samples)) for at in range(0, n_samples, size)]
            for _ in range(2):
                found = _tried(slices, work)
                if found is not None:
                    self.n_split += len(slices) > 1
                    return found
            if size == 1:
                raise NoRoomError(
                    "the GPU has no room for a single sample: use --device-map auto, --dtype bfloat16, smaller images "
                    "or a GPU with more memory"
                )
            size = _half(min(size, _smallest_that_holds(n_samples, self._batch_size)))
            self._fitting[shape] = size


def _tried(slices: list[slice], work: Callable[[slice], Result]) -> list[Result] | None:
    """Return the results of all slices, None if the device has no room for them."""
    try:
        return [work(part) for part in slices]
    except torch.OutOfMemoryError:
        pass  # outside of the handler, for the traceback keeps the tensors of its frames alive
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()
    return None


def _half(size: int) -> int:
    return -(-size // 2)


def _smallest_that_holds(n_samples: int, batch_size: int) -> int:
    """Return the smallest of batch_size, its half, … that is no smaller than the batch."""
    size = batch_size
    while size > 1 and _half(size) >= n_samples:
        size = _half(size)
    return size
