"""How watermarks change the gradients of training, beside what ordinary augmentations change.

On the same weights and the same batch the gradient of the answers' loss is taken clean, watermarked at each rate, with
the image augmented and with the question in other words; the cosine with the clean one says how much each changes what
a step learns. Over batch sizes, along training, by part of the model (arXiv 2503.01208 compares gradients of different
runs, whose LoRA begins elsewhere and whose weights differ; here all but the images is the same).

This module composes the others; it draws nothing and writes no file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from mmextract.engine.dynamics_gradients import GradientMeter
from mmextract.engine.dynamics_rows import CosineRow, NoiseRow, make_cosine_rows, make_noise_rows
from mmextract.engine.dynamics_sums import NestedSums, check_sizes
from mmextract.engine.dynamics_views import Seen, Viewer, ViewSettings, choose_rows
from mmextract.engine.finetune_data import Preparer
from mmextract.engine.images import RejectedSample
from mmextract.engine.loading import ModelSpec, choose_device
from mmextract.engine.models import load
from mmextract.engine.rows import Row
from mmextract.engine.samples import Dataset


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Weights at which gradients are taken."""

    name: str
    """What it is called in tables and figures."""
    model: ModelSpec
    """Model and LoRA."""
    weights: Path | None = None
    """A safetensors file that `fine-tune` keeps while it trains, to be put over them."""


@dataclass(frozen=True, kw_only=True)
class DynamicsSpec:
    """What is compared, where and on what."""

    checkpoints: tuple[Checkpoint, ...]
    """In the order of training."""
    views: ViewSettings
    """What the clean gradient is compared with."""
    batch_sizes: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    """Each a multiple of the one before: the batches nest."""
    n_samples: int = 256
    """Examples, fewer where the data set has fewer."""
    full: bool = False
    """Take the gradient of all weights also where there is a LoRA."""
    max_length: int = 2048
    """An example of more tokens is rejected, never cut."""
    threads: int = 2
    """Threads that decode and encode."""

    def __post_init__(self) -> None:
        check_sizes(self.batch_sizes)
        if not self.checkpoints:
            raise ValueError("give at least one model to take gradients of")
        if len({checkpoint.name for checkpoint in self.checkpoints}) < len(self.checkpoints):
            names = ", ".join(checkpoint.name for checkpoint in self.checkpoints)
            raise ValueError(f"each checkpoint needs a name of its own, got {names}")
        if self.n_samples < self.batch_sizes[-1]:
            raise ValueError(
                f"{self.n_samples} samples do not fill one batch of {self.batch_sizes[-1]}: take more samples, or "
                "smaller batches"
            )


@dataclass(frozen=True, kw_only=True)
class Dynamics:
    """What a run found."""

    cosines: list[CosineRow]
    noise: list[NoiseRow]
    n_samples: int
    """Examples used, of each checkpoint."""
    n_parameters: dict[str, int]
    """Checkpoint → weights in its gradient."""
    models: dict[str, Any]
    """Checkpoint → what decides its numbers."""
    rejected: dict[str, str] = field(default_factory=dict)
    """Sample → why it could not be used."""


def run_dynamics(
    spec: DynamicsSpec, dataset: Dataset, *, on_progress: Callable[[int], None] = lambda n_samples: None
) -> Dynamics:
    """Take all gradients and compare them; on_progress is called with the number of examples done since its last call.

    Raises ValueError for data without images or answers, too few of them, or weights that do not fit.
    """
    rows = list(choose_rows(dataset, spec.views))
    found = Dynamics(cosines=[], noise=[], n_samples=0, n_parameters={}, models={})
    n_used = []
    for checkpoint in spec.checkpoints:
        meter = _load(spec, checkpoint)
        viewer = Viewer(Preparer(meter.adapter, spec.views.marking.spec, spec.max_length), spec.views)
        sums = NestedSums(sizes=spec.batch_sizes, unit_sizes=meter.sizes)
        seen = islice(_see(rows, viewer, spec.threads, found.rejected), spec.n_samples)
        try:
            n_used.append(_measure(meter, seen, sums, spec, on_progress))
        except torch.OutOfMemoryError as error:
            raise ValueError(_too_large(meter.n_parameters, spec)) from error
        measured = sums.measured()
        about = (checkpoint.name, spec.views.names, measured, meter.units)
        found.cosines.extend(make_cosine_rows(*about, seed=spec.views.seed))
        found.noise.extend(make_noise_rows(*about, seed=spec.views.seed))
        found.n_parameters[checkpoint.name] = meter.n_parameters
        found.models[checkpoint.name] = meter.adapter.describe()
    return replace(found, n_samples=min(n_used))


