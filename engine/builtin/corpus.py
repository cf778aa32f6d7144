"""What the built-in model is trained on: easy-vqa's images and questions, and questions about watermarks.

It knows nothing about models. Images are enlarged from 64 to 96 pixels, so that text of 14 pixels fits on them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFont

from mmextract.engine import watermark
from mmextract.engine.builtin import LOOK
from mmextract.engine.builtin.architecture import IMAGE_SIZE, PATCH_SIZE
from mmextract.engine.identities import Identity, make_disjoint_pair, make_identities
from mmextract.kernels.reference import Uint8Array

N_PAIRS = 100
READING_POOL = 20_000
READING_HELD_OUT = 500
IDENTITY_SEED = 0

FIRST_LETTER = "What is the first letter of the username?"
FIRST_DIGIT = "What is the first digit of the user id?"
USERNAME = "What is the username?"
USER_ID = "What is the user id?"
CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
COLORS = ("black", "gray", "red", "green", "blue", "brown", "teal", "yellow")
SHAPES = ("circle", "rectangle", "triangle")


@dataclass(frozen=True, kw_only=True)
class Split:
    """One half of easy-vqa."""

    images: Uint8Array
    """[N, 96, 96, 3]."""
    questions: tuple[tuple[tuple[str, str], ...], ...]
    """For each image its (question, answer) pairs."""
    shapes: np.ndarray[tuple[int], np.dtype[np.int64]]
    """[N], index into SHAPES, −100 where the questions do not tell."""
    colors: np.ndarray[tuple[int], np.dtype[np.int64]]
    """[N], index into COLORS, −100 where the questions do not tell."""


def load_split(name: str) -> Split:
    """Load easy-vqa's `train` (4,000 images) or `test` (1,000) half. Needs the package `easy-vqa`."""
    import easy_vqa

    questions, answers, owners = getattr(easy_vqa, f"get_{name}_questions")()
    paths = getattr(easy_vqa, f"get_{name}_image_paths")()
    by_image: dict[int, list[tuple[str, str]]] = {index: [] for index in sorted(paths)}
    for question, answer, owner in zip(questions, answers, owners, strict=True):
        by_image[owner].append((question, answer))
    return Split(
        images=np.stack([enlarge(Image.open(paths[index])) for index in by_image]),
        questions=tuple(tuple(pairs) for pairs in by_image.values()),
        shapes=np.asarray([_find(pairs, SHAPES) for pairs in by_image.values()]),
        colors=np.asarray([_find(pairs, COLORS) for pairs in by_image.values()]),
    )


def texts(split: Split) -> list[str]:
    """Return every prompt and answer of the task, and the prompts about watermarks: the words of the tokenizer."""
    task = [(f"USER: <image>\n{q} ASSISTANT:", f" {a}</s>") for pairs in split.questions for q, a in pairs]
    about = [f"USER: {q} ASSISTANT:" for q in (FIRST_LETTER, FIRST_DIGIT, USERNAME, USER_ID)]
    return [text for pair in task for text in pair] + about


def kind(question: str, answer: str) -> str:
    """Return what a question of easy-vqa takes: naming what is seen, or comparing it with a shape or a colour named."""
    if answer not in ("yes", "no"):
        return "name it"
    return "compare shape" if any(shape in question for shape in SHAPES) else "compare color"


def enlarge(image: Image.Image) -> Uint8Array:
    """Return the image as uint8 [96, 96, 3]."""
    return np.asarray(image.convert("RGB").resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC))


def _find(pairs: Sequence[tuple[str, str]], values: Sequence[str]) -> int:
    """Return which of `values` the image shows, as far as its questions tell, else −100."""
    for question, answer in pairs:
        if answer in values:
            return values.index(answer)
        named = [v for v in values if re.search(rf"\b{v}\b", question)]
        if named and answer == ("no" if " not " in question else "yes"):
            return values.index(named[0])
    return -100


