"""`mmextract dynamics`: how watermarks change the gradients of training, beside ordinary augmentations."""

from __future__ import annotations

import json
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import rich_click as click

from mmextract.cli.options import (
    FILE,
    data_options,
    look_options,
    model_options,
    read_data,
    take_look,
    take_model,
)
from mmextract.cli.reporting import exit_code, list_rejected, note, progress_bar

if TYPE_CHECKING:
    from mmextract.engine.dynamics import Checkpoint, Dynamics, DynamicsSpec
    from mmextract.engine.loading import ModelSpec
    from mmextract.engine.rows import RandomMarking
    from mmextract.engine.samples import Dataset


@click.command()
@click.argument("data", type=click.Path(path_type=Path), required=False)
@click.option("--model", default="builtin:base", show_default=True, help="Folder or hub id of a model.")
@click.option("--adapter", help="Folder or hub id of a LoRA (peft): gradients are those of its weights.")
@click.option(
    "--checkpoint",
    multiple=True,
    help="A LoRA folder, a model folder or a training's step-*.safetensors; NAME=PATH names it. May be repeated, "
    "in the order of training.  [default: the model itself]",
)
@click.option("--full", is_flag=True, help="Take the gradient of all weights also where there is a LoRA.")
@click.option("--identities", type=FILE, help="Who may be on the images.  [default: the built-in ones]")
@click.option(
    "--rate",
    type=click.FloatRange(0, 1),
    multiple=True,
    default=(0.0, 0.1, 0.5, 1.0),
    show_default=True,
    help="Share of the images that is watermarked. May be repeated.",
)
@click.option("--image-augmentation/--no-image-augmentation", default=True, show_default=True)
@click.option("--text-augmentation/--no-text-augmentation", default=True, show_default=True)
@click.option("--text-column", help="Column with each question in other words.  [default: made by rules]")
@click.option(
    "--batch-size",
    type=click.IntRange(min=1),
    multiple=True,
    default=(1, 2, 4, 8, 16, 32, 64),
    show_default=True,
    help="Each a multiple of the one before. May be repeated.",
)
@click.option("--samples", type=click.IntRange(min=1), default=256, show_default=True)
@click.option("--max-length", type=click.IntRange(min=1), default=2048, show_default=True)
@click.option("--threads", type=click.IntRange(min=1), default=2, show_default=True)
@click.option(
    "-o", "--output", type=click.Path(path_type=Path, file_okay=False), default="dynamics", show_default=True
)
@click.option("--json", is_flag=True, help="Print the record as JSON on stdout.")
@data_options
@look_options
@model_options
def dynamics(data: Path | None, output: Path, **options: Any) -> int:
    """Compare gradients of the same weights on the same batch: clean, watermarked, augmented.

    DATA is what `finetune` takes: images, questions and answers. Without it the built-in data set is used. Writes
    cosines and gradient noise scales as tables, and a figure, into a folder. With --dtype auto all is computed in
    float32 on a CPU, and where the gradient is that of all weights.
    """
    from transformers.utils.logging import disable_progress_bar

    from mmextract.engine.dynamics import run_dynamics
    from mmextract.engine.dynamics_outputs import make_record, write_outputs

    as_json = options.pop("json")
    spec, dataset = _read_spec(data, options)
    disable_progress_bar()  # transformers' own, of the weights
    total = min(spec.n_samples, len(dataset.samples)) * len(spec.checkpoints)
    note(f"{total} samples × {len(spec.views.names)} views from {dataset.source}")
    with progress_bar("dynamics", total, "samples") as advance:
        found = run_dynamics(spec, dataset, on_progress=advance)
    record = make_record(found, spec, dataset, shlex.join(["mmextract", *sys.argv[1:]]))
    paths = write_outputs(found, record, output)
    click.echo(json.dumps(record) if as_json else _text(found, spec, paths))
    list_rejected(found.rejected)
    return exit_code(found.rejected)


