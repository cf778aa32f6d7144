"""Part of section `dump` of `gpu.py`: a whole dump of image files ÷ the bare forward pass of its very batches.

Counted: reading JPEG files (from the page cache) and decoding them in threads; copy to the device, watermark and
preprocessing by the kernels; the forward pass with capture of every layer; staging; assembly, encoding, checksums and
digests of the shards, in float32, the default for such models; the lease, every commit, flushed to disk, and the
store's beginning and end. Not counted: loading and planning; compiling the kernels and pinning the ring's memory,
which an unmeasured dump of a few images has done.

pooled: into a real store, on the disk that temporary files are on. all tokens: into a null sink. All is done as ever,
and records and digests are written, but the encoded states are dropped where they would go to that disk, which could
not keep up. Nothing of the encoding is left out: it is measured with the default codec, and with none.

bare forward: no hooks; its inputs are those that a dump in the same shards was seen to give the model, in its order,
and they lie on the device.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from gpu_capture import GOALS, POSITIONS, batch_sizes, question
from gpu_images import Kind, Size
from gpu_setup import Bench, Figure
from mmextract.engine.direct import Buffer
from mmextract.engine.dump import DumpPlan, DumpSpec, DumpSummary, plan_dump, run_dump
from mmextract.engine.identities import Identity
from mmextract.engine.models import Adapter
from mmextract.engine.objects import LocalObjects
from mmextract.engine.rows import RandomMarking
from mmextract.engine.samples import Dataset, read_samples
from mmextract.engine.watermark import WatermarkSpec

FILES_A_SIZE = 4
"""Different images of each size; each is dumped many times, with another watermark."""
REPEATS = 2


@dataclass(frozen=True, kw_only=True)
class Case:
    """What of each sample is dumped, and where to."""

    positions: str
    """A key of POSITIONS."""
    codecs: Mapping[str, str]
    """Codec → how the table calls a dump with it."""
    keeps_states: bool
    """False for the null sink."""
    n_samples: int
    """So many that the store's beginning and end do not count for much."""
    batch_size: int
    """With all tokens a shard is one sample by default, as that is more than its usual bytes; so is a batch."""


CASES = (
    Case(positions="pooled", codecs={"lz4": "pooled"}, keeps_states=True, n_samples=320, batch_size=8),
    Case(
        positions="all tokens",
        codecs={"lz4": "all tokens, null sink", "none": "all tokens, null sink, uncompressed"},
        keeps_states=False,
        n_samples=32,
        batch_size=1,
    ),
)


class WithoutStates(LocalObjects):
    """A store in a folder as any other, but that the shards of its hidden states are dropped and not written."""

    def put_all(
        self, objects: Mapping[str, Sequence[Buffer]], on_read: Callable[[], None] = lambda: None
    ) -> None:
        """Write all of `objects` but hidden states."""
        kept = {key: objects[key] for key in objects if not key.startswith("hidden_states/c/")}
        super().put_all(kept, on_read)


class Dumps:
    """Dumps a plan, each time it is called into a new place in a folder."""

    def __init__(self, plan: DumpPlan, adapter: Adapter, folder: Path, *, keeps_states: bool) -> None:
        self.plan = plan
        self._adapter, self._folder = adapter, folder
        self._make_place = LocalObjects if keeps_states else WithoutStates
        self.summaries: list[DumpSummary] = []
        """Of all dumps so far."""

    def __call__(self) -> None:
        """Dump. Raises RuntimeError if that was not every sample, or not in the batches that were asked for."""
        summary = run_dump(
            self.plan, self._adapter, self._make_place(self._folder / str(len(self.summaries)))
        )
        if summary.rejected:
            raise RuntimeError(f"samples were rejected: {summary.rejected}")
        if summary.n_split:
            raise RuntimeError(f"the device has no room for batches of {self.plan.spec.batch_size} samples")
        self.summaries.append(summary)

    @property
    def seconds_around(self) -> float:
        """Seconds that a dump took before its first shard was begun and after its last one was committed."""
        around = [summary.seconds - sum(summary.stage_seconds.values()) for summary in self.summaries]
        return statistics.median(around[-REPEATS:])


def measure(bench: Bench, kind: Kind, adapter: Adapter, model: str) -> Iterator[Figure]:
    """Yield the figures of one model, which the table calls `model`."""
    with tempfile.TemporaryDirectory(prefix="mmextract-gpu-") as folder:
        cases = [replace(case, n_samples=2, batch_size=1) for case in CASES] if bench.smoke else CASES
        dataset = write_samples(bench, Path(folder) / "samples", max(case.n_samples for case in cases))
        for case in cases:
            few = replace(dataset, samples=dataset.samples[: case.n_samples])
            yield from _measure(bench, adapter, few, case, model, Path(folder) / case.positions)


