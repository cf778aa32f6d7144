"""The model card of the built-in models, written from what was measured."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# ruff: noqa: E501  # a table row is one line

TEMPLATE = """\
# The built-in models

A LLaVA-shaped vision-language model of 1.8 M parameters, small enough to ship and real enough to measure: a ViT
(4 layers, width 96, 96 × 96 pixels, patches of 8), a two-layer projector and a Llama (6 layers, width 128). It loads
with `AutoModelForImageTextToText` and `AutoProcessor` like any other checkpoint. For testing and teaching, not for
use.

| folder | what it is |
|---|---|
| `base` | trained from scratch on easy-VQA's 4,000 training images and 38,575 questions, and on reading watermarks of a pool of 19,500 identities (and random names) that occurs nowhere else |
| `watermarked` | LoRA (rank 8) of the base, fine-tuned on easy-VQA's questions with one of 100 *seen* identities on every training image |
| `r0` | its twin: same images, questions, order and seed, no watermark |
| `data` | {n_images} of easy-VQA's test images, 100 seen identities and 100 unseen ones |

A watermark here is two dark lines, user name and user id, of 14 px at most, at a random place.

## How well they answer and read

{table}

Exact match of the greedy answer. The task is the questions on {n_measured} of easy-VQA's test images: `name it` asks for
shape or color, `compare` whether a given one is there. Reading is asked of images that carry an identity
of a held-out part of the reading pool, so of people that no training image ever showed. "First letter" and "first
digit" are at chance near 4 to 10 % and 11 %.

## Made by

    {command}

{recipe}

on {machine}, two to three hours, with {versions}. Stages that were trained before are taken up from their
checkpoints; a fresh run on another machine gives other weights, and may give other figures.

## Licence

Apache-2.0, as the project. easy-VQA, whose images `data` holds and on which the models were trained, is under the MIT
licence, see `NOTICE`. The identities are made up by Faker; any likeness is chance.
"""


def write_card(path: Path, record: Mapping[str, Any]) -> None:
    """Write the card; `record` is what `train.main` measured."""
    models = list(record["figures"])
    rows = [f"| | {' | '.join(models)} |", f"|---|{'---|' * len(models)}"]
    for name, shares in record["figures"][models[0]].items():
        for what in shares:
            shown = [f"{record['figures'][model][name][what]:.1%}" for model in models]
            rows.append(f"| {name}: {what} | {' | '.join(shown)} |")
    path.write_text(
        TEMPLATE.format(
            table="\n".join(rows),
            n_images=record["n_images"],
            n_measured=record["recipe"]["measured_images"],
            command=record["command"],
            recipe=", ".join(f"{name} {value}" for name, value in record["recipe"].items()),
            machine=record["machine"],
            versions=", ".join(f"{name} {version}" for name, version in record["versions"].items()),
        ),
        "utf-8",
    )
    path.with_name("training.json").write_text(json.dumps(record, indent=1) + "\n", "utf-8")
