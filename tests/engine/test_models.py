"""Inputs equal to what transformers gives when called directly, batches, structure, and what is recorded."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from PIL import Image

from mmextract.engine.images import RejectedSample
from mmextract.engine.loading import load_model
from mmextract.engine.models import Adapter, Encoded, find_decoder_layers
from mmextract.engine.samples import Turn
from tests.engine import tiny_models
from tests.engine.tiny_adapters import FAMILIES, edit_json, image, on_cpu, user


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_inputs_equal_those_of_apply_chat_template(
    family: str, side: str, tiny_folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_folders[family], tmp_path / "model"))
    edit_json(folder / "tokenizer_config.json", padding_side=side)
    adapter, pixels = on_cpu(folder), image()
    turns = [Turn(role="system", text="Be brief."), Turn(role="user", text="Hello!")]
    turns += [Turn(role="assistant", text="Yes?"), Turn(role="user", text="What?")]
    messages: list[dict[str, Any]] = [{"role": turn.role, "content": turn.text} for turn in turns]
    if adapter.has_vision:
        turns[-1] = Turn(role="user", text="See: <image>\nWhat?")
        for message in messages[:-1]:
            message["content"] = [{"type": "text", "text": message["content"]}]
        parts = [{"type": "image", "image": Image.fromarray(pixels)}, {"type": "text", "text": "What?"}]
        messages[-1]["content"] = [{"type": "text", "text": "See: "}, *parts]
        owner = hf.AutoProcessor.from_pretrained(folder)
        assert owner.tokenizer.padding_side == side
    else:
        owner = hf.AutoTokenizer.from_pretrained(folder)
        assert owner.padding_side == side
    expected = owner.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    encoded = adapter.encode(adapter.render(turns), pixels if adapter.has_vision else None)
    assert encoded.inputs.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(encoded.inputs[name], tensor), name
    assert encoded.n_tokens == expected["input_ids"].shape[1]
    n_bos = int((encoded.inputs["input_ids"] == 1).sum())
    assert n_bos == (0 if family == "qwen2-vl" else 1)


def test_a_tokenizer_adds_nothing_to_what_its_template_wrote(tmp_path: Path) -> None:
    template = tiny_models.CHAT_TEMPLATE.removeprefix("{{ bos_token }}")
    folder = tiny_models.save_text_model(tmp_path, chat_template=template)
    adapter = on_cpu(folder)
    expected = hf.AutoTokenizer.from_pretrained(folder).apply_chat_template(
        [{"role": "user", "content": "What?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    ids = adapter.encode(adapter.render(user("What?")), None).inputs["input_ids"]
    assert torch.equal(ids, expected["input_ids"])
    assert not (ids == 1).any()


def test_a_template_that_writes_bos_gets_no_second_one(tmp_path: Path) -> None:
    template = "{{ bos_token }}" + tiny_models.LLAVA_TEMPLATE
    adapter = on_cpu(tiny_models.save_llava(tmp_path, chat_template=template))
    text = adapter.render(user("<image>\nWhat?"))
    assert text.startswith("<s>USER")
    assert (adapter.encode(text, image()).inputs["input_ids"] == 1).sum() == 1


@pytest.mark.parametrize(("family", "n_image_tokens"), [("llava", 4), ("llava-siglip", 4), ("qwen2-vl", 3)])
def test_the_image_mask_marks_the_image_tokens(
    family: str, n_image_tokens: int, tiny_adapters: dict[str, Adapter]
) -> None:
    adapter = tiny_adapters[family]
    encoded = adapter.encode(adapter.render(user("<image>\nWhat?")), image(height=28, width=84))
    assert encoded.image_mask.dtype == torch.bool
    assert encoded.image_mask.shape == (encoded.n_tokens,)
    assert encoded.image_mask.sum() == n_image_tokens
    assert encoded.image_mask.nonzero().ravel().diff().eq(1).all()


@pytest.mark.parametrize("family", ["llava", "llava-siglip", "qwen2-vl"])
@pytest.mark.parametrize("shape", [(3, 50), (50, 3), (1, 1), (3, 3)])
def test_an_image_with_three_rows_is_not_taken_for_three_channels(
    family: str, shape: tuple[int, int], tiny_adapters: dict[str, Adapter], tiny_folders: dict[str, Path]
) -> None:
    adapter, pixels = tiny_adapters[family], image(0, *shape)
    encoded = adapter.encode(adapter.render(user("<image>\nWhat?")), pixels)
    expected = hf.AutoProcessor.from_pretrained(tiny_folders[family]).image_processor(
        Image.fromarray(pixels), return_tensors="pt"
    )
    assert torch.equal(encoded.inputs["pixel_values"], expected["pixel_values"])


@pytest.mark.parametrize("family", ["llava", "qwen2-vl"])
def test_an_image_and_its_place_must_come_together(family: str, tiny_adapters: dict[str, Adapter]) -> None:
    adapter = tiny_adapters[family]
    with pytest.raises(RejectedSample, match=r"image"):
        adapter.encode(adapter.render(user("What?")), image())
    with pytest.raises(RejectedSample, match="no images were passed"):
        adapter.encode(adapter.render(user("<image>\nWhat?")), None)


def test_an_image_is_rejected_by_a_model_that_takes_none(tiny_adapters: dict[str, Adapter]) -> None:
    with pytest.raises(RejectedSample, match="this model takes none"):
        tiny_adapters["llama"].encode("What?", image())


def test_an_image_that_the_processor_refuses_is_rejected_with_its_reason(
    tiny_adapters: dict[str, Adapter],
) -> None:
    adapter = tiny_adapters["qwen2-vl"]
    with pytest.raises(RejectedSample, match="aspect ratio must be smaller than 200"):
        adapter.encode(adapter.render(user("<image>\nWhat?")), image(0, 2, 500))


@pytest.mark.parametrize("family", ["llava", "llama"])
def test_a_prompt_longer_than_the_model_takes_is_rejected_with_both_numbers(
    family: str, tiny_adapters: dict[str, Adapter]
) -> None:
    adapter, limit = tiny_adapters[family], tiny_models.MAX_TOKENS
    pixels = image() if adapter.has_vision else None
    slot = "<image>\n" if adapter.has_vision else ""

    def encode(n_letters: int) -> Encoded:
        return adapter.encode(adapter.render(user(slot + "x" * n_letters)), pixels)

    fitting = limit - encode(1).n_tokens + 1
    assert encode(fitting).n_tokens == limit
    with pytest.raises(RejectedSample, match=f"has {limit + 1} tokens, and the model takes at most {limit}"):
        encode(fitting + 1)


def test_an_empty_prompt_is_rejected(tmp_path: Path) -> None:
    adapter = on_cpu(tiny_models.save_qwen2_vl(tmp_path))
    with pytest.raises(RejectedSample, match="has no tokens"):
        adapter.encode("", None)


@pytest.mark.parametrize("family", ["llava", "llama"])
def test_many_threads_may_encode_at_once(family: str, tiny_copy: Callable[[str], Path]) -> None:
    # a tokenizer saved with truncation and padding has them switched off, which two threads cannot do at once
    folder = tiny_copy(family)
    truncation = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
    padding: dict[str, Any] = {"strategy": {"Fixed": 200}, "direction": "Left", "pad_to_multiple_of": None}
    padding |= {"pad_id": 0, "pad_type_id": 0, "pad_token": "<pad>"}
    edit_json(folder / "tokenizer.json", truncation=truncation, padding=padding)
    adapter = on_cpu(folder)
    settings = load_model(adapter.spec).tokenizer.backend_tokenizer
    assert (settings.truncation, settings.padding) == (None, None)
    pixels = image() if adapter.has_vision else None
    slot = "<image>\n" if adapter.has_vision else ""
    texts = [f"{slot}{'why ' * (n % 7)}{n}?" for n in range(80)]

    def encode(text: str) -> Encoded:
        return adapter.encode(adapter.render(user(text)), pixels)

    with ThreadPoolExecutor(8) as executor:
        together = list(executor.map(encode, texts))
    for text, encoded in zip(texts, together, strict=True):
        alone = encode(text)
        assert encoded.n_tokens > 8
        assert encoded.inputs.keys() == alone.inputs.keys()
        for name, tensor in alone.inputs.items():
            assert torch.equal(encoded.inputs[name], tensor)


def test_a_batch_joins_its_samples_in_order(tiny_adapters: dict[str, Adapter]) -> None:
    for family in ("llava", "qwen2-vl"):
        adapter = tiny_adapters[family]
        text = adapter.render(user("<image>\nWhat?"))
        batch = [adapter.encode(text, image(seed)) for seed in range(3)]
        inputs = adapter.collate(batch)
        assert inputs.keys() == batch[0].inputs.keys()
        for name, tensor in inputs.items():
            for part, encoded in zip(tensor.chunk(3), batch, strict=True):
                assert torch.equal(part, encoded.inputs[name])


def test_only_samples_that_fit_together_share_a_batch_key(tiny_adapters: dict[str, Adapter]) -> None:
    llava, qwen = tiny_adapters["llava"], tiny_adapters["qwen2-vl"]
    one = llava.encode(llava.render(user("<image>\nWhat?")), image())
    longer = llava.encode(llava.render(user("<image>\nWhat is it?")), image())
    assert one.batch_key != longer.batch_key
    plain = llava.encode("USER: " + "x" * (one.n_tokens - 7), None)
    assert plain.n_tokens == one.n_tokens
    assert plain.batch_key != one.batch_key
    with pytest.raises(ValueError, match="samples of one batch_key"):
        llava.collate([one, plain])
    with pytest.raises(ValueError, match="got 0"):
        llava.collate([])
    few = qwen.encode(qwen.render(user("<image>\nWhat is it?")), image(0, 28, 56))
    many = qwen.encode(qwen.render(user("<image>\nWhat is")), image(0, 56, 84))
    assert few.n_tokens == many.n_tokens
    assert few.inputs["pixel_values"].shape != many.inputs["pixel_values"].shape
    assert few.batch_key == many.batch_key


def test_decoder_blocks_are_found_by_structure() -> None:
    small: dict[str, Any] = {
        "vocab_size": 32,
        "hidden_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
    }
    configs = [
        hf.GPT2Config(vocab_size=32, n_embd=16, n_layer=3, n_head=2),
        hf.OPTConfig(**small, ffn_dim=16, word_embed_proj_dim=16),
        hf.GPTNeoXConfig(**small, intermediate_size=16),
        hf.BloomConfig(vocab_size=32, hidden_size=16, n_layer=3, n_head=2),
        hf.FalconConfig(**small),
        hf.Gemma2Config(**small, intermediate_size=16, num_key_value_heads=1, head_dim=8),
        hf.MixtralConfig(
            **small, intermediate_size=16, num_key_value_heads=1, num_local_experts=3, num_experts_per_tok=1
        ),
    ]
    for config in configs:
        model = hf.AutoModelForCausalLM.from_config(config).eval()
        layers = find_decoder_layers(model)
        names = {id(module): name for name, module in model.named_modules()}
        assert [names[id(layer)].rsplit(".", 1)[1] for layer in layers] == ["0", "1", "2"]
        with torch.no_grad():
            states = model(input_ids=torch.tensor([[1, 2, 3]]), output_hidden_states=True).hidden_states
            outputs: list[torch.Tensor] = []
            for layer in layers:
                layer.register_forward_hook(partial(keep, outputs))
            model(input_ids=torch.tensor([[1, 2, 3]]))
        assert all(torch.equal(a, b) for a, b in zip(outputs[:-1], states[1:-1], strict=True))


def keep(into: list[torch.Tensor], module: torch.nn.Module, args: Any, output: Any) -> None:
    into.append(output[0] if isinstance(output, tuple) else output)


def test_a_model_whose_blocks_cannot_be_told_is_refused() -> None:
    small: dict[str, Any] = {
        "vocab_size": 32,
        "d_model": 16,
        "num_layers": 3,
        "num_heads": 2,
        "d_ff": 16,
        "d_kv": 8,
    }
    model = hf.T5ForConditionalGeneration(hf.T5Config(**small))
    model.config.num_hidden_layers = 5
    with pytest.raises(
        LookupError, match=r"cannot tell the decoder blocks of T5.*one list of 5 modules.*\(3\)"
    ):
        find_decoder_layers(model)


def test_the_description_is_json_and_names_what_decides_the_numbers(
    tiny_adapters: dict[str, Adapter],
) -> None:
    described = json.loads(json.dumps(tiny_adapters["qwen2-vl"].describe()))
    assert described["class"] == "Qwen2VLForConditionalGeneration"
    assert described["processor"]["class"] == "Qwen2VLProcessor"
    assert described["processor"]["image_backend"] == "torchvision"
    assert described["tokenizer"]["padding_side"] == "left"
    assert described["prompt"]["chat_template"] == tiny_models.QWEN_VL_TEMPLATE
    assert described["config"]["text_config"]["num_hidden_layers"] == tiny_models.N_LAYERS
    assert described["versions"]["transformers"] == hf.__version__
    assert described["dtype"] == "float32"


def test_the_description_does_not_depend_on_where_the_model_lies(
    tiny_adapters: dict[str, Adapter], tiny_folders: dict[str, Path], tiny_copy: Callable[[str], Path]
) -> None:
    for family in ("llava", "llama"):
        described = tiny_adapters[family].describe()
        assert on_cpu(tiny_copy(family)).describe() == described
        assert str(tiny_folders[family].parent) not in json.dumps(described)


def test_the_description_changes_with_every_file_that_matters(
    tiny_adapters: dict[str, Adapter], tiny_copy: Callable[[str], Path]
) -> None:
    before = tiny_adapters["llava"].describe()
    folder = tiny_copy("llava")
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["normalizer"] = {"type": "Lowercase"}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "chat_template.jinja").write_text(tiny_models.LLAVA_TEMPLATE + " ")
    after = on_cpu(folder).describe()
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"weights", "tokenizer", "prompt"}
