"""From one record of the input to the turns of a conversation, its answer and its image.

Three dialects: flat records (`question`, `answer`, `image`), LLaVA (`conversations` of `from`/`value`, the
image in a column, its place marked by `<image>`), and Qwen (the same with `<img>path</img>` in the text, or
`messages` of `role`/`content` whose parts may be images). This module knows nothing about files, ids or chat
templates.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal

IMAGE_SLOT = "<image>"
"""Where, in a turn's text, the image stands."""

IMAGE_NAMES = ("image", "image_path", "img", "file_name", "images")
"""Columns that an image is looked for in, the first one that is there."""

QUESTION_NAMES = ("question", "prompt", "text")
"""Columns that a flat record's question is looked for in, the first one that is there."""

ANSWER_NAME = "answer"

ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
"""What the formats call a speaker → what a chat template does."""

_IMG_TAG = re.compile(r"<img>(.*?)</img>", re.DOTALL)

Dialect = Literal["llava", "qwen"] | None
"""A conversation format that every record must have; None takes each record for what it looks like."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """What one speaker says at once."""

    role: str
    """`system`, `user` or `assistant`."""
    text: str
    """The words, with IMAGE_SLOT where the image stands."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """What a record asks, about which image, and the answer it expects."""

    turns: tuple[Turn, ...]
    """Up to the user turn to be answered."""
    answer: str
    """The last assistant turn after it, empty if there is none."""
    image: Any
    """As the record has it: a path, or whatever stands in its image column; None for text alone."""
    used: frozenset[str]
    """Columns whose content is in the fields above."""


def parse_conversation(
    record: Mapping[str, Any], *, dialect: Dialect = None, prompt: str | None = None
) -> Conversation:
    """Return the conversation of a record, with exactly one image slot if it has an image, none if not.

    A flat question without a slot has it put before it. `prompt`, if given, becomes the only turn, in the
    same way; the record's own question is then neither needed nor used. Raises ValueError saying what is
    wrong with the record.
    """
    if dialect != "llava" and isinstance(record.get("messages"), list):
        turns, images = _parse_messages(record["messages"])
        found = _conversation(record, "messages", turns, images)
    elif isinstance(record.get("conversations"), list):
        tagged = (dialect or guess_dialect(record)) == "qwen"
        turns, images = _parse_from_value(record["conversations"], tagged)
        found = _conversation(record, "conversations", turns, images)
    elif dialect is None:
        found = _parse_flat(record, prompt)
    else:
        expected = "`conversations`" if dialect == "llava" else "`messages` or `conversations`"
        raise ValueError(
            f"the {dialect} format needs a list of turns in {expected}, the record has {_names(record)}"
        )
    if prompt is not None:
        found = replace(found, turns=(_user_turn(prompt, found.image is not None),))
    _check_slots(found)
    return found


def guess_dialect(record: Mapping[str, Any]) -> Dialect:
    """Return the conversation format that a record shows, None if it shows neither."""
    if isinstance(record.get("messages"), list):
        return "qwen"
    turns = record.get("conversations")
    if not isinstance(turns, list):
        return None
    texts = [turn["value"] for turn in turns if isinstance(turn, dict) and isinstance(turn.get("value"), str)]
    if any(record.get(name) for name in IMAGE_NAMES) or any(IMAGE_SLOT in text for text in texts):
        return "llava"
    return "qwen" if any(_IMG_TAG.search(text) for text in texts) else None


def as_text(value: Any) -> str:
    """Return a text as it is, nothing as the empty text, and anything else as JSON."""
    if value is None or isinstance(value, str):
        return value or ""
    return json.dumps(value, ensure_ascii=False, default=str)


def _parse_flat(record: Mapping[str, Any], prompt: str | None) -> Conversation:
    images, image_names = _column_images(record)
    image = _only(images)
    used = image_names | {ANSWER_NAME}
    answer = as_text(record.get(ANSWER_NAME))
    if prompt is not None:
        return Conversation(turns=(), answer=answer, image=image, used=used)
    name = next((name for name in QUESTION_NAMES if name in record), None)
    if name is None:
        raise ValueError(
            f"no question: expected a column {', '.join(QUESTION_NAMES)}, conversations or messages, or one "
            f"prompt for all samples (--prompt); the record has {_names(record)}"
        )
    question = record[name]
    if not isinstance(question, str) or not question.strip():
        raise ValueError(f"the question in `{name}` must be a text that is not empty, got {question!r}")
    turns = (_user_turn(question, image is not None),)
    return Conversation(turns=turns, answer=answer, image=image, used=used | {name})


def _parse_from_value(turns: list[Any], tagged: bool) -> tuple[list[Turn], list[Any]]:
    parsed, images = [], []
    for number, turn in enumerate(turns):
        role = _speaker(number, turn, "from")
        text = turn.get("value")
        if not isinstance(text, str):
            raise ValueError(f"turn {number} must have a text in `value`, got {text!r}")
        if tagged and role == "user":
            images += [path.strip() for path in _IMG_TAG.findall(text)]
            text = _IMG_TAG.sub(IMAGE_SLOT, text)
        parsed.append(Turn(role=role, text=text))
    return parsed, images


def _parse_messages(messages: list[Any]) -> tuple[list[Turn], list[Any]]:
    parsed, images = [], []
    for number, message in enumerate(messages):
        role = _speaker(number, message, "role")
        content = message.get("content")
        if isinstance(content, str):
            content = [{"type": "text", "text": content}]
        if not isinstance(content, list):
            raise ValueError(
                f"turn {number} must have a text or a list of parts in `content`, got {content!r}"
            )
        text = ""
        for part in content:
            part_text, part_images = _parse_part(number, part)
            text += part_text
            images += part_images
        parsed.append(Turn(role=role, text=text))
    return parsed, images


def _parse_part(number: int, part: Any) -> tuple[str, list[Any]]:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return part["text"], []
    if kind in ("image", "image_url"):
        # Qwen writes `image`, transformers `path` or `url`, OpenAI `image_url: {url}`, others an image column
        value = next((part[key] for key in ("image", "path", "url", "image_url") if part.get(key)), None)
        value = value.get("url") if isinstance(value, dict) else value
        return IMAGE_SLOT, [value] if value else []
    raise ValueError(f"turn {number} must consist of parts of type text or image, got {part!r}")


def _speaker(number: int, turn: Any, key: str) -> str:
    speaker = turn.get(key) if isinstance(turn, dict) else None
    if speaker not in ROLES:
        raise ValueError(f"turn {number} must have one of {', '.join(ROLES)} in `{key}`, got {turn!r}")
    return ROLES[speaker]


def _conversation(
    record: Mapping[str, Any], column: str, turns: list[Turn], images: list[Any]
) -> Conversation:
    users = [number for number, turn in enumerate(turns) if turn.role == "user"]
    if not users:
        raise ValueError(f"no turn of `{column}` is the user's, so that there is nothing to answer")
    kept, rest = turns[: users[-1] + 1], turns[users[-1] + 1 :]
    if not kept[-1].text.strip():
        raise ValueError(f"the user's turn {users[-1]} is empty")
    column_images, image_names = _column_images(record)
    return Conversation(
        turns=tuple(kept),
        answer=next((turn.text for turn in reversed(rest) if turn.role == "assistant"), ""),
        image=_only([*images, *column_images]),
        used=image_names | {column},
    )


def _column_images(record: Mapping[str, Any]) -> tuple[list[Any], frozenset[str]]:
    name = next((name for name in IMAGE_NAMES if name in record), None)
    if name is None:
        return [], frozenset()
    value = record[name]
    values = value if isinstance(value, list) else [value]
    return [image for image in values if image is not None and image != ""], frozenset({name})


def _only(images: Sequence[Any]) -> Any:
    if len(images) > 1 and any(image != images[0] for image in images):
        shown = ", ".join(str(getattr(image, "name", image)) for image in images)
        raise ValueError(
            f"{len(images)} images in one sample ({shown}), where one is supported: split or drop the sample"
        )
    return images[0] if images else None


@lru_cache(maxsize=1024)  # data sets repeat their questions: keep each once
def _user_turn(text: str, needs_slot: bool) -> Turn:
    return Turn(role="user", text=f"{IMAGE_SLOT}\n{text}" if needs_slot and IMAGE_SLOT not in text else text)


def _check_slots(found: Conversation) -> None:
    slots = [turn.role for turn in found.turns for _ in range(turn.text.count(IMAGE_SLOT))]
    if found.image is None and slots:
        raise ValueError(
            f"the prompt has an image slot ({IMAGE_SLOT}), but the sample has no image: drop or add one"
        )
    if found.image is not None and not slots:
        raise ValueError(
            f"the sample has an image, its prompt no image slot: write {IMAGE_SLOT} where the image stands"
        )
    if len(slots) > 1:
        raise ValueError(
            f"the prompt has {len(slots)} image slots, where one is supported: split or drop the sample"
        )
    if slots and slots[0] != "user":
        raise ValueError(
            f"the image slot ({IMAGE_SLOT}) is in a turn of the {slots[0]}: only the user can show an image"
        )


def _names(record: Mapping[str, Any]) -> str:
    return ", ".join(record) or "no columns"
