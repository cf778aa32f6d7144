from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText

from mmextract.engine import builtin
from mmextract.engine.finetune_data import (
    IGNORED,
    Prepared,
    Preparer,
    answer_loss,
    collate,
    marked_pixels,
    micro_batches,
)
from mmextract.engine.images import RejectedSample
from mmextract.engine.models import Adapter
from mmextract.engine.rows import Row
from mmextract.engine.samples import Sample, Turn
from tests.engine.finetune_cases import LOOK, examples, questions
from tests.engine.tiny_adapters import FAMILIES, image, on_cpu

CPU = torch.device("cpu")


def row(*texts: str) -> Row:
    """A conversation, the user first; without an image source, for pixels are passed by hand."""
    roles = ("user", "assistant")
    turns = tuple(Turn(role=roles[i % 2], text=text) for i, text in enumerate(texts))
    return Row(id="r", sample=Sample(id="r", image=None, turns=turns, answer="", columns={}))


def prepare(adapter: Adapter, texts: tuple[str, ...], answer: str, seed: int = 0) -> Prepared:
    shown = ("<image>\n" + texts[0], *texts[1:]) if adapter.has_vision else texts
    pixels = image(seed) if adapter.has_vision else None
    return Preparer(adapter, None, 2048).encode(row(*shown), answer, pixels)


def learnt(adapter: Adapter, prepared: Prepared) -> str:
    text = adapter.tokenizer.decode(prepared.labels[prepared.labels != IGNORED])
    assert isinstance(text, str)
    return text


