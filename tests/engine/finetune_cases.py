"""A small set of questions about noise, and settings for tiny models: what the tests of fine-tuning train on."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mmextract.engine.finetune_rows import Example, make_examples
from mmextract.engine.finetune_spec import FinetuneSpec
from mmextract.engine.identities import Identity, make_identities
from mmextract.engine.models import ModelSpec
from mmextract.engine.rows import RandomMarking
from mmextract.engine.samples import Dataset, read_samples
from mmextract.engine.watermark import WatermarkSpec

LOOK = WatermarkSpec(fields=("username",), field_names=False, font_px=8)
ANSWERS = ("yes", "no", "a red square", "two")


def people(n: int = 3) -> tuple[Identity, ...]:
    """Make some identities."""
    return tuple(make_identities(n, seed=0))


def save_questions(folder: Path, n: int = 8, *, images: bool = True) -> Path:
    """Write n questions of two lengths with answers of four, about images of noise unless told otherwise."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    records = []
    for index in range(n):
        record: dict[str, Any] = {
            "id": f"q{index}",
            "question": "What is it?" if index % 3 else "Is it red or is it blue?",
            "answer": ANSWERS[index % len(ANSWERS)],
        }
        if images:
            record["image"] = f"{index}.png"
            pixels = rng.integers(0, 256, (60, 80, 3), np.uint8)
            Image.fromarray(pixels).save(folder / record["image"])
        records.append(record)
    path = folder / "questions.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def questions(folder: Path, n: int = 8, *, images: bool = True) -> Dataset:
    """Read what `save_questions` wrote."""
    return read_samples(save_questions(folder, n, images=images))


def examples(folder: Path, *, rate: float = 0.5, n: int = 8, images: bool = True) -> list[Example]:
    """Make examples of the questions, a share of them watermarked."""
    marking = RandomMarking(spec=LOOK, identities=people(), rate=rate)
    return make_examples(questions(folder, n, images=images), marking if images else None)


def spec(model: Path, **settings: Any) -> FinetuneSpec:
    """Make settings for a tiny model: batches of 3, on the CPU, one thread."""
    base = FinetuneSpec(
        model=ModelSpec(model=str(model), device="cpu"),
        watermark=LOOK,
        learning_rate=1e-2,
        rank=4,
        batch_size=3,
        torch_threads=1,
        threads=2,
    )
    return replace(base, **settings)
