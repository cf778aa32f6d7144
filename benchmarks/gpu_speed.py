"""Sections of `gpu.py`: the card's limits, the kernels against a copy of as many bytes, the peer on the same card.

A copy of as many bytes moves through memory what the kernel must: bytes read and bytes written, half of it each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from gpu_exact import make_spans
from gpu_images import Batch, Kind, kinds, lut_of, make_batch, mixed_sizes
from gpu_setup import Bench, Figure
from mmextract.engine.staging import Slot, Staging
from mmextract.kernels.pool import pool

LOOPS = 10


def ceilings(bench: Bench) -> Iterator[Figure]:
    """Yield the device copy and the matrix product."""
    n_bytes, side = (1 << 16, 64) if bench.smoke else (4 << 30, 8192)
    generator = bench.generator()
    source = torch.randint(0, 256, (n_bytes,), dtype=torch.uint8, device=bench.device, generator=generator)
    target = torch.empty_like(source)
    shape = (side, side)
    left, right = (
        torch.randn(shape, generator=generator, device=bench.device).to(torch.bfloat16) for _ in range(2)
    )
    found = bench.seconds({"copy": lambda: target.copy_(source), "matmul": lambda: left @ right}, loops=LOOPS)
    yield Figure(name="device copy, read and written", value=2 * n_bytes / found["copy"] / 1e9, unit="GB/s")
    yield Figure(
        name=f"bf16 matrix product of side {side}",
        value=2 * side**3 / found["matmul"] / 1e12,
        unit="TFLOP/s",
    )


def images(bench: Bench) -> Iterator[Figure]:
    """Yield, for each family, both passes against copies and against transformers' torchvision backend."""
    for kind in kinds(bench):
        yield from _family(bench, kind)


def _family(bench: Bench, kind: Kind) -> Iterator[Figure]:
    batch = make_batch(bench, kind, mixed_sizes(bench))
    lut, fill = (tensor.to(bench.device) for tensor in lut_of(kind, torch.bfloat16))
    middle = torch.empty(batch.ragged.n_middle, dtype=torch.uint8, device=bench.device)
    out = batch.make_out(torch.bfloat16)
    n_out = out.numel() * out.element_size()

    def both() -> None:
        batch.first(middle)
        batch.second(middle, lut, fill, out=out)

    work: dict[str, Callable[[], object]] = {
        "first pass": lambda: batch.first(middle),
        "copy for first pass": copying(bench, batch.n_source + len(middle)),
        "second pass": lambda: batch.second(middle, lut, fill, out=out),
        "copy for second pass": copying(bench, len(middle) + n_out),
        "both passes": both,
        "copy for both passes": copying(bench, batch.n_source + n_out),
        "both passes in one CUDA graph": bench.replaying(both),
    }
    found = bench.seconds(work, loops=LOOPS)
    for name in ("first pass", "second pass", "both passes"):
        ratio = found[name] / found[f"copy for {name}"]
        yield Figure(name=f"{kind.name}: {name} ÷ copy", value=ratio, unit="×", goal=1.5, must=3)
    ratio = found["both passes in one CUDA graph"] / found["copy for both passes"]
    yield Figure(name=f"{kind.name}: both passes in one CUDA graph ÷ copy", value=ratio, unit="×")
    n_launches = len(batch.ragged.first) + len(batch.ragged.second)
    yield Figure(name=f"{kind.name}: launches of both passes", value=n_launches, unit="")
    n_images = len(batch.pictures)
    yield Figure(
        name=f"{kind.name}: watermark to pixel_values", value=n_images / found["both passes"], unit="images/s"
    )
    yield Figure(
        name=f"{kind.name}: the same", value=batch.n_source / 3e6 / found["both passes"], unit="MP/s"
    )
    peer = bench.seconds({"peer": _peer(bench, batch)}, repeats=3)["peer"]
    yield Figure(
        name=f"{kind.name}: ÷ transformers' torchvision backend here, without a watermark",
        value=found["both passes"] / peer,
        unit="×",
        goal=0.1,
    )
    peak = bench.peak_memory(lambda: batch.run(lut, fill))
    yield Figure(name=f"{kind.name}: memory beside the pixels, of which", value=peak / 1e6, unit="MB")
    yield Figure(name=f"{kind.name}: pixel_values", value=n_out / 1e6, unit="MB")