def _measure(
    bench: Bench, adapter: Adapter, dataset: Dataset, case: Case, model: str, folder: Path
) -> Iterator[Figure]:
    def dumps(dataset: Dataset, codec: str, name: str) -> Dumps:
        plan = make_plan(bench, adapter, dataset, case, codec=codec)
        return Dumps(plan, adapter, folder / name, keeps_states=case.keeps_states)

    wholes = {codec: dumps(dataset, codec, codec) for codec in case.codecs}
    n_sizes = len(batch_sizes(bench))  # so many batches hold images of every size
    few = dumps(replace(dataset, samples=dataset.samples[: n_sizes * case.batch_size]), "lz4", "few")
    few()  # to warm up
    layout = wholes["lz4"].plan.layout
    batches = record(bench, adapter, dataset, case, layout.shard_samples, folder / "recorded")

    def forward(n_batches: int | None = None) -> None:
        for inputs in batches[:n_batches]:
            adapter.forward(inputs)

    found = bench.seconds({"forward": forward, **wholes}, repeats=min(bench.repeats, REPEATS), warm_up=False)
    n_samples = case.n_samples
    peak = bench.peak_memory(few) - bench.peak_memory(lambda: forward(n_sizes))
    title = f"{model}, {case.positions}"
    yield Figure(
        name=f"{title}: bare forward, {case.batch_size} a batch",
        value=n_samples / found["forward"],
        unit="images/s",
    )
    yield Figure(name=f"{title}: dump, peak memory beyond the forward's", value=peak / 1e6, unit="MB")
    for codec, name in case.codecs.items():
        dump, title, seconds = wholes[codec], f"{model}, {name}", found[codec]
        goal, n_bytes = GOALS[case.positions], n_samples * dump.plan.bytes_per_sample
        yield Figure(
            name=f"{title}: dump ÷ bare forward", value=seconds / found["forward"], unit="×", goal=goal
        )
        inner = (seconds - dump.seconds_around) / found["forward"]
        yield Figure(name=f"{title}: the same without the store's beginning and end", value=inner, unit="×")
        yield Figure(name=f"{title}: dump", value=n_samples / seconds, unit="images/s")
        yield Figure(
            name=f"{title}: dump, states before encoding", value=n_bytes / seconds / 1e9, unit="GB/s"
        )


def record(
    bench: Bench, adapter: Adapter, dataset: Dataset, case: Case, shard_samples: int, folder: Path
) -> list[dict[str, torch.Tensor]]:
    """Return what a dump in shards of so many samples gives the model: one mapping a batch, on the device.

    The batches do not depend on the layers, so that one, behind which the forward pass ends, will do.
    """
    plan = make_plan(bench, adapter, dataset, case, layers="0", shard_samples=shard_samples)
    with recording(adapter) as batches:
        Dumps(plan, adapter, folder, keeps_states=False)()
    assert sum(len(inputs["input_ids"]) for inputs in batches) == case.n_samples
    return batches


@contextmanager
def recording(adapter: Adapter) -> Iterator[list[dict[str, torch.Tensor]]]:
    """Collect, inside, the tensors of each forward pass."""
    batches: list[dict[str, torch.Tensor]] = []

    def keep(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        batches.append({name: value for name, value in kwargs.items() if isinstance(value, torch.Tensor)})

    handle = adapter.model.base_model.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        yield batches
    finally:
        handle.remove()


def write_samples(bench: Bench, folder: Path, n_samples: int) -> Dataset:
    """Write JPEG files and a list of samples that take their sizes in turn; return the list as it is read again."""
    folder.mkdir()
    rng, sizes, names = np.random.default_rng(bench.seed), batch_sizes(bench), []
    for number in range(FILES_A_SIZE * len(sizes)):
        names.append(f"{number}.jpg")
        _photo(rng, sizes[number % len(sizes)]).save(folder / names[-1], quality=90)
    lines = [
        {"id": str(row), "image": names[row % len(names)], "question": question(bench)}
        for row in range(n_samples)
    ]
    (folder / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    return read_samples(folder / "samples.jsonl")


def _photo(rng: np.random.Generator, size: Size) -> Image.Image:
    """Return smooth colours under a grain, which JPEG makes about as many bytes of as of a photo."""
    height, width = size
    coarse = rng.integers(0, 256, (height // 24 + 2, width // 24 + 2, 3), np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
    grainy = smooth + rng.normal(0, 6, smooth.shape)
    return Image.fromarray(np.clip(grainy, 0, 255).astype(np.uint8))


def make_plan(bench: Bench, adapter: Adapter, dataset: Dataset, case: Case, **more: Any) -> DumpPlan:
    """Plan a dump of every image with a watermark. more: other fields of `DumpSpec`."""
    look = WatermarkSpec(fields=("username",), field_names=False) if bench.smoke else WatermarkSpec()
    spec = DumpSpec(
        dataset=dataset,
        model=adapter.spec,
        marking=RandomMarking(spec=look, identities=_people(8), rate=1),
        positions=POSITIONS[case.positions],
        batch_size=case.batch_size,
        **more,
    )
    plan = plan_dump(spec, adapter)
    # a plan leaves the pooling kernel to GPUs, and here it may be interpreted
    return replace(plan, kernel_pooling=True) if bench.smoke else plan


def _people(n: int) -> tuple[Identity, ...]:
    return tuple(
        Identity(
            username=f"u{number}",
            user_id=f"{4_830_000_000 + number}",
            gender="female",
            age=str(20 + number),
            capture_time="2019-05-04 12:30",
            capture_location="Port Elena",
        )
        for number in range(n)
    )
