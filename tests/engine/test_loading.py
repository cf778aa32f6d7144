"""Models as transformers and peft load them, or an error that names the tensor, file or option."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from mmextract.engine.loading import choose_device
from mmextract.engine.models import Adapter, ModelSpec, load
from tests.engine import tiny_models
from tests.engine.tiny_adapters import captured, edit_json, encode_any, image, on_cpu, user


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_dtype_is_the_checkpoints_unless_asked_for(
    dtype: str, tiny_folders: dict[str, Path], tmp_path: Path
) -> None:
    wanted = getattr(torch, dtype)
    transformers.LlamaForCausalLM.from_pretrained(tiny_folders["llama"], dtype=wanted).save_pretrained(
        tmp_path
    )
    transformers.AutoTokenizer.from_pretrained(tiny_folders["llama"]).save_pretrained(tmp_path)
    assert on_cpu(tmp_path).dtype == wanted
    assert on_cpu(tmp_path, dtype="float32").dtype == torch.float32
    assert on_cpu(tiny_folders["llama"], dtype=dtype).dtype == wanted


def test_the_attention_can_be_chosen(tiny_folders: dict[str, Path]) -> None:
    assert on_cpu(tiny_folders["llava"], attn_implementation="eager").describe()["attention"] == "eager"


def test_an_attention_that_is_not_installed_is_an_error(tiny_folders: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match=r"cannot be loaded as asked: .*[Ff]lash"):
        on_cpu(tiny_folders["llama"], attn_implementation="flash_attention_2")


def test_a_device_map_places_the_model(tiny_folders: dict[str, Path]) -> None:
    adapter = load(ModelSpec(model=str(tiny_folders["llava"]), device_map="auto"))
    assert adapter.device == choose_device("auto")
    states = captured(adapter, [encode_any(adapter)])
    assert states.isfinite().all()


def test_a_broken_configuration_is_named(tiny_copy: Callable[[str], Path]) -> None:
    folder = tiny_copy("llama")
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"cannot be loaded: .*config\.json"):
        on_cpu(folder)


def test_a_lora_may_bring_its_own_embedding(tiny_folders: dict[str, Path], tmp_path: Path) -> None:
    from peft import PeftModel

    base = transformers.LlamaForCausalLM
    folder = tiny_folders["llama"]
    tiny_models.save_lora(tmp_path, base.from_pretrained(folder), modules_to_save=["embed_tokens"])
    adapter = on_cpu(folder, adapter=str(tmp_path))
    encoded = encode_any(adapter)
    theirs = PeftModel.from_pretrained(base.from_pretrained(folder), tmp_path)
    with torch.no_grad():
        expected = theirs(**encoded.inputs, output_hidden_states=True).hidden_states
    assert torch.equal(captured(adapter, [encoded])[0, :-1], torch.stack(expected[:-1])[:, 0])


def test_gguf_gives_the_very_weights_and_tokens(
    tiny_adapters: dict[str, Adapter], tiny_folders: dict[str, Path], tmp_path: Path
) -> None:
    adapter, original = on_cpu(tiny_models.save_gguf(tmp_path, tiny_folders["llama"])), tiny_adapters["llama"]
    encoded = adapter.encode(adapter.render(user("What?")), None)
    expected = original.encode(original.render(user("What?")), None)
    assert torch.equal(encoded.inputs["input_ids"], expected.inputs["input_ids"])
    assert torch.equal(captured(adapter, [encoded]), captured(original, [expected]))
    assert adapter.describe()["weights"]["files"] == ["tiny.gguf"]


def test_tied_weights_may_be_stored_once(tiny_folders: dict[str, Path], tmp_path: Path) -> None:
    config = transformers.AutoConfig.from_pretrained(tiny_folders["llama"])
    config.tie_word_embeddings = True
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    transformers.AutoTokenizer.from_pretrained(tiny_folders["llama"]).save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    on_cpu(tmp_path)


def test_missing_weights_are_an_error_not_random_numbers(tiny_copy: Callable[[str], Path]) -> None:
    path = tiny_copy("llava") / "model.safetensors"
    tensors = load_file(path)
    gone = [name for name in tensors if "layers.2.self_attn.q_proj" in name and "vision" not in name]
    assert len(gone) == 1
    save_file({k: v for k, v in tensors.items() if k not in gone}, path, {"format": "pt"})
    with pytest.raises(ValueError, match=r"1 tensors are missing \(.*layers\.2\.self_attn\.q_proj\.weight\)"):
        on_cpu(path.parent)


def test_weights_without_a_place_are_an_error(tiny_copy: Callable[[str], Path]) -> None:
    folder = tiny_copy("llama")
    edit_json(folder / "config.json", num_hidden_layers=3)
    with pytest.raises(ValueError, match=r"9 tensors have no place in the model \(model\.layers\.3\."):
        on_cpu(folder)


def test_weights_of_another_shape_are_an_error(tiny_copy: Callable[[str], Path]) -> None:
    folder = tiny_copy("llama")
    edit_json(folder / "config.json", intermediate_size=40)
    with pytest.raises(ValueError, match=r"mlp\.\w+_proj\.weight has shape .*48.* expected .*40"):
        on_cpu(folder)


@pytest.mark.parametrize(
    ("family", "names", "reason"),
    [
        ("llava", ["config.json"], r"no config\.json"),
        ("llava", ["processor_config.json"], r"no image processor: expected processor_config\.json"),
        ("qwen2-vl", ["tokenizer.json"], r"no tokenizer: expected tokenizer\.json"),
        ("llama", ["tokenizer.json", "tokenizer_config.json"], r"no tokenizer: expected tokenizer\.json"),
    ],
)
def test_a_missing_file_is_named(
    family: str, names: Sequence[str], reason: str, tiny_copy: Callable[[str], Path]
) -> None:
    folder = tiny_copy(family)
    for name in names:
        (folder / name).unlink()
    with pytest.raises(LookupError, match=reason):
        on_cpu(folder)


def test_a_processor_that_cannot_count_image_tokens_is_refused(tiny_copy: Callable[[str], Path]) -> None:
    folder = tiny_copy("llava")
    edit_json(folder / "processor_config.json", patch_size=None)
    with pytest.raises(
        ValueError, match=r"set patch_size and vision_feature_select_strategy in processor_config"
    ):
        on_cpu(folder)


def test_without_torchvision_a_qwen_model_says_what_it_needs(tiny_folders: dict[str, Path]) -> None:
    code = f"""
        import sys
        sys.modules["torchvision"] = None
        from mmextract.engine.models import ModelSpec, load
        described = load(ModelSpec(model={str(tiny_folders["llava"])!r}, device="cpu")).describe()
        print(described["processor"]["image_backend"])
        try:
            load(ModelSpec(model={str(tiny_folders["qwen2-vl"])!r}, device="cpu"))
        except ValueError as error:
            print(error)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True
    )
    backend, error = done.stdout.splitlines()
    assert backend == "pil"
    assert error.endswith("needs torchvision: pip install torchvision")


