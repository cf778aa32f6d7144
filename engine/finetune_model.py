"""Which weights a fine-tune trains: a LoRA on the decoder's linear layers, or the weights themselves.

This module knows nothing about data, steps or files.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from mmextract.engine.finetune_spec import FinetuneSpec
from mmextract.engine.loading import choose_device
from mmextract.engine.models import Adapter, load
from mmextract.engine.parts import decoder_blocks, find_projectors, part_of


@dataclass(frozen=True, kw_only=True)
class Trainee:
    """A model that is ready to be trained, with nothing else trainable than what the spec asks for."""

    adapter: Adapter
    """Whose `model` is trained in place."""
    peft_model: Any | None
    """peft's model around it, None with `full`."""
    autocast: bool
    """Whether it computes in bfloat16."""

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """What is trained, by name, in the model's order."""
        return {name: p for name, p in self.adapter.model.named_parameters() if p.requires_grad}


def make_trainee(spec: FinetuneSpec) -> Trainee:
    """Load the base and make its trained weights, in float32. Raises ValueError or LookupError as `models.load` does.

    A LoRA is random by torch's generator, which the caller seeds.
    """
    adapter = _load_base(spec)
    autocast = spec.precision == "bfloat16" or (spec.precision == "auto" and adapter.dtype == torch.bfloat16)
    model = adapter.model
    peft_model = None
    if spec.full:
        model.requires_grad_(True)
        for name, parameter in model.named_parameters():
            if part_of(model, name) == "vision" and not spec.vision:
                parameter.requires_grad_(False)
    else:
        peft_model = _add_lora(model, spec)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if spec.gradient_checkpointing:
        # transformers 5.23 gave it another name, and warns of the old one
        enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
        enable({"use_reentrant": False})
    return Trainee(adapter=adapter, peft_model=peft_model, autocast=autocast)


def _load_base(spec: FinetuneSpec) -> Adapter:
    model = spec.model
    if choose_device(model.device).type != "cpu":
        # examples are prepared in threads and kept on the host, so no kernels of the device may be a part of it
        model = replace(model, preprocess="processor")
    if spec.full or spec.precision == "float32":
        return load(replace(model, dtype="float32"))
    adapter = load(model)
    if adapter.dtype != torch.float16:
        return adapter
    # float16 has too little range for gradients, and under autocast it would be mixed with bfloat16
    del adapter
    return load(replace(model, dtype="bfloat16"))


def _add_lora(model: Any, spec: FinetuneSpec) -> Any:
    from peft import LoraConfig, get_peft_model

    projectors = find_projectors(model) if spec.projector_learning_rate is not None else []
    if spec.projector_learning_rate is not None and not projectors:
        raise ValueError(
            f"{type(model).__name__} has no projector to train: leave out the projector's learning rate"
        )
    config = LoraConfig(
        r=spec.rank,
        lora_alpha=spec.alpha,
        lora_dropout=spec.dropout,
        target_modules=find_targets(model, spec.targets, vision=spec.vision),
        modules_to_save=projectors or None,
        bias="none",
    )
    with warnings.catch_warnings():  # peft asks transformers for it by its old name
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        return get_peft_model(model, config)


def find_targets(model: Any, targets: Sequence[str], *, vision: bool) -> str:
    """Return peft's regular expression for the linear layers that get a LoRA.

    targets: last parts of their names; none means every linear layer. Those of the decoder blocks count, and with
    `vision` those of the vision tower. Raises ValueError, naming what there is, if none is left.
    """
    blocks = decoder_blocks(model)
    linear = [name for name, module in model.named_modules() if is_linear(module)]
    inside = [name for name in linear if name.startswith(f"{blocks}.")]
    if vision:
        inside += [name for name in linear if part_of(model, name) == "vision"]
    chosen = [name for name in inside if not targets or _ends_with_one(name, targets)]
    if not chosen:
        there = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in inside})) or "none"
        wanted = f"called {', '.join(targets)} " if targets else ""
        raise ValueError(
            f"{type(model).__name__} has no trainable target modules: no linear layer {wanted}in {blocks} "
            f"(there are: {there}). Give other --targets, or train all weights (--full)"
        )
    return "|".join(_patterns(chosen))


def is_linear(module: nn.Module) -> bool:
    """Tell whether peft can put a LoRA on a module: torch's linear layer, or GPT-2's transposed one."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, nn.Linear | Conv1D)


def _ends_with_one(name: str, targets: Sequence[str]) -> bool:
    return any(name == target or name.endswith(f".{target}") for target in targets)


def _patterns(names: Iterable[str]) -> list[str]:
    """Return regular expressions that match just `names`, those that differ in a number alone in one."""
    return list(dict.fromkeys(re.sub(r"(?<=\\\.)\d+(?=\\\.)", r"\\d+", re.escape(name)) for name in names))


def parameter_groups(trainee: Trainee, spec: FinetuneSpec) -> list[dict[str, Any]]:
    """Return AdamW's groups: the projector at its own rate, and no decay for what is no matrix, as transformers has it.

    `peak` is the group's learning rate at the top of the schedule.
    """
    model = trainee.adapter.model
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in trainee.parameters.items():
        own = spec.projector_learning_rate if part_of(model, name) == "projector" else None
        peak = spec.learning_rate if own is None else own
        decay = spec.weight_decay if parameter.ndim > 1 else 0.0
        groups.setdefault((peak, decay), []).append(parameter)
    return [
        {"params": parameters, "lr": peak, "peak": peak, "weight_decay": decay}
        for (peak, decay), parameters in groups.items()
    ]
