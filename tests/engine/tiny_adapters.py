"""What several test modules do with the tiny models: load them, ask them, look at a state."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mmextract.engine.capture import Capture
from mmextract.engine.models import Adapter, Encoded, ModelSpec, load
from mmextract.engine.samples import Turn
from mmextract.engine.selection import EMBED, parse_positions
from tests.engine import tiny_models

FAMILIES: dict[str, Callable[[Path, str], Path]] = {
    "llava": lambda folder, side: tiny_models.save_llava(folder, padding_side=side),
    "llava-siglip": lambda folder, side: tiny_models.save_llava(folder, padding_side=side, siglip=True),
    "qwen2-vl": lambda folder, side: tiny_models.save_qwen2_vl(folder, padding_side=side),
    "llama": lambda folder, side: tiny_models.save_text_model(folder, padding_side=side),
    "qwen2": lambda folder, side: tiny_models.save_text_model(folder, padding_side=side, qwen=True),
}
"""Name → how to save one of it, given a folder and the tokenizer's padding side."""

EVERY_LAYER = (EMBED, *range(tiny_models.N_LAYERS))


def on_cpu(folder: Path, **settings: Any) -> Adapter:
    """Load a checkpoint, also where there is a GPU."""
    return load(ModelSpec(model=str(folder), device="cpu", **settings))


def image(seed: int = 0, height: int = 40, width: int = 90) -> NDArray[np.uint8]:
    """Return noise, uint8 [H, W, 3]."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def user(text: str) -> list[Turn]:
    """Return a conversation of one turn."""
    return [Turn(role="user", text=text)]


def encode(adapter: Adapter, question: str, pixels: NDArray[np.uint8] | None) -> Encoded:
    """Ask a question, after an image if there is one."""
    return adapter.encode(
        adapter.render(user(question if pixels is None else f"See: <image>\n{question}")), pixels
    )


def encode_any(adapter: Adapter, seed: int = 0, question: str = "What is it?") -> Encoded:
    """Ask a question, after noise if the model takes images."""
    return encode(adapter, question, image(seed) if adapter.has_vision else None)


def captured(
    adapter: Adapter,
    batch: Sequence[Encoded],
    layers: Sequence[int] = EVERY_LAYER,
    positions: Sequence[str] = ("all",),
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Return [B, L, P, D] as `Capture` fills it, NaN where it does not."""
    n_positions = batch[0].n_tokens if list(positions) == ["all"] else len(positions)
    out = torch.full((len(batch), len(layers), n_positions, adapter.hidden_size), torch.nan, dtype=dtype)
    with Capture(adapter, layers, parse_positions(positions)) as capture:
        capture.run(batch, out=out)
    return out


def reference_states(adapter: Adapter, encoded: Encoded) -> torch.Tensor:
    """Return [1 + n_layers, T, D]: transformers' hidden states, but the last block's before the final norm.

    The last block's comes from a hook of this function's own.
    """
    last: list[torch.Tensor] = []

    def keep(block: Any, args: Any, output: Any) -> None:
        last.append(output[0] if isinstance(output, tuple) else output)

    handle = adapter.model.get_decoder().layers[-1].register_forward_hook(keep)
    with torch.no_grad():
        states = adapter.model(**encoded.inputs, output_hidden_states=True).hidden_states
    handle.remove()
    assert len(states) == tiny_models.N_LAYERS + 1
    return torch.stack([*states[:-1], last[0]])[:, 0]


def edit_json(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file; None removes one."""
    content = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in (content | changes).items() if v is not None}))
