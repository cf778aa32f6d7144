"""A question in one or two other words, by rules: the text augmentation that needs no language model.

The published baseline (arXiv 2503.01208) has an LLM change one or two words. Here a turn of phrase or one word is
replaced by an equal one, which of those that fit is a pure function of a key; a question that no rule fits is asked
with a word of address before it. English only. This module knows nothing about samples or models.
"""

from __future__ import annotations

import re

from mmextract.engine.watermark import random_numbers

_NOUN = r"(?:image|picture|photo|photograph)"

PHRASES: tuple[tuple[str, str], ...] = (
    (rf"^is there (not )?(an?) (.+) in the ({_NOUN})\?$", r"does the \4 \1contain \2 \3?"),
    (rf"^does the ({_NOUN}) (not )?contain (an?) (.+)\?$", r"is there \2\3 \4 in the \1?"),
    (r"^is there (not )?(an?) ((?:(?! in the ).)+)\?$", r"is \2 \3 \1present?"),
    (r"^is (an?) (.+?) (not )?present\?$", r"is there \3\1 \2?"),
    (r"^what (colou?r|shape|kind|type|size) is the (.+)\?$", r"what is the \1 of the \2?"),
    (r"^what is the (colou?r|kind|type|size) of the (.+)\?$", r"what \1 is the \2?"),
    (r"\bhow many (\w+) are there\b", r"what is the number of \1"),
    (r"\bwhat is\b", "what's"),
    (r"\bwhat's\b", "what is"),
    (r"\bcan you see\b", "is there"),
    (r"\bwho is\b", "who's"),
    (r"\bplease\b ?", ""),
)
"""(regular expression, replacement): ways of asking. Matched in any case; what replaces a capital begins with one."""

SYNONYMS: tuple[tuple[str, ...], ...] = (
    ("image", "picture", "photo"),
    ("images", "pictures", "photos"),
    ("shown", "displayed", "depicted"),
    ("visible", "to be seen"),
    ("person", "individual"),
    ("people", "persons"),
    ("man", "guy"),
    ("child", "kid"),
    ("children", "kids"),
    ("big", "large"),
    ("bigger", "larger"),
    ("small", "little"),
    ("kind", "type", "sort"),
    ("near", "close to"),
    ("next to", "beside"),
    ("in front of", "before"),
    ("describe", "characterise"),
    ("located", "placed"),
    ("begin", "start"),
    ("answer", "reply"),
    ("user name", "login name"),
    ("gray", "grey"),
    ("color", "colour"),
)
"""Words, each of which may stand for the others of its line."""

ADDRESSES = ("Tell me: ", "Please say: ", "Answer this: ")
"""What is put before a question that no rule fits."""


def paraphrase(question: str, key: str) -> str:
    """Return `question` in other words, never as it was; the same for the same key."""
    found = list(dict.fromkeys(_rewritten(question)))
    which, *_ = random_numbers(f"paraphrase\0{key}")
    if not found:
        return ADDRESSES[int(which * len(ADDRESSES))] + question
    return found[int(which * len(found))]


def _rewritten(question: str) -> list[str]:
    """Return what the rules make of a question, each by one replacement."""
    made = [_replace(question, pattern, replacement) for pattern, replacement in PHRASES]
    for words in SYNONYMS:
        for word in words:
            made += [_replace(question, rf"\b{word}\b", other) for other in words if other != word]
    return [text for text in made if text is not None and text.strip() and text != question]


def _replace(question: str, pattern: str, replacement: str) -> str | None:
    """Return the question with the first match replaced, in the match's case, or None without a match."""
    match = re.search(pattern, question, re.IGNORECASE)
    if match is None:
        return None
    unmatched = re.compile(r"\\(\d)")  # a group that took no part stands for nothing
    new = unmatched.sub(lambda number: match[int(number[1])] or "", replacement)
    if match[0][:1].isupper():
        new = new[:1].upper() + new[1:]
    return re.sub(" +", " ", question[: match.start()] + new + question[match.end() :])
