"""Layer and position expressions: what they select, and what a wrong one is told."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmextract.engine.images import RejectedSample
from mmextract.engine.selection import EMBED, Position, parse_layers, parse_positions


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("all", tuple(range(12))),
        ("embed", (EMBED,)),
        ("embed,all", (EMBED, *range(12))),
        ("0,4,8", (0, 4, 8)),
        ("8-11", (8, 9, 10, 11)),
        ("-1", (11,)),
        ("-12", (0,)),
        ("-4--2", (8, 9, 10)),
        ("8--1", (8, 9, 10, 11)),
        ("::4", (0, 4, 8)),
        ("2:10:2", (2, 4, 6, 8)),
        ("2:12", tuple(range(2, 12))),
        ("-3:", (9, 10, 11)),
        (":-9", (0, 1, 2)),
        (" 3 , 1,3, embed,1-2", (EMBED, 1, 2, 3)),
    ],
)
def test_layers_are_sorted_and_distinct(text: str, expected: tuple[int, ...]) -> None:
    assert parse_layers(text, 12) == expected


@given(st.integers(1, 40), st.data())
def test_slices_select_what_python_selects(n_layers: int, data: st.DataObject) -> None:
    start = data.draw(st.one_of(st.none(), st.integers(-n_layers, n_layers - 1)))
    stop = data.draw(st.one_of(st.none(), st.integers(-n_layers, n_layers)))
    step = data.draw(st.one_of(st.none(), st.integers(1, 5)))
    expected = tuple(range(n_layers))[slice(start, stop, step)]
    text = ":".join("" if part is None else str(part) for part in (start, stop, step))
    if expected:
        assert parse_layers(text, n_layers) == expected
    else:
        with pytest.raises(ValueError, match="selects none"):
            parse_layers(text, n_layers)


@pytest.mark.parametrize("text", ["12", "-13", "5-12", "3,99", "2:13", "13:", "99999"])
def test_a_layer_out_of_range_is_told_the_valid_range(text: str) -> None:
    with pytest.raises(ValueError, match=r"out of range: the model has layers 0 to 11 .*-12 to -1"):
        parse_layers(text, 12)


@pytest.mark.parametrize(
    "text", ["", "first", "1,,2", "1.5", "a-b", "1:2:3:4", "0x3", "--1", "1 2", "²", "9" * 5000]
)
def test_what_is_no_layer_is_told_what_is(text: str) -> None:
    with pytest.raises(ValueError, match="not understood: expected all, embed, an index"):
        parse_layers(text, 12)


@pytest.mark.parametrize("text", ["8-4", "8:4", "4:4", "-1:0"])
def test_an_empty_selection_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="selects none"):
        parse_layers(text, 12)


def test_a_step_of_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="step must be at least 1"):
        parse_layers("::0", 12)


MASK = torch.tensor([False, True, True, True, False, False])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("last", [5]),
        ("first", [0]),
        ("-2", [4]),
        ("-6", [0]),
        ("3", [3]),
        ("mean", [0, 1, 2, 3, 4, 5]),
        ("image", [1, 2, 3]),
        ("prompt", [0, 4, 5]),
        ("all", [0, 1, 2, 3, 4, 5]),
    ],
)
def test_a_position_names_its_tokens(name: str, expected: list[int]) -> None:
    tokens = Position(name).tokens(MASK)
    assert tokens.dtype == np.int64
    assert tokens.tolist() == expected


@pytest.mark.parametrize("name", ["6", "-7", "400"])
def test_an_index_beyond_the_sample_rejects_it_with_its_length(name: str) -> None:
    with pytest.raises(RejectedSample, match=rf"position {name} is out of range: the sample has 6 tokens"):
        Position(name).tokens(MASK)


def test_a_sample_without_image_tokens_is_rejected_for_image() -> None:
    with pytest.raises(RejectedSample, match="position image: the sample has no image tokens"):
        Position("image").tokens(torch.zeros(4, dtype=torch.bool))


def test_a_sample_of_image_tokens_alone_is_rejected_for_prompt() -> None:
    with pytest.raises(RejectedSample, match="position prompt: the sample has no text tokens"):
        Position("prompt").tokens(torch.ones(4, dtype=torch.bool))


@pytest.mark.parametrize("name", ["last", "first", "0", "-1", "mean", "image", "prompt", "all"])
def test_an_empty_sample_is_rejected_for_every_position(name: str) -> None:
    with pytest.raises(RejectedSample):
        Position(name).tokens(torch.zeros(0, dtype=torch.bool))


def test_positions_keep_their_order_and_indices_get_one_spelling() -> None:
    assert [p.name for p in parse_positions(["prompt", " last", "-2", "05"])] == ["prompt", "last", "-2", "5"]


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        ([], "at least one position"),
        (["middle"], "'middle' not understood: expected last, first"),
        (["1.5"], "not understood"),
        (["last", "last"], "asked for once"),
        (["5", "05"], "asked for once"),
        (["all", "last"], "goes with no other"),
    ],
)
def test_wrong_positions_are_refused(names: list[str], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse_positions(names)