def _peer(bench: Bench, batch: Batch) -> Callable[[], object]:
    pixels = [torch.from_numpy(image).permute(2, 0, 1).to(bench.device) for image in batch.images]
    processor: Any = batch.kind.processor
    return lambda: processor(pixels, return_tensors="pt", device=bench.device)


def copying(bench: Bench, n_bytes: int) -> Callable[[], object]:
    """Return a device copy that reads and writes `n_bytes` together."""
    shape = (max(n_bytes // 2, 1),)
    source = torch.randint(
        0, 256, shape, dtype=torch.uint8, device=bench.device, generator=bench.generator(1)
    )
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def states(bench: Bench) -> Iterator[Figure]:
    """Yield the pooling kernel against a copy, and staging to the host against a pinned copy."""
    n_samples, n_tokens, n_hidden = (2, 9, 64) if bench.smoke else (64, 700, 4096)
    shape = (n_samples, n_tokens, n_hidden)
    hidden = torch.randn(shape, generator=bench.generator(), device=bench.device).to(torch.bfloat16)
    spans = make_spans(n_samples, n_tokens, bench.device)
    out, counts = pool(hidden, spans, dtype=torch.float32)
    every = make_every_token(n_samples, n_tokens, bench.device)
    all_out, _ = pool(hidden, every)
    read = hidden.nbytes + n_samples * n_hidden * 2  # of three positions one is the last token once more
    work: dict[str, Callable[[], object]] = {
        "pooled": lambda: pool(hidden, spans, out=out, counts=counts),
        "copy for pooled": copying(bench, read + out.nbytes),
        "every token": lambda: pool(hidden, every, out=all_out, counts=counts),
        "copy for every token": copying(bench, hidden.nbytes + all_out.nbytes),
    }
    found = bench.seconds(work, loops=LOOPS)
    for name in ("pooled", "every token"):
        ratio = found[name] / found[f"copy for {name}"]
        yield Figure(name=f"token pooling, {name}, ÷ copy", value=ratio, unit="×", goal=1.5, must=3)
    yield from staging(bench)


def make_every_token(n_samples: int, n_tokens: int, device: torch.device) -> Any:
    """Return the spans that keep every token."""
    from mmextract.kernels.pool import Spans

    begin = torch.arange(n_tokens, dtype=torch.int32, device=device)
    bounds = torch.stack([begin, begin + 1], 1)[:, None].expand(n_tokens, n_samples, 2)
    return Spans(tokens=begin, bounds=bounds.contiguous())


def staging(bench: Bench) -> Iterator[Figure]:
    """Yield the speed of the ring of host buffers into a consumer that does nothing, over a pinned copy's."""
    shape = (2, 4, 3, 16) if bench.smoke else (16, 33, 128, 4096)
    n_batches = 2 if bench.smoke else 8
    device_states = torch.randn(shape, generator=bench.generator(), device=bench.device).to(torch.bfloat16)
    pinned = torch.empty(shape, dtype=torch.bfloat16, pin_memory=not bench.smoke)

    def plain() -> None:
        for _ in range(n_batches):
            pinned.copy_(device_states, non_blocking=True)

    def consume(tag: int, found: torch.Tensor | None) -> None:
        pass

    with Staging(consume, shape=shape, dtype=torch.bfloat16, device=bench.device) as ring:
        _fill(ring, device_states)

        def staged() -> None:
            for number in range(n_batches):
                ring.submit(ring.acquire(), shape[0], number)
            _drain(ring)

        found = bench.seconds({"staged": staged, "plain": plain})
    speed = found["plain"] / found["staged"]
    n_bytes = n_batches * device_states.nbytes
    yield Figure(name="pinned copy to the host", value=n_bytes / found["plain"] / 1e9, unit="GB/s")
    yield Figure(name="staging ÷ pinned copy, speed", value=speed, unit="×", goal=0.9, higher_is_better=True)


N_SLOTS = 3


def _fill(ring: Staging[int], device_states: torch.Tensor) -> None:
    """Put states into every buffer once, so that no copy is of zeros."""
    slots: list[Slot] = [ring.acquire() for _ in range(N_SLOTS)]
    for slot in slots:
        slot.device.copy_(device_states)
        ring.submit(slot, len(device_states), -1)
    _drain(ring)


def _drain(ring: Staging[int]) -> None:
    """Wait until all that was submitted has been consumed: then every buffer is free at once."""
    for slot in [ring.acquire() for _ in range(N_SLOTS)]:
        ring.submit(slot, 0, -1)
