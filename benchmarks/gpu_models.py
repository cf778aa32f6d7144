"""Qwen2-VL-7B and LLaVA-1.5-7B as they are, but for their weights, which are random, and their few words.

Made on the device, never on a disk. It knows nothing about what is measured.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

from gpu_images import Kind
from gpu_setup import Bench
from mmextract.engine.checkpoints import Weights
from mmextract.engine.loading import Loaded
from mmextract.engine.models import Adapter, ModelSpec
from random_models import llava_processor, qwen2vl_processor

hf: Any = transformers

SMALL_DECODER = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def llava(bench: Bench, kind: Kind) -> Adapter:
    """LLaVA-1.5-7B: CLIP-L at 336 pixels, 576 image tokens, 32 blocks of 4096."""
    processor = llava_processor(kind.processor, patch_size=6 if bench.smoke else 14)
    vision = {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": kind.side,
        "patch_size": processor.patch_size,
        "projection_dim": 768,
    }
    text = {
        "vocab_size": 32064,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 4096,
    }
    if bench.smoke:
        sizes = {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
        }
        vision, text = vision | sizes, SMALL_DECODER
    config = hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**vision),
        text_config=hf.LlamaConfig(**text),
        image_token_index=processor.tokenizer.convert_tokens_to_ids("<image>"),
    )
    return _adapter(bench, hf.LlavaForConditionalGeneration, config, processor)


def qwen2vl(bench: Bench, kind: Kind) -> Adapter:
    """Qwen2-VL-7B: 32 vision blocks of 1280, 28 blocks of 3584, images at their own resolution."""
    processor, ids = qwen2vl_processor(kind.processor.size)
    vision = {
        "depth": 32,
        "embed_dim": 1280,
        "hidden_size": 3584,
        "num_heads": 16,
        "mlp_ratio": 4,
        "patch_size": 14,
    }
    text = {
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
    }
    sections = [16, 24, 24]
    if bench.smoke:
        vision |= {"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2}
        text, sections = SMALL_DECODER, [2, 3, 3]
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": sections}
    config = hf.Qwen2VLConfig(vision_config=vision, text_config=text | {"rope_parameters": rope}, **ids)
    return _adapter(bench, hf.Qwen2VLForConditionalGeneration, config, processor)


def _adapter(bench: Bench, model_class: Any, config: Any, processor: Any) -> Adapter:
    torch.manual_seed(bench.seed)
    dtype = torch.float32 if bench.smoke else torch.bfloat16
    with bench.device:
        model = model_class._from_config(config, dtype=dtype, attn_implementation="sdpa")
    return Adapter(
        Loaded(
            spec=ModelSpec(
                model="random", dtype="float32" if bench.smoke else "bfloat16", preprocess="kernels"
            ),
            name="random",
            commit=None,
            model=model.to(bench.device).eval().requires_grad_(False),
            tokenizer=processor.tokenizer,
            processor=processor,
            weights=Weights(folder=Path(), files=()),
        )
    )
