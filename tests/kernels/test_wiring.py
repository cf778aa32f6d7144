"""A model whose images go through the kernels, under Triton's interpreter: the inputs are the processor's own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mmextract.engine.watermark import Stamp
from tests.engine import tiny_models
from tests.engine.tiny_adapters import image
from tests.kernels import wired

Interpreter = Callable[..., Any]
SIZES = [(40, 90), (90, 40), (31, 33), (28, 28), (9, 11), (70, 66)]
PROMPTS = {
    "llava": "USER: <image>\n{} ASSISTANT:",
    "qwen2-vl": "<|vision_start|><|image_pad|><|vision_end|>{}",
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("wired")
    return {
        "llava": tiny_models.save_llava(root / "llava"),
        "qwen2-vl": tiny_models.save_qwen2_vl(root / "qwen2-vl", most_image_tokens=4),
        "padded": tiny_models.save_llava(root / "padded", pad_to_square=True),
    }


def samples(family: str) -> list[wired.Sample]:
    """Images of many sizes, two of three with a watermark, some with the same mask, some with one that is cut off."""
    glyphs = [np.random.default_rng(n).integers(0, 256, (5, 8), np.uint8) for n in range(2)]
    stamps = []
    for n, (height, width) in enumerate(SIZES):
        x, y = [(n, 1), (-3, -2), (width - 4, height - 3)][n // 2]
        stamps.append(Stamp(alpha=glyphs[n % 2], x=x, y=y, color=(250, 3 * n, 120)) if n % 3 else None)
    text = PROMPTS[family].format("what?")
    return [(text, image(n, *size), stamp) for n, (size, stamp) in enumerate(zip(SIZES, stamps, strict=True))]


@pytest.mark.parametrize("name", ["llava", "qwen2-vl", "padded"])
def test_the_inputs_of_every_batch_are_those_of_the_processor(
    interpreter: Interpreter, folders: dict[str, Path], name: str
) -> None:
    given = samples("qwen2-vl" if name == "qwen2-vl" else "llava")
    wanted = wired.collated(folders[name], "processor", given)
    got = interpreter(wired.collated, folders[name], "kernels", given)
    assert len(got) == len(wanted) == (1 if name != "qwen2-vl" else len(wanted))
    for ours, theirs in zip(got, wanted, strict=True):
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            assert ours[key].dtype == value.dtype and torch.equal(ours[key], value), key


def test_an_image_waits_as_it_was_decoded_and_its_canvas_takes_no_memory(
    interpreter: Interpreter, folders: dict[str, Path]
) -> None:
    height, width = 3, 400  # on a canvas of 400 × 400
    assert (
        interpreter(wired.packed_bytes, folders["padded"], image(0, height, width)) < 1.1 * 3 * height * width
    )


def test_an_image_that_the_kernels_cannot_take_joins_its_batch_all_the_same(
    interpreter: Interpreter, folders: dict[str, Path]
) -> None:
    given = samples("llava")[:3]
    wanted = wired.collated(folders["llava"], "processor", given)[0]["pixel_values"]
    assert torch.equal(interpreter(wired.with_one_on_the_cpu, folders["llava"], given), wanted)
    assert interpreter(wired.waits_when_wide, folders["llava"], 50)
    assert not interpreter(
        wired.waits_when_wide, folders["llava"], 2**25
    )  # wider than a row that they can address


def test_what_the_processor_refuses_is_refused_in_its_words(
    interpreter: Interpreter, folders: dict[str, Path]
) -> None:
    given = (PROMPTS["qwen2-vl"].format(""), image(0, 2, 500), None)
    message = interpreter(wired.refusal, folders["qwen2-vl"], "kernels", given)
    assert message == wired.refusal(folders["qwen2-vl"], "processor", given) != ""


@pytest.mark.parametrize("positions", [["last", "-2", "first"], ["all"]], ids=" ".join)
def test_a_token_comes_out_of_the_pooling_kernel_to_the_bit(
    interpreter: Interpreter, folders: dict[str, Path], positions: list[str]
) -> None:
    extra = 3 if positions == ["all"] else 0
    given = samples("llava")[:3]
    states, counts = interpreter(wired.pooled, folders["llava"], given, positions, True, extra)
    wanted, none = interpreter(wired.pooled, folders["llava"], given, positions, False, extra)
    assert torch.equal(states.nan_to_num(1e9), wanted.nan_to_num(1e9))
    assert torch.equal(counts, none) and not none.any()
    assert states.isnan().any() == bool(extra)


def test_a_mean_is_as_near_as_float32_allows(interpreter: Interpreter, folders: dict[str, Path]) -> None:
    given, positions = samples("llava")[:3], ["mean", "image", "prompt"]
    states, _ = interpreter(wired.pooled, folders["llava"], given, positions, True)
    wanted, _ = interpreter(wired.pooled, folders["llava"], given, positions, False)
    torch.testing.assert_close(states, wanted, rtol=1e-5, atol=1e-6)


def test_masks_are_held_until_there_is_no_more_room_and_none_is_ever_wrong(interpreter: Interpreter) -> None:
    glyphs = [np.random.default_rng(n).integers(0, 256, (6, 5 + n), np.uint8) for n in range(9)]
    orders = [[0, 1, 0], [1, 2], [3, 4], [0], [5, 6, 7, 8], [8, 0]]
    found = wired.cached_glyphs(120, [[glyphs[n] for n in order] for order in orders])
    for order, (there, room) in zip(orders, found, strict=True):
        assert all(np.array_equal(mask, glyphs[n]) for n, mask in zip(order, there, strict=True))
        assert room >= 120
    assert found[3][1] == 120 and found[4][1] == sum(glyphs[n].size for n in (5, 6, 7, 8))
