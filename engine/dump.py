"""The whole run: plan it, hold the store, have its missing shards written, finish it.

Who writes the shards, this process or the workers of a cluster, is a function that `run_dump` is given or makes;
`pipeline` is what both do. This module composes the others; it draws nothing on a screen.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from mmextract.engine import pooling
from mmextract.engine.completion import complete
from mmextract.engine.images import RejectedSample, measure
from mmextract.engine.layout import Layout
from mmextract.engine.lease import Lease
from mmextract.engine.models import Adapter, ModelSpec
from mmextract.engine.objects import Objects
from mmextract.engine.pipeline import Recipe, ShardRows, Written, in_order, torch_threads, write_shards
from mmextract.engine.rows import Marking, Row, describe_marking, make_columns, make_rows
from mmextract.engine.samples import Dataset
from mmextract.engine.selection import Position, parse_layers, parse_positions
from mmextract.engine.store import read_attributes
from mmextract.engine.writer import StoreWriter, open_writer

SHARD_BYTES = 64 << 20
"""Size of a shard's states before compression, unless its number of samples is given."""

IMAGE_RECORD_FIELDS = ("n_tokens", "n_nonfinite", "image_hash", "image_height", "image_width")
TEXT_RECORD_FIELDS = ("n_tokens", "n_nonfinite")
WATERMARK_RECORD_FIELDS = ("watermark_x", "watermark_y", "watermark_font_px")


@dataclass(frozen=True, kw_only=True)
class DumpSpec:
    """What to dump. Everything here but `threads` decides the store's bytes."""

    dataset: Dataset
    """Samples."""
    model: ModelSpec
    """What `adapter` was loaded from."""
    marking: Marking | None = None
    """Watermarks to put on the images, if any."""
    layers: str = "all"
    """See `selection.parse_layers`."""
    positions: tuple[str, ...] = ("last",)
    """See `selection.parse_positions`."""
    dtype: str = "auto"
    """`float32`, `float16`, `bfloat16`; auto is float16 for a float16 model and float32 for any other."""
    batch_size: int = 16
    """Most samples of a forward pass; all have the same number of tokens."""
    shard_samples: int | None = None
    """Samples of a shard; None chooses by SHARD_BYTES."""
    codec: str = "lz4"
    """See `shards.CODECS`."""
    max_tokens: int | None = None
    """Length of the position axis with `all`; None measures the longest sample first."""
    threads: int = field(default_factory=lambda: max(2, os.cpu_count() or 2))
    """Threads that decode and encode."""
    torch_threads: int | None = None
    """Threads that torch computes in on a CPU; None is torch's own number. A store that is there keeps its number."""

    def __post_init__(self) -> None:
        numbers = {
            "batch size": self.batch_size,
            "threads": self.threads,
            "torch threads": self.torch_threads,
        }
        for name, value in numbers.items():
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.shard_samples is not None and self.shard_samples < 1:
            raise ValueError(f"a shard needs at least 1 sample, got {self.shard_samples}")


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """What a plan needs to know of a model: all that is found out by loading it, and small."""

    n_layers: int
    """Decoder blocks."""
    hidden_size: int
    """D."""
    has_vision: bool
    """Whether it takes images."""
    dtype: str
    """Of its hidden states."""
    device: str
    """The type of device that it is on."""
    torch_threads: int | None
    """Threads that torch computes in; None where that makes no difference."""
    preprocessing: Mapping[str, Any] | None
    """See `Preprocessing.describe`; None for a model that takes no images."""
    kernel_pooling: bool
    """Whether the pooling kernel takes the states, rather than torch."""
    description: Mapping[str, Any]
    """See `Adapter.describe`."""


@dataclass(frozen=True, kw_only=True)
class DumpPlan:
    """A run, planned to the last shape; see `plan_dump`."""

    spec: DumpSpec
    rows: Sequence[Row]
    layout: Layout
    positions: tuple[Position, ...]
    attributes: Mapping[str, Any]
    kernel_pooling: bool = False

    @property
    def bytes_per_sample(self) -> int:
        """Bytes of one sample's states before compression."""
        layout = self.layout
        width = 4 if layout.dtype == "float32" else 2
        return len(layout.layers) * len(layout.positions) * layout.hidden_size * width

    @property
    def recipe(self) -> Recipe:
        """How rows become states."""
        return Recipe(
            layout=self.layout,
            positions=self.positions,
            watermark=self.spec.marking.spec if self.spec.marking else None,
            batch_size=self.spec.batch_size,
            threads=self.spec.threads,
            kernel_pooling=self.kernel_pooling,
        )

    def shard_rows(self, shard: int) -> ShardRows:
        """Return the rows of one shard."""
        rows = self.layout.rows(shard)
        return ShardRows(shard=shard, rows=self.rows[rows.start : rows.stop])


