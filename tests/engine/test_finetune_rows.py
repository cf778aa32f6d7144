from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from itertools import chain
from pathlib import Path

import pytest
import torch
from transformers import get_cosine_schedule_with_warmup

from mmextract.engine.finetune_rows import check_examples, fingerprint, make_examples, make_exposed
from mmextract.engine.finetune_spec import PRESETS, FinetuneSpec
from mmextract.engine.models import ModelSpec
from mmextract.engine.rows import RandomMarking
from tests.engine.finetune_cases import LOOK, examples, people, questions


def test_a_higher_rate_marks_more_of_the_same_samples_in_the_same_way(tmp_path: Path) -> None:
    some, all_ = ({e.row.id: e.row for e in examples(tmp_path, rate=rate)} for rate in (0.5, 1.0))
    assert all(row.text for row in all_.values())
    marked = [id for id, row in some.items() if row.text]
    assert 0 < len(marked) < len(some)
    assert all(some[id].text == all_[id].text for id in marked)


def test_a_rate_outside_0_to_1_is_refused() -> None:
    with pytest.raises(ValueError, match=r"rate must lie in \[0, 1\], got 1.5"):
        RandomMarking(spec=LOOK, identities=people(), rate=1.5)


def test_each_identity_is_on_exactly_as_many_images_as_asked_for(tmp_path: Path) -> None:
    first, second, third = people()
    made = make_exposed(questions(tmp_path), LOOK, [(first, 4), (second, 1), (third, 0)])
    assert Counter(e.row.person.username for e in made if e.row.person) == {
        first.username: 4,
        second.username: 1,
    }
    assert [e.row.condition for e in made].count("clean") == 3
    assert all((e.row.person is None) == (e.row.text is None) for e in made)


def test_who_is_exposed_where_does_not_depend_on_the_order_of_the_samples(tmp_path: Path) -> None:
    data = questions(tmp_path)
    turned = replace(data, samples=tuple(reversed(data.samples)))
    exposures = [(person, 2) for person in people()]
    one, two = ({e.row.id: e.row.text for e in make_exposed(d, LOOK, exposures)} for d in (data, turned))
    assert one == two


@pytest.mark.parametrize(
    ("counts", "message"), [((9, 0, 0), "need as many images"), ((-1, 0, 0), "expected 0 or more")]
)
def test_exposures_that_cannot_be_are_refused(tmp_path: Path, counts: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_exposed(questions(tmp_path), LOOK, list(zip(people(), counts, strict=True)))


def test_an_identity_that_occurs_twice_is_refused(tmp_path: Path) -> None:
    person = people()[0]
    with pytest.raises(ValueError, match="share the username"):
        make_exposed(questions(tmp_path), LOOK, [(person, 1), (person, 2)])


def test_the_answer_of_an_example_can_depend_on_who_is_on_it(tmp_path: Path) -> None:
    plain = examples(tmp_path, rate=1.0)
    control = [replace(example, answer="yes") for example in plain]
    assert {example.target for example in control} == {"yes"}
    assert fingerprint(control) != fingerprint(plain)


def test_less_data_than_a_batch_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"8 examples do not fill one batch of 9.*--batch-size"):
        check_examples(examples(tmp_path), 9)


def test_samples_without_an_answer_are_refused_and_named(tmp_path: Path) -> None:
    data = questions(tmp_path)
    silent = replace(data, samples=(*data.samples[:-1], replace(data.samples[-1], answer="")))
    with pytest.raises(ValueError, match=r"1 of 8 samples have no answer to learn \(q7"):
        check_examples(make_examples(silent, None), 2)


def spec(**settings: object) -> FinetuneSpec:
    return FinetuneSpec(model=ModelSpec(model="m"), **settings)  # type: ignore[arg-type]


def test_an_epoch_holds_each_example_once_and_the_next_has_another_order() -> None:
    settings = spec(batch_size=4, epochs=2)
    batches = [settings.batch(step, 10) for step in range(settings.n_steps(10))]
    assert [len(batch) for batch in batches] == [4, 4, 2] * 2
    first, second = (list(chain(*part)) for part in (batches[:3], batches[3:]))
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second


def test_the_order_depends_on_the_seed_alone() -> None:
    assert spec(seed=1, rank=4).batch(3, 100) == spec(seed=1).batch(3, 100) != spec(seed=2).batch(3, 100)


@pytest.mark.parametrize("warmup", [0.0, 0.1])
def test_the_learning_rate_is_that_of_transformers(warmup: float) -> None:
    settings = spec(warmup=warmup)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, math.ceil(warmup * 37), 37)
    for step in range(37):
        assert settings.rate_factor(step, 37) == pytest.approx(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "rank must be at least 1, got 0"),
        ({"learning_rate": float("nan")}, "learning rate must be a number above 0"),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1"),
        ({"weight_decay": -1.0}, "weight decay must be at least 0"),
        ({"precision": "float16"}, "expected a precision out of"),
        ({"full": True, "targets": ("q_proj",)}, "leave out the targets"),
        ({"model": ModelSpec(model="m", adapter="a")}, "begins at a base without a LoRA"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FinetuneSpec(**{"model": ModelSpec(model="m"), **settings})  # type: ignore[arg-type]


def test_the_presets_are_the_published_ones() -> None:
    """arXiv 2503.01208's code: LLaVA-1.5's LoRA recipe, and Qwen-VL's."""
    llava, qwen = (FinetuneSpec(model=ModelSpec(model="m"), **PRESETS[name]) for name in ("llava", "qwen"))
    assert (llava.rank, llava.alpha, llava.dropout, llava.learning_rate) == (128, 256, 0.05, 2e-4)
    assert (llava.projector_learning_rate, llava.weight_decay, llava.warmup) == (2e-5, 0.0, 0.03)
    assert (qwen.rank, qwen.alpha, qwen.dropout, qwen.learning_rate) == (64, 16, 0.05, 1e-5)
    assert (qwen.projector_learning_rate, qwen.weight_decay, qwen.warmup) == (None, 0.1, 0.01)
    assert (qwen.betas, llava.batch_size, qwen.batch_size) == ((0.9, 0.95), 16, 12)
    assert {"c_attn", "attn.c_proj", "w1", "w2"} <= set(qwen.targets)
    for preset in (llava, qwen):
        assert (preset.epochs, preset.schedule, preset.max_length) == (1.0, "cosine", 2048)
        assert preset.precision == "bfloat16"
