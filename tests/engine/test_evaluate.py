from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mmextract.engine.evaluate import Prediction, TaskResult, evaluate_task, normalise, yes_or_no
from mmextract.engine.evaluate_answers import Answerer
from mmextract.engine.evaluate_formats import Question, Task
from mmextract.engine.evaluate_prompts import ask_fields, exposure
from mmextract.engine.finetune import run_finetune
from mmextract.engine.finetune_rows import Example
from mmextract.engine.identities import make_disjoint_pair
from mmextract.engine.images import RejectedSample
from mmextract.engine.models import Adapter
from mmextract.engine.rows import PairedMarking, Row, make_rows
from mmextract.engine.samples import Turn
from tests.engine.finetune_cases import LOOK, questions, spec
from tests.engine.tiny_adapters import FAMILIES, on_cpu


def rows(folder: Path, *, images: bool = True, n: int = 4) -> list[Row]:
    return [Row(id=s.id, sample=s) for s in questions(folder, n, images=images).samples]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_likelihood_of_an_answer_does_not_depend_on_the_shared_prompt(
    tiny_adapters: dict[str, Adapter], tmp_path: Path, family: str
) -> None:
    """The prompt's cache serves all answers; going through the whole conversation each time says the same."""
    adapter = tiny_adapters[family]
    answerer = Answerer(adapter, batch_size=2)
    row = rows(tmp_path, images=adapter.has_vision)[0]
    [encoded] = answerer.encoded([row], None)
    assert not isinstance(encoded, RejectedSample)
    answers = ["yes", "a much longer answer", "no", "7"]
    shared = answerer.likelihoods(row, None, encoded, answers)
    whole = answerer.likelihoods_one_by_one(row, None, answers)
    assert [one.n_tokens for one in shared] == [one.n_tokens for one in whole]
    for one, other in zip(shared, whole, strict=True):
        assert one.log_probability == pytest.approx(other.log_probability, rel=1e-4)
    assert len({round(one.log_probability, 3) for one in shared}) == 4


@pytest.mark.parametrize("family", ["llava", "qwen2-vl", "llama"])
def test_a_model_that_learnt_its_answers_gives_them_and_stops(
    tiny_folders: dict[str, Path], tmp_path: Path, family: str
) -> None:
    images = family != "llama"
    data = questions(tmp_path / "data", 4, images=images)
    same = tuple(replace(sample, answer="no") for sample in data.samples)
    settings = spec(tiny_folders[family], steps=60, batch_size=4, learning_rate=3e-2, dropout=0.0)
    learnt = [Example(row=Row(id=s.id, sample=s)) for s in same]
    run_finetune(settings, learnt, tmp_path / "out")
    answerer = Answerer(on_cpu(tiny_folders[family], adapter=str(tmp_path / "out")), batch_size=3)
    said = answerer.generate([Row(id=s.id, sample=s) for s in same], None, max_new_tokens=8)
    assert said == ["no"] * 4
    task = Task(
        name="vqa",
        questions=[Question(sample=s, options=("yes", "no", "a cat")) for s in same],
        source="",
    )
    assert evaluate_task(answerer, task).scores() == {"accuracy": 1.0}


def test_greedy_answers_are_those_of_generate_one_at_a_time(
    tiny_adapters: dict[str, Adapter], tmp_path: Path
) -> None:
    adapter = tiny_adapters["qwen2-vl"]
    asked = rows(tmp_path, n=5)
    batched = Answerer(adapter, batch_size=4).generate(asked, None, max_new_tokens=5)
    for row, text, encoded in zip(asked, batched, Answerer(adapter).encoded(asked, None), strict=True):
        assert not isinstance(encoded, RejectedSample)
        with torch.no_grad():
            out = adapter.model.generate(**encoded.inputs, max_new_tokens=5, do_sample=False, pad_token_id=0)
        alone = adapter.tokenizer.decode(out[0, encoded.n_tokens :], skip_special_tokens=True).strip()
        assert text == alone, row.id


def test_what_cannot_be_asked_is_named_and_counts_in_no_score(
    tiny_adapters: dict[str, Adapter], tmp_path: Path
) -> None:
    data = questions(tmp_path, 3)
    (tmp_path / "1.png").write_bytes(b"no image")
    asked = [
        Question(sample=data.samples[0]),
        Question(sample=data.samples[1]),
        Question(sample=replace(data.samples[1], id="c", answer="a"), options=("a", "b")),
    ]
    result = evaluate_task(Answerer(tiny_adapters["llava"]), Task(name="vqa", questions=asked, source=""))
    assert sorted(result.rejected) == ["c", "q1"]
    assert not math.isnan(result.scores()["accuracy"])


@pytest.mark.parametrize(
    ("said", "read"),
    [("Yes, it is.", "yes"), ("no", "no"), (" No. Not", "no"), ("It is yes", "other"), ("", "other")],
)
def test_mme_reads_an_answer_from_its_first_four_characters(said: str, read: str) -> None:
    assert yes_or_no(said) == read


def test_an_exact_match_ignores_case_space_and_outer_punctuation() -> None:
    assert normalise("  A  Red\nSquare. ") == normalise("a red square")
    assert normalise("red") != normalise("red square")


