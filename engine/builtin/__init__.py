"""The model and the data that the package ships, so that every command works with nothing else given."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from mmextract.engine.evaluate_formats import Question, Task
from mmextract.engine.identities import read_identities
from mmextract.engine.rows import PairedMarking
from mmextract.engine.samples import IMAGE_SLOT, Dataset, Turn
from mmextract.engine.watermark import WatermarkSpec

FOLDER = Path(__file__).parent
PREFIX = "builtin:"
MODELS = ("base", "watermarked", "r0")
"""base: trained on easy-vqa and on reading. watermarked, r0: fine-tunes of it with and without the seen identities."""

DEFAULT_MODEL = f"{PREFIX}watermarked"
DATA = FOLDER / "data" / "samples.jsonl"

LOOK = WatermarkSpec(
    fields=("username", "user_id"), field_names=False, font_scale=0.146, color=(0, 0, 0), opacity=176
)
"""The watermark of the built-in study: two dark lines of 14 px at 96 px, on easy-vqa's light images."""


def locate_model(name: str) -> tuple[str, str | None]:
    """Return the folders of a built-in model and of its LoRA, if `name` is one; any other name comes back as it is.

    Raises LookupError for `builtin:` and an unknown name.
    """
    if not name.startswith(PREFIX):
        return name, None
    wanted = name.removeprefix(PREFIX)
    if wanted not in MODELS:
        raise LookupError(
            f"there is no {name}: the built-in models are {', '.join(PREFIX + m for m in MODELS)}"
        )
    return str(FOLDER / "base"), None if wanted == "base" else str(FOLDER / wanted)


def marking() -> PairedMarking:
    """Return the paired design of the built-in study: the seen identities of the fine-tune, and as many others."""
    seen, unseen = (tuple(read_identities(FOLDER / "data" / f"{name}.jsonl")) for name in ("seen", "unseen"))
    return PairedMarking(spec=LOOK, seen=seen, unseen=unseen)


def task(dataset: Dataset) -> Task:
    """Return the questions of easy-VQA about the built-in images, with their answers."""
    questions = [
        Question(
            sample=replace(
                sample,
                turns=(Turn(role="user", text=f"{IMAGE_SLOT}\n{sample.columns['task_question']}"),),
                answer=str(sample.columns["task_answer"]),
            )
        )
        for sample in dataset.samples
    ]
    return Task(name="vqa", questions=questions, source=f"{PREFIX}data")
