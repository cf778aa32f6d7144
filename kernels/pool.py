"""Token pooling: from a block's output [B, T, D] to [P, B, D], in one launch, counting what is not finite.

A position of a sample is a list of its tokens: one (the last, an index), many (the mean over an image), or none (past
a sample's end), and keeping every token is one position a token. The sum is in float32, token after token, so it is
the same on every device.

It knows nothing about prompts, layers or buffers on the host.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mmextract.kernels.triton_support import jit, require_device, tl

BLOCK = 512
"""Hidden units of one program."""
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True, kw_only=True)
class Spans:
    """Which tokens each position of each sample pools, on the device of the states."""

    tokens: torch.Tensor
    """int32, flat: the lists of tokens, one after the other, in any order and shared as may be."""
    bounds: torch.Tensor
    """int32 [P, B, 2]: where a list begins and ends in `tokens`; if at the same place, the result is NaN."""

    def __post_init__(self) -> None:
        if self.bounds.dim() != 3 or self.bounds.shape[2] != 2 or self.tokens.dim() != 1:
            raise ValueError(
                f"expected tokens [n] and bounds [positions, samples, 2], got {list(self.tokens.shape)} and "
                f"{list(self.bounds.shape)}"
            )
        if {self.tokens.dtype, self.bounds.dtype} != {torch.int32}:
            raise ValueError(f"expected int32, got {self.tokens.dtype} and {self.bounds.dtype}")


@jit
def _pool_kernel(  # type: ignore[no-untyped-def]
    states_ptr,  # [B, T, D], rows of D contiguous
    tokens_ptr,  # int32
    bounds_ptr,  # int32 [P, B, 2]
    out_ptr,  # [P, B, D], rows of D contiguous
    counts_ptr,  # int32 [B, 2]
    n_samples,
    n_hidden,
    states_by_sample,  # strides, in elements
    states_by_token,
    out_by_position,
    out_by_sample,
    BLOCK: tl.constexpr,
):
    position = (tl.program_id(0) // n_samples).to(tl.int64)
    sample = (tl.program_id(0) % n_samples).to(tl.int64)
    unit = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    valid = unit < n_hidden
    begin = tl.load(bounds_ptr + (position * n_samples + sample) * 2)
    end = tl.load(bounds_ptr + (position * n_samples + sample) * 2 + 1)
    sample_ptr = states_ptr + sample * states_by_sample + unit

    total = tl.zeros((BLOCK,), tl.float32)
    for index in tl.range(begin, end, loop_unroll_factor=4):
        token = tl.load(tokens_ptr + index).to(tl.int64)
        total += tl.load(sample_ptr + token * states_by_token, mask=valid, other=0).to(tl.float32)
    # IEEE division: 0 / 0 is the NaN of an empty list, and the mean of one token is that token
    mean = tl.div_rn(total, tl.zeros((BLOCK,), tl.float32) + (end - begin).to(tl.float32))
    value = mean.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + position * out_by_position + sample * out_by_sample + unit, value, mask=valid)

    stored = value.to(tl.float32)
    lost = valid & ((stored - stored) != 0) & (begin < end)  # NaN or infinite
    overflown = lost & ((mean - mean) == 0)
    n_lost = tl.sum(lost.to(tl.int32), axis=0)
    if n_lost > 0:
        tl.atomic_add(counts_ptr + sample * 2, n_lost)
        tl.atomic_add(counts_ptr + sample * 2 + 1, tl.sum(overflown.to(tl.int32), axis=0))


def pool(
    states: torch.Tensor,
    spans: Spans,
    *,
    out: torch.Tensor | None = None,
    counts: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pool the tokens of `states` and count the values that are not finite.

    states: float [B, T, D], D contiguous. out: [P, B, D] of any strides but D contiguous, such as a view into a staging
    buffer; made in `dtype` (default: that of the states) if not given. counts: int32 [B, 2], which is added to: values
    of `out` that are not finite, and those of them that were finite before the cast; made of zeros if not given.
    Given both nothing is allocated, nothing waits, and the launch may be captured in a CUDA graph.

    Returns (out, counts). Raises ValueError for shapes and dtypes that do not fit. Token numbers are trusted.
    """
    n_samples, _, n_hidden = states.shape
    n_positions = spans.bounds.shape[0]
    if out is None:
        out = states.new_empty((n_positions, n_samples, n_hidden), dtype=dtype or states.dtype)
    if counts is None:
        counts = torch.zeros((n_samples, 2), dtype=torch.int32, device=states.device)
    _require(states, spans, out, counts)
    require_device(spans.tokens, spans.bounds, counts, states[:0, :0], out[:0, :0])
    if out.numel():
        grid = (n_positions * n_samples, -(-n_hidden // BLOCK))
        strides = (*states.stride()[:2], *out.stride()[:2])
        _pool_kernel[grid](
            states, spans.tokens, spans.bounds, out, counts, n_samples, n_hidden, *strides, BLOCK=BLOCK
        )
    return out, counts


def _require(states: torch.Tensor, spans: Spans, out: torch.Tensor, counts: torch.Tensor) -> None:
    n_samples, _, n_hidden = states.shape
    shape = (spans.bounds.shape[0], n_samples, n_hidden)
    if spans.bounds.shape[1] != n_samples or tuple(out.shape) != shape:
        raise ValueError(
            f"states {list(states.shape)} pool into {list(shape)} with bounds [positions, {n_samples}, 2], "
            f"got out {list(out.shape)} and bounds {list(spans.bounds.shape)}"
        )
    if states.dtype not in DTYPES or out.dtype not in DTYPES:
        raise ValueError(f"states and out must be one of {DTYPES}, got {states.dtype} and {out.dtype}")
    if counts.dtype != torch.int32 or tuple(counts.shape) != (n_samples, 2):
        raise ValueError(f"counts must be int32 {[n_samples, 2]}, got {counts.dtype} {list(counts.shape)}")
    if n_hidden > 1 and (states.stride(2) != 1 or out.stride(2) != 1):
        raise ValueError("the hidden units of states and out must be contiguous")
