"""How long steps may take and how large results may be, before anything was run: from sizes alone, roughly.

The figures are for choosing, not for promising, and give way to measured ones as soon as a step of a kind is done.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mmextract.engine.finetune_spec import FinetuneSpec
from mmextract.engine.loading import ModelSpec, choose_device

DEFAULT_IMAGE_TOKENS, TEXT_TOKENS = 576, 30
"""Tokens of a sample where the configuration does not tell."""

EFFICIENCY = 0.35
"""Share of a large matrix product's speed that a model reaches; 14 ms a forward pass and 36 ms a training step an image
of the built-in model, on one core of 80 GFLOP/s, make it 0.5."""


@dataclass(frozen=True)
class Costs:
    """Guesses for one model; None where its size is not known before it is downloaded."""

    model: ModelSpec
    config: dict[str, Any] = field(init=False)
    n_parameters: int | None = field(init=False)
    seconds_per_flop: float = field(init=False)

    def __post_init__(self) -> None:
        folder = Path(self.model.model)
        object.__setattr__(self, "config", _read_config(folder))
        object.__setattr__(self, "n_parameters", _count(folder))
        object.__setattr__(self, "seconds_per_flop", _measure_speed(choose_device(self.model.device)))

    @property
    def n_tokens(self) -> int:
        """Tokens of a sample."""
        vision = self.config.get("vision_config", {})
        size, patch = vision.get("image_size"), vision.get("patch_size")
        both = isinstance(size, int) and isinstance(patch, int)
        return TEXT_TOKENS + ((size // patch) ** 2 if both else DEFAULT_IMAGE_TOKENS)

    @property
    def forward_image(self) -> float | None:
        """Seconds of a forward pass of one image: 2 operations a parameter and token (Kaplan et al. 2020)."""
        if self.n_parameters is None:
            return None
        return 2 * self.n_parameters * self.n_tokens * self.seconds_per_flop / EFFICIENCY

    @property
    def training_image(self) -> float | None:
        """Seconds of a training step, an image: the backward pass takes twice the forward pass."""
        return None if self.forward_image is None else 3 * self.forward_image

    def model_bytes(self, settings: FinetuneSpec) -> int:
        """Return the size of a fine-tune: all weights in float32, or a LoRA of some 1 % a rank of 16."""
        n = self.n_parameters or 0
        return 4 * n if settings.full else int(4 * n * 0.01 * settings.rank / 16)

    def state_bytes(self, n_positions: int) -> int:
        """Return the size of one sample's hidden states before compression."""
        text = self.config.get("text_config", self.config)
        return 4 * n_positions * int(text.get("num_hidden_layers", 32)) * int(text.get("hidden_size", 4096))


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    return dict(json.loads(path.read_text("utf-8"))) if path.is_file() else {}


def _count(folder: Path) -> int | None:
    """Return the number of weights, from the headers of a folder's files."""
    from safetensors import safe_open

    n = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                shape = file.get_slice(name).get_shape()
                n += int(torch.Size(shape).numel())
    return n or None


def _measure_speed(device: torch.device) -> float:
    """Return seconds a floating-point operation of a matrix product takes here, measured in some milliseconds."""
    size, dtype = (4096, torch.bfloat16) if device.type == "cuda" else (512, torch.float32)
    a = torch.ones(size, size, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(4):
        begun = time.perf_counter()
        float((a @ a)[0, 0])  # waits for the device
        best = min(best, time.perf_counter() - begun)
    return best / (2 * size**3)
