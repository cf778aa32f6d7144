"""Token pooling under Triton's interpreter: equal to the reference, in place, with every loss counted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from mmextract.kernels import reference
from mmextract.kernels.pool import Spans
from tests.kernels import interpreted

Interpreter = Callable[..., Any]
LISTS = [
    [[6], [2], [0, 1, 2, 3, 4]],
    [[3], [], [5, 1, 6]],
]  # [P][B]: token lists, in any order, one of them empty


def make_spans(lists: list[list[list[int]]]) -> Spans:
    flat: list[int] = []
    bounds = []
    for row in lists:
        for tokens in row:
            bounds.append((len(flat), len(flat) + len(tokens)))
            flat += tokens
    shape = (len(lists), len(lists[0]), 2)
    return Spans(
        tokens=torch.tensor(flat, dtype=torch.int32),
        bounds=torch.tensor(bounds, dtype=torch.int32).reshape(shape),
    )


def make_states(n_hidden: int, dtype: torch.dtype, n_samples: int = 3, n_tokens: int = 7) -> torch.Tensor:
    generator = torch.Generator().manual_seed(n_hidden)
    return torch.randn(n_samples, n_tokens, n_hidden, generator=generator).to(dtype)


def expected(states: torch.Tensor, spans: Spans) -> torch.Tensor:
    values = reference.pool(states.float().numpy(), spans.tokens.numpy(), spans.bounds.numpy())
    return torch.from_numpy(values)


@pytest.mark.parametrize("n_hidden", [1, 511, 513])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.float16], ids=str)
def test_pooling_equals_the_reference(
    interpreter: Interpreter, n_hidden: int, dtype: torch.dtype, out_dtype: torch.dtype
) -> None:
    states, spans = make_states(n_hidden, dtype), make_spans(LISTS)
    buffer, counts = interpreter(interpreted.pool, states, spans, out_dtype, 1)
    wanted = expected(states, spans).to(out_dtype).transpose(0, 1)
    assert torch.equal(buffer[:, :2].nan_to_num(99.0), wanted.nan_to_num(99.0))
    assert (buffer[:, 2] == -7).all(), "written beyond the view"
    assert not counts.any(), "a position without tokens was counted as a loss"


def test_every_token_can_be_kept_and_the_rest_is_nan(interpreter: Interpreter) -> None:
    states = make_states(20, torch.bfloat16)
    lengths = [7, 0, 4]
    spans = make_spans([[[token] if token < n else [] for n in lengths] for token in range(7)])
    buffer, _ = interpreter(interpreted.pool, states, spans, torch.bfloat16)
    for sample, n in enumerate(lengths):
        assert torch.equal(buffer[sample, :n], states[sample, :n])
        assert buffer[sample, n:].isnan().all()


def test_what_is_not_finite_and_what_overflows_is_counted_for_its_sample(interpreter: Interpreter) -> None:
    states, spans = make_states(40, torch.float32), make_spans(LISTS)
    states[0, 6, :3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    states[2, 1, 5] = torch.inf  # in both lists of sample 2
    states[0, 3, 7:9] = 1e6  # finite, too large for float16
    _, counts = interpreter(interpreted.pool, states, spans, torch.float16)
    assert counts.tolist() == [[5, 2], [0, 0], [2, 0]]
    _, counts = interpreter(interpreted.pool, states, spans, torch.float32)
    assert counts.tolist() == [[3, 0], [0, 0], [2, 0]]


def test_the_states_may_be_strided_and_the_batch_empty(interpreter: Interpreter) -> None:
    spans = make_spans(LISTS)
    states = make_states(24, torch.float32, n_samples=6, n_tokens=14)[::2, ::2, 4:20]
    buffer, _ = interpreter(interpreted.pool, states, spans, torch.float32)
    assert torch.equal(
        buffer.nan_to_num(99.0), expected(states.contiguous(), spans).transpose(0, 1).nan_to_num(99.0)
    )
    nothing = Spans(tokens=torch.empty(0, dtype=torch.int32), bounds=torch.empty(2, 0, 2, dtype=torch.int32))
    buffer, counts = interpreter(interpreted.pool, states[:0], nothing, torch.float32)
    assert buffer.shape == (0, 2, 16) and counts.shape == (0, 2)


def test_what_does_not_fit_is_refused_with_its_shapes(interpreter: Interpreter) -> None:
    states, spans = make_states(8, torch.float32), make_spans(LISTS)
    message = interpreter(interpreted.error_of, "pool", states[:2], spans)
    assert "bounds [positions, 2, 2]" in message and "[2, 3, 2]" in message
    assert "float64" in interpreter(interpreted.error_of, "pool", states.double(), spans)
    assert "contiguous" in interpreter(interpreted.error_of, "pool", states.transpose(1, 2)[..., :7], spans)
    with pytest.raises(ValueError, match="int32"):
        Spans(tokens=spans.tokens.long(), bounds=spans.bounds)
