"""Which part of a model a parameter or a layer belongs to: decoder, head, projector or vision.

Told by structure: what is in the decoder is the decoder's, the output embedding is the head, and what is left reads
images; of that, the projector goes by the names that transformers gives it. This module knows nothing about training.
"""

from __future__ import annotations

from typing import Any, Literal

from torch import nn

from mmextract.engine.models import find_decoder_layers

Part = Literal["decoder", "head", "projector", "vision"]

PROJECTOR_NAMES = frozenset(
    {"multi_modal_projector", "mm_projector", "projector", "connector", "aligner", "merger"}
)
"""What transformers calls the module between vision tower and decoder, in one family or another."""


def part_of(model: Any, name: str) -> Part:
    """Return the part that the parameter or module `name` of a transformers model belongs to."""
    if _is_inside(name, name_of(model, model.get_decoder())):
        return "decoder"
    head = model.get_output_embeddings()
    if head is not None and _is_inside(name, name_of(model, head)):
        return "head"
    return "projector" if PROJECTOR_NAMES & set(name.split(".")) else "vision"


def name_of(model: nn.Module, wanted: nn.Module) -> str:
    """Return the name of a module of `model`. Raises LookupError if it is none of it."""
    names: dict[int, str] = {id(module): name for name, module in model.named_modules()}
    if id(wanted) in names:
        return names[id(wanted)]
    raise LookupError(f"{type(wanted).__name__} is no module of {type(model).__name__}")


def decoder_blocks(model: Any) -> str:
    """Return the name of the list of decoder blocks."""
    blocks: nn.Module = find_decoder_layers(model)
    return name_of(model, blocks)


def find_projectors(model: nn.Module) -> list[str]:
    """Return the names of the outermost modules that are a projector."""
    names = [name for name, _ in model.named_modules() if name.rsplit(".", 1)[-1] in PROJECTOR_NAMES]
    return [name for name in names if not PROJECTOR_NAMES & set(name.split(".")[:-1])]


def _is_inside(name: str, module: str) -> bool:
    return name == module or name.startswith(f"{module}.")