ENDS = {
    "llava": " It is red</s>",  # LLaVA's template ends no turn, so the tokenizer's EOS does
    "llava-siglip": " It is red</s>",
    "qwen2-vl": "It is red<|im_end|>",
    "llama": "It is red<|im_end|>",
    "qwen2": "It is red<|im_end|>",
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_answer_and_the_token_that_ends_it_are_learnt_and_nothing_else(
    tiny_adapters: dict[str, Adapter], family: str
) -> None:
    adapter = tiny_adapters[family]
    prepared = prepare(adapter, ("What is it?",), "It is red")
    assert learnt(adapter, prepared) == ENDS[family]
    assert bool((prepared.labels[-prepared.n_answer_tokens :] != IGNORED).all())


@pytest.mark.parametrize("family", FAMILIES)
def test_what_stands_before_the_answer_is_the_prompt_that_dump_and_generation_use(
    tiny_adapters: dict[str, Adapter], family: str
) -> None:
    adapter = tiny_adapters[family]
    turn = Turn(role="user", text="<image>\nWhat is it?" if adapter.has_vision else "What is it?")
    prompt = adapter.encode(adapter.render([turn]), image() if adapter.has_vision else None)
    ids = prepare(adapter, ("What is it?",), "It is red").inputs["input_ids"]
    assert torch.equal(ids[:, : prompt.n_tokens], prompt.inputs["input_ids"])


@pytest.mark.parametrize("family", FAMILIES)
def test_every_turn_of_the_assistant_is_learnt(tiny_adapters: dict[str, Adapter], family: str) -> None:
    adapter = tiny_adapters[family]
    text = learnt(adapter, prepare(adapter, ("What is it?", "A cat", "Which color?"), "Red"))
    assert text.count("A cat") == text.count("Red") == 1
    assert "color" not in text and "What" not in text and "USER" not in text and "user" not in text


def test_the_built_in_model_learns_what_it_was_trained_to_write() -> None:
    adapter = on_cpu(Path(builtin.locate_model("builtin:base")[0]))
    assert learnt(adapter, prepare(adapter, ("what shape is it?",), "circle")) == " circle</s>"


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_changes_no_loss(tiny_adapters: dict[str, Adapter], family: str) -> None:
    adapter = tiny_adapters[family]
    items = [
        prepare(adapter, ("What is it?",), "It is a rather long answer", 1),
        prepare(adapter, ("Is it?",), "no", 2),
    ]
    with torch.no_grad():
        alone = [answer_loss(adapter.model, collate([item], 0), CPU) for item in items]
        together = answer_loss(adapter.model, collate(items, 0), CPU)
    assert together[1] == sum(n for _, n in alone)
    torch.testing.assert_close(together[0], sum((loss for loss, _ in alone), torch.zeros(())))


@pytest.mark.parametrize("family", ["llava", "qwen2-vl", "llama"])
def test_the_loss_is_that_of_transformers(tiny_adapters: dict[str, Adapter], family: str) -> None:
    adapter = tiny_adapters[family]
    item = prepare(adapter, ("What is it?",), "It is red")
    with torch.no_grad():
        expected = adapter.model(**item.inputs, labels=item.labels[None]).loss
        summed, n = answer_loss(adapter.model, collate([item], 0), CPU)
    torch.testing.assert_close(summed / n, expected)


def test_texts_of_one_length_are_not_padded(tiny_adapters: dict[str, Adapter]) -> None:
    items = [prepare(tiny_adapters["llava"], ("What is it?",), answer) for answer in ("yes", "two")]
    batch = collate(items, 0)
    assert batch["input_ids"].shape == (2, len(items[0].labels))
    assert bool(batch["attention_mask"].all())


def test_text_alone_and_images_go_through_the_model_apart(tiny_adapters: dict[str, Adapter]) -> None:
    adapter = tiny_adapters["llava"]
    text_only = Preparer(adapter, None, 2048).encode(row("What is it?"), "yes", None)
    with_image = prepare(adapter, ("What is it?",), "yes")
    groups = micro_batches([text_only, with_image, text_only], 8)
    assert [len(group) for group in groups] == [2, 1]
    with pytest.raises(ValueError, match="one batch_key"):
        collate([text_only, with_image], 0)


def test_a_marked_row_shows_its_watermark_and_a_clean_one_its_image(tmp_path: Path) -> None:
    for example in examples(tmp_path):
        original = marked_pixels(Row(id="x", sample=example.row.sample), None)
        shown = marked_pixels(example.row, LOOK)
        assert original is not None and shown is not None
        assert np.array_equal(shown, original) == (example.row.text is None)


def test_a_watermark_without_a_look_is_refused(tmp_path: Path) -> None:
    marked = next(example for example in examples(tmp_path, rate=1.0))
    with pytest.raises(ValueError, match="nothing says how it looks"):
        marked_pixels(marked.row, None)


def test_an_example_that_is_too_long_is_rejected_not_cut(
    tiny_adapters: dict[str, Adapter], tmp_path: Path
) -> None:
    data = questions(tmp_path)
    with pytest.raises(RejectedSample, match=r"tokens, and --max-length is 10"):
        Preparer(tiny_adapters["llava"], None, 10).encode(Row(id="a", sample=data.samples[0]), "yes", image())


def test_an_answer_that_the_model_reads_as_a_placeholder_is_rejected(
    tiny_adapters: dict[str, Adapter],
) -> None:
    with pytest.raises(RejectedSample, match="one image a sample"):
        prepare(tiny_adapters["llava"], ("What is it?",), "an <image>")


def test_a_template_that_rewrites_its_prompt_is_refused(
    tiny_adapters: dict[str, Adapter], tmp_path: Path
) -> None:
    from tests.engine import tiny_models

    template = "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    adapter = on_cpu(tiny_models.save_text_model(tmp_path / "m", chat_template=template))
    with pytest.raises(ValueError, match="does not begin with its own prompt"):
        prepare(adapter, ("What?",), "yes")


def test_the_built_in_loss_is_that_of_a_plain_transformers_call() -> None:
    folder = builtin.locate_model("builtin:base")[0]
    adapter = on_cpu(Path(folder))
    item = prepare(adapter, ("what shape is it?",), "circle")
    model = AutoModelForImageTextToText.from_pretrained(folder)
    with torch.no_grad():
        expected = model(**item.inputs, labels=item.labels[None]).loss
        summed, n = answer_loss(adapter.model, collate([item], 0), CPU)
    torch.testing.assert_close(summed / n, expected)
