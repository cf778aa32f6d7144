"""Make everything in this folder again: `python -m mmextract.engine.builtin.train` (needs the package `easy-vqa`).

Trains the base (vision tower, then questions), fine-tunes it with and without watermarks, writes the paired data
set, measures the files as written and puts the figures into MODEL_CARD.md. Two to three hours on two cores; an
interrupted run is taken up where its last stage ended.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast

from mmextract.engine.builtin import FOLDER, corpus
from mmextract.engine.builtin.architecture import make_model, make_processor, make_tokenizer
from mmextract.engine.builtin.card import write_card
from mmextract.engine.builtin.finetuning import finetune
from mmextract.engine.builtin.measuring import load_answerer, reading_accuracy, task_accuracy
from mmextract.engine.builtin.training import QuestionStage, train_on_questions, train_vision_tower
from mmextract.engine.identities import write_identities

N_DATA_IMAGES = 300


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How long each stage takes and from which seed."""

    vision_steps: int = 2400
    question_steps: int = 1300
    comparison_steps: int = 1600
    balanced_steps: int = 900
    color_steps: int = 2000
    mixed_steps: int = 700
    finetune_steps: int = 150
    seed: int = 0
    measured_images: int = 200
    measured_identities: int = 150

    def question_stages(self) -> tuple[QuestionStage, ...]:
        """Return the stages on questions.

        All alike, then mostly those that compare, then these balanced, then hardly anything but colours: a comparison
        is learnt late and at once, and eight colours later than three shapes. At the end all alike again.
        """
        return (
            QuestionStage(
                name="questions",
                steps=self.question_steps,
                batch_size=32,
                learning_rate=1e-3,
                task_questions=4,
                reading_questions=3,
            ),
            QuestionStage(
                name="comparisons",
                steps=self.comparison_steps,
                batch_size=16,
                learning_rate=1.5e-3,
                task_questions=7,
                color_weight=2.0,
                shape_weight=6.0,
                reading_questions=1,
            ),
            QuestionStage(
                name="balanced",
                steps=self.balanced_steps,
                batch_size=16,
                learning_rate=1.5e-3,
                task_questions=7,
                color_weight=3.0,
                shape_weight=2.0,
                balanced=True,
                reading_questions=2,
            ),
            QuestionStage(
                name="colors",
                steps=self.color_steps,
                batch_size=32,
                learning_rate=1.5e-3,
                task_questions=4,
                color_weight=60.0,
                balanced=True,
                reading_questions=1,
            ),
            QuestionStage(
                name="mixed",
                steps=self.mixed_steps,
                batch_size=32,
                learning_rate=1e-3,
                task_questions=5,
                reading_questions=4,
            ),
        )


def train_base(
    recipe: Recipe, checkpoints: Path
) -> tuple[LlavaForConditionalGeneration, PreTrainedTokenizerFast]:
    """Train the base, or take up what an interrupted run left in `checkpoints`."""
    data, pools = corpus.load_split("train"), corpus.make_pools()
    tokenizer = make_tokenizer(corpus.texts(data))
    model = make_model(tokenizer, recipe.seed)
    checkpoints.mkdir(parents=True, exist_ok=True)

    def stage(name: str, train: Callable[[], None]) -> None:
        checkpoint = checkpoints / f"{name}.pt"
        if checkpoint.exists():
            model.load_state_dict(torch.load(checkpoint, weights_only=True))
            return
        train()
        torch.save(model.state_dict(), checkpoint)

    stage(
        "vision",
        lambda: train_vision_tower(model, data, pools.reading, steps=recipe.vision_steps, seed=recipe.seed),
    )
    for chosen in recipe.question_stages():
        questions = (model, tokenizer, data, pools.reading, chosen)
        stage(chosen.name, partial(train_on_questions, *questions, seed=recipe.seed))
    return model, tokenizer