def test_code_that_comes_with_a_model_is_not_run_unless_asked(
    tiny_copy: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, canary = tiny_copy("llama"), tmp_path / "canary"
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    edit_json(
        folder / "config.json",
        model_type="homemade",
        auto_map={"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"},
    )
    code = f"""
        from pathlib import Path
        from transformers import LlamaConfig, LlamaForCausalLM
        Path({str(canary)!r}).touch()
        class OwnConfig(LlamaConfig):
            model_type = "homemade"
        class OwnModel(LlamaForCausalLM):
            config_class = OwnConfig
    """
    (folder / "own.py").write_text(textwrap.dedent(code))
    with pytest.raises(ValueError, match="pass --trust-remote-code if you trust them"):
        on_cpu(folder)
    assert not canary.exists()
    adapter = on_cpu(folder, trust_remote_code=True)
    assert canary.exists()
    assert adapter.describe()["class"] == "OwnModel"


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"model": ""}, "empty string"),
        ({"dtype": "int8"}, "dtype must be one of auto, float32"),
        ({"device": "gpu"}, "device must be auto, cpu, cuda"),
        ({"device": "cpu", "device_map": "auto"}, "either a device or a device map"),
    ],
)
def test_a_wrong_specification_is_refused(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        ModelSpec(**{"model": "somewhere", **settings})


def test_a_gpu_that_is_not_there_is_refused(tiny_folders: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match=r"there is no cuda:99 here: torch sees \d+ CUDA devices"):
        load(ModelSpec(model=str(tiny_folders["llama"]), device="cuda:99"))


@pytest.mark.parametrize("family", ["llava", "qwen2-vl", "llama"])
def test_states_with_a_lora_equal_those_of_peft(
    family: str, tiny_folders: dict[str, Path], tmp_path: Path
) -> None:
    from peft import PeftModel

    base = (
        transformers.AutoModelForCausalLM if family == "llama" else transformers.AutoModelForImageTextToText
    )
    tiny_models.save_lora(tmp_path, base.from_pretrained(tiny_folders[family]), lora_dropout=0.5)
    adapter = on_cpu(tiny_folders[family], adapter=str(tmp_path))
    pixels = image() if adapter.has_vision else None
    encoded = adapter.encode(
        adapter.render(user("<image>\nWhat?" if adapter.has_vision else "What?")), pixels
    )
    theirs = PeftModel.from_pretrained(base.from_pretrained(tiny_folders[family]), tmp_path)
    with torch.no_grad():
        expected = theirs(**encoded.inputs, output_hidden_states=True).hidden_states
        plain = base.from_pretrained(tiny_folders[family])(
            **encoded.inputs, output_hidden_states=True
        ).hidden_states
    ours = captured(adapter, [encoded])[0, :-1]  # the last block's is not in transformers' output
    assert torch.equal(ours, torch.stack(expected[:-1])[:, 0])
    assert not torch.allclose(ours, torch.stack(plain[:-1])[:, 0], rtol=1e-2)
    assert str(tmp_path.parent) not in json.dumps(adapter.describe())
    described = adapter.describe()["adapter"]
    assert described["config"]["r"] == 4
    assert described["xxh3_128"] != adapter.describe()["weights"]["xxh3_128"]


@pytest.fixture
def lora(tiny_folders: dict[str, Path], tmp_path: Path) -> Path:
    return tiny_models.save_lora(
        tmp_path / "lora", transformers.LlamaForCausalLM.from_pretrained(tiny_folders["llama"])
    )


def test_a_lora_of_another_base_is_refused_with_its_keys(
    tiny_folders: dict[str, Path], lora: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"does not fit|another model"):
        on_cpu(tiny_folders["llava"], adapter=str(lora))
    tensors = load_file(lora / "adapter_model.safetensors")
    name = "base_model.model.model.layers.3.self_attn.q_proj.lora_A.weight"
    kept = {key: tensor for key, tensor in tensors.items() if key != name}
    save_file(kept, lora / "adapter_model.safetensors")
    with pytest.raises(
        ValueError, match=r"1 of its tensors are missing and 0 have no place .*layers\.3.*q_proj"
    ):
        on_cpu(tiny_folders["llama"], adapter=str(lora))
    deeper = {**tensors, name.replace("layers.3", "layers.7"): tensors[name].clone()}
    save_file(deeper, lora / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"0 of its tensors are missing and 1 have no place .*layers\.7"):
        on_cpu(tiny_folders["llama"], adapter=str(lora))
    save_file({**tensors, name: tensors[name][:, :16].clone()}, lora / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"does not fit this model: (?s:.*)layers\.3\.self_attn\.q_proj"):
        on_cpu(tiny_folders["llama"], adapter=str(lora))


def test_a_lora_for_modules_that_are_not_there_is_refused(tiny_folders: dict[str, Path], lora: Path) -> None:
    edit_json(lora / "adapter_config.json", target_modules=["qkv_proj"])
    with pytest.raises(ValueError, match=r"does not fit this model: (?s:.*)qkv_proj"):
        on_cpu(tiny_folders["llama"], adapter=str(lora))
