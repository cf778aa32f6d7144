"""A capture as a context: which blocks run, that no hook stays, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mmextract.engine.capture import Capture
from mmextract.engine.images import RejectedSample
from mmextract.engine.models import Adapter
from mmextract.engine.selection import EMBED, parse_positions
from tests.engine import tiny_models
from tests.engine.tiny_adapters import EVERY_LAYER, captured, encode, encode_any, reference_states

WIDTH = tiny_models.HIDDEN_SIZE


@pytest.fixture
def llava(tiny_adapters: dict[str, Adapter]) -> Adapter:
    return tiny_adapters["llava"]


@pytest.fixture
def qwen(tiny_adapters: dict[str, Adapter]) -> Adapter:
    return tiny_adapters["qwen2-vl"]


@pytest.mark.parametrize(("layers", "n_run"), [((EMBED,), 0), ((0,), 1), ((EMBED, 2), 3), ((3,), 4)])
def test_blocks_after_the_last_wanted_layer_do_not_run(
    llava: Adapter, layers: tuple[int, ...], n_run: int
) -> None:
    ran: list[int] = []
    modules = [layer.mlp for layer in llava.model.model.language_model.layers]
    modules += [llava.model.model.language_model.norm, llava.model.lm_head]
    handles = [
        module.register_forward_pre_hook(lambda module, args, n=n: ran.append(n))
        for n, module in enumerate(modules)
    ]
    captured(llava, [encode_any(llava)], layers)
    for handle in handles:
        handle.remove()
    assert ran == list(range(n_run))


def test_no_hook_stays_after_use(llava: Adapter) -> None:
    before = n_hooks(llava)
    captured(llava, [encode_any(llava)])
    assert n_hooks(llava) == before


def test_no_hook_stays_when_the_model_fails(llava: Adapter) -> None:
    before = n_hooks(llava)
    handle = llava.model.get_decoder().layers[1].mlp.register_forward_pre_hook(fail)
    encoded = encode_any(llava)
    with (
        pytest.raises(RuntimeError, match="out of luck"),
        Capture(llava, EVERY_LAYER, parse_positions(["last"])) as capture,
    ):
        capture.run([encoded], out=torch.empty(1, len(EVERY_LAYER), 1, WIDTH))
    handle.remove()
    assert n_hooks(llava) == before
    captured(llava, [encoded])


def fail(module: torch.nn.Module, args: Any) -> None:
    raise RuntimeError("out of luck")


def n_hooks(adapter: Adapter) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in adapter.model.modules())


def test_a_capture_is_usable_again_after_a_failed_batch(llava: Adapter) -> None:
    encoded = encode_any(llava)
    out = torch.empty(1, 1, 1, WIDTH)
    with Capture(llava, (2,), parse_positions(["last"])) as capture:
        handle = llava.model.get_decoder().layers[1].mlp.register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="out of luck"):
            capture.run([encoded], out=out)
        handle.remove()
        capture.run([encoded], out=out)
    assert torch.equal(out[0, 0, 0], reference_states(llava, encoded)[3, -1])


def test_others_may_run_the_model_while_the_hooks_stand(llava: Adapter) -> None:
    encoded = encode_any(llava)
    expected = reference_states(llava, encoded)
    with Capture(llava, EVERY_LAYER, parse_positions(["last"])):
        assert torch.equal(reference_states(llava, encoded), expected)


def test_a_model_that_skips_a_block_is_not_believed(llava: Adapter) -> None:
    decoder, encoded = llava.model.get_decoder(), encode_any(llava)
    depth, decoder.config.num_hidden_layers = decoder.config.num_hidden_layers, 2
    try:
        with pytest.raises(RuntimeError, match="ran 2 of the 3 wanted layers"):
            captured(llava, [encoded], (0, 1, 3))
    finally:
        decoder.config.num_hidden_layers = depth


@pytest.mark.parametrize("layers", [(), (1, 0), (0, 0), (4,), (-2, 0)])
def test_layers_that_are_not_the_models_are_refused(llava: Adapter, layers: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"sorted, distinct layers out of -1 \(embed\) to 3"):
        Capture(llava, layers, parse_positions(["last"]))


@pytest.mark.parametrize(
    "out",
    [
        torch.empty(2, 1, 1, WIDTH),
        torch.empty(1, 2, 1, WIDTH),
        torch.empty(1, 1, 2, WIDTH),
        torch.empty(1, 1, 1, WIDTH + 1),
        torch.empty(1, 1, WIDTH),
        torch.empty(1, 1, 1, WIDTH, dtype=torch.int16),
    ],
    ids=lambda out: f"{out.dtype}{tuple(out.shape)}",
)
def test_a_buffer_of_the_wrong_shape_is_refused(llava: Adapter, out: torch.Tensor) -> None:
    with (
        Capture(llava, (1,), parse_positions(["last"])) as capture,
        pytest.raises(ValueError, match=r"expected a floating point buffer \(1, 1, 1, 32\)"),
    ):
        capture.run([encode_any(llava)], out=out)


def test_a_buffer_with_too_few_tokens_is_refused(llava: Adapter) -> None:
    encoded = encode_any(llava)
    with (
        Capture(llava, (1,), parse_positions(["all"])) as capture,
        pytest.raises(ValueError, match="expected a floating point buffer"),
    ):
        capture.run([encoded], out=torch.empty(1, 1, encoded.n_tokens - 1, WIDTH))


def test_a_position_that_a_sample_lacks_rejects_it(qwen: Adapter) -> None:
    with (
        Capture(qwen, (1,), parse_positions(["image"])) as capture,
        pytest.raises(RejectedSample, match="no image tokens"),
    ):
        capture.run([encode(qwen, "What?", None)], out=torch.empty(1, 1, 1, WIDTH))


def test_samples_of_different_length_are_not_padded_but_refused(llava: Adapter) -> None:
    batch = [encode_any(llava, 0, "What?"), encode_any(llava, 0, "What is it?")]
    with (
        Capture(llava, (1,), parse_positions(["last"])) as capture,
        pytest.raises(ValueError, match="samples of one batch_key"),
    ):
        capture.run(batch, out=torch.empty(2, 1, 1, WIDTH))


def test_run_outside_the_context_is_refused(llava: Adapter) -> None:
    capture = Capture(llava, (1,), parse_positions(["last"]))
    with pytest.raises(RuntimeError, match="inside its `with` block"):
        capture.run([encode_any(llava)], out=torch.empty(1, 1, 1, WIDTH))
