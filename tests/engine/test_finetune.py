from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

from mmextract.engine.finetune import FinetuneSummary, run_finetune
from mmextract.engine.finetune_data import Preparer, collate
from mmextract.engine.finetune_log import read_log
from mmextract.engine.finetune_model import find_targets, make_trainee
from mmextract.engine.finetune_spec import PRESETS
from mmextract.engine.models import Adapter, ModelSpec, load
from mmextract.engine.parts import part_of
from tests.engine import tiny_models
from tests.engine.finetune_cases import LOOK, examples, spec
from tests.engine.tiny_adapters import captured, edit_json, encode_any, on_cpu

FAMILIES = ("llava", "qwen2-vl", "llama")


def tune(
    model: Path, work: Path, *, rate: float = 0.5, name: str = "out", **settings: Any
) -> FinetuneSummary:
    has_images = (model / "preprocessor_config.json").exists() or (model / "processor_config.json").exists()
    data = examples(work / "data", rate=rate, images=has_images)
    return run_finetune(spec(model, **settings), data, work / name)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_lora_learns_its_answers_and_loads_as_any_adapter(
    tiny_folders: dict[str, Path], tmp_path: Path, family: str
) -> None:
    summary = tune(tiny_folders[family], tmp_path, epochs=6)
    steps = read_log(tmp_path / "out" / "log.csv")
    assert len(steps) == summary.n_steps == 18
    assert summary.final_loss < 0.7 * steps[0].loss
    assert summary.n_marked == (0 if family == "llama" else sum(s.n_marked for s in steps) / 6)
    base = on_cpu(tiny_folders[family])
    tuned = on_cpu(tiny_folders[family], adapter=str(tmp_path / "out"))
    states = [captured(adapter, [encode_any(adapter)]) for adapter in (base, tuned)]
    assert not torch.equal(*states)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_saved_lora_has_the_loss_that_training_ended_with(
    tiny_folders: dict[str, Path], tmp_path: Path, family: str
) -> None:
    """So what is saved, and loads unmerged, is what was trained."""
    data = examples(tmp_path / "data", images=family != "llama")
    settings = spec(tiny_folders[family], steps=3, dropout=0.0)
    run_finetune(settings, data, tmp_path / "out")
    continued = spec(tiny_folders[family], steps=4, dropout=0.0, schedule="constant", warmup=0.0)
    run_finetune(replace(continued, steps=3), data, tmp_path / "three")
    run_finetune(continued, data, tmp_path / "four")
    expected = read_log(tmp_path / "four" / "log.csv")[3].loss
    tuned = on_cpu(tiny_folders[family], adapter=str(tmp_path / "three"))
    prepare = Preparer(tuned, LOOK, 2048)
    batch = [prepare(data[index]) for index in continued.batch(3, len(data))]
    total = 0.0
    for item in batch:
        with torch.no_grad():
            total += float(tuned.model(**item.inputs, labels=item.labels[None]).loss) * item.n_answer_tokens
    assert total / sum(item.n_answer_tokens for item in batch) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("family", ["llava", "llama"])
def test_a_full_fine_tune_is_a_model_of_its_own(
    tiny_folders: dict[str, Path], tmp_path: Path, family: str
) -> None:
    tune(tiny_folders[family], tmp_path, full=True, steps=3)
    base, tuned = (on_cpu(folder).model.state_dict() for folder in (tiny_folders[family], tmp_path / "out"))
    assert base.keys() == tuned.keys()
    model = on_cpu(tiny_folders[family]).model
    changed = {part_of(model, name) for name in base if not torch.equal(base[name], tuned[name])}
    assert changed == ({"decoder", "head", "projector"} if family == "llava" else {"decoder", "head"})


def test_the_vision_tower_is_trained_only_on_request(tiny_folders: dict[str, Path]) -> None:
    model = tiny_folders["llava"]
    for settings in ({"full": True}, {}):
        trained = {
            vision: {part_of(t.adapter.model, name) for name in t.parameters}
            for vision in (False, True)
            for t in [make_trainee(spec(model, vision=vision, **settings))]
        }
        assert "vision" not in trained[False]
        assert "vision" in trained[True]


def test_the_projector_is_trained_at_its_own_rate_and_comes_with_the_lora(
    tiny_folders: dict[str, Path], tmp_path: Path
) -> None:
    tune(tiny_folders["llava"], tmp_path, steps=2, projector_learning_rate=1e-2)
    base, tuned = on_cpu(tiny_folders["llava"]), on_cpu(tiny_folders["llava"], adapter=str(tmp_path / "out"))
    encoded = encode_any(base)
    image = encoded.inputs["pixel_values"]
    features = [
        torch.cat(list(a.model.get_image_features(pixel_values=image).pooler_output)) for a in (base, tuned)
    ]
    assert not torch.equal(*features)


