"""Files of a checkpoint: found here or in the hub's cache, never pickle, and named when they are wrong."""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from mmextract.engine.models import ModelSpec, load
from tests.engine import tiny_models
from tests.engine.tiny_adapters import edit_json, on_cpu


def test_a_checkpoint_in_several_files_loads_whole(tiny_folders: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_folders["llama"], tmp_path / "model"))
    (folder / "model.safetensors").unlink()
    model = transformers.LlamaForCausalLM.from_pretrained(tiny_folders["llama"])
    model.save_pretrained(folder, max_shard_size="60KB")
    adapter = on_cpu(folder)
    assert len(adapter.describe()["weights"]["files"]) > 1
    for (name, ours), theirs in zip(
        adapter.model.state_dict().items(), model.state_dict().values(), strict=True
    ):
        assert torch.equal(ours, theirs), name


def test_a_folder_is_never_looked_up_on_the_network(
    tiny_folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lora = tiny_models.save_lora(
        tmp_path, transformers.LlavaForConditionalGeneration.from_pretrained(tiny_folders["llava"])
    )

    def refuse(*args: Any) -> None:
        raise AssertionError(f"connected to {args[1:]}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    for name in ("llava", "qwen2-vl", "llama"):
        on_cpu(tiny_folders[name], adapter=str(lora) if name == "llava" else None).describe()


def test_a_hub_id_is_read_from_the_cache_by_commit(
    tiny_folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--someone--tiny"
    shutil.copytree(tiny_folders["llama"], repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    described = load(ModelSpec(model="someone/tiny", device="cpu")).describe()
    assert (described["name"], described["commit"]) == ("someone/tiny", commit)
    with pytest.raises(LookupError, match="'someone/else' is no folder here, and the hub does not give it"):
        load(ModelSpec(model="someone/else", device="cpu"))


def test_a_folder_that_is_not_there_is_not_looked_for_elsewhere(tmp_path: Path) -> None:
    for name in (str(tmp_path / "nowhere"), "./nowhere", "a/b/c", "~/nowhere-at-all"):
        with pytest.raises(LookupError, match="no model folder at"):
            load(ModelSpec(model=name))
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file; expected the folder"):
        load(ModelSpec(model=str(tmp_path / "file")))


def test_a_revision_of_a_folder_is_refused(tiny_folders: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match="drop --revision"):
        on_cpu(tiny_folders["llama"], revision="main")


def test_a_folder_without_weights_is_told_which_file_was_expected(tiny_copy: Callable[[str], Path]) -> None:
    folder = tiny_copy("llava")
    (folder / "model.safetensors").unlink()
    with pytest.raises(LookupError, match=r"holds no weights: expected model\.safetensors"):
        on_cpu(folder)


def test_weights_that_are_only_pickle_are_never_read(
    tiny_copy: Callable[[str], Path], tmp_path: Path
) -> None:
    folder, canary = tiny_copy("llama"), tmp_path / "canary"
    (folder / "model.safetensors").unlink()
    torch.save({"weight": Canary(canary)}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"only as pickle \(pytorch_model\.bin\).*save_pretrained"):
        on_cpu(folder)
    assert not canary.exists()
    torch.load(folder / "pytorch_model.bin", weights_only=False)
    assert canary.exists()  # so it would have shown


class Canary:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_a_missing_shard_is_named(tiny_copy: Callable[[str], Path]) -> None:
    folder = tiny_copy("llama")
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(LookupError, match=r"model-00001-of-00002\.safetensors is missing"):
        on_cpu(folder)


@pytest.mark.parametrize(
    ("index", "reason"),
    [
        ('{"weight_map": {"a": "../model.safetensors"}}', "points outside its folder"),
        ('{"weight_map": ', "is not a safetensors index"),
        ("[]", "is not a safetensors index"),
    ],
)
def test_a_bad_index_is_refused(index: str, reason: str, tiny_copy: Callable[[str], Path]) -> None:
    folder = tiny_copy("llama")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ValueError, match=reason):
        on_cpu(folder)


@pytest.mark.parametrize("n_bytes", [0, 5, 1000, -1])
def test_a_truncated_weight_file_is_named(n_bytes: int, tiny_copy: Callable[[str], Path]) -> None:
    path = tiny_copy("llama") / "model.safetensors"
    path.write_bytes(path.read_bytes()[:n_bytes])
    with pytest.raises(ValueError, match=r"model\.safetensors is not a whole safetensors file"):
        on_cpu(path.parent)


def test_two_gguf_files_are_not_chosen_from(tiny_folders: dict[str, Path], tmp_path: Path) -> None:
    tiny_models.save_gguf(tmp_path, tiny_folders["llama"], "a.gguf")
    shutil.copy(tmp_path / "a.gguf", tmp_path / "b.gguf")
    with pytest.raises(ValueError, match=r"2 GGUF files \(a\.gguf, b\.gguf\)"):
        on_cpu(tmp_path)


@pytest.fixture
def lora(tiny_folders: dict[str, Path], tmp_path: Path) -> Path:
    return tiny_models.save_lora(
        tmp_path / "lora", transformers.LlamaForCausalLM.from_pretrained(tiny_folders["llama"])
    )


def test_an_adapter_that_is_no_lora_is_refused(tiny_folders: dict[str, Path], lora: Path) -> None:
    edit_json(lora / "adapter_config.json", peft_type="PROMPT_TUNING")
    with pytest.raises(ValueError, match="PROMPT_TUNING adapter; only LoRA"):
        on_cpu(tiny_folders["llama"], adapter=str(lora))


def test_a_lora_without_its_files_is_told_which(
    tiny_folders: dict[str, Path], lora: Path, tmp_path: Path
) -> None:
    (lora / "adapter_model.safetensors").rename(lora / "adapter_model.bin")
    with pytest.raises(
        LookupError, match=r"no adapter_model\.safetensors \(only adapter_model\.bin, which is pickle"
    ):
        on_cpu(tiny_folders["llama"], adapter=str(lora))
    (lora / "adapter_config.json").unlink()
    with pytest.raises(LookupError, match=r"holds no adapter_config\.json"):
        on_cpu(tiny_folders["llama"], adapter=str(lora))
    with pytest.raises(LookupError, match="no model folder at"):
        on_cpu(tiny_folders["llama"], adapter=str(tmp_path / "nowhere"))


def test_a_lora_as_the_model_is_told_where_it_belongs(lora: Path) -> None:
    with pytest.raises(ValueError, match="is a LoRA: pass it as --adapter"):
        on_cpu(lora)


def test_a_lora_beside_whole_weights_is_refused(tiny_copy: Callable[[str], Path], lora: Path) -> None:
    folder = tiny_copy("llama")
    shutil.copy(lora / "adapter_config.json", folder)
    with pytest.raises(ValueError, match="holds a whole model and a LoRA"):
        on_cpu(folder)
