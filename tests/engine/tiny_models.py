"""Tiny random checkpoints on disk, with real tokenizers, processors and chat templates; tens of thousands of parameters.

It knows nothing about mmextract: what it saves is what transformers saves.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    SiglipImageProcessor,
    SiglipVisionConfig,
)

HIDDEN_SIZE = 32
N_LAYERS = 4
MAX_TOKENS = 128

LLAVA_TEMPLATE = (
    "{% for message in messages %}"
    "{{ message['role'].upper() + ': ' }}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] + ' ' }}{% endfor %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
"""As LLaVA-1.5's: no BOS, which the tokenizer adds; the image first, then a line break."""

QWEN_VL_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}"
    "{{ '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""As Qwen2-VL's: parts in their order, no BOS at all."""

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""Of a text model: wants strings, and writes the BOS itself, as Llama 3's does."""


def make_tokenizer(
    *special_tokens: str, bos: bool, padding_side: str = "left", **named: str
) -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer; with `bos` it puts `<s>` before every text."""
    vocabulary = ["<pad>", "<s>", "</s>", *special_tokens, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(vocabulary)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", vocabulary.index("<s>"))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        padding_side=padding_side,
        additional_special_tokens=list(special_tokens),
        **({"bos_token": "<s>"} if bos else {}),
        **named,
    )


def text_settings(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """Return what the decoders of all families share: 4 layers, width 32, 2 key-value heads for 4 heads."""
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": HIDDEN_SIZE,
        "intermediate_size": 48,
        "num_hidden_layers": N_LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": MAX_TOKENS,
        "initializer_range": 0.2,  # wide enough for layers to matter
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }


def save_llava(
    folder: Path,
    *,
    padding_side: str = "left",
    siglip: bool = False,
    seed: int = 0,
    chat_template: str | None = LLAVA_TEMPLATE,
) -> Path:
    """Save a LLaVA-1.5: CLIP (or SigLIP) at 28 × 28 pixels → 4 image tokens, projector, Llama with a BOS."""
    tokenizer = make_tokenizer("<image>", bos=True, padding_side=padding_side)
    size: dict[str, Any] = {"image_size": 28, "patch_size": 14, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = (SiglipVisionConfig if siglip else CLIPVisionConfig)(hidden_size=16, intermediate_size=24, **size)
    strategy = "full" if siglip else "default"  # SigLIP has no class token to drop
    torch.manual_seed(seed)
    config = LlavaConfig(
        vision_config=vision,
        text_config=LlamaConfig(**text_settings(tokenizer)),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-2,
        vision_feature_select_strategy=strategy,
    )
    square = {"height": 28, "width": 28}
    image_processor = (
        SiglipImageProcessor(size=square)
        if siglip
        else CLIPImageProcessor(size={"shortest_edge": 28}, crop_size=square)
    )
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy=strategy,
        num_additional_image_tokens=0 if siglip else 1,
        chat_template=chat_template,
    ).save_pretrained(folder)
    return folder


def save_qwen2_vl(folder: Path, *, padding_side: str = "left", seed: int = 0) -> Path:
    """Save a Qwen2-VL: any image becomes 1 to 16 image tokens of 28 × 28 pixels; no BOS."""
    names = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
    tokenizer = make_tokenizer(*names, bos=False, padding_side=padding_side)
    ids = dict(zip(names, tokenizer.convert_tokens_to_ids(list(names)), strict=True))
    torch.manual_seed(seed)
    config = Qwen2VLConfig(
        vision_config={
            "depth": 2,
            "embed_dim": 16,
            "hidden_size": HIDDEN_SIZE,
            "num_heads": 2,
            "mlp_ratio": 2,
            "patch_size": 14,
        },
        text_config={
            **text_settings(tokenizer),
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    pixels = {"shortest_edge": 28 * 28, "longest_edge": 16 * 28 * 28}
    Qwen2VLForConditionalGeneration(config).save_pretrained(folder)
    Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=pixels),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(size=pixels),
        chat_template=QWEN_VL_TEMPLATE,
    ).save_pretrained(folder)
    return folder


def save_text_model(
    folder: Path,
    *,
    qwen: bool = False,
    padding_side: str = "left",
    seed: int = 0,
    chat_template: str | None = CHAT_TEMPLATE,
) -> Path:
    """Save a Llama, or a Qwen2, without vision; its tokenizer adds a BOS."""
    tokenizer = make_tokenizer("<|im_start|>", "<|im_end|>", bos=True, padding_side=padding_side)
    tokenizer.chat_template = chat_template
    torch.manual_seed(seed)
    settings = text_settings(tokenizer)
    model: Any = (
        Qwen2ForCausalLM(Qwen2Config(**settings)) if qwen else LlamaForCausalLM(LlamaConfig(**settings))
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_lora(folder: Path, model: Any, *, seed: int = 0, **settings: Any) -> Path:
    """Save a random LoRA for the attention of a transformers model that is thrown away afterwards."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, **settings)
    get_peft_model(model, config).save_pretrained(folder)
    return folder
