"""Conversations as the text that a model was trained on: its chat template, with the generation prompt.

This module knows nothing about pixels, token ids, weights or data sets.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from jinja2 import TemplateError

from mmextract.engine.images import RejectedSample
from mmextract.engine.samples import IMAGE_SLOT, Turn

TEMPLATE_DATE = datetime(2024, 7, 26)
"""What templates that print today's date (Llama 3's, SmolLM3's) print, so that a run repeats on any day."""

_DATE_CALL = re.compile(r"""strftime_now\(\s*(['"])(.*?)\1\s*\)""")

_PROBE = "mmextract probe text"

Message = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Answered:
    """A conversation with its answer, as the model is to write it."""

    text: str
    """Prompt and answer, up to the token that ends the answer."""
    spans: tuple[tuple[int, int], ...]
    """(start, end) in characters of what the assistant writes, one span a turn of it."""


class ChatFormat:
    """How one model wants its conversations written.

    processor: a transformers processor, or None for a text model. image_token: the model's image placeholder,
    or None if it takes no images. Raises ValueError for a chat template that shows no user text in either way
    of passing it.
    """

    def __init__(self, tokenizer: Any, processor: Any | None, image_token: str | None) -> None:
        owners = [owner for owner in (processor, tokenizer) if owner is not None]
        self._owner = next((owner for owner in owners if owner.chat_template is not None), None)
        self._image_token = image_token
        names = ("image_token", "video_token", "audio_token")
        placeholders = {getattr(processor, name, None) for name in names} | {image_token}
        self._reserved = sorted(token for token in placeholders if isinstance(token, str) and token)
        self.template = None if self._owner is None else _default_template(self._owner.chat_template)
        """The Jinja template, None if the model has none."""
        self._dated = _DATE_CALL.sub(_fixed_date, self.template or "")
        self._end_token: str | None = tokenizer.eos_token
        added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        self._special = re.compile("|".join(map(re.escape, sorted(added, key=len, reverse=True))) or r"(?!)")
        self.content = "plain" if self._owner is None else self._content_style()
        """How the template wants a turn: in `parts` (image, text) or as one `text`; `plain` without one."""

    def render(self, turns: Sequence[Turn]) -> str:
        """Return the prompt of a conversation, up to where the answer begins.

        The slot in a turn's text becomes the model's image. One line break between slot and text is part of
        the slot. Without a chat template the turns' texts are joined by line breaks. Raises RejectedSample
        for more than one slot, a slot for a model that takes no images, a literal placeholder token in the
        text, and for conversations that the template refuses.
        """
        self._check(turns)
        if self.content == "plain":
            return "\n".join(self._inline(turn.text) for turn in turns)
        try:
            return self._apply([self._message(turn) for turn in turns])
        except TemplateError as error:
            raise RejectedSample(f"the model's chat template refuses this conversation: {error}") from error

    def answered(self, turns: Sequence[Turn], answer: str) -> Answered:
        """Return a conversation with `answer` behind it, and where the assistant speaks: what is trained on.

        A span begins where `render` of the turns before it ends, and ends with the special token that the template
        puts behind the turn. A template that puts none (LLaVA-1.5's) gets the tokenizer's EOS behind the last turn,
        so that the model learns to stop. Raises RejectedSample as `render` does, ValueError for a template whose
        conversation does not begin with its own prompt, and for a tokenizer without EOS that needs one.
        """
        spoken = [*turns, Turn(role="assistant", text=answer)]
        self._check(spoken)
        text = self._whole(spoken)
        spans: list[tuple[int, int]] = []
        stopped = False
        for number, turn in enumerate(spoken):
            if turn.role == "assistant":
                start = len(self._prefix(text, spoken[:number]))
                end, stopped = self._end(text, start, turn.text.strip())
                spans.append((start, end))
        start, end = spans[-1]
        text = text[:end] if stopped else text[:end] + self._eos()
        return Answered(text=text, spans=(*spans[:-1], (start, len(text))))

    def _whole(self, turns: Sequence[Turn]) -> str:
        if self.content == "plain":
            return "\n".join(self._inline(turn.text) for turn in turns)
        try:
            return self._apply([self._message(turn) for turn in turns], generation_prompt=False)
        except TemplateError as error:
            raise RejectedSample(f"the model's chat template refuses this conversation: {error}") from error

    def _prefix(self, text: str, turns: Sequence[Turn]) -> str:
        prompt = self.render(turns)
        if not text.startswith(prompt):
            raise ValueError(
                f"the model's chat template writes a conversation that does not begin with its own prompt, so that "
                f"the answer cannot be told from it: it begins with {text[:60]!r}, the prompt with {prompt[:60]!r}"
            )
        return prompt

    def _end(self, text: str, start: int, answer: str) -> tuple[int, bool]:
        """Return where the turn that begins at `start` ends, and whether a special token that stands there ends it."""
        at = text.find(answer, start)
        if at < 0:
            raise RejectedSample("the model's chat template does not show the answer as it is")
        words = at + len(answer)
        space = re.compile(r"\s*").match(text, words)
        assert space is not None
        special = self._special.match(text, space.end())
        return (words, False) if special is None else (special.end(), True)

    def _eos(self) -> str:
        if self._end_token is None:
            raise ValueError("neither the chat template nor the tokenizer says which token ends an answer")
        return self._end_token

    def describe(self) -> dict[str, Any]:
        """Return everything that decides the text of a prompt, JSON-able."""
        dated = self._dated != (self.template or "")
        return {
            "chat_template": self.template,
            "content": self.content,
            "template_date": TEMPLATE_DATE.date().isoformat() if dated else None,
        }

    def _check(self, turns: Sequence[Turn]) -> None:
        n_slots = sum(turn.text.count(IMAGE_SLOT) for turn in turns)
        if n_slots and self._image_token is None:
            raise RejectedSample(f"the text has {IMAGE_SLOT}, but this model takes no images")
        if n_slots > 1:
            raise RejectedSample(
                f"the conversation has {n_slots} times {IMAGE_SLOT}; one image a sample is supported"
            )
        for turn in turns:
            rest = turn.text.replace(IMAGE_SLOT, "")
            found = [token for token in self._reserved if token in rest]
            if found:
                raise RejectedSample(f"the text contains {found[0]}, which this model reads as a placeholder")

    def _message(self, turn: Turn) -> Message:
        if self.content == "text":
            return {"role": turn.role, "content": self._inline(turn.text)}
        before, slot, after = turn.text.partition(IMAGE_SLOT)
        texts = [before.removesuffix("\n"), after.removeprefix("\n")] if slot else [before]
        parts: list[Message] = [{"type": "text", "text": text} if text else {} for text in texts]
        if slot:
            parts.insert(1, {"type": "image"})
        return {"role": turn.role, "content": [part for part in parts if part]}

    def _inline(self, text: str) -> str:
        return text if self._image_token is None else text.replace(IMAGE_SLOT, self._image_token)

    def _apply(self, messages: list[Message], *, generation_prompt: bool = True) -> str:
        assert self._owner is not None
        text = self._owner.apply_chat_template(
            messages, chat_template=self._dated, add_generation_prompt=generation_prompt, tokenize=False
        )
        assert isinstance(text, str)
        return text

    def _content_style(self) -> str:
        """Try both ways of passing a turn, the usual one first; take the one that shows the text as it is."""
        styles: dict[str, Any] = {"text": _PROBE, "parts": [{"type": "text", "text": _PROBE}]}
        for style in ("parts", "text") if self._image_token is not None else ("text", "parts"):
            try:
                shown = self._apply([{"role": "user", "content": styles[style]}])
            except (TemplateError, TypeError):
                continue  # such as: can only concatenate str, not list
            if _PROBE in shown and "'type'" not in shown:
                return style
        raise ValueError(
            "the model's chat template shows no user text, neither from strings nor from content parts"
        )


def _default_template(template: str | dict[str, str]) -> str:
    if isinstance(template, str):
        return template
    if "default" not in template:
        raise ValueError(f"the model has several chat templates ({', '.join(template)}), but no default one")
    return template["default"]


def _fixed_date(call: re.Match[str]) -> str:
    return json.dumps(TEMPLATE_DATE.strftime(call[2]))
