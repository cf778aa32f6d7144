"""Captured states against transformers' own and against independent hooks, in float32 on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from mmextract.engine.capture import Capture
from mmextract.engine.models import Adapter, ModelSpec, load
from mmextract.engine.selection import EMBED, parse_positions
from tests.engine import tiny_models
from tests.engine.tiny_adapters import (
    EVERY_LAYER,
    FAMILIES,
    captured,
    encode,
    encode_any,
    image,
    on_cpu,
    reference_states,
    user,
)

N_LAYERS, WIDTH = tiny_models.N_LAYERS, tiny_models.HIDDEN_SIZE


@pytest.fixture(scope="module")
def adapters(
    tiny_adapters: dict[str, Adapter], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Adapter]:
    root = tmp_path_factory.mktemp("right")
    right = {f"{name}-right": on_cpu(save(root / name, "right")) for name, save in FAMILIES.items()}
    return right | {f"{name}-left": adapter for name, adapter in tiny_adapters.items()}


@pytest.fixture(params=[f"{name}-{side}" for name in FAMILIES for side in ("left", "right")])
def adapter(request: pytest.FixtureRequest, adapters: dict[str, Adapter]) -> Adapter:
    return adapters[request.param]


@pytest.fixture
def llava(tiny_adapters: dict[str, Adapter]) -> Adapter:
    return tiny_adapters["llava"]


@pytest.fixture
def qwen(tiny_adapters: dict[str, Adapter]) -> Adapter:
    return tiny_adapters["qwen2-vl"]


def test_every_state_of_one_sample_equals_transformers_bit_for_bit(adapter: Adapter) -> None:
    encoded = encode_any(adapter)
    assert torch.equal(captured(adapter, [encoded])[0], reference_states(adapter, encoded))


def test_the_last_block_is_captured_before_the_final_norm(adapter: Adapter) -> None:
    encoded = encode_any(adapter)
    ours = captured(adapter, [encoded], [N_LAYERS - 1])[:, 0]
    with torch.no_grad():
        theirs = adapter.model(**encoded.inputs, output_hidden_states=True).hidden_states[-1]
        assert torch.equal(adapter.model.get_decoder().norm(ours), theirs)
    assert not torch.equal(ours, theirs)


def test_single_tokens_are_the_states_themselves_and_pools_their_means(adapter: Adapter) -> None:
    encoded = encode_any(adapter, 1)
    positions = ["last", "first", "-2", "7", "mean", "prompt", *(["image"] if adapter.has_vision else [])]
    pooled = captured(adapter, [encoded], EVERY_LAYER, positions)[0]
    states = reference_states(adapter, encoded)
    mask = encoded.image_mask
    for number, token in enumerate((-1, 0, -2, 7)):
        assert torch.equal(pooled[:, number], states[:, token])
    spans = [torch.ones_like(mask), ~mask, mask]
    for number, span in enumerate(spans[: len(positions) - 4], 4):
        assert span.any()
        torch.testing.assert_close(pooled[:, number], states[:, span].mean(1), rtol=1e-5, atol=1e-6)


def test_a_batch_equals_its_samples_alone_but_for_rounding(adapter: Adapter) -> None:
    # not bit for bit: a matrix product of more rows is blocked, and so summed, differently
    questions = ("What is it?", "Where is it", "Who is she!")
    batch = [encode_any(adapter, seed, question) for seed, question in enumerate(questions)]
    together = captured(adapter, batch)
    for states, encoded in zip(together, batch, strict=True):
        alone = captured(adapter, [encoded])[0]
        assert (states - alone).abs().max() <= 1e-5 * alone.abs().max()
    assert not torch.allclose(together[0], together[1], rtol=1e-2)


def test_samples_of_a_batch_may_have_their_images_at_different_places(qwen: Adapter) -> None:
    few, many = encode(qwen, "What is it?", image(0, 28, 56)), encode(qwen, "What is", image(1, 56, 84))
    later = qwen.encode(qwen.render(user("What is it? <image>See:")), image(2, 28, 56))
    batch = [many, few, later, many]
    assert len({encoded.n_tokens for encoded in batch}) == 1
    assert [int(encoded.image_mask.sum()) for encoded in batch] == [6, 2, 2, 6]
    assert not torch.equal(few.image_mask, later.image_mask)
    pooled = captured(qwen, batch, EVERY_LAYER, ("image", "last", "prompt"))
    for row, encoded in zip(pooled, batch, strict=True):
        states, mask = reference_states(qwen, encoded), encoded.image_mask
        expected = [states[:, mask].mean(1), states[:, -1], states[:, ~mask].mean(1)]
        torch.testing.assert_close(row, torch.stack(expected, 1), rtol=1e-5, atol=1e-5)
    alike = captured(qwen, [few, later], (1,), ("image",))[:, 0, 0]
    for row, encoded in zip(alike, (few, later), strict=True):
        expected_mean = reference_states(qwen, encoded)[2, encoded.image_mask].mean(0)
        torch.testing.assert_close(row, expected_mean, rtol=1e-5, atol=1e-5)


def test_one_image_token_is_copied_not_averaged(qwen: Adapter) -> None:
    encoded = encode(qwen, "What?", image(0, 28, 28))
    assert int(encoded.image_mask.sum()) == 1
    states = reference_states(qwen, encoded)[:, encoded.image_mask]
    assert torch.equal(captured(qwen, [encoded], EVERY_LAYER, ("image",))[0], states)


def test_layers_keep_their_numbers_whatever_else_is_asked_for(llava: Adapter) -> None:
    encoded = encode_any(llava)
    states = reference_states(llava, encoded)
    for layers in [(EMBED,), (0,), (2,), (EMBED, 3), (1, 3), (0, 1, 2)]:
        expected = states[[layer + 1 for layer in layers]]
        assert torch.equal(captured(llava, [encoded], layers)[0], expected), layers


def test_every_token_mode_marks_what_lies_beyond_a_sample_as_nan(llava: Adapter) -> None:
    encoded = encode_any(llava)
    out = torch.zeros(1, 2, encoded.n_tokens + 5, WIDTH)
    with Capture(llava, (0, 1), parse_positions(["all"])) as capture:
        capture.run([encoded], out=out)
        assert not capture.nonfinite.any()
    assert torch.equal(out[0, :, : encoded.n_tokens], reference_states(llava, encoded)[1:3])
    assert out[:, :, encoded.n_tokens :].isnan().all()


def test_the_buffer_may_be_a_part_of_a_larger_one(llava: Adapter) -> None:
    whole = torch.full((4, 3, 2, WIDTH), 7.0)
    encoded = encode_any(llava)
    with Capture(llava, (1, 2), parse_positions(["last", "mean"])) as capture:
        capture.run([encoded, encoded], out=whole[1:3, 1:])
    assert (whole[[0, 3]] == 7).all()
    assert (whole[:, 0] == 7).all()
    assert not (whole[1:3, 1:] == 7).any()


def test_results_do_not_depend_on_what_ran_before(qwen: Adapter) -> None:
    plain, pictured = encode(qwen, "What is it?", None), encode(qwen, "What is it?", image(0))
    with Capture(qwen, EVERY_LAYER, parse_positions(["last"])) as capture:
        out = torch.empty(3, 1, len(EVERY_LAYER), 1, WIDTH)
        for slot, encoded in zip(out, (plain, pictured, plain), strict=True):
            capture.run([encoded], out=slot)
    assert torch.equal(out[0], out[2])
    for slot, encoded in zip(out, (plain, pictured), strict=False):
        assert torch.equal(slot[0, :, 0], reference_states(qwen, encoded)[:, -1])


def test_bfloat16_states_are_held_exactly_by_a_float32_buffer(tmp_path: Path) -> None:
    folder = str(tiny_models.save_llava(tmp_path))
    adapter = load(ModelSpec(model=folder, device="cpu", dtype="bfloat16"))
    encoded = encode_any(adapter)
    exact = captured(adapter, [encoded], EVERY_LAYER, ("last",), torch.bfloat16)
    wide = captured(adapter, [encoded], EVERY_LAYER, ("last",), torch.float32)
    assert torch.equal(exact.float(), wide)
    with torch.no_grad():
        inputs = {k: v.to(torch.bfloat16) if v.is_floating_point() else v for k, v in encoded.inputs.items()}
        theirs = adapter.model(**inputs, output_hidden_states=True).hidden_states
    assert torch.equal(exact[0, :-1, 0], torch.stack(theirs[:-1])[:, 0, -1])
    means = captured(adapter, [encoded], EVERY_LAYER, ("mean",))[0, :-1, 0]
    torch.testing.assert_close(means, torch.stack(theirs[:-1])[:, 0].float().mean(1), rtol=1e-5, atol=1e-6)


@contextmanager
def scaled(adapter: Adapter, layer: int, factor: float) -> Iterator[None]:
    """Multiply what a block passes on."""
    block = adapter.model.get_decoder().layers[layer]
    handle = block.register_forward_hook(lambda block, args, output: output * factor)
    yield
    handle.remove()


def test_an_overflow_of_the_buffer_is_counted_by_sample_and_layer(llava: Adapter) -> None:
    batch = [encode_any(llava, seed) for seed in (0, 1)]
    out = torch.empty(2, 2, 2, WIDTH, dtype=torch.float16)
    with scaled(llava, 2, 1e6):
        wide = captured(llava, batch, (1, 2), ("last", "mean"))
        with Capture(llava, (1, 2), parse_positions(["last", "mean"])) as capture:
            capture.run(batch, out=out)
    lost = (wide.abs() >= 65520).sum((2, 3)).int()  # halfway from float16's largest to the next
    assert (lost[:, 1] > 10).all()
    assert torch.equal(capture.overflow, lost)
    assert torch.equal(capture.nonfinite, lost)
    assert torch.equal(out[:, 0], wide[:, 0].half())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_what_is_not_finite_in_the_model_is_counted_apart_from_overflow(
    llava: Adapter, dtype: torch.dtype
) -> None:
    with scaled(llava, 1, torch.inf), Capture(llava, (0, 1), parse_positions(["last"])) as capture:
        capture.run([encode_any(llava)], out=torch.empty(1, 2, 1, WIDTH, dtype=dtype))
    assert capture.nonfinite.tolist() == [[0, WIDTH]]
    assert capture.overflow.tolist() == [[0, 0]]


def test_an_infinite_image_token_does_not_reach_the_mean_of_the_text(llava: Adapter) -> None:
    encoded = encode_any(llava)

    def spoil(block: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        return output.masked_fill(encoded.image_mask[None, :, None], torch.inf)

    handle = llava.model.get_decoder().layers[1].register_forward_hook(spoil)
    out = captured(llava, [encoded], (1,), ("prompt", "image"))
    handle.remove()
    assert out[0, 0, 0].isfinite().all()
    assert out[0, 0, 1].isinf().all()