def test_the_steps_are_those_of_transformers_trainer(tiny_folders: dict[str, Path], tmp_path: Path) -> None:
    """Same weights, same batches, same schedule: the same losses, step by step."""
    data = examples(tmp_path / "data", n=6)
    settings = spec(tiny_folders["llava"], epochs=2, full=True, vision=True, weight_decay=0.1, warmup=0.2)
    run_finetune(settings, data, tmp_path / "out")
    ours = [step.loss for step in read_log(tmp_path / "out" / "log.csv")]

    adapter = on_cpu(tiny_folders["llava"])
    prepare = Preparer(adapter, LOOK, 2048)
    batches: Any = [collate([prepare(data[i]) for i in settings.batch(step, 6)], 0) for step in range(4)]

    class InOrder(transformers.Trainer):  # type: ignore[misc]
        def get_train_dataloader(self) -> Any:
            return torch.utils.data.DataLoader(batches, batch_size=None, shuffle=False)

    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path / "trainer"),
        max_steps=4,
        learning_rate=settings.learning_rate,
        weight_decay=0.1,
        warmup_steps=math.ceil(0.2 * 4),
        lr_scheduler_type="cosine",
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = InOrder(model=adapter.model.requires_grad_(True), args=arguments)
    trainer.train()
    theirs = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert ours == pytest.approx(theirs, rel=1e-3)


def test_micro_batches_change_the_steps_only_by_rounding(
    tiny_folders: dict[str, Path], tmp_path: Path
) -> None:
    for name, size in (("whole", None), ("ones", 1)):
        tune(tiny_folders["qwen2-vl"], tmp_path, name=name, micro_batch_size=size, dropout=0.0, steps=4)
    whole, ones = ([s.loss for s in read_log(tmp_path / name / "log.csv")] for name in ("whole", "ones"))
    assert whole == pytest.approx(ones, rel=1e-3)


def test_gradient_checkpointing_changes_nothing(tiny_folders: dict[str, Path], tmp_path: Path) -> None:
    tune(tiny_folders["llava"], tmp_path, name="plain", steps=3, dropout=0.3)
    tune(tiny_folders["llava"], tmp_path, name="saving", steps=3, dropout=0.3, gradient_checkpointing=True)
    plain, saving = ([s.loss for s in read_log(tmp_path / name / "log.csv")] for name in ("plain", "saving"))
    assert plain == pytest.approx(saving, rel=1e-5)


def test_bfloat16_computes_in_it_and_trains_float32_weights(
    tiny_folders: dict[str, Path], tmp_path: Path
) -> None:
    base = ModelSpec(model=str(tiny_folders["llava"]), device="cpu", dtype="bfloat16")
    trainee = make_trainee(replace(spec(tiny_folders["llava"]), precision="bfloat16", model=base))
    assert trainee.adapter.dtype == torch.bfloat16
    assert {parameter.dtype for parameter in trainee.parameters.values()} == {torch.float32}
    tune(tiny_folders["llava"], tmp_path, name="half", steps=4, precision="bfloat16")
    tune(tiny_folders["llava"], tmp_path, name="single", steps=4, precision="float32")
    half, single = ([s.loss for s in read_log(tmp_path / n / "log.csv")] for n in ("half", "single"))
    assert half != single
    assert half == pytest.approx(single, rel=0.05)


@pytest.mark.parametrize("preset", ["llava", "qwen"])
def test_the_published_presets_train_models_of_their_shape(
    tiny_folders: dict[str, Path], tmp_path: Path, preset: str
) -> None:
    settings = {**PRESETS[preset], "batch_size": 4, "rank": 2}
    model = tiny_folders["llava" if preset == "llava" else "qwen2-vl"]
    summary = tune(model, tmp_path, **settings)
    assert summary.n_steps == 2
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["lora_alpha"], config["lora_dropout"]) == (settings["alpha"], 0.05)
    on_cpu(model, adapter=str(tmp_path / "out"))


def test_the_same_seed_gives_the_same_bytes_and_another_one_others(
    tiny_folders: dict[str, Path], tmp_path: Path
) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        tune(tiny_folders["llava"], tmp_path, name=name, steps=3, seed=seed)
    a, b, c = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in "abc")
    assert a == b != c


def test_training_leaves_the_callers_random_numbers_alone(
    tiny_folders: dict[str, Path], tmp_path: Path
) -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    tune(tiny_folders["llama"], tmp_path, steps=1)
    assert torch.equal(torch.rand(1), expected)


def test_examples_that_cannot_be_had_are_named_and_the_rest_is_trained_on(
    tiny_folders: dict[str, Path], tmp_path: Path
) -> None:
    data = examples(tmp_path / "data")
    (tmp_path / "data" / "2.png").write_bytes(b"no image")
    summary = run_finetune(spec(tiny_folders["llava"]), data, tmp_path / "out")
    assert list(summary.rejected) == ["q2"]
    assert sum(step.n_examples for step in read_log(tmp_path / "out" / "log.csv")) == 7


