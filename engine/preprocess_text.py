"""Token ids of a prompt with an image in it, without calling the whole processor.

The processor itself says how many placeholder tokens an image takes. The prompt, with its one placeholder, goes
through the tokenizer once, and the placeholder's id is repeated; a placeholder is a token that tokenizers cut out of
the text before anything else, so what stands around it is the same however often it is repeated. Whatever is not of
this simple form is left to the processor. This module knows nothing about pixels, and `preprocess_choice` compares
what it makes with the processor's.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from mmextract.engine.preprocess import ImagePlan, NoPlanError, Size


class Expander:
    """Makes the text inputs of one model. May be used by many threads at once.

    Raises NoPlanError, with the reason, for a processor whose way with placeholders is not the common one.
    """

    def __init__(self, processor: Any, plan: ImagePlan) -> None:
        from transformers import ProcessorMixin

        kind = type(processor)
        for name in ("replace_image_token", "create_mm_token_type_ids"):
            if not hasattr(kind, name):
                raise NoPlanError(f"{kind.__name__} does not tell how it expands an image token")
        for name in ("__call__", "_process_images", "get_text_with_replacements", "create_mm_token_type_ids"):
            if getattr(kind, name, None) is not getattr(ProcessorMixin, name, None):
                raise NoPlanError(f"{kind.__name__} has a {name} of its own")
        self._processor = processor
        self._tokenizer = processor.tokenizer
        self._token: str = getattr(processor, "image_token", None) or ""
        added = self._tokenizer.get_added_vocab()
        if not self._tokenizer.is_fast or self._token not in added:
            raise NoPlanError(f"the tokenizer of {kind.__name__} does not hold {self._token!r} as one token")
        self._token_id: int = added[self._token]
        self._patches = plan.patches
        self._with_types = bool(getattr(processor, "return_mm_token_type_ids", False))

    def takes(self, text: str) -> bool:
        """Say whether a text has exactly one placeholder; any other is the processor's to expand or to refuse."""
        return text.count(self._token) == 1

    def expand(self, text: str, output: Size, add_special_tokens: bool) -> dict[str, torch.Tensor] | None:
        """Return the text inputs, int64 [1, T] each, for an image that becomes `output` pixels; and its grid.

        text: one that `takes` says yes to. None if its placeholder is not expanded by repeating its token.
        """
        shown = self._image_inputs(output)
        expansion = self._processor.replace_image_token(shown, image_idx=0)
        n_tokens, rest = divmod(len(expansion), len(self._token))
        if rest or not n_tokens or expansion != self._token * n_tokens:
            return None
        found = self._tokenizer(text, padding=False, truncation=False, add_special_tokens=add_special_tokens)
        ids = found["input_ids"]
        if ids.count(self._token_id) != 1:
            return None
        at = ids.index(self._token_id)
        inputs = {
            name: torch.tensor([[*values[:at], *[values[at]] * n_tokens, *values[at + 1 :]]])
            for name, values in found.items()
        }
        if self._with_types:
            inputs["mm_token_type_ids"] = self._types(inputs["input_ids"])
        if self._patches is not None:
            inputs["image_grid_thw"] = shown["image_grid_thw"]
        return inputs

    def _image_inputs(self, output: Size) -> dict[str, Any]:
        """Return what the processor looks at to tell how many tokens an image takes, less the pixels."""
        height, width = output
        if self._patches is None:
            return {"pixel_values": np.broadcast_to(np.float32(0), (1, 3, height, width))}
        size = self._patches.patch
        return {"image_grid_thw": torch.tensor([[1, height // size, width // size]])}

    def _types(self, ids: torch.Tensor) -> torch.Tensor:
        """Return 1 at image tokens, 2 at video, 3 at audio, 0 elsewhere."""
        types = torch.zeros_like(ids)
        for number, modality in enumerate(("image", "video", "audio"), 1):
            for token_id in getattr(self._processor, f"{modality}_token_ids"):
                if token_id is not None:
                    types[ids == token_id] = number
        return types
