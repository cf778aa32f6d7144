"""Tiny random checkpoints on disk (some 60,000 parameters) with real tokenizers, processors and templates.

It knows nothing about mmextract: what it saves is what transformers saves.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers as hf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

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


def make_tokenizer(*special_tokens: str, bos: bool, padding_side: str = "left", **named: str) -> Any:
    """Return a byte-level tokenizer; with `bos` it puts `<s>` before every text."""
    vocabulary = ["<pad>", "<s>", "</s>", *special_tokens, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(vocabulary)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", vocabulary.index("<s>"))]
        )
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        padding_side=padding_side,
        additional_special_tokens=list(special_tokens),
        **({"bos_token": "<s>"} if bos else {}),
        **named,
    )


def text_settings(tokenizer: Any) -> dict[str, Any]:
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
    image_processor: Any = None,
    pad_to_square: bool = False,
) -> Path:
    """Save a LLaVA-1.5: CLIP (or SigLIP) at 28 × 28 pixels → 4 image tokens, projector, Llama with a BOS.

    pad_to_square: as the original LLaVA does before the resize. image_processor: another one than these.
    """
    tokenizer = make_tokenizer("<image>", bos=True, padding_side=padding_side)
    size: dict[str, Any] = {
        "image_size": 28,
        "patch_size": 14,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    vision = (hf.SiglipVisionConfig if siglip else hf.CLIPVisionConfig)(
        hidden_size=16, intermediate_size=24, **size
    )
    strategy = "full" if siglip else "default"  # SigLIP has no class token to drop
    torch.manual_seed(seed)
    config = hf.LlavaConfig(
        vision_config=vision,
        text_config=hf.LlamaConfig(**text_settings(tokenizer)),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-2,
        vision_feature_select_strategy=strategy,
    )
    square = {"height": 28, "width": 28}
    if image_processor is None and siglip:
        image_processor = hf.SiglipImageProcessor(size=square)
    elif image_processor is None:
        kind: Any = hf.LlavaImageProcessor if pad_to_square else hf.CLIPImageProcessor
        more = {"do_pad": True} if pad_to_square else {}
        image_processor = kind(size={"shortest_edge": 28}, crop_size=square, **more)
    hf.LlavaForConditionalGeneration(config).save_pretrained(folder)
    hf.LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy=strategy,
        num_additional_image_tokens=0 if siglip else 1,
        chat_template=chat_template,
    ).save_pretrained(folder)
    return folder


def save_qwen2_vl(
    folder: Path, *, padding_side: str = "left", seed: int = 0, most_image_tokens: int = 16
) -> Path:
    """Save a Qwen2-VL: any image becomes 1 to 16 image tokens of 28 × 28 pixels; no BOS."""
    names = (
        "<|im_start|>",
        "<|im_end|>",
        "<|vision_start|>",
        "<|vision_end|>",
        "<|image_pad|>",
        "<|video_pad|>",
    )
    tokenizer = make_tokenizer(*names, bos=False, padding_side=padding_side)
    ids = dict(zip(names, tokenizer.convert_tokens_to_ids(list(names)), strict=True))
    torch.manual_seed(seed)
    config = hf.Qwen2VLConfig(
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
    pixels = {"shortest_edge": 28 * 28, "longest_edge": most_image_tokens * 28 * 28}
    hf.Qwen2VLForConditionalGeneration(config).save_pretrained(folder)
    hf.Qwen2VLProcessor(
        image_processor=hf.Qwen2VLImageProcessor(size=pixels),
        tokenizer=tokenizer,
        video_processor=hf.Qwen2VLVideoProcessor(size=pixels),
        chat_template=QWEN_VL_TEMPLATE,
    ).save_pretrained(folder)
    return folder


def save_text_model(
    folder: Path,
    *,
    qwen: bool = False,
    padding_side: str = "left",
    seed: int = 0,
    chat_template: str | dict[str, str] | None = CHAT_TEMPLATE,
) -> Path:
    """Save a Llama, or a Qwen2, without vision; its tokenizer adds a BOS."""
    tokenizer = make_tokenizer("<|im_start|>", "<|im_end|>", bos=True, padding_side=padding_side)
    tokenizer.chat_template = chat_template
    torch.manual_seed(seed)
    settings = text_settings(tokenizer)
    model: Any = (
        hf.Qwen2ForCausalLM(hf.Qwen2Config(**settings))
        if qwen
        else hf.LlamaForCausalLM(hf.LlamaConfig(**settings))
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_lora(folder: Path, model: Any, *, seed: int = 0, **settings: Any) -> Path:
    """Save a random LoRA for the attention of a transformers model that is thrown away afterwards."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, **settings)
    get_peft_model(model, config).save_pretrained(str(folder))
    return folder


def save_gguf(folder: Path, source: Path, name: str = "tiny.gguf") -> Path:
    """Save the Llama that `save_text_model` put into `source` as one GGUF file."""
    from gguf import GGUFWriter

    model = hf.LlamaForCausalLM.from_pretrained(source)
    config = model.config
    folder.mkdir(exist_ok=True)
    writer = GGUFWriter(folder / name, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    vocabulary = hf.PreTrainedTokenizerFast.from_pretrained(source).get_vocab()
    tokens = sorted(vocabulary, key=lambda token: vocabulary[token])
    tokens[-1] = "ab"  # the format wants at least one merge
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if number < 5 else 1 for number in range(len(tokens))])  # 3: control, 1: normal
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(config.bos_token_id)
    writer.add_eos_token_id(config.eos_token_id)
    writer.add_chat_template(CHAT_TEMPLATE)
    for key, tensor in model.state_dict().items():
        n_heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        array = _gguf_rope_order(tensor, n_heads.get(key.split(".")[-2], 0))
        writer.add_tensor(_gguf_name(key), array.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder


GGUF_NAMES = {
    "embed_tokens": "token_embd",
    "norm": "output_norm",
    "lm_head": "output",
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def _gguf_name(key: str) -> str:
    parts = key.removeprefix("model.").removesuffix(".weight").split(".")
    return ".".join([*(["blk", parts[1]] if parts[0] == "layers" else []), GGUF_NAMES[parts[-1]], "weight"])


def _gguf_rope_order(weight: torch.Tensor, n_heads: int) -> torch.Tensor:
    """Interleave each head's halves: llama.cpp rotates neighbours where transformers rotates halves."""
    if not n_heads:
        return weight
    return weight.view(n_heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)
