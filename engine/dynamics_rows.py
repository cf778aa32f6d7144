"""The tables of a run: inner products of gradients → cosines and noise scales, by part of the model.

This module knows nothing about models, images or files.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from mmextract.engine.dynamics_gradients import LORA_A, Unit
from mmextract.engine.dynamics_statistics import (
    Estimate,
    between_batches,
    cosines,
    mean_with_interval,
    noise_scale,
)
from mmextract.engine.dynamics_sums import Measured

ALL = "all"
OTHER_BATCH = "another clean batch"
"""The cosine between two different clean batches: what to hold the views' cosines against."""
DEAD_A = "∇A is zero as long as B is: the LoRA is at its first step"


@dataclass(frozen=True, kw_only=True)
class CosineRow:
    """How alike the gradients of one view and of the clean batch are."""

    checkpoint: str
    batch_size: int
    view: str
    """A view, or OTHER_BATCH."""
    group: str
    """Part of the model, or ALL."""
    matrix: str
    """ALL, or which of a LoRA's matrices."""
    cosine: float | None
    """Mean over the batches."""
    low: float | None
    high: float | None
    n_batches: int
    """Batches that the mean is over."""
    n_same: int
    """Those in which the gradient is the clean one to the last bit, such as where no image of it is watermarked."""
    reason: str
    """Why a number is absent."""


@dataclass(frozen=True, kw_only=True)
class NoiseRow:
    """The gradient noise scale, estimated from the smallest batches and those of one other size."""

    checkpoint: str
    view: str
    group: str
    matrix: str
    small_batch: int
    batch_size: int
    noise_scale: float | None
    """In examples: below it, a batch twice as large is nearly worth twice as much."""
    low: float | None
    high: float | None
    n_batches: int
    """Batches of the larger size."""
    reason: str


def select_parts(units: Sequence[Unit]) -> list[tuple[str, str, list[int]]]:
    """Return (group, matrix, units) of every part that is reported: each group and all of them, whole and by matrix."""
    parts = []
    for group in (ALL, *dict.fromkeys(unit.group for unit in units)):
        inside = [number for number, unit in enumerate(units) if group in (ALL, unit.group)]
        matrices = sorted({units[number].matrix for number in inside})
        for matrix in (ALL, *(matrices if len(matrices) > 1 else ())):
            parts.append((group, matrix, [n for n in inside if matrix in (ALL, units[n].matrix)]))
    return parts


def make_cosine_rows(
    checkpoint: str, views: Sequence[str], measured: Sequence[Measured], units: Sequence[Unit], *, seed: int
) -> Iterator[CosineRow]:
    """Yield a row a (part, batch size, view); views: their names, the clean one first."""
    for group, matrix, part in select_parts(units):
        own = [products.own[:, :, part].sum(2) for products in measured]  # [batches, V] a size
        cross = [products.cross[:, :, part].sum(2) for products in measured]
        for level, size in enumerate(products.size for products in measured):
            for view, name in enumerate(views[1:], 1):
                values = cosines(own[level][:, view], own[level][:, 0], cross[level][:, view])
                estimate = mean_with_interval(values, seed)
                n_same = int((values == 1).sum())
                yield _cosine_row(estimate, checkpoint, size, name, group, matrix, n_same)
            if level + 1 < len(measured) and measured[level + 1].size == 2 * size:
                estimate = between_batches(own[level][:, 0], own[level + 1][:, 0], seed)
                yield _cosine_row(estimate, checkpoint, size, OTHER_BATCH, group, matrix, 0)


def _cosine_row(
    estimate: Estimate, checkpoint: str, size: int, view: str, group: str, matrix: str, n_same: int
) -> CosineRow:
    dead = estimate.value is None and matrix == LORA_A
    return CosineRow(
        checkpoint=checkpoint,
        batch_size=size,
        view=view,
        group=group,
        matrix=matrix,
        cosine=estimate.value,
        low=estimate.low,
        high=estimate.high,
        n_batches=estimate.n_batches,
        n_same=n_same,
        reason=DEAD_A if dead else estimate.reason,
    )


def make_noise_rows(
    checkpoint: str, views: Sequence[str], measured: Sequence[Measured], units: Sequence[Unit], *, seed: int
) -> Iterator[NoiseRow]:
    """Yield a row a (part, larger batch size, view)."""
    small = measured[0]
    for group, matrix, part in select_parts(units):
        for big in measured[1:]:
            for view, name in enumerate(views):
                estimate = noise_scale(
                    small.own[:, view, part].sum(1) / small.size**2,
                    big.own[:, view, part].sum(1) / big.size**2,
                    small.size,
                    big.size,
                    seed,
                )
                yield NoiseRow(
                    checkpoint=checkpoint,
                    view=name,
                    group=group,
                    matrix=matrix,
                    small_batch=small.size,
                    batch_size=big.size,
                    noise_scale=estimate.value,
                    low=estimate.low,
                    high=estimate.high,
                    n_batches=estimate.n_batches,
                    reason=DEAD_A if estimate.value is None and matrix == LORA_A else estimate.reason,
                )
