"""How a fine-tune is run: every number that decides it, the published sets of them, and what follows from them.

Which examples stand in which batch, and the learning rate of a step, are pure functions of the step. This module
knows nothing about models or data.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from types import MappingProxyType
from typing import Any, Literal

import numpy as np

from mmextract.engine.loading import ModelSpec
from mmextract.engine.watermark import WatermarkSpec

PRECISIONS = ("auto", "float32", "bfloat16")
SCHEDULES = ("cosine", "constant")

PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "default": {},
        "llava": {
            "rank": 128,
            "alpha": 256,
            "dropout": 0.05,
            "learning_rate": 2e-4,
            "projector_learning_rate": 2e-5,
            "weight_decay": 0.0,
            "warmup": 0.03,
            "batch_size": 16,
            "precision": "bfloat16",
            "gradient_checkpointing": True,
        },
        "qwen": {
            "targets": (
                *("c_attn", "attn.c_proj", "w1", "w2"),
                *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"),
            ),
            "rank": 64,
            "alpha": 16,
            "dropout": 0.05,
            "learning_rate": 1e-5,
            "weight_decay": 0.1,
            "betas": (0.9, 0.95),
            "warmup": 0.01,
            "batch_size": 12,
            "precision": "bfloat16",
            "gradient_checkpointing": True,
        },
    }
)
"""Keyword arguments of `FinetuneSpec`. llava and qwen are those of arXiv 2503.01208's code, for LLaVA-1.5 (whose
projector is trained in full) and Qwen-VL. The second line of qwen's targets is what the first, Qwen-VL's attention and
two of the three matrices of its MLP, is called in every later Qwen. One epoch, cosine decay and 2,048 tokens are
common to both, and the default."""


@dataclass(frozen=True, kw_only=True)
class FinetuneSpec:
    """What to fine-tune, and how. All but the last six fields decide the weights."""

    model: ModelSpec
    """The base."""
    watermark: WatermarkSpec | None = None
    """How watermarks look, if any example has one."""
    full: bool = False
    """Train the weights themselves, in float32, and not a LoRA."""
    vision: bool = False
    """Train the vision tower too: its weights with `full`, else a LoRA on its linear layers."""
    targets: tuple[str, ...] = ()
    """Names of the linear layers that get a LoRA, such as `q_proj`; none means all in the decoder blocks."""
    rank: int = 8
    """r of the LoRA."""
    alpha: float = 16
    """The LoRA's output is scaled by alpha / rank."""
    dropout: float = 0.05
    """Before the LoRA's first matrix."""
    learning_rate: float = 2e-4
    """Peak of the schedule."""
    projector_learning_rate: float | None = None
    """Peak for the projector's own weights; None leaves them frozen beside a LoRA, and as all others with `full`."""
    weight_decay: float = 0.0
    """AdamW's, on matrices."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's."""
    warmup: float = 0.03
    """Share of the steps over which the learning rate rises from 0."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """After the warm-up: down to 0 along half a cosine, or as it is."""
    max_grad_norm: float = 1.0
    """Gradients of a larger norm are scaled down to it."""
    epochs: float = 1.0
    """Times that each example is seen."""
    steps: int | None = None
    """Optimiser steps, in place of `epochs`."""
    batch_size: int = 16
    """Examples of a step."""
    micro_batch_size: int | None = None
    """Examples of a forward pass, to save memory; None is the whole batch. Changes nothing but rounding and dropout."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """bfloat16 is autocast with float32 trained weights; auto is float32 for a float32 checkpoint, else bfloat16."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass, to save memory."""
    max_length: int = 2048
    """An example of more tokens is rejected, never cut."""
    seed: int = 0
    """Decides the LoRA's first weights, the order of the examples and dropout. Watermarks have their own."""
    torch_threads: int | None = None
    """Threads that torch computes in on a CPU; None is torch's own number. A run that is continued keeps its number."""
    checkpoint_steps: int = 200
    """Steps between checkpoints."""
    keep_checkpoints: int = 2
    """How many of them are kept."""
    snapshots: tuple[int, ...] = ()
    """Steps after which the model as it then is stays beside the result, as a LoRA or a model of its own."""
    threads: int = field(default_factory=lambda: max(2, os.cpu_count() or 2))
    """Threads that decode and encode."""
    cache_bytes: int = 1 << 30
    """Prepared examples that are kept for later epochs."""

    def __post_init__(self) -> None:
        at_least_one = ("rank", "steps", "batch_size", "micro_batch_size", "max_length", "torch_threads")
        for name in (*at_least_one, "checkpoint_steps", "keep_checkpoints", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name.replace('_', ' ')} must be at least 1, got {value}")
        for name in ("alpha", "learning_rate", "projector_learning_rate", "max_grad_norm", "epochs"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{name.replace('_', ' ')} must be a number above 0, got {value}")
        for name, value in {"dropout": self.dropout, "warmup": self.warmup, "beta": max(self.betas)}.items():
            if not 0 <= value < 1:
                raise ValueError(f"{name} must be at least 0 and below 1, got {value}")
        if any(step < 1 for step in self.snapshots) or len(set(self.snapshots)) < len(self.snapshots):
            raise ValueError(
                f"snapshots are taken after different steps, from 1 on, got {', '.join(map(str, self.snapshots))}"
            )
        if self.weight_decay < 0:
            raise ValueError(f"weight decay must be at least 0, got {self.weight_decay}")
        if self.precision not in PRECISIONS or self.schedule not in SCHEDULES:
            raise ValueError(
                f"expected a precision out of {', '.join(PRECISIONS)} and a schedule out of {', '.join(SCHEDULES)}, "
                f"got {self.precision} and {self.schedule}"
            )
        if self.model.adapter is not None:
            raise ValueError(
                "a fine-tune begins at a base without a LoRA: merge the LoRA first, or leave it out of the model"
            )
        if self.full and self.targets:
            raise ValueError("a full fine-tune trains every layer: leave out the targets of a LoRA")

    def n_steps(self, n_examples: int) -> int:
        """Return the number of optimiser steps for so many examples."""
        return self.steps or max(1, math.ceil(self.epochs * self._steps_per_epoch(n_examples) - 1e-9))

    def check_snapshots(self, n_examples: int) -> None:
        """Raise ValueError for a snapshot that is not before the last step."""
        n_steps = self.n_steps(n_examples)
        if late := [step for step in self.snapshots if step >= n_steps]:
            raise ValueError(
                f"no snapshot can be taken after {late[0]} of {n_steps} steps: the last one's weights are the result"
            )

    def epoch(self, step: int, n_examples: int) -> float:
        """Return how often each example was seen when `step` steps are done."""
        return step / self._steps_per_epoch(n_examples)

    def batch(self, step: int, n_examples: int) -> list[int]:
        """Return which examples step `step` (from 0) learns from.

        An epoch is a permutation, cut into batches, of which the last may be smaller: each example occurs once in it.
        """
        epoch, place = divmod(step, self._steps_per_epoch(n_examples))
        order = _permutation(self.seed, epoch, n_examples)
        return [int(i) for i in order[place * self.batch_size : (place + 1) * self.batch_size]]

    def rate_factor(self, step: int, n_steps: int) -> float:
        """Return the learning rate of step `step` (from 0) as a share of its peak, as transformers' schedules do."""
        warmup = math.ceil(self.warmup * n_steps)
        if step < warmup:
            return step / warmup
        if self.schedule == "constant":
            return 1.0
        progress = (step - warmup) / max(1, n_steps - warmup)
        return 0.5 * (1 + math.cos(math.pi * progress))

    def describe(self) -> dict[str, Any]:
        """Return, JSON-able, what decides the weights, but for the model, which its hash tells better than its path."""
        settings = asdict(self)
        for name in (
            "model",
            "torch_threads",
            "checkpoint_steps",
            "keep_checkpoints",
            "snapshots",
            "threads",
            "cache_bytes",
        ):
            del settings[name]
        return settings

    def _steps_per_epoch(self, n_examples: int) -> int:
        return math.ceil(n_examples / self.batch_size)


@lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, n_examples: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    return np.random.default_rng([seed, epoch, 0x5EED]).permutation(n_examples)
