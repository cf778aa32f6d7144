from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from mmextract.engine.augment import Augmentation, augment, draw_augmentation
from mmextract.engine.paraphrase import ADDRESSES, paraphrase

QUESTIONS = (
    "is there a red shape in the image?",
    "does the image not contain a rectangle?",
    "what is the blue shape?",
    "is a teal shape present?",
    "what color is the triangle?",
    "What is the person in the picture near?",
    "xyz",
)


def every_paraphrase(question: str) -> set[str]:
    return {paraphrase(question, str(key)) for key in range(200)}


@pytest.mark.parametrize("question", QUESTIONS)
def test_a_paraphrase_is_never_the_question_itself(question: str) -> None:
    assert question not in every_paraphrase(question)
    assert paraphrase(question, "a") == paraphrase(question, "a")


def test_ways_of_asking_keep_what_is_asked() -> None:
    asked = every_paraphrase("is there not a red shape in the image?")
    assert "does the image not contain a red shape?" in asked
    assert "is there not a red shape in the photo?" in asked
    assert "is there not a green shape?" in every_paraphrase("is a green shape not present?")
    assert every_paraphrase("is there a circle?") == {"is a circle present?"}
    assert "what is the color of the circle?" in every_paraphrase("what color is the circle?")


def test_words_are_replaced_whole_and_keep_their_capital() -> None:
    asked = every_paraphrase("Images of a man")
    assert asked == {"Pictures of a man", "Photos of a man", "Images of a guy"}


def test_a_question_that_no_rule_fits_gets_a_word_of_address() -> None:
    assert every_paraphrase("xyz") == {address + "xyz" for address in ADDRESSES}


def test_an_augmentation_is_that_of_its_key_and_within_the_published_bounds() -> None:
    drawn = [draw_augmentation(str(key)) for key in range(300)]
    assert draw_augmentation("7") == drawn[7]
    for values, low, high in (
        ([a.angle for a in drawn], -30, 30),
        ([a.brightness for a in drawn], 0.8, 1.2),
        ([a.contrast for a in drawn], 0.8, 1.2),
    ):
        assert low <= min(values) < 0.95 * low + 0.05 * high
        assert 0.05 * low + 0.95 * high < max(values) <= high
    assert 0.4 < np.mean([a.flip for a in drawn]) < 0.6


def test_an_image_is_turned_on_a_larger_canvas_mirrored_and_brightened() -> None:
    pixels = np.random.default_rng(0).integers(0, 100, (30, 60, 3), np.uint8)
    mirrored = augment(pixels, Augmentation(angle=0, flip=True, brightness=1, contrast=1))
    np.testing.assert_array_equal(mirrored, pixels[:, ::-1])
    turned = augment(pixels, Augmentation(angle=30, flip=False, brightness=1, contrast=1))
    assert turned.shape[:2] == Image.fromarray(pixels).rotate(30, expand=True).size[::-1]
    assert (turned[0, 0] == 0).all(), "corners are black"
    brighter = augment(pixels, Augmentation(angle=0, flip=False, brightness=1.2, contrast=1))
    assert np.abs(brighter - 1.2 * pixels).max() <= 1
