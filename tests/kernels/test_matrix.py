"""The kernels, watermark and all, against Pillow and torchvision themselves: a sample here, all with `-m kernels`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from mmextract.kernels.resample import Filter, Mode
from tests.kernels import matrix

Interpreter = Callable[..., Any]
N_SAMPLED = 4
"""Random cases of each filter and mode in every run of the tests."""
N_SHARES, N_A_SHARE = 5, 40
"""And in the full matrix: 200 of each, in shares that processes can divide among them."""


@pytest.mark.parametrize(("filter", "mode"), matrix.PAIRS)
def test_a_sample_of_random_resizes_equals_the_library(
    interpreter: Interpreter, filter: Filter, mode: Mode
) -> None:
    assert interpreter(matrix.random_cases, filter, mode, 0, N_SAMPLED) == []


def test_a_watermark_across_every_edge_of_a_photo_equals_pillow(interpreter: Interpreter) -> None:
    assert interpreter(matrix.photo_cases, "bicubic", matrix.INSTALLED, "astronaut") == []


@pytest.mark.kernels
@pytest.mark.parametrize("share", range(N_SHARES))
@pytest.mark.parametrize(("filter", "mode"), matrix.PAIRS)
def test_every_random_resize_equals_the_library(
    interpreter: Interpreter, filter: Filter, mode: Mode, share: int
) -> None:
    assert interpreter(matrix.random_cases, filter, mode, share + 1, N_A_SHARE) == []


@pytest.mark.kernels
@pytest.mark.parametrize("photo", matrix.PHOTOS)
@pytest.mark.parametrize(("filter", "mode"), matrix.PAIRS)
def test_every_photo_equals_the_library(
    interpreter: Interpreter, filter: Filter, mode: Mode, photo: str
) -> None:
    assert interpreter(matrix.photo_cases, filter, mode, photo) == []
