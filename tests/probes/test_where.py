from __future__ import annotations

import numpy as np
import pytest

from mmextract.probes.where import parse_where, select

COLUMNS = {
    "condition": np.array(["seen", "unseen", "clean", "seen"], object),
    "n_tokens": np.array([5, 60, 70, 80]),
    "usable": np.array([True, True, False, True]),
}


@pytest.mark.parametrize(
    ("expression", "kept"),
    [
        ("condition == 'seen'", [0, 3]),
        ("condition != 'seen'", [1, 2]),
        ("condition in ['seen', 'clean']", [0, 2, 3]),
        ("condition not in ('seen',)", [1, 2]),
        ("n_tokens < 70 and condition == 'seen'", [0]),
        ("n_tokens < 10 or n_tokens >= 80", [0, 3]),
        ("10 < n_tokens <= 70", [1, 2]),
        ("not usable", [2]),
        ("usable and not (n_tokens == 5)", [1, 3]),
        ("n_tokens > -1", [0, 1, 2, 3]),
    ],
)
def test_an_expression_keeps_the_samples_for_which_it_holds(expression: str, kept: list[int]) -> None:
    assert np.flatnonzero(select(expression, COLUMNS, 4)).tolist() == kept


@pytest.mark.parametrize(
    "expression",
    [
        "__import__('os').system('true')",
        "condition.__class__ == 'seen'",
        "(lambda: True)()",
        "condition == f'{n_tokens}'",
        "n_tokens + 1 == 6",
        "condition in COLUMNS",
        "condition is None",
        "condition == ",
        "'seen'",
        "",
    ],
)
def test_nothing_but_comparisons_is_understood(expression: str) -> None:
    with pytest.raises(ValueError, match="filter"):
        parse_where(expression)


def test_a_column_that_is_not_there_is_named_with_those_that_are() -> None:
    with pytest.raises(LookupError, match=r"'colour'.*condition, n_tokens, usable"):
        select("colour == 'red'", COLUMNS, 4)


@pytest.mark.parametrize("expression", ["n_tokens == 'seen'", "condition < 3", "n_tokens in ['a']"])
def test_comparing_a_text_with_a_number_is_an_error_and_not_false(expression: str) -> None:
    with pytest.raises(ValueError, match="compares a text with a number"):
        select(expression, COLUMNS, 4)


def test_only_a_truth_value_can_stand_alone() -> None:
    with pytest.raises(ValueError, match=r"n_tokens.*int64"):
        select("n_tokens", COLUMNS, 4)
