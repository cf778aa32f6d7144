"""From an example to what a model learns from: pixels, tokens, and which of them are the answer's.

An answer's tokens are found by the model's own chat template: what is written behind the generation prompt. This
module knows nothing about optimisers, batches' order or files.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from mmextract.engine import watermark
from mmextract.engine.finetune_rows import Example
from mmextract.engine.images import RejectedSample, decode
from mmextract.engine.models import Adapter
from mmextract.engine.rows import Row
from mmextract.engine.watermark import WatermarkSpec
from mmextract.kernels.reference import Uint8Array

IGNORED = -100
"""The label of a token that is not learnt, as in transformers."""

PER_TOKEN = frozenset({"input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"})
"""Inputs [1, T] that are padded with the text; all others belong to the image."""


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """One example as the model takes it."""

    inputs: dict[str, torch.Tensor]
    """What the processor returns for a batch of one, on the CPU; `input_ids` is int64 [1, T]."""
    labels: torch.Tensor
    """int64 [T]: the token where the assistant writes, else IGNORED."""

    @property
    def batch_key(self) -> Hashable:
        """Equal for examples that can share a forward pass, their texts padded."""
        others = sorted(
            (name, t.dtype, t.shape[1:]) for name, t in self.inputs.items() if name not in PER_TOKEN
        )
        return frozenset(self.inputs), tuple((name, str(dtype), shape) for name, dtype, shape in others)

    @property
    def n_answer_tokens(self) -> int:
        """Tokens that are learnt."""
        return int((self.labels != IGNORED).sum())

    @property
    def n_bytes(self) -> int:
        """Memory it takes."""
        return sum(t.nbytes for t in (*self.inputs.values(), self.labels))


class Preparer:
    """Makes examples ready, from any number of threads; see `__call__`."""

    def __init__(self, adapter: Adapter, spec: WatermarkSpec | None, max_length: int) -> None:
        self.adapter = adapter
        self.spec = spec
        self.max_length = max_length
        self._tokenize = lru_cache(maxsize=1 << 14)(lambda text: tuple(adapter.tokenize(text)))

    def __call__(self, example: Example) -> Prepared:
        """Decode, watermark and encode an example. Raises RejectedSample for one that cannot be had."""
        return self.encode(example.row, example.target, marked_pixels(example.row, self.spec))

    def encode(self, row: Row, answer: str, pixels: Uint8Array | None) -> Prepared:
        """Encode the conversation of a row with `answer` behind it. Raises RejectedSample."""
        answered = self.adapter.answered(row.sample.turns, answer)
        encoded = self.adapter.encode(answered.text, pixels)
        if encoded.n_tokens > self.max_length:
            raise RejectedSample(
                f"it has {encoded.n_tokens} tokens, and --max-length is {self.max_length}: answers are never cut"
            )
        inputs = self.adapter.collate([encoded])  # also makes the pixel_values that wait for the device
        assert pixels is None or inputs.keys() - PER_TOKEN, "the image is not among the inputs"
        ids = inputs["input_ids"][0]
        labels = torch.full_like(ids, IGNORED)
        for start, end in answered.spans:
            begin, stop = self._locate(answered.text, start, end, ids)
            labels[begin:stop] = ids[begin:stop]
        return Prepared(inputs=inputs, labels=labels)

    def _locate(self, text: str, start: int, end: int, ids: torch.Tensor) -> tuple[int, int]:
        """Return the tokens [begin, stop) of `ids` that the characters [start, end) of `text` became.

        They are those in which the tokens of the whole text differ from those of its beginning: at a border that a
        token crosses, the whole token is the answer's. The image's placeholder takes one token of the text and many
        of `ids`, so what stands behind it is counted from the end.
        """
        whole = self._tokenize(text)
        begin, stop = (_n_equal(self._tokenize(text[:at]), whole) for at in (start, end))
        expanded = ids.tolist()
        if begin >= _n_equal(whole, expanded):
            shift = len(expanded) - len(whole)
            begin, stop = begin + shift, stop + shift
            if expanded[begin:stop] == list(whole[begin - shift : stop - shift]):
                return begin, stop
        elif stop <= _n_equal(whole, expanded):
            return begin, stop
        raise ValueError(
            "the tokens of the answer cannot be told: the processor changes the text behind the image"
        )


def marked_pixels(row: Row, spec: WatermarkSpec | None) -> Uint8Array | None:
    """Return the row's image with its watermark, uint8 [H, W, 3], or None for text alone. Raises RejectedSample."""
    if row.sample.image is None:
        return None
    pixels = decode(row.sample.image).pixels
    if row.text is None:
        return pixels
    if spec is None:
        raise ValueError(f"row {row.id!r} carries a watermark, and nothing says how it looks")
    height, width = pixels.shape[:2]
    try:
        placement = watermark.place(spec, row.sample.id, width, height, row.texts_to_fit)
    except ValueError as error:
        raise RejectedSample(str(error)) from error
    return watermark.apply(pixels, spec, row.text, placement)


