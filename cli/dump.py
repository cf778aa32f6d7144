"""`mmextract dump`: hidden states of a model on images and prompts, into a Zarr store."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import rich_click as click

from mmextract.cli.clusters import connect, scheduler_options, start
from mmextract.cli.options import data_options, marking_options, read_data, take_marking
from mmextract.cli.reporting import exit_code, list_rejected, note, progress_bar, size

if TYPE_CHECKING:
    from mmextract.engine.dump import DumpPlan, DumpSpec, DumpSummary

_MODEL_FIELDS = (
    "revision",
    "adapter",
    "dtype",
    "device",
    "device_map",
    "attn_implementation",
    "trust_remote_code",
    "preprocess",
)


@click.command()
@click.argument("data", type=click.Path(path_type=Path), required=False)
@click.option("--model", help="Folder or hub id of a transformers model.  [default: the built-in one]")
@click.option("--revision", help="Revision on the hub.")
@click.option("--adapter", help="Folder or hub id of a LoRA (peft) for the model.")
@click.option("--dtype", default="auto", show_default=True, help="Dtype of the model's weights.")
@click.option(
    "--device", default="auto", show_default=True, help="cuda, cuda:1, cpu; auto takes a GPU if there is one."
)
@click.option("--device-map", help="Spread the model over devices (accelerate): auto, balanced, …")
@click.option("--attn-implementation", help="eager, sdpa, flash_attention_2, …")
@click.option("--trust-remote-code", is_flag=True, help="Run code that comes with the model.")
@click.option(
    "--preprocess",
    type=click.Choice(("auto", "processor", "cpu", "kernels")),
    default="auto",
    show_default=True,
    help="How images become pixel_values: by the model's processor, or quicker and equal to the bit.",
)
@click.option(
    "--layers", default="all", show_default=True, help="all, embed, 0,4,8, 8-15, -1, ::4 and mixtures."
)
@click.option(
    "--position",
    multiple=True,
    default=("last",),
    show_default=True,
    help="last, first, an index such as -2, mean, image, prompt; or all tokens. May be repeated.",
)
@click.option(
    "--store-dtype",
    type=click.Choice(("auto", "float32", "float16", "bfloat16")),
    default="auto",
    show_default=True,
)
@click.option(
    "--codec",
    type=click.Choice(("lz4", "zstd", "none")),
    default="lz4",
    show_default=True,
    help="Compression.",
)
@click.option(
    "--batch-size",
    type=click.IntRange(min=1),
    default=16,
    show_default=True,
    help="Most samples of a forward pass.",
)
@click.option(
    "--shard-samples",
    type=click.IntRange(min=1),
    help="Samples of a shard, the unit of commit.  [default: 64 MiB of states]",
)
@click.option(
    "--max-tokens",
    type=click.IntRange(min=1),
    help="Room for tokens with --position all.  [default: measured]",
)
@click.option(
    "--threads", type=click.IntRange(min=1), help="Threads that decode and encode.  [default: all cores]"
)
@click.option(
    "--torch-threads",
    type=click.IntRange(min=1),
    help="Threads that torch computes in on a CPU, which decide last bits.  [default: torch's own number]",
)
@click.option(
    "--workers",
    type=click.IntRange(min=1),
    help="Write shards in N processes of this machine, each with a GPU of its own where there are GPUs.",
)
@scheduler_options
@click.option(
    "-o",
    "--output",
    type=click.Path(),
    default="activations.zarr",
    show_default=True,
    help="The store: a folder, or s3://bucket/name.",
)
@click.option("--dry-run", is_flag=True, help="Say what would be done, and how large it would be.")
@click.option("--json", is_flag=True, help="Print the result as JSON on stdout.")
@data_options
@marking_options
def dump(data: Path | None, output: str, dry_run: bool, **options: Any) -> int:
    """Dump hidden states of every layer asked for, for DATA, into a Zarr store.

    DATA is a folder of images, a JSONL, CSV, Parquet, LLaVA or Qwen JSON file, or a Hugging Face data set on disk.
    Without it the built-in paired data set is used. The same command again continues an interrupted run, with any
    number of workers.
    """
    from transformers.utils.logging import disable_progress_bar

    as_json, where = options.pop("json"), _take_where(options)
    spec, model = _read_spec(data, options.pop("model"), options, where.n_workers or 1)
    disable_progress_bar()  # transformers' own, of the weights
    note(f"{len(spec.dataset.samples)} samples from {spec.dataset.source}; loading {model}")
    with _computer(spec, where) as (plan, run):
        _note_preprocessing(plan)
        if dry_run:
            click.echo(json.dumps(_plan_record(plan)) if as_json else _plan_text(plan, output))
            return 0
        with progress_bar("dump", len(plan.rows), "samples") as advance:
            summary = run(output, advance)
    click.echo(json.dumps(_summary_record(summary, output)) if as_json else _summary_text(summary, output))
    list_rejected(summary.rejected)
    return exit_code(summary.rejected)


class _Where(NamedTuple):
    """On what a dump runs; on this process alone if none of the first three is given."""

    n_workers: int | None
    scheduler: str | None
    scheduler_file: Path | None
    patience: float
    """Seconds that a cluster may be without workers."""


def _take_where(options: dict[str, Any]) -> _Where:
    where = _Where(*(options.pop(name) for name in ("workers", "scheduler", "scheduler_file", "patience")))
    if sum(value is not None for value in where[:3]) > 1:
        raise click.UsageError("give only one of --workers, --scheduler and --scheduler-file")
    return where


def _read_spec(
    data: Path | None, model: str | None, options: dict[str, Any], n_workers: int
) -> tuple[DumpSpec, str]:
    """Return what to dump, and what the model is called. The cores are shared by the workers of this machine."""
    from dataclasses import replace

    from mmextract.engine import builtin
    from mmextract.engine.dump import DumpSpec
    from mmextract.engine.models import ModelSpec

    positions = options.pop("position")
    marking = take_marking(options, default=builtin.marking() if data is None else None)
    dataset = read_data(data or builtin.DATA, options)
    if data is None:
        dataset = replace(dataset, source="builtin:data")
    model = model or builtin.DEFAULT_MODEL
    folder, own_adapter = builtin.locate_model(model)
    settings = {name: options.pop(name) for name in _MODEL_FIELDS}
    settings["adapter"] = settings["adapter"] or own_adapter
    dtype, threads = options.pop("store_dtype"), options.pop("threads")
    spec = DumpSpec(
        dataset=dataset,
        model=ModelSpec(model=folder, **settings),
        marking=marking,
        positions=positions,
        dtype=dtype,
        **options,
        **({"threads": threads} if threads else {}),
    )
    return (spec if threads else replace(spec, threads=max(2, spec.threads // n_workers))), model


@contextmanager
def _computer(
    spec: DumpSpec, where: _Where
) -> Iterator[tuple[DumpPlan, Callable[[str, Callable[[int], None]], DumpSummary]]]:
    """Yield the plan, and what runs it: this process, processes of this machine, or a cluster that is there."""
    n_workers, scheduler, scheduler_file, patience = where
    if where[:3] == (None, None, None):
        from mmextract.engine.dump import plan_dump, run_dump
        from mmextract.engine.models import load

        adapter = load(spec.model)
        plan = plan_dump(spec, adapter)
        yield plan, lambda output, advance: run_dump(plan, adapter, output, advance)
        return
    from mmextract.engine.distributed import plan_distributed, run_distributed

    cluster = start(n_workers, spec.model) if n_workers else connect(scheduler, scheduler_file, patience)
    with cluster as client:
        plan = plan_distributed(spec, client, patience=patience)
        yield (
            plan,
            lambda output, advance: run_distributed(plan, client, output, advance, note, patience=patience),
        )


def _note_preprocessing(plan: DumpPlan) -> None:
    """Say why a quicker way of making pixel_values than the one taken is not taken."""
    found = plan.attributes["preprocess"]
    if found and found["reason"]:
        way = "the model's processor" if found["path"] == "processor" else "the CPU"
        note(f"images are preprocessed by {way}: {found['reason']}")


def _plan_record(plan: DumpPlan) -> dict[str, Any]:
    layout = plan.layout
    return {
        "n_samples": layout.n_samples,
        "layers": list(layout.layers),
        "positions": len(layout.positions) if plan.positions[0].name == "all" else list(layout.positions),
        "hidden_size": layout.hidden_size,
        "dtype": layout.dtype,
        "n_shards": layout.n_shards,
        "shard_samples": layout.shard_samples,
        "bytes": plan.bytes_per_sample * layout.n_samples,
    }


def _plan_text(plan: DumpPlan, output: str) -> str:
    record = _plan_record(plan)
    return (
        f"{output}: {record['n_samples']} samples × {len(record['layers'])} layers × {len(plan.layout.positions)} "
        f"positions × {record['hidden_size']}, {record['dtype']}\n"
        f"{size(record['bytes'])} before compression, in {record['n_shards']} shards of "
        f"{record['shard_samples']} samples"
    )


def _summary_record(summary: DumpSummary, output: str) -> dict[str, Any]:
    return {
        "store": output,
        "n_samples": summary.n_samples,
        "n_resumed": summary.n_resumed,
        "n_nonfinite": summary.n_nonfinite,
        "nonfinite_layers": summary.nonfinite_layers,
        "n_split": summary.n_split,
        "bytes_written": summary.bytes_written,
        "seconds": summary.seconds,
        "stage_seconds": summary.stage_seconds,
        "bottleneck": summary.bottleneck,
        "rejected": summary.rejected,
    }


def _summary_text(summary: DumpSummary, output: str) -> str:
    new = summary.n_samples - summary.n_resumed
    resumed = f" ({summary.n_resumed} were there already)" if summary.n_resumed else ""
    if not new:
        return f"{output} is complete: {summary.n_samples} samples, nothing to do"
    shares = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in summary.stage_seconds.items())
    lines = [
        f"{new} samples{resumed} in {summary.seconds:.1f} s, {new / summary.seconds:.1f} a second; "
        f"{size(summary.bytes_written)} written to {output}",
        f"bottleneck: {summary.bottleneck} (waited for {shares})",
    ]
    if summary.n_nonfinite:
        layers = ", ".join(f"{layer}: {count:,}" for layer, count in summary.nonfinite_layers.items())
        lines.append(
            f"{summary.n_nonfinite} samples hold a NaN or an infinity (by layer: {layers}): see the column n_nonfinite"
        )
    if summary.n_split:
        lines.append(
            f"{summary.n_split} batches did not fit into the GPU's memory and ran in parts: a smaller --batch-size "
            "spares the tries"
        )
    return "\n".join(lines)