@dataclass(kw_only=True)
class DumpSummary:
    """What a run did."""

    n_samples: int
    """Rows of the store."""
    n_resumed: int = 0
    """Rows that an earlier run had committed."""
    bytes_written: int = 0
    """Bytes of encoded states."""
    seconds: float = 0.0
    """Wall time, the model's loading not included."""
    rejected: dict[str, str] = field(default_factory=dict)
    """Sample id → why it has no states, for the whole store."""
    n_nonfinite: int = 0
    """Samples of this run that hold a NaN or an infinity."""
    nonfinite_layers: Mapping[int, int] = field(default_factory=dict)
    """Layer → samples of this run that hold one there."""
    n_split: int = 0
    """Batches of this run that the GPU had no room for, and that ran in parts."""
    stage_seconds: dict[str, float] = field(default_factory=dict)
    """How long the run waited for each stage."""

    @property
    def bottleneck(self) -> str:
        """The stage that the run waited for longest."""
        return max(self.stage_seconds, key=lambda name: self.stage_seconds[name], default="none")


Write = Callable[[StoreWriter, Sequence[int], Lease, Callable[[int], None]], Written]
"""Writes shards of a store and checks its lease often: (writer, shards, lease, on_progress) → what was done."""


def plan_dump(spec: DumpSpec, adapter: Adapter) -> DumpPlan:
    """Work out rows, shapes and attributes of a run; reads image headers only if positions are `all`.

    Raises ValueError or LookupError for what cannot be done with this model and these samples.
    """
    return make_plan(spec, find_facts(adapter), lambda rows: longest(rows, adapter, spec.threads))


def find_facts(adapter: Adapter) -> ModelFacts:
    """Return what a plan needs to know of a loaded model."""
    return ModelFacts(
        n_layers=adapter.n_layers,
        hidden_size=adapter.hidden_size,
        has_vision=adapter.has_vision,
        dtype=str(adapter.dtype).removeprefix("torch."),
        device=adapter.device.type,
        torch_threads=torch.get_num_threads() if adapter.device.type == "cpu" else None,
        preprocessing=adapter.preprocessing.describe() if adapter.has_vision else None,
        kernel_pooling=adapter.spec.device_map is None
        and adapter.device.type == "cuda"
        and pooling.serves(adapter.device, adapter.dtype),
        description=adapter.describe(),
    )


