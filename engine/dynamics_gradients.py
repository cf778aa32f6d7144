"""Gradients as flat vectors, cut into the parts of the model that they belong to.

This module knows nothing about views, batches' nesting or statistics.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mmextract.engine.finetune_data import Prepared, answer_loss, collate, micro_batches
from mmextract.engine.models import Adapter
from mmextract.engine.parts import decoder_blocks, name_of, part_of

WEIGHTS, LORA_A, LORA_B = "weights", "A", "B"
_LORA = re.compile(r"\.lora_(A|B)\.")


@dataclass(frozen=True, order=True, kw_only=True)
class Unit:
    """The finest part of a gradient that is told apart."""

    group: str
    """`vision`, `projector`, `embedding`, `layer 0`, …, `final norm` or `head`."""
    matrix: str
    """`weights`, or which of a LoRA's two matrices: `A`, `B`."""


class GradientMeter:
    """Gradients of the answers' loss of one model, over the weights that training would change.

    full: of all weights; else of a LoRA's, of which there must be one. The model must be in evaluation mode: dropout
    would make two gradients of one batch differ. Its weights that are differentiated become float32. Raises
    ValueError if there is no LoRA to differentiate.
    """

    def __init__(self, adapter: Adapter, *, full: bool) -> None:
        self.adapter = adapter
        self._autocast = not full and adapter.dtype == torch.bfloat16
        model = adapter.model.requires_grad_(False)
        found = {name: unit for name, _ in model.named_parameters() if (unit := unit_of(model, name, full))}
        if not found:
            raise ValueError("the model has no LoRA: give an --adapter, or take all weights (--full)")
        order = {unit: rank for rank, unit in enumerate(sort_units(set(found.values())))}
        self.names = sorted(found, key=lambda name: order[found[name]])
        """Of the parameters, unit by unit."""
        parameters = dict(model.named_parameters())
        self._parameters = [parameters[name] for name in self.names]
        for parameter in self._parameters:
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
        sizes = dict.fromkeys(order, 0)
        for name in self.names:
            sizes[found[name]] += parameters[name].numel()
        self.units = tuple(sizes)
        """In the order of the vector."""
        self.sizes = tuple(sizes.values())
        """Elements of each."""

    @property
    def n_parameters(self) -> int:
        """P, the length of a gradient."""
        return sum(self.sizes)

    def gradient(self, batch: Sequence[Prepared]) -> torch.Tensor:
        """Return float32 [P] on the model's device: the gradient of −log p, summed over all answers' tokens."""
        total = torch.zeros(self.n_parameters, device=self.adapter.device)
        for part in micro_batches(batch, len(batch)):
            self._add_gradient(total, part)
        return total

    def _add_gradient(self, total: torch.Tensor, batch: Sequence[Prepared]) -> None:
        device = self.adapter.device
        inputs = collate(batch, self.adapter.tokenizer.pad_token_id or 0)
        autocast: Any = torch.autocast(device.type, torch.bfloat16) if self._autocast else nullcontext()
        with torch.enable_grad(), autocast:
            loss, _ = answer_loss(self.adapter.model, inputs, device)
        # a weight may take no part, such as a vision tower's last block where an earlier one's output is used
        gradients = torch.autograd.grad(loss, self._parameters, allow_unused=True)
        start = 0
        for parameter, gradient in zip(self._parameters, gradients, strict=True):
            if gradient is not None:
                total[start : start + parameter.numel()] += gradient.flatten().to(total.device)
            start += parameter.numel()

    def put(self, weights: Mapping[str, torch.Tensor], source: str) -> None:
        """Set weights by name, such as those of a checkpoint. Raises ValueError for names or shapes that do not fit."""
        own = dict(self.adapter.model.named_parameters())
        if wrong := sorted(n for n, w in weights.items() if n not in own or own[n].shape != w.shape):
            raise ValueError(
                f"{source} is a checkpoint of another model: {len(wrong)} of its {len(weights)} tensors have no place "
                f"in this one, such as {', '.join(wrong[:4])}"
            )
        with torch.no_grad():
            for name, weight in weights.items():
                own[name].copy_(weight)


def unit_of(model: nn.Module, name: str, full: bool) -> Unit | None:
    """Return which unit a parameter belongs to, or None if its gradient is not asked for."""
    lora = _LORA.search(name)
    if full:
        return None if lora else Unit(group=group_of(model, name), matrix=WEIGHTS)
    if lora:
        return Unit(group=group_of(model, name), matrix=lora[1])
    # a projector that was trained whole beside the LoRA
    return Unit(group=group_of(model, name), matrix=WEIGHTS) if ".modules_to_save." in name else None


def group_of(model: Any, name: str) -> str:
    """Return the group of a parameter of a transformers model."""
    part = part_of(model, name)
    if part != "decoder":
        return part
    blocks = decoder_blocks(model)
    if name.startswith(f"{blocks}."):
        return f"layer {name.removeprefix(f'{blocks}.').split('.')[0]}"
    embedding = name_of(model, model.get_input_embeddings())
    return "embedding" if name.startswith(f"{embedding}.") else "final norm"


def sort_units(units: set[Unit]) -> list[Unit]:
    """Return units in the order in which the data flows."""
    ends = {"vision": -3, "projector": -2, "embedding": -1, "final norm": 10**6, "head": 10**6 + 1}

    def place(unit: Unit) -> tuple[int, str]:
        return ends[unit.group] if unit.group in ends else int(unit.group.split()[1]), unit.matrix

    return sorted(units, key=place)
