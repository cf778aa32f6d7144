"""Random models of two published shapes, small enough for a laptop, with processors of the real resolutions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

from mmextract.engine.builtin.architecture import CHAT_TEMPLATE, make_tokenizer

hf: Any = transformers  # its annotations are wrong in too many places for mypy

QWEN_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def _decoder(tokenizer: Any) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": 256,
        "intermediate_size": 688,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": 4096,
    }


def save_llava(folder: Path) -> Path:
    """LLaVA-1.5: CLIP at 336 pixels and patches of 14 (576 image tokens), but 4 layers of width 128."""
    images = hf.CLIPImageProcessor(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})
    processor = llava_processor(images)
    tokenizer = processor.tokenizer
    torch.manual_seed(0)
    vision = hf.CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=336,
        patch_size=14,
    )
    config = hf.LlavaConfig(
        vision_config=vision,
        text_config=hf.LlamaConfig(**_decoder(tokenizer)),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    hf.LlavaForConditionalGeneration(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def llava_processor(image_processor: Any, patch_size: int = 14) -> Any:
    """Return LLaVA's processor around one for images, with a tokenizer of single letters."""
    return hf.LlavaProcessor(
        image_processor=image_processor,
        tokenizer=make_tokenizer(["USER: ", " ASSISTANT:"]),
        patch_size=patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def save_qwen2vl(folder: Path, max_image_tokens: int = 576) -> Path:
    """Qwen2-VL: images at their own resolution, patches of 14, four to a token, but 4 vision layers of width 128."""
    processor, ids = qwen2vl_processor(
        {"shortest_edge": 4 * 28 * 28, "longest_edge": max_image_tokens * 28 * 28}
    )
    torch.manual_seed(0)
    config = hf.Qwen2VLConfig(
        vision_config={"depth": 4, "embed_dim": 128, "hidden_size": 256, "num_heads": 4, "patch_size": 14},
        text_config={
            **_decoder(processor.tokenizer),
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 6, 6]},
        },
        **ids,
    )
    hf.Qwen2VLForConditionalGeneration(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def qwen2vl_processor(size: Any) -> tuple[Any, dict[str, int]]:
    """Return Qwen2-VL's processor for images of this size, with a tokenizer of single letters, and its config's ids."""
    # without the built-in tokenizer's own image token, which the processor would look for
    words = make_tokenizer([]).backend_tokenizer
    tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>")
    names = {
        "<|im_start|>": None,
        "<|im_end|>": None,
        "<|vision_start|>": "vision_start_token_id",
        "<|vision_end|>": "vision_end_token_id",
        "<|image_pad|>": "image_token_id",
        "<|video_pad|>": "video_token_id",
    }
    tokenizer.add_special_tokens({"additional_special_tokens": list(names)})
    processor = hf.Qwen2VLProcessor(
        image_processor=hf.Qwen2VLImageProcessor(size=size),
        tokenizer=tokenizer,
        video_processor=hf.Qwen2VLVideoProcessor(size=size),
        chat_template=QWEN_TEMPLATE,
    )
    return processor, {key: tokenizer.convert_tokens_to_ids(name) for name, key in names.items() if key}