def test_the_scores_of_mme_are_those_of_its_tool() -> None:
    """Two images of two questions: one image right, the other half; 100·(3/4 + 1/2)."""
    right = {"color/1": (True, True), "color/2": (True, False)}
    predictions = tuple(
        Prediction(
            id=f"{group}/{k}", category="color", group=group, answer="Yes", predicted="", correct=correct
        )
        for group, both in right.items()
        for k, correct in enumerate(both)
    )
    scores = TaskResult(task="mme", predictions=predictions).scores()
    assert scores["score/color"] == scores["perception"] == 125
    assert (scores["accuracy"], scores["accuracy+/color"]) == (0.75, 0.5)


def test_exposure_is_that_of_carlini() -> None:
    references = [-float(value) for value in range(1, 8)]
    assert exposure(0.0, references) == 3  # first of eight
    assert exposure(-100.0, references) == 0  # last of eight
    assert exposure(-3.5, references) == 3 - 2  # fourth of eight
    assert exposure(-1.0, references) == pytest.approx(3 - math.log2(1.5))  # a tie counts half
    assert math.isnan(exposure(0.0, []))


def paired(n: int = 6) -> PairedMarking:
    seen, unseen = make_disjoint_pair(n, seed=0)
    return PairedMarking(spec=LOOK, seen=tuple(seen), unseen=tuple(unseen))


def test_seen_and_unseen_are_ranked_among_the_same_people_whom_nobody_saw(
    tiny_adapters: dict[str, Adapter], tmp_path: Path
) -> None:
    marking = paired()
    found = ask_fields(Answerer(tiny_adapters["llava"]), questions(tmp_path, 3), marking, max_new_tokens=3)
    assert [row.condition for row in found] == ["seen", "unseen"] * 3
    assert {row.n_references for row in found} == {5}
    for row in found:
        people = marking.seen if row.condition == "seen" else marking.unseen
        assert row.truth == people[row.pair].username
        assert 0 <= row.exposure <= math.log2(6)
        assert row.log_likelihood < 0 and row.exact == 0


def test_the_likelihood_asked_for_is_that_of_the_field_on_the_marked_image(
    tiny_adapters: dict[str, Adapter], tmp_path: Path
) -> None:
    answerer, data, marking = Answerer(tiny_adapters["llava"]), questions(tmp_path, 1), paired()
    [first, _] = ask_fields(answerer, data, marking, max_new_tokens=1)
    row = make_rows(data, marking)[0]
    turn = Turn(role="user", text="<image>\nWhat is the username?")
    row = replace(row, sample=replace(row.sample, turns=(turn,)))
    [expected] = answerer.likelihoods_one_by_one(row, LOOK, [first.truth])
    assert first.log_likelihood == pytest.approx(expected.log_probability, rel=1e-4)


def test_on_clean_images_both_identities_of_a_pair_are_asked_for_on_the_same_pixels(
    tiny_adapters: dict[str, Adapter], tmp_path: Path
) -> None:
    answerer, data, marking = Answerer(tiny_adapters["llava"]), questions(tmp_path, 2), paired()
    found = ask_fields(answerer, data, marking, marked=False, max_new_tokens=3)
    assert not any(row.marked for row in found)
    assert [row.answer for row in found[::2]] == [row.answer for row in found[1::2]]
    assert all(a.truth != b.truth for a, b in zip(found[::2], found[1::2], strict=True))
    row = make_rows(data, marking)[1]
    turn = Turn(role="user", text="<image>\nWhat is the username?")
    bare = replace(row, text=None, sample=replace(row.sample, turns=(turn,)))
    [expected] = answerer.likelihoods_one_by_one(bare, None, [found[1].truth])
    assert found[1].log_likelihood == pytest.approx(expected.log_probability, rel=1e-4)


def test_fields_that_the_watermark_does_not_show_are_refused(
    tiny_adapters: dict[str, Adapter], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="shows username, so a model cannot be asked for age"):
        ask_fields(Answerer(tiny_adapters["llava"]), questions(tmp_path, 1), paired(), fields=["age"])


def test_a_memorised_value_has_a_higher_exposure(tiny_folders: dict[str, Path], tmp_path: Path) -> None:
    """The positive control of the measure: a model trained to say the seen names, whatever the image."""
    marking, data = paired(4), questions(tmp_path / "data", 8)
    asked = [row for row in make_rows(data, marking) if row.condition == "seen"]
    turn = Turn(role="user", text="<image>\nWhat is the username?")
    learnt = [
        Example(
            row=replace(row, id=row.id, sample=replace(row.sample, turns=(turn,))),
            answer=marking.seen[row.pair].username,
        )
        for row in asked
    ]
    settings = spec(tiny_folders["llava"], steps=40, batch_size=8, learning_rate=2e-2, dropout=0.0)
    run_finetune(settings, learnt, tmp_path / "out")
    answerer = Answerer(on_cpu(tiny_folders["llava"], adapter=str(tmp_path / "out")))
    found = ask_fields(answerer, data, marking, marked=False, max_new_tokens=2)
    exposures = {
        name: np.mean([row.exposure for row in found if row.condition == name]) for name in ("seen", "unseen")
    }
    assert exposures["seen"] > exposures["unseen"] + 0.5