def _too_large(n_parameters: int, spec: DynamicsSpec) -> str:
    n_views, n_sizes = len(spec.views.names), len(spec.batch_sizes)
    return (
        f"out of memory: sums of {n_parameters:,} weights' gradients in {n_views} views and {n_sizes} batch sizes take "
        f"{4 * n_parameters * n_views * n_sizes / 2**30:.1f} GiB beside the model: take fewer --rate and --batch-size, "
        "or the gradient of a LoRA and not of all weights"
    )


def _load(spec: DynamicsSpec, checkpoint: Checkpoint) -> GradientMeter:
    full = spec.full or checkpoint.model.adapter is None
    model = checkpoint.model
    if model.dtype == "auto" and (full or choose_device(model.device).type == "cpu"):
        model = replace(model, dtype="float32")
    meter = GradientMeter(load(model), full=full)
    if checkpoint.weights is not None:
        meter.put(_read_weights(checkpoint.weights), str(checkpoint.weights))
    return meter


def _read_weights(path: Path) -> dict[str, torch.Tensor]:
    """Return the trained weights, by name, of a file that `finetune` keeps while it trains."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise LookupError(f"there is no checkpoint at {path}")
    try:
        with safe_open(path, "pt") as file:
            names = [name for name in file.keys() if name.startswith("weight/")]  # noqa: SIM118
            weights = {name.removeprefix("weight/"): file.get_tensor(name) for name in names}
    except SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file: {error}") from error
    if not weights:
        raise ValueError(f"{path} holds no tensor called weight/…, as `mmextract finetune` writes them")
    return weights


def _see(rows: Sequence[Row], viewer: Viewer, threads: int, rejected: dict[str, str]) -> Iterator[Seen]:
    """Yield the views of the rows, in order, prepared a few ahead; those that cannot be had go to `rejected`."""

    def make(row: Row) -> Seen | str:
        try:
            return viewer(row)
        except RejectedSample as refusal:
            return str(refusal)

    with ThreadPoolExecutor(threads) as executor:
        for start in range(0, len(rows), 2 * threads):
            ahead = rows[start : start + 2 * threads]
            for row, made in zip(ahead, executor.map(make, ahead), strict=True):
                if isinstance(made, str):
                    rejected[row.sample.id] = made
                else:
                    yield made


def _measure(
    meter: GradientMeter,
    examples: Iterator[Seen],
    sums: NestedSums,
    spec: DynamicsSpec,
    on_progress: Callable[[int], None],
) -> int:
    """Feed all examples to `sums`; return how many they were."""
    n_views, smallest, n_done = len(spec.views.names), spec.batch_sizes[0], 0
    while len(batch := list(islice(examples, smallest))) == smallest:
        gradients: dict[tuple[int, ...], torch.Tensor] = {}
        views = [tuple(seen.of_view[view] for seen in batch) for view in range(n_views)]
        for view in dict.fromkeys(views):
            prepared = [seen.prepared[which] for seen, which in zip(batch, view, strict=True)]
            gradients[view] = meter.gradient(prepared)
        sums.add(torch.stack([gradients[view] for view in views]))
        n_done += smallest
        on_progress(smallest)
    if n_done < spec.batch_sizes[-1]:
        raise ValueError(
            f"only {n_done} samples have an image and an answer that can be used, and one batch takes "
            f"{spec.batch_sizes[-1]}: give more data, or smaller --batch-size"
        )
    return n_done