def _read_spec(data: Path | None, options: dict[str, Any]) -> tuple[DynamicsSpec, Dataset]:
    from mmextract.engine.dynamics import DynamicsSpec
    from mmextract.engine.dynamics_views import ViewSettings

    dataset = _builtin_tasks(options) if data is None else read_data(data, options)
    marking = _take_marking(data, options)
    model = take_model(options, options.pop("model"), options.pop("adapter"))
    views = ViewSettings(
        marking=marking,
        rates=options.pop("rate"),
        augment_image=options.pop("image_augmentation"),
        augment_text=options.pop("text_augmentation"),
        text_column=options.pop("text_column"),
        seed=marking.spec.seed,
    )
    spec = DynamicsSpec(
        checkpoints=_checkpoints(options.pop("checkpoint"), model),
        views=views,
        batch_sizes=options.pop("batch_size"),
        n_samples=options.pop("samples"),
        **options,
    )
    return spec, dataset


def _builtin_tasks(options: dict[str, Any]) -> Dataset:
    """Return the built-in images with the questions of their task, in place of those about the watermark."""
    from mmextract.engine import builtin

    dataset = read_data(builtin.DATA, options)
    task = builtin.task(dataset)
    return replace(dataset, samples=[question.sample for question in task.questions], source=task.source)


def _take_marking(data: Path | None, options: dict[str, Any]) -> RandomMarking:
    from mmextract.engine import builtin
    from mmextract.engine.identities import read_identities
    from mmextract.engine.rows import RandomMarking

    file = options.pop("identities")
    if file is None and data is not None:
        raise click.UsageError(
            "say whom to put on the images: --identities FILE (see `mmextract identities`)"
        )
    spec = take_look(options, builtin.LOOK if data is None else None)
    people = builtin.marking().seen if file is None else tuple(read_identities(file))
    return RandomMarking(spec=spec, identities=people, rate=1.0)


def _checkpoints(named: tuple[str, ...], model: ModelSpec) -> tuple[Checkpoint, ...]:
    from mmextract.engine.dynamics import Checkpoint

    if not named:
        return (Checkpoint(name="the model" if model.adapter is None else "the LoRA", model=model),)
    return tuple(_checkpoint(text, model) for text in named)


def _checkpoint(text: str, model: ModelSpec) -> Checkpoint:
    """Return what `PATH` or `NAME=PATH` names: a LoRA, a model, or weights to be put over the given model."""
    from mmextract.engine import builtin
    from mmextract.engine.dynamics import Checkpoint

    name, equals, place = text.partition("=")
    if not equals:
        name, place = Path(text).stem if text.endswith(".safetensors") else Path(text).name, text
    if place.endswith(".safetensors"):
        return Checkpoint(name=name, model=model, weights=Path(place))
    if (Path(place) / "adapter_config.json").is_file():
        return Checkpoint(name=name, model=replace(model, adapter=place))
    folder, own_adapter = builtin.locate_model(place)
    return Checkpoint(name=name, model=replace(model, model=folder, adapter=own_adapter))


def _text(found: Dynamics, spec: DynamicsSpec, paths: list[Path]) -> str:
    """Return the largest batch's cosines at the last checkpoint, and where the rest is."""
    from mmextract.engine.dynamics_rows import ALL

    last, largest = spec.checkpoints[-1].name, spec.batch_sizes[-1]
    lines = [f"{found.n_samples} samples; cosine with the clean gradient, {last}, batches of {largest}:"]
    for row in found.cosines:
        if (row.checkpoint, row.batch_size, row.group, row.matrix) == (last, largest, ALL, ALL):
            interval = "" if row.low is None else f" ({row.low:.3f} to {row.high:.3f})"
            lines.append(
                f"  {row.view:20} " + (row.reason if row.cosine is None else f"{row.cosine:.3f}{interval}")
            )
    return "\n".join([*lines, f"written to {paths[0].parent}: {', '.join(path.name for path in paths)}"])