def micro_batches(prepared: Sequence[Prepared], size: int) -> list[list[Prepared]]:
    """Return the examples in groups of at most `size` that can share a forward pass, in order of first occurrence."""
    groups: dict[Hashable, list[Prepared]] = {}
    for item in prepared:
        groups.setdefault(item.batch_key, []).append(item)
    return [group[i : i + size] for group in groups.values() for i in range(0, len(group), size)]


def collate(prepared: Sequence[Prepared], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Join examples of one `batch_key` along dimension 0, with `labels` [B, T] beside the inputs.

    Shorter texts are padded on the right and masked, so that every token keeps its position; of texts of one length
    none is. Raises ValueError for examples that cannot share a forward pass.
    """
    if len({item.batch_key for item in prepared}) != 1:
        raise ValueError(f"a forward pass needs examples of one batch_key, got {len(prepared)} of several")
    length = max(len(item.labels) for item in prepared)
    fills = {"input_ids": pad_token_id}
    batch = {
        name: torch.cat(
            [_pad(item.inputs[name], length, fills.get(name, 0)) for item in prepared]
            if name in PER_TOKEN
            else [item.inputs[name] for item in prepared]
        )
        for name in prepared[0].inputs
    }
    batch["labels"] = torch.cat([_pad(item.labels[None], length, IGNORED) for item in prepared])
    return batch


def answer_loss(model: Any, batch: dict[str, torch.Tensor], device: torch.device) -> tuple[torch.Tensor, int]:
    """Return the cross-entropy summed over the answers' tokens, and how many they are.

    batch: from `collate`, on the CPU. Only the positions that predict an answer's token go through the LM head.
    """
    losses, _ = token_losses(model, batch, device)
    return losses.sum(), int((batch["labels"][:, 1:] != IGNORED).sum())


def token_losses(
    model: Any, batch: dict[str, torch.Tensor], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return [B, n] −log p of the answers' tokens, 0 elsewhere, and bool [B, n], where an answer's token stands."""
    wanted = batch["labels"][:, 1:]
    columns = (wanted != IGNORED).any(0).nonzero()[:, 0]
    wanted = wanted[:, columns]
    inputs = {name: _to(tensor, model, device) for name, tensor in batch.items() if name != "labels"}
    keeps: dict[str, Any] = {"logits_to_keep": columns.to(device)} if takes_logits_to_keep(model) else {}
    logits = model(**inputs, use_cache=False, **keeps).logits
    logits = (logits if keeps else logits[:, columns]).float()
    losses = nn.functional.cross_entropy(
        logits.flatten(0, 1), wanted.to(device).flatten(), ignore_index=IGNORED, reduction="none"
    )
    return losses.view(wanted.shape), wanted != IGNORED


def takes_logits_to_keep(model: Any) -> bool:
    """Tell whether the model can be asked for some positions' logits only."""
    return _takes(type(model).forward)


@lru_cache(maxsize=64)
def _takes(forward: Callable[..., Any]) -> bool:
    return "logits_to_keep" in inspect.signature(forward).parameters


def _to(tensor: torch.Tensor, model: Any, device: torch.device) -> torch.Tensor:
    return tensor.to(device, model.dtype if tensor.is_floating_point() else None, non_blocking=True)


def _pad(tensor: torch.Tensor, length: int, fill: int) -> torch.Tensor:
    return nn.functional.pad(tensor, (0, length - tensor.shape[1]), value=fill)


def _n_equal(first: Sequence[int], second: Sequence[int]) -> int:
    """Return how many tokens two sequences begin with in common."""
    n = 0
    for a, b in zip(first, second, strict=False):
        if a != b:
            break
        n += 1
    return n