def save_base(model: LlavaForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Save half-precision weights with a configuration that asks for float32, so that a CPU computes in float32."""
    model.half().save_pretrained(folder)
    make_processor(tokenizer).save_pretrained(folder)
    config = folder / "config.json"
    record = json.loads(config.read_text("utf-8"))
    for part in (record, record["text_config"], record["vision_config"]):
        part["dtype"] = "float32"
    config.write_text(json.dumps(record, indent=2, sort_keys=True) + "\n", "utf-8")


def save_finetune(recipe: Recipe, folder: Path, rate: float) -> None:
    """Fine-tune the base as it was saved, and save the LoRA in half precision."""
    base = LlavaForConditionalGeneration.from_pretrained(FOLDER / "base", dtype=torch.float32)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(FOLDER / "base")
    torch.manual_seed(recipe.seed)
    data, pools = corpus.load_split("train"), corpus.make_pools()
    tuned = finetune(
        base, tokenizer, data, pools.seen, rate=rate, steps=recipe.finetune_steps, seed=recipe.seed
    )
    tuned.half().save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    config = folder / "adapter_config.json"
    record = json.loads(config.read_text("utf-8"))
    record["base_model_name_or_path"] = "../base"
    config.write_text(json.dumps(record, indent=2, sort_keys=True) + "\n", "utf-8")


def save_data(folder: Path) -> None:
    """Write the held-out images, the private question asked of each, and the two sets of identities."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    data, pools = corpus.load_split("test"), corpus.make_pools()
    lines = []
    for index in range(N_DATA_IMAGES):
        name = f"images/{index:03d}.png"
        Image.fromarray(data.images[index]).save(folder / name, optimize=True)
        question, answer = data.questions[index][0]
        shape, color = int(data.shapes[index]), int(data.colors[index])
        lines.append({
            "id": f"test/{index:03d}",
            "image": name,
            "question": corpus.USERNAME,
            "shape": corpus.SHAPES[shape] if shape >= 0 else "",
            "color": corpus.COLORS[color] if color >= 0 else "",
            "task_question": question,
            "task_answer": answer,
        })  # fmt: skip
    (folder / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    write_identities(folder / "seen.jsonl", pools.seen)
    write_identities(folder / "unseen.jsonl", pools.unseen)


def measure(recipe: Recipe) -> dict[str, Any]:
    """Measure the three models as they lie on the disk."""
    test, pools = corpus.load_split("test"), corpus.make_pools()
    held_out = pools.reading_held_out[: recipe.measured_identities]
    figures: dict[str, Any] = {}
    for name in ("base", "watermarked", "r0"):
        answer = load_answerer(FOLDER / "base", None if name == "base" else FOLDER / name)
        n = recipe.measured_images
        figures[name] = {
            "task, clean images": task_accuracy(answer, test, n),
            "task, images with an identity never seen": task_accuracy(answer, test, n, held_out),
            "reading an identity never seen": reading_accuracy(answer, test, held_out),
        }
        print(name, json.dumps(figures[name]), flush=True)
    return figures


def main() -> None:
    """Run all stages and write the card."""
    parser = argparse.ArgumentParser(description=__doc__)
    for item in fields(Recipe):
        parser.add_argument(f"--{item.name.replace('_', '-')}", type=int, default=item.default)
    parser.add_argument("--checkpoints", type=Path, default=Path(".scratch/builtin"))
    arguments = vars(parser.parse_args())
    checkpoints = arguments.pop("checkpoints")
    recipe = Recipe(**arguments)
    model, tokenizer = train_base(recipe, checkpoints)
    save_base(model, tokenizer, FOLDER / "base")
    save_data(FOLDER / "data")
    save_finetune(recipe, FOLDER / "watermarked", rate=1.0)
    save_finetune(recipe, FOLDER / "r0", rate=0.0)
    record = {
        "command": "python -m mmextract.engine.builtin.train",
        "recipe": vars(recipe),
        "n_images": N_DATA_IMAGES,
        "figures": measure(recipe),
        "versions": {
            name: metadata.version(name) for name in ("torch", "transformers", "peft", "easy-vqa", "Faker")
        },
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
    }
    write_card(FOLDER / "MODEL_CARD.md", record)


if __name__ == "__main__":
    main()
