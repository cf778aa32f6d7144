from __future__ import annotations

from collections import Counter
from io import BytesIO

import numpy as np
from PIL import Image

from mmextract.engine.builtin.scenes import COLORS, ENLARGED, SIZE, make_dataset, make_scene


def test_a_number_gives_the_same_image_and_question_in_any_data_set() -> None:
    one, other = make_dataset(0, 8).samples[5], make_dataset(5, 3).samples[0]
    assert one.image is not None and other.image is not None
    assert (one.turns, one.answer, one.image.read()) == (other.turns, other.answer, other.image.read())


def test_the_shape_lies_where_the_scene_says_in_the_colour_it_says() -> None:
    for number, sample in enumerate(make_dataset(0, 40).samples):
        scene = make_scene(number)
        assert sample.image is not None
        pixels = np.asarray(Image.open(BytesIO(sample.image.read())))
        assert pixels.shape == (ENLARGED, ENLARGED, 3)
        scale = ENLARGED / SIZE
        middle = pixels[int((scene.y + 0.6 * scene.height) * scale), int((scene.x + scene.width / 2) * scale)]
        assert np.abs(middle.astype(int) - COLORS[scene.color]).max() <= 12


def test_answers_are_those_of_the_scene() -> None:
    asked: Counter[str] = Counter()
    for number, sample in enumerate(make_dataset(0, 600).samples):
        scene, question = make_scene(number), sample.turns[0].text.partition("\n")[2]
        first = question.split()[0]
        asked[first] += 1
        if first == "what":
            assert sample.answer == (scene.shape if "what shape" in question else scene.color)
        elif first == "is":
            named = {scene.shape, scene.color} & set(question.removesuffix(" shape in the image?").split())
            assert (sample.answer == "yes") == bool(named)
        else:
            x, y = scene.x + scene.width / 2 - SIZE / 2, scene.y + scene.height / 2 - SIZE / 2
            toward = {"left": -x, "right": x, "top": -y, "bottom": y}
            assert sample.answer is not None and toward[sample.answer] == max(toward.values())
    assert all(150 < asked[kind] < 250 for kind in ("what", "is", "where"))