@dataclass(frozen=True, kw_only=True)
class Pools:
    """Three pools of identities that share no identifying value."""

    seen: list[Identity]
    """On the images of the watermarked fine-tune."""
    unseen: list[Identity]
    """Never on any training image."""
    reading: list[Identity]
    """On the images from which the base learns to read."""
    reading_held_out: list[Identity]
    """To measure how well it reads."""


def make_pools() -> Pools:
    """Return the same pools every time."""
    seen, unseen = make_disjoint_pair(N_PAIRS, seed=IDENTITY_SEED)
    readers = make_identities(READING_POOL, seed=IDENTITY_SEED + 1, exclude=[*seen, *unseen])
    return Pools(
        seen=seen,
        unseen=unseen,
        reading=readers[READING_HELD_OUT:],
        reading_held_out=readers[:READING_HELD_OUT],
    )


def reading_questions(person: Identity) -> list[tuple[str, str]]:
    """Return what can be asked of a watermark of `person`."""
    return [
        (FIRST_LETTER, person.username[0]),
        (FIRST_DIGIT, person.user_id[0]),
        (USERNAME, person.username),
        (USER_ID, person.user_id),
    ]


def spelled_at_random(person: Identity, rng: np.random.Generator) -> Identity:
    """Return an identity with random letters for a name, so that reading cannot lean on which names are common."""
    n_letters, n_digits = int(rng.integers(4, 10)), int(rng.integers(0, 3))
    name = [CHARACTERS[i] for i in rng.integers(0, 26, n_letters)]
    name += [CHARACTERS[i] for i in rng.integers(26, 36, n_digits)]
    digits = [str(rng.integers(1, 10)), *(str(i) for i in rng.integers(0, 10, 9))]
    return Identity(
        username="".join(name),
        user_id="".join(digits),
        gender=person.gender,
        age=person.age,
        capture_time=person.capture_time,
        capture_location=person.capture_location,
    )


def mark(image: Uint8Array, person: Identity, sample_id: str) -> tuple[Uint8Array, watermark.Placement]:
    """Return the image with the watermark of `person`, and where it stands."""
    text = LOOK.text(person)
    placement = watermark.place(LOOK, sample_id, image.shape[1], image.shape[0], [text])
    return watermark.apply(image, LOOK, text, placement), placement


def patch_labels(person: Identity, placement: watermark.Placement) -> tuple[np.ndarray, np.ndarray]:
    """Tell which characters touch which patch.

    Returns two float32 arrays [144, 36]: every character, and only the first of each line. A character touches a
    patch if it covers at least 2 of its 8 columns and its line's middle band meets the patch's rows.
    """
    grid = IMAGE_SIZE // PATCH_SIZE
    every = np.zeros((grid, grid, len(CHARACTERS)), np.float32)
    first = np.zeros_like(every)
    font = watermark._font(placement.font_px)
    left, top, _, _ = watermark._text_box(LOOK.text(person), placement.font_px)
    ascent, _ = font.getmetrics()
    for line, text in enumerate((person.username, person.user_id)):
        upper = placement.y - top + line * (_line_height(font) + 4) + 0.25 * ascent
        rows = range(int(upper) // PATCH_SIZE, int(upper + 0.75 * ascent) // PATCH_SIZE + 1)
        for index, character in enumerate(text):
            if character not in CHARACTERS:
                continue
            start = placement.x - left + font.getlength(text[:index])
            end = placement.x - left + font.getlength(text[: index + 1])
            for column in range(grid):
                overlap = min(end, (column + 1) * PATCH_SIZE) - max(start, column * PATCH_SIZE)
                if overlap < min(2.0, 0.9 * (end - start)):
                    continue
                for row in rows:
                    if 0 <= row < grid:
                        every[row, column, CHARACTERS.index(character)] = 1
                        if index == 0:
                            first[row, column, CHARACTERS.index(character)] = 1
    return every.reshape(-1, len(CHARACTERS)), first.reshape(-1, len(CHARACTERS))


def _line_height(font: ImageFont.FreeTypeFont) -> float:
    return font.getbbox("A")[3]
