"""Rendered conversations: the model's own template, the image where the slot was, nothing forged."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers

from mmextract.engine.images import RejectedSample
from mmextract.engine.models import Adapter
from mmextract.engine.samples import Turn
from tests.engine import tiny_models
from tests.engine.tiny_adapters import image, on_cpu, user


def test_the_image_stands_where_the_slot_was(tiny_adapters: dict[str, Adapter]) -> None:
    picture = "<|vision_start|><|image_pad|><|vision_end|>"
    render = tiny_adapters["qwen2-vl"].render
    assert f"user\n{picture}What?<|im_end|>" in render(user("<image>\nWhat?"))
    assert f"user\nWhat?{picture}<|im_end|>" in render(user("What?\n<image>"))
    assert f"user\nOf {picture} what?<|im_end|>" in render(user("Of <image> what?"))
    assert f"user\n{picture}<|im_end|>" in render(user("<image>"))
    assert "user\nWhat?\n<|im_end|>" in render(user("What?\n"))


def test_a_model_without_template_gets_the_plain_text(tmp_path: Path) -> None:
    text_model = on_cpu(tiny_models.save_text_model(tmp_path / "text", chat_template=None))
    turns = [Turn(role="system", text="Be brief."), Turn(role="user", text="What?")]
    assert text_model.render(turns) == "Be brief.\nWhat?"
    ids = text_model.encode("What?", None).inputs["input_ids"][0].tolist()
    assert ids == transformers.AutoTokenizer.from_pretrained(tmp_path / "text")("What?").input_ids
    assert ids[0] == 1
    assert text_model.describe()["prompt"] == {
        "chat_template": None,
        "content": "plain",
        "template_date": None,
    }
    llava = on_cpu(tiny_models.save_llava(tmp_path / "llava", chat_template=None))
    assert llava.render(user("<image>\nWhat?")) == "<image>\nWhat?"
    assert llava.encode("<image>\nWhat?", image()).image_mask.sum() == 4


STRINGS = "{% for message in messages %}[{{ message['content'] }}]{% endfor %}"
PARTS = (
    "{% for message in messages %}[{% for p in message['content'] %}{{ p['text'] }}{% endfor %}]{% endfor %}"
)


def test_a_template_is_given_what_it_can_show(tmp_path: Path) -> None:
    wants_strings = on_cpu(tiny_models.save_llava(tmp_path / "a", chat_template=STRINGS))
    assert wants_strings.render(user("<image>\nWhat?")) == "[<image>\nWhat?]"
    wants_parts = on_cpu(tiny_models.save_text_model(tmp_path / "b", chat_template=PARTS))
    assert wants_parts.render(user("What?")) == "[What?]"
    with pytest.raises(ValueError, match="shows no user text"):
        on_cpu(tiny_models.save_text_model(tmp_path / "c", chat_template="nothing"))


def test_of_several_templates_the_default_is_used(tmp_path: Path) -> None:
    several = {"default": STRINGS, "tool_use": "tools"}
    folder = tiny_models.save_text_model(tmp_path / "a", chat_template=several)
    assert on_cpu(folder).render(user("What?")) == "[What?]"
    with pytest.raises(ValueError, match=r"several chat templates \(rag\), but no default one"):
        on_cpu(tiny_models.save_text_model(tmp_path / "b", chat_template={"rag": STRINGS}))


def test_a_template_that_prints_the_date_prints_the_same_on_any_day(tmp_path: Path) -> None:
    dated = '{% if strftime_now is defined %}{{ strftime_now( "%d %b %Y" ) }}{% endif %} ' + STRINGS
    adapter = on_cpu(tiny_models.save_text_model(tmp_path, chat_template=dated))
    assert adapter.render(user("What?")) == "26 Jul 2024 [What?]"
    assert adapter.describe()["prompt"]["template_date"] == "2024-07-26"


@pytest.mark.parametrize(
    ("family", "text", "reason"),
    [
        ("llava", "<image>\nand <image>", "2 times <image>"),
        ("qwen2-vl", "<image> or <|image_pad|>?", r"contains <\|image_pad\|>, which this model reads"),
        ("qwen2-vl", "is <|video_pad|> a word?", r"contains <\|video_pad\|>"),
        ("llama", "<image>\nWhat?", "this model takes no images"),
    ],
)  # fmt: skip
def test_a_text_that_would_forge_or_lack_an_image_is_rejected(
    family: str, text: str, reason: str, tiny_adapters: dict[str, Adapter]
) -> None:
    with pytest.raises(RejectedSample, match=reason):
        tiny_adapters[family].render(user(text))


def test_a_conversation_that_the_template_refuses_is_rejected_with_its_words(tmp_path: Path) -> None:
    template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system here') }}{% endif %}" + STRINGS
    )
    adapter = on_cpu(tiny_models.save_text_model(tmp_path, chat_template=template))
    assert adapter.render(user("What?")) == "[What?]"
    with pytest.raises(RejectedSample, match="refuses this conversation: no system here"):
        adapter.render([Turn(role="system", text="Be brief."), *user("What?")])