def test_a_batch_of_which_nothing_can_be_had_ends_the_run(
    tiny_folders: dict[str, Path], tmp_path: Path
) -> None:
    data = examples(tmp_path / "data")
    with pytest.raises(ValueError, match=r"none of the 3 examples of a batch can be used.*--max-length is 5"):
        run_finetune(spec(tiny_folders["llava"], max_length=5), data, tmp_path / "out")


def test_a_model_without_target_modules_says_what_it_has(tiny_adapters: dict[str, Adapter]) -> None:
    with pytest.raises(ValueError, match=r"no trainable target modules.*c_attn.*q_proj.*--full"):
        find_targets(tiny_adapters["llava"].model, ["c_attn"], vision=False)


def test_a_text_model_has_no_projector_to_train(tiny_folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no projector to train"):
        tune(tiny_folders["llama"], tmp_path, projector_learning_rate=1e-4)


def test_a_loss_that_is_no_number_ends_the_run(tiny_folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="lower the learning rate"):
        tune(tiny_folders["llama"], tmp_path, full=True, learning_rate=1e30, steps=5, warmup=0.0)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB"),
        RuntimeError(
            "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
        ),
    ],
)
def test_when_memory_is_short_the_error_says_what_to_lower(
    tiny_folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr(transformers.LlavaForConditionalGeneration, "forward", fail)
    with pytest.raises(
        OSError, match=r"--micro-batch-size below 3, --gradient-checkpointing, a --rank below 4"
    ):
        tune(tiny_folders["llava"], tmp_path)


def test_other_errors_of_torch_are_not_taken_for_memory(
    tiny_folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(transformers.LlavaForConditionalGeneration, "forward", fail)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        tune(tiny_folders["llava"], tmp_path)


def test_a_lora_of_another_base_of_the_same_shape_is_refused(
    tiny_folders: dict[str, Path], tmp_path: Path
) -> None:
    tune(tiny_folders["llava"], tmp_path, steps=1)
    other = tiny_models.save_llava(tmp_path / "other", seed=1)
    with pytest.raises(ValueError, match="was trained on another base: on llava with weights"):
        on_cpu(other, adapter=str(tmp_path / "out"))


def test_an_adapter_that_does_not_fit_is_refused_with_its_keys(
    tiny_folders: dict[str, Path], tmp_path: Path
) -> None:
    tune(tiny_folders["llama"], tmp_path, steps=1)
    (tmp_path / "out" / "finetune.json").unlink()  # so that only the tensors can tell
    with pytest.raises(ValueError, match=r"tensors|does not fit"):
        on_cpu(tiny_folders["llava-siglip"], adapter=str(tmp_path / "out"))


def test_half_precision_is_trained_in_bfloat16(tiny_copy: Callable[[str], Path], tmp_path: Path) -> None:
    folder = tiny_copy("llama")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).half()
    model.save_pretrained(folder)
    trainee = make_trainee(spec(folder))
    assert trainee.autocast
    assert trainee.adapter.dtype == torch.bfloat16


def test_the_log_says_what_each_step_saw(tiny_folders: dict[str, Path], tmp_path: Path) -> None:
    tune(tiny_folders["llava"], tmp_path, epochs=2, rate=1.0)
    steps = read_log(tmp_path / "out" / "log.csv")
    assert [s.step for s in steps] == list(range(1, 7))
    assert [s.n_examples for s in steps] == [s.n_marked for s in steps] == [3, 3, 2] * 2
    assert steps[-1].epoch == 2
    assert all(np.isfinite([s.loss, s.grad_norm]).all() for s in steps)


def test_the_result_is_safetensors_and_json_alone(tiny_folders: dict[str, Path], tmp_path: Path) -> None:
    tune(tiny_folders["llava"], tmp_path, steps=2, checkpoint_steps=1)
    names = sorted(path.name for path in (tmp_path / "out").iterdir() if not path.name.startswith("."))
    assert names == ["adapter_config.json", "adapter_model.safetensors", "finetune.json", "log.csv"]
    assert all(t.dtype == torch.float32 for t in load_file(tmp_path / "out" / names[1]).values())


def test_a_lora_can_be_put_on_the_vision_tower(tiny_folders: dict[str, Path], tmp_path: Path) -> None:
    tune(tiny_folders["qwen2-vl"], tmp_path, steps=1, vision=True)
    assert any("visual" in key for key in load_file(tmp_path / "out" / "adapter_model.safetensors"))
    load(ModelSpec(model=str(tiny_folders["qwen2-vl"]), adapter=str(tmp_path / "out"), device="cpu"))


def test_the_record_of_a_damaged_lora_is_refused(tiny_folders: dict[str, Path], tmp_path: Path) -> None:
    tune(tiny_folders["llava"], tmp_path, steps=1)
    edit_json(tmp_path / "out" / "finetune.json", run=None)
    with pytest.raises(ValueError, match="is not the record of a fine-tune"):
        on_cpu(tiny_folders["llava"], adapter=str(tmp_path / "out"))
