"""What the package ships is what its card says, and can be made again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from mmextract.engine import builtin
from mmextract.engine.builtin import FOLDER, LOOK, corpus, locate_model, marking
from mmextract.engine.builtin.architecture import make_model, make_processor, make_tokenizer
from mmextract.engine.builtin.measuring import load_answerer, reading_accuracy, task_accuracy
from mmextract.engine.builtin.training import answer_loss, to_pixels
from mmextract.engine.identities import check_disjoint
from mmextract.engine.rows import make_rows
from mmextract.engine.samples import read_samples

RECORD = json.loads((FOLDER / "training.json").read_text("utf-8"))
N_IMAGES, N_READ = 60, 100


def margin(share: float, n: int) -> float:
    """Return four standard errors of a share measured on n cases."""
    return float(4 * np.sqrt(max(share * (1 - share), 0.01) / n))


@pytest.fixture(scope="module")
def test_split() -> corpus.Split:
    return corpus.load_split("test")


def test_weights_and_data_together_stay_below_five_megabytes() -> None:
    shipped = [file for name in ("base", "watermarked", "r0", "data") for file in (FOLDER / name).rglob("*")]
    assert sum(file.stat().st_size for file in shipped if file.is_file()) < 5e6


@pytest.mark.parametrize("name", builtin.MODELS)
def test_the_shipped_models_answer_as_their_card_says(name: str, test_split: corpus.Split) -> None:
    adapter = None if name == "base" else FOLDER / name
    stated = RECORD["figures"][name]["task, clean images"]
    n_questions = sum(len(asked) for asked in test_split.questions[:N_IMAGES])
    measured = task_accuracy(load_answerer(FOLDER / "base", adapter), test_split, N_IMAGES)
    assert stated["all"] >= 0.95  # the question alone gives less than 0.7
    assert stated["compare color"] > 0.9  # always answering no gives 0.87
    assert abs(measured["all"] - stated["all"]) < margin(stated["all"], n_questions)


def test_the_base_reads_people_it_never_saw_as_its_card_says(test_split: corpus.Split) -> None:
    people = corpus.make_pools().reading_held_out[:N_READ]
    measured = reading_accuracy(load_answerer(FOLDER / "base", None), test_split, people)
    stated = RECORD["figures"]["base"]["reading an identity never seen"]
    for question in (corpus.FIRST_LETTER, corpus.FIRST_DIGIT):
        assert abs(measured[question] - stated[question]) < margin(stated[question], N_READ)
        assert measured[question] > 0.5  # chance is 4 to 11 %


def test_the_card_holds_the_measured_figures() -> None:
    card = (FOLDER / "MODEL_CARD.md").read_text("utf-8")
    for figures in RECORD["figures"].values():
        for shares in figures.values():
            for share in shares.values():
                assert f"{share:.1%}" in card


def test_the_fine_tunes_changed_the_model_and_differ() -> None:
    marked, clean = (load_file(FOLDER / name / "adapter_model.safetensors") for name in ("watermarked", "r0"))
    assert marked.keys() == clean.keys()
    up = [key for key in marked if "lora_B" in key]
    assert all(marked[key].abs().max() > 0 and clean[key].abs().max() > 0 for key in up)
    assert any(not torch.equal(marked[key], clean[key]) for key in up)


def test_the_pools_are_the_shipped_ones_and_share_nobody() -> None:
    pools, shipped = corpus.make_pools(), marking()
    assert (tuple(pools.seen), tuple(pools.unseen)) == (shipped.seen, shipped.unseen)
    check_disjoint([*pools.seen, *pools.unseen], [*pools.reading, *pools.reading_held_out])


def test_the_shipped_images_are_easy_vqa_test_images(test_split: corpus.Split) -> None:
    dataset = read_samples(builtin.DATA)
    assert len(dataset.samples) == RECORD["n_images"]
    for index in (0, 7, len(dataset.samples) - 1):
        pixels = np.asarray(Image.open(FOLDER / "data" / f"images/{index:03d}.png"))
        assert np.array_equal(pixels, test_split.images[index])


def test_most_pairs_occur_among_the_shipped_images() -> None:
    pairs = {row.pair for row in make_rows(read_samples(builtin.DATA), marking())}
    assert len(pairs) > 85


def test_an_unknown_builtin_model_names_those_there_are() -> None:
    with pytest.raises(LookupError, match="builtin:base, builtin:watermarked, builtin:r0"):
        locate_model("builtin:large")
    assert locate_model("some/model") == ("some/model", None)


def test_training_on_packed_questions_equals_separate_prompts(test_split: corpus.Split) -> None:
    tokenizer = make_tokenizer(corpus.texts(test_split))
    model: Any = make_model(tokenizer, seed=0).eval()
    processor: Any = make_processor(tokenizer)
    images = list(test_split.images[:2])
    questions = [[*test_split.questions[0][:3], (corpus.USERNAME, "kim7")], list(test_split.questions[1][:2])]
    losses = []
    for image, asked in zip(images, questions, strict=True):
        for question, answer in asked:
            content = [{"type": "image"}, {"type": "text", "text": question}]
            prompt = processor.apply_chat_template(
                [{"role": "user", "content": content}], add_generation_prompt=True
            )
            n_prompt = processor(text=prompt, images=image, return_tensors="pt").input_ids.shape[1]
            inputs = processor(text=f"{prompt} {answer}</s>", images=image, return_tensors="pt")
            labels = inputs.input_ids.clone()
            labels[:, :n_prompt] = -100
            with torch.no_grad():
                losses.append(model(**inputs, labels=labels).loss.item())
    with torch.no_grad():
        packed = answer_loss(model, tokenizer, images, questions).item()
    assert packed == pytest.approx(np.mean(losses), rel=1e-5)


def test_training_sees_the_pixels_that_the_processor_gives(test_split: corpus.Split) -> None:
    processor: Any = make_processor(make_tokenizer(["x"]))
    by_processor = processor.image_processor(list(test_split.images[:3]), return_tensors="pt").pixel_values
    assert torch.allclose(to_pixels(list(test_split.images[:3])), by_processor, atol=1e-6)


def test_patch_labels_lie_on_the_text(test_split: corpus.Split) -> None:
    person = corpus.make_pools().reading[0]
    blank = np.full((96, 96, 3), 255, np.uint8)
    marked, placement = corpus.mark(blank, person, "somewhere")
    every, first = corpus.patch_labels(person, placement)
    inked = np.asarray((marked < 255).any(-1)).reshape(12, 8, 12, 8).any((1, 3)).reshape(-1)
    touched = np.asarray(every.any(1))
    assert inked[touched].mean() > 0.9 and touched[inked].mean() > 0.6
    named = {corpus.CHARACTERS[index] for index in np.flatnonzero(every.any(0))}
    assert named == set(person.username + person.user_id) & set(corpus.CHARACTERS)
    assert {corpus.CHARACTERS[i] for i in np.flatnonzero(first.any(0))} == {
        person.username[0],
        person.user_id[0],
    }


def test_the_builtin_look_is_legible_at_its_size() -> None:
    seen = marking().seen
    sizes = [corpus.mark(np.zeros((96, 96, 3), np.uint8), person, "s")[1].font_px for person in seen]
    assert np.median(sizes) == 14 and min(sizes) >= 8
    assert LOOK.opacity == 176


def test_every_shipped_file_is_in_the_package() -> None:
    declared = (Path(__file__).parents[2] / "pyproject.toml").read_text("utf-8")
    for file in FOLDER.rglob("*"):
        if file.is_file() and file.suffix not in (".py", ".pyc"):
            folder = file.relative_to(FOLDER).parent.as_posix()
            pattern = file.name if folder == "." else f"{folder}/*"
            assert f'"{pattern}"' in declared, file