def make_plan(spec: DumpSpec, facts: ModelFacts, measure_longest: Callable[[Sequence[Row]], int]) -> DumpPlan:
    """Do as `plan_dump` does, with a model that is loaded elsewhere."""
    rows = make_rows(spec.dataset, spec.marking)
    positions = parse_positions(spec.positions)
    layers = parse_layers(spec.layers, facts.n_layers)
    has_images = any(row.sample.image is not None for row in rows)
    if has_images and not facts.has_vision:
        raise ValueError(
            f"{spec.model.model} takes no images, but the samples have them: drop the image column"
        )
    names = tuple(position.name for position in positions)
    if names == ("all",):
        names = tuple(str(index) for index in range(spec.max_tokens or measure_longest(rows)))
    dtype = spec.dtype
    if dtype == "auto":
        dtype = "float16" if facts.dtype == "float16" else "float32"
    width = 4 if dtype == "float32" else 2
    per_sample = len(layers) * len(names) * facts.hidden_size * width
    fields = IMAGE_RECORD_FIELDS if has_images else TEXT_RECORD_FIELDS
    layout = Layout(
        n_samples=len(rows),
        layers=layers,
        positions=names,
        hidden_size=facts.hidden_size,
        dtype=dtype,
        shard_samples=min(spec.shard_samples or max(1, SHARD_BYTES // per_sample), len(rows)),
        codec=spec.codec,
        record_fields=fields + (WATERMARK_RECORD_FIELDS if spec.marking else ()),
    )
    return DumpPlan(
        spec=spec,
        rows=rows,
        layout=layout,
        positions=positions,
        attributes=_make_attributes(spec, facts, layout),
        kernel_pooling=facts.kernel_pooling,
    )


def _make_attributes(spec: DumpSpec, facts: ModelFacts, layout: Layout) -> dict[str, Any]:
    data = dict(spec.dataset.describe())
    source = data.pop("source")  # the same data under another path is the same run
    run = {
        "data": data,
        "model": facts.description,
        "watermark": describe_marking(spec.marking),
        "layers": list(layout.layers),
        "positions": list(spec.positions),
        "dtype": layout.dtype,
        "codec": spec.codec,
        "batch_size": spec.batch_size,
        "shard_samples": layout.shard_samples,
        "device": facts.device,
    }
    if facts.kernel_pooling and not {"mean", "image", "prompt"}.isdisjoint(spec.positions):
        run["pooling"] = "kernel"  # its means differ from torch's in the last bits
    # what a run finds in the store it goes by, on whatever machine it is continued: the last bits depend on it
    threads = facts.torch_threads and (spec.torch_threads or facts.torch_threads)
    # how pixel_values were made is told, but is no part of the run: every way makes the same ones, or is not taken
    preprocess = facts.preprocessing and dict(facts.preprocessing)
    return {"run": run, "source": source, "torch_threads": threads, "preprocess": preprocess}


def run_dump(
    plan: DumpPlan,
    adapter: Adapter,
    place: str | Path | Objects,
    on_progress: Callable[[int], None] = lambda n_rows: None,
) -> DumpSummary:
    """Write, in this process, what is missing of the store at `place`, and finalise it.

    on_progress is called with the number of rows done since the last call. Raises `writer.OtherRunError` if another
    run made the store, `lease.StoreBusyError` if another one is writing it, OSError if it cannot be written. Whatever
    stops it, a later call continues.
    """

    def write(
        writer: StoreWriter, shards: Sequence[int], held: Lease, on_progress: Callable[[int], None]
    ) -> Written:
        def advance(n_rows: int) -> None:
            held.check()
            on_progress(n_rows)

        with torch_threads(find_torch_threads(writer)):
            return write_shards(plan.recipe, adapter, writer, map(plan.shard_rows, shards), advance)

    return run_with(write, plan, place, on_progress)


def run_with(
    write: Write, plan: DumpPlan, place: str | Path | Objects, on_progress: Callable[[int], None]
) -> DumpSummary:
    """Do as `run_dump` does, with shards that `write` writes."""
    started = time.perf_counter()
    written = Written()

    def compute(writer: StoreWriter, shards: Sequence[int], held: Lease) -> None:
        on_progress(len(plan.rows) - sum(len(plan.layout.rows(shard)) for shard in shards))
        written.add(write(writer, shards, held, on_progress))

    with ThreadPoolExecutor(plan.spec.threads, "mmextract-cpu") as executor:
        columns = make_columns(plan.rows, plan.spec.marking)
        writer = open_writer(place, plan.layout, columns, plan.attributes, executor)
        committed = complete(writer, compute)
        reasons = writer.rejected()
    return DumpSummary(
        n_samples=len(plan.rows),
        n_resumed=sum(len(plan.layout.rows(shard)) for shard in committed),
        bytes_written=written.bytes_written,
        n_nonfinite=written.n_nonfinite,
        nonfinite_layers=dict(sorted(written.nonfinite_layers.items())),
        n_split=written.n_split,
        stage_seconds=written.stage_seconds,
        rejected={plan.rows[row].id: reason for row, reason in reasons.items()},
        seconds=time.perf_counter() - started,
    )


def find_torch_threads(writer: StoreWriter) -> int | None:
    """Return the number of threads that the store's states are computed in, None where it makes no difference."""
    n_threads: int | None = read_attributes(writer.objects).get("torch_threads")
    return n_threads


def longest(rows: Sequence[Row], adapter: Adapter, threads: int) -> int:
    """Return the number of tokens of the longest sample: exact, from its text and the size of its image."""

    @lru_cache(maxsize=1 << 20)
    def n_tokens(text: str, size: tuple[int, int] | None) -> int:
        return adapter.count_tokens(text, None if size is None else (size[1], size[0]))

    def measured(row: Row) -> int:
        image = row.sample.image
        try:
            return n_tokens(adapter.render(row.sample.turns), None if image is None else measure(image))
        except RejectedSample:
            return 0  # it will be refused again, and then recorded, when its turn comes

    with ThreadPoolExecutor(threads) as executor:
        return max(1, *in_order(executor, measured, iter(rows), window=64))
