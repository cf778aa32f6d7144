"""Hidden states of chosen layers and tokens, taken by hooks while the model runs, pooled at once.

`layer i` is what decoder block i gives to the next, before any final norm; the embedding is what block 0 is
given. So it equals transformers' `hidden_states[i + 1]` but for the last block, where transformers returns
the normed state. This module knows nothing about prompts, files, host buffers or stores.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from mmextract.engine.models import Adapter, Encoded
from mmextract.engine.pooling import every_token, make_spans
from mmextract.engine.preprocess_device import Packed
from mmextract.engine.selection import EMBED, Position
from mmextract.kernels.pool import pool


class Capture:
    """A context manager; inside, `run` fills a buffer with the states of a batch.

    layers: sorted, each once, as from `parse_layers`. positions: as from `parse_positions`; with `all` every
    token is kept. Hooks stand on the wanted blocks only, and are removed on leaving, whatever happens. At
    most one layer's full states are alive beyond what the model itself needs. One thread at a time.

        with Capture(adapter, layers=(0, 5), positions=parse_positions(["last", "image"])) as capture:
            capture.run(batch, out=torch.empty(len(batch), 2, 2, adapter.hidden_size))

    States of one sample alone are bit for bit those of `model(**inputs, output_hidden_states=True)`. In a
    batch they may differ in the last bits, as transformers' own do: a matrix product sums in another order
    for another number of rows (float32 on a CPU: up to 1.2e-6 of the largest state; tests hold 1e-5).

    with_kernel: pool by kernels/pool.py, on a GPU. What is one token (`last`, an index, `all`) is the same to the
    bit; a mean is summed token after token in float32, and may differ in its last bits from torch's.
    """

    def __init__(
        self,
        adapter: Adapter,
        layers: Sequence[int],
        positions: Sequence[Position],
        *,
        with_kernel: bool = False,
    ) -> None:
        valid = range(EMBED, adapter.n_layers)
        if not layers or list(layers) != sorted(set(layers)) or any(layer not in valid for layer in layers):
            raise ValueError(
                f"expected sorted, distinct layers out of {EMBED} (embed) to {adapter.n_layers - 1}, "
                f"got {layers}"
            )
        self._adapter = adapter
        self._layers = tuple(layers)
        self._positions = tuple(positions)
        self._every_token = [position.name for position in positions] == ["all"]
        self._with_kernel = with_kernel
        self._handles: list[RemovableHandle] = []
        self._batch: _Batch | _KernelBatch | None = None
        self.nonfinite: torch.Tensor = torch.empty(0, len(layers), dtype=torch.int32)
        """int32 [B, L] on the buffer's device: values of the last run that are not finite in it."""
        self.overflow: torch.Tensor = torch.empty(0, len(layers), dtype=torch.int32)
        """int32 [B, L]: those of them that were finite in the model, and are too large for the buffer."""

    def __enter__(self) -> Self:
        if self._handles:
            raise RuntimeError("this capture is already entered")
        try:
            for index, layer in enumerate(self._layers):
                self._handles.append(self._register(index, layer))
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._remove()

    def run(self, batch: Sequence[Encoded], *, out: torch.Tensor, packed: Packed | None = None) -> None:
        """Run the model as far as the last wanted layer and fill `out`.

        batch: samples of one `batch_key`. packed: from `Adapter.pack`, if it was called before. out: floating point
        [B, L, P, D], every element of which is written. With `all`, P is at least the number of tokens, and what
        lies beyond is NaN. Pooled means are summed in float32 or better before they are cast. Raises RejectedSample
        if a sample lacks a position (see `Position.check`), ValueError for a buffer of another shape, RuntimeError if
        the model does not run its blocks as expected.
        """
        if not self._handles:
            raise RuntimeError("use a capture inside its `with` block")
        inputs = self._adapter.collate(batch, packed)
        self._check_buffer(batch, out)
        make = _KernelBatch if self._with_kernel else _Batch
        self._batch = make(batch, self._positions, out)
        try:
            self._adapter.forward(inputs)
        except _EnoughError:
            pass
        finally:
            done, self._batch = self._batch, None
        if done.n_layers_seen != len(self._layers):
            model = type(self._adapter.model).__name__
            raise RuntimeError(f"{model} ran {done.n_layers_seen} of the {len(self._layers)} wanted layers")
        self.nonfinite, self.overflow = done.counts()

    def _check_buffer(self, batch: Sequence[Encoded], out: torch.Tensor) -> None:
        n_positions = max(out.shape[2], batch[0].n_tokens) if self._every_token and out.ndim == 4 else None
        expected = (
            len(batch),
            len(self._layers),
            n_positions or len(self._positions),
            self._adapter.hidden_size,
        )
        if tuple(out.shape) != expected or not out.is_floating_point():
            raise ValueError(
                f"expected a floating point buffer {expected}, got {out.dtype} {tuple(out.shape)}"
            )

    def _register(self, index: int, layer: int) -> RemovableHandle:
        is_last = index == len(self._layers) - 1

        def before_block(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._take(index, args[0] if args else kwargs["hidden_states"], is_last)

        def after_block(block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            # a tuple in transformers 4 and in some models' own code, a tensor in transformers 5
            self._take(index, output[0] if isinstance(output, tuple) else output, is_last)

        if layer == EMBED:
            return self._adapter.layers[0].register_forward_pre_hook(before_block, with_kwargs=True)
        return self._adapter.layers[layer].register_forward_hook(after_block)

    def _take(self, index: int, states: torch.Tensor, is_last: bool) -> None:
        batch = self._batch
        if batch is None:
            return  # somebody else runs the model while the hooks stand
        batch.take(index, states)
        if is_last:
            # a new one each time: a kept one would keep the states alive through its traceback
            raise _EnoughError

    def _remove(self) -> None:
        while self._handles:
            self._handles.pop().remove()


class _EnoughError(Exception):
    """Raised in the last wanted layer, to spare the rest of the forward pass."""


@dataclass(frozen=True)
class _Span:
    """Tokens to pool, for some or all samples of a batch."""

    position: int
    rows: torch.Tensor | slice
    """Which samples: int64 [b], or all."""
    tokens: torch.Tensor | slice
    """Their tokens: int64 [b, n], or, the same for all, int64 [n] or a slice of n."""
    n_tokens: int

    def pool(self, states: torch.Tensor) -> torch.Tensor:
        """Return [b, D]: the token itself if it is one, else the mean, in float32 or better."""
        tokens = self.tokens if isinstance(self.tokens, slice) else self.tokens.to(states.device)
        rows = self.rows if isinstance(self.rows, slice) else self.rows.to(states.device)[:, None]
        chosen = states[rows, tokens]  # [b, n, D]
        if self.n_tokens == 1:
            return chosen[:, 0]
        return chosen.mean(1, dtype=torch.promote_types(states.dtype, torch.float32))


class _Running:
    """What the hooks need to know of the batch that is running."""

    def __init__(self, batch: Sequence[Encoded], positions: Sequence[Position], out: torch.Tensor) -> None:
        self.n_tokens = batch[0].n_tokens
        self.every_token = [position.name for position in positions] == ["all"]
        self.out = out
        self.n_layers_seen = 0

    def begin(self, index: int, states: torch.Tensor) -> None:
        """Check that `states` are [B, T, D], and of the layer that is due."""
        expected = (self.out.shape[0], self.n_tokens, self.out.shape[3])
        if tuple(states.shape) != expected or index != self.n_layers_seen:
            raise RuntimeError(
                f"the {self.n_layers_seen}th wanted layer should give states {expected}; "
                f"the {index}th gave {tuple(states.shape)}"
            )
        self.n_layers_seen += 1


class _Batch(_Running):
    """Pools by torch's own operations, on any device."""

    def __init__(self, batch: Sequence[Encoded], positions: Sequence[Position], out: torch.Tensor) -> None:
        super().__init__(batch, positions, out)
        self.spans = [] if self.every_token else _make_spans(positions, batch, out.device)
        self.overflow = torch.zeros(out.shape[:2], dtype=torch.int32, device=out.device)

    def take(self, index: int, states: torch.Tensor) -> None:
        """Pool the states [B, T, D] of the index-th wanted layer into the buffer."""
        self.begin(index, states)
        if not self.spans:
            self._write(slice(None), index, slice(self.n_tokens), states)
        for span in self.spans:
            self._write(span.rows, index, span.position, span.pool(states))

    def counts(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return how many values are not finite, and how many were in the model, int32 [B, L]; complete the buffer."""
        kept = self.out
        if self.every_token:
            self.out[:, :, self.n_tokens :] = torch.nan
            kept = self.out[:, :, : self.n_tokens]
        return kept.isfinite().logical_not_().sum(dim=(2, 3), dtype=torch.int32), self.overflow

    def _write(
        self, rows: torch.Tensor | slice, layer: int, position: int | slice, values: torch.Tensor
    ) -> None:
        cast = values.to(self.out.device, self.out.dtype)
        self.out[rows, layer, position] = cast
        if torch.finfo(cast.dtype).max < torch.finfo(values.dtype).max:
            lost = cast.isinf() & values.to(cast.device).isfinite()
            self.overflow[rows, layer] += lost.flatten(1).sum(1, dtype=torch.int32)


class _KernelBatch(_Running):
    """Pools by one kernel a layer, which counts on the way."""

    def __init__(self, batch: Sequence[Encoded], positions: Sequence[Position], out: torch.Tensor) -> None:
        super().__init__(batch, positions, out)
        if self.every_token:
            self.spans = every_token(len(batch), self.n_tokens, out.shape[2], out.device)
        else:
            masks = [encoded.image_mask for encoded in batch]
            tokens = [[position.tokens(mask) for mask in masks] for position in positions]
            self.spans = make_spans(tokens, out.device)
        self.counted = torch.zeros(
            (out.shape[1], out.shape[0], 2), dtype=torch.int32, device=out.device
        )  # [L, B, 2]

    def take(self, index: int, states: torch.Tensor) -> None:
        """Pool the states [B, T, D] of the index-th wanted layer into the buffer."""
        self.begin(index, states)
        pool(states, self.spans, out=self.out[:, index].transpose(0, 1), counts=self.counted[index])

    def counts(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return how many values are not finite, and how many were in the model, int32 [B, L]."""
        return self.counted[..., 0].T, self.counted[..., 1].T


def _make_spans(positions: Sequence[Position], batch: Sequence[Encoded], device: torch.device) -> list[_Span]:
    """Turn positions into index tensors, once a batch; equally long spans are pooled together."""
    spans = []
    for number, position in enumerate(positions):
        tokens = [position.tokens(encoded.image_mask) for encoded in batch]
        for length in sorted({len(found) for found in tokens}):
            rows = [row for row, found in enumerate(tokens) if len(found) == length]
            spans.append(
                _make_span(number, rows, np.stack([tokens[row] for row in rows]), len(batch), device)
            )
    return spans


def _make_span(
    position: int,
    rows: list[int],
    tokens: np.ndarray[Any, np.dtype[np.int64]],
    n_rows: int,
    device: torch.device,
) -> _Span:
    first, length = tokens[0], tokens.shape[1]
    if len(rows) < n_rows or (tokens != first).any():
        every_row = torch.tensor(rows, device=device)
        return _Span(position, every_row, torch.from_numpy(tokens).to(device), length)
    if first[-1] - first[0] + 1 == length:
        return _Span(position, slice(None), slice(int(first[0]), int(first[-1]) + 1), length)
    return _Span(position, slice(None), torch.from_numpy(first).to(device), length)
