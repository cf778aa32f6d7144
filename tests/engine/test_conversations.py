"""Whatever the dialect, a record becomes turns up to the user's last, with a slot where it has an image."""

from typing import Any

import pytest

from mmextract.engine.conversations import Dialect, Turn, guess_dialect, parse_conversation


def llava(*texts: str, **columns: Any) -> dict[str, Any]:
    """Return a record of alternating turns, the human's first."""
    speakers = ("human", "gpt")
    turns = [{"from": speakers[i % 2], "value": text} for i, text in enumerate(texts)]
    return {"id": "1", **columns, "conversations": turns}


def qwen(*contents: Any, **columns: Any) -> dict[str, Any]:
    """Return a record of alternating messages, the user's first."""
    roles = ("user", "assistant")
    return {**columns, "messages": [{"role": roles[i % 2], "content": c} for i, c in enumerate(contents)]}


def user(text: str) -> Turn:
    return Turn(role="user", text=text)


def assistant(text: str) -> Turn:
    return Turn(role="assistant", text=text)


IMAGE_PART = {"type": "image", "image": "a.png"}


@pytest.mark.parametrize(
    ("record", "turns", "answer", "image"),
    [
        ({"question": "What?", "image": "a.png", "answer": "x"}, [user("<image>\nWhat?")], "x", "a.png"),
        ({"question": "See <image> here", "img": "a.png"}, [user("See <image> here")], "", "a.png"),
        ({"prompt": "What?", "image": "", "answer": 3}, [user("What?")], "3", None),
        ({"text": "What?", "image": None, "answer": True}, [user("What?")], "true", None),
        (llava("<image>\nWhat?", "x", image="a.png"), [user("<image>\nWhat?")], "x", "a.png"),
        (llava("What?", "x"), [user("What?")], "x", None),
        (llava("<image>", image=["a.png"]), [user("<image>")], "", "a.png"),
        (
            llava("<image>a", "b", "c", "d", image="a.png"),
            [user("<image>a"), assistant("b"), user("c")],
            "d",
            "a.png",
        ),
        (llava("a", "b", "c"), [user("a"), assistant("b"), user("c")], "", None),
        (
            {"conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "q"}]},
            [Turn(role="system", text="s"), user("q")],
            "",
            None,
        ),
        (
            llava("Picture 1: <img>d/a.png</img>\nWhat?", "x"),
            [user("Picture 1: <image>\nWhat?")],
            "x",
            "d/a.png",
        ),
        (qwen([IMAGE_PART, {"type": "text", "text": "What?"}], "x"), [user("<image>What?")], "x", "a.png"),
        (qwen([{"type": "text", "text": "What? "}, IMAGE_PART]), [user("What? <image>")], "", "a.png"),
        (
            qwen([{"type": "image"}, {"type": "text", "text": "q"}], image="a.png"),
            [user("<image>q")],
            "",
            "a.png",
        ),
        (qwen("<image>q", images=["a.png"]), [user("<image>q")], "", "a.png"),
        (qwen("q", [{"type": "text", "text": "x"}]), [user("q")], "x", None),
        (
            qwen([{"type": "image_url", "image_url": {"url": "file:///d/a.png"}}]),
            [user("<image>")],
            "",
            "file:///d/a.png",
        ),
    ],
)
def test_records_of_every_dialect_become_turns(
    record: dict[str, Any], turns: list[Turn], answer: str, image: str | None
) -> None:
    found = parse_conversation(record)
    assert (list(found.turns), found.answer, found.image) == (turns, answer, image)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"image": "a.png"}, "no question: expected a column question, prompt, text"),
        ({"question": " "}, "must be a text that is not empty"),
        ({"question": 5}, "must be a text that is not empty, got 5"),
        ({"question": "<image>?"}, "slot .*, but the sample has no image"),
        ({"question": "<image> <image>", "image": "a.png"}, "2 image slots, where one is supported"),
        (llava("What?", "x", image="a.png"), "no image slot: write <image>"),
        (llava("<image>What?", "x"), "slot .*, but the sample has no image"),
        (llava("<image><image>", image="a.png"), "2 image slots"),
        (llava("<image><image>", image=["a.png", "b.png"]), r"2 images in one sample \(a.png, b.png\)"),
        (llava("<img>a.png</img><img>b.png</img>?"), "2 images in one sample"),
        (llava("<img>a.png</img><img>a.png</img>?"), "2 image slots"),
        (llava("a", "<image>", "c", image="a.png"), "in a turn of the assistant"),
        (llava(), "nothing to answer"),
        (llava(" "), "turn 0 is empty"),
        ({"conversations": [{"from": "gpt", "value": "x"}]}, "no turn of `conversations` is the user's"),
        ({"conversations": [{"from": "tool", "value": "x"}]}, "turn 0 must have one of system, human, user"),
        ({"conversations": ["hello"]}, "turn 0 must have one of"),
        (
            {"conversations": [{"from": "human", "value": None}]},
            "turn 0 must have a text in `value`, got None",
        ),
        ({"messages": [{"role": "user", "content": None}]}, "a text or a list of parts in `content`"),
        (qwen([{"type": "video", "video": "a.mp4"}]), "parts of type text or image, got"),
        (qwen([IMAGE_PART, {"type": "image", "image": "b.png"}]), "2 images in one sample"),
        (qwen([IMAGE_PART], image="b.png"), "2 images in one sample"),
        (qwen([{"type": "image"}]), "slot .*, but the sample has no image"),
    ],
)
def test_what_is_wrong_with_a_record_is_said(record: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_conversation(record)


def test_a_prompt_replaces_the_conversation_and_keeps_image_and_answer() -> None:
    long = llava("<image>a", "b", "c", "d", image="a.png")
    found = parse_conversation(long, prompt="Who?")
    assert (found.turns, found.answer, found.image) == ((user("<image>\nWho?"),), "d", "a.png")
    assert parse_conversation(long, prompt="Who is <image>?").turns == (user("Who is <image>?"),)
    assert parse_conversation(llava("a"), prompt="Who?").turns == (user("Who?"),)
    assert parse_conversation({"image": "a.png"}, prompt="Who?").turns == (user("<image>\nWho?"),)


def test_with_a_prompt_the_slots_of_the_record_do_not_matter_but_its_image_does() -> None:
    assert parse_conversation(llava("no slot", image="a.png"), prompt="Who?").image == "a.png"
    with pytest.raises(ValueError, match=r"slot .*, but the sample has no image"):
        parse_conversation(llava("q"), prompt="<image> Who?")


def test_a_column_is_used_up_only_if_its_content_is_in_the_conversation() -> None:
    record = {"question": "q", "prompt": "p", "image": "a.png", "file_name": "f", "answer": "x", "label": 1}
    assert parse_conversation(record).used >= {"question", "image", "answer"}
    assert not parse_conversation(record).used & {"prompt", "file_name", "label"}
    assert "question" not in parse_conversation(record, prompt="Who?").used


def test_the_forced_dialect_decides_what_a_tag_is() -> None:
    record = llava("Explain <img>a.png</img>")
    assert parse_conversation(record, dialect="qwen").image == "a.png"
    assert parse_conversation(record, dialect="llava").turns == (user("Explain <img>a.png</img>"),)
    both = {**llava("in conversations"), **qwen("in messages")}
    assert parse_conversation(both, dialect="llava").turns == (user("in conversations"),)
    assert parse_conversation(both, dialect="qwen").turns == (user("in messages"),)


@pytest.mark.parametrize(
    ("dialect", "expected"), [("llava", "`conversations`"), ("qwen", "`messages` or `conv")]
)
def test_a_record_without_the_forced_dialects_turns_is_refused(dialect: Dialect, expected: str) -> None:
    with pytest.raises(ValueError, match=rf"needs a list of turns in {expected}.*the record has question"):
        parse_conversation({"question": "q"}, dialect=dialect)


def test_dialects_are_told_apart_by_what_marks_the_image() -> None:
    assert guess_dialect(llava("<image>q")) == guess_dialect(llava("<img>a</img>", image="a.png")) == "llava"
    assert guess_dialect(llava("<img>a</img>")) == guess_dialect(qwen("q")) == "qwen"
    assert guess_dialect(llava("q")) is None and guess_dialect({"question": "<image>"}) is None
