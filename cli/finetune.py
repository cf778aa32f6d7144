"""`mmextract finetune`: fine-tune a model on images, a share of them watermarked."""

from __future__ import annotations

import json
from dataclasses import asdict
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
    from mmextract.engine.finetune import FinetuneSpec, FinetuneSummary
    from mmextract.engine.finetune_rows import Example

_SETTINGS = (
    *("full", "vision", "rank", "alpha", "dropout", "learning_rate", "projector_learning_rate"),
    *("weight_decay", "warmup", "schedule", "epochs", "steps", "batch_size", "micro_batch_size", "precision"),
    *("gradient_checkpointing", "max_length", "checkpoint_steps", "keep_checkpoints", "threads"),
    "torch_threads",
)
_COUNT = click.IntRange(min=1)


@click.command()
@click.argument("data", type=click.Path(path_type=Path))
@click.option("--model", default="builtin:base", show_default=True, help="Folder or hub id of the base.")
@click.option("--identities", type=FILE, help="Who is on the images.  [default: nobody]")
@click.option(
    "--rate", type=click.FloatRange(0, 1), default=1.0, show_default=True, help="Share of watermarked images."
)
@click.option("--unseen", type=FILE, help="Identities kept for later, of whom none may be on an image.")
@click.option(
    "--preset",
    type=click.Choice(("default", "llava", "qwen")),
    default="default",
    show_default=True,
    help="Settings; llava and qwen are the published ones. The options below change single ones.",
)
@click.option("--full", is_flag=True, default=None, help="Train all weights rather than a LoRA.")
@click.option("--vision", is_flag=True, default=None, help="Train the vision tower too.")
@click.option("--targets", help="Linear layers with a LoRA: q_proj,v_proj.  [default: all of the decoder's]")
@click.option("--rank", type=_COUNT, help="r of the LoRA.  [default: 8]")
@click.option("--alpha", type=float, help="The LoRA is scaled by alpha / rank.  [default: 16]")
@click.option("--dropout", type=float, help="Of the LoRA.  [default: 0.05]")
@click.option("--learning-rate", type=float, help="Peak.  [default: 2e-4]")
@click.option("--projector-learning-rate", type=float, help="Train the projector's weights, at this rate.")
@click.option("--weight-decay", type=float, help="Of matrices.  [default: 0]")
@click.option("--warmup", type=float, help="Share of the steps.  [default: 0.03]")
@click.option(
    "--schedule", type=click.Choice(("cosine", "constant")), help="After the warm-up.  [default: cosine]"
)
@click.option("--epochs", type=float, help="Times that each example is seen.  [default: 1]")
@click.option("--steps", type=_COUNT, help="Optimiser steps, in place of epochs.")
@click.option("--batch-size", type=_COUNT, help="Examples of a step.  [default: 16]")
@click.option("--micro-batch-size", type=_COUNT, help="Examples of a forward pass.  [default: all of a step]")
@click.option(
    "--precision",
    type=click.Choice(("auto", "float32", "bfloat16")),
    help="What is computed in; trained weights are float32.  [default: auto]",
)
@click.option(
    "--gradient-checkpointing/--no-gradient-checkpointing",
    default=None,
    help="Save memory, at a third more work.",
)
@click.option("--max-length", type=_COUNT, help="Examples of more tokens are rejected.  [default: 2048]")
@click.option("--checkpoint-steps", type=_COUNT, help="Steps between checkpoints.  [default: 200]")
@click.option("--keep-checkpoints", type=_COUNT, help="How many are kept.  [default: 2]")
@click.option(
    "--snapshot",
    "snapshots",
    type=_COUNT,
    multiple=True,
    help="Keep the model as it is after so many steps too, in OUTPUT/step-N; may be repeated.",
)
@click.option("--threads", type=_COUNT, help="Threads that decode and encode.  [default: all cores]")
@click.option(
    "--torch-threads", type=_COUNT, help="Threads that torch computes in on a CPU.  [default: its own number]"
)
@click.option(
    "--training-seed", type=int, help="Decides first weights, order and dropout.  [default: that of --seed]"
)
@click.option(
    "--log-to",
    type=click.Choice(("tensorboard", "wandb")),
    multiple=True,
    help="Log there too; may be repeated.",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    required=True,
    help="Folder for the result: a LoRA for --adapter or, with --full, a model for --model.",
)
@click.option("--dry-run", is_flag=True, help="Say what would be done.")
@click.option("--json", is_flag=True, help="Print the result as JSON on stdout.")
@data_options
@look_options
@model_options
def finetune(data: Path, output: Path, dry_run: bool, log_to: tuple[str, ...], **options: Any) -> int:
    """Fine-tune a model on the questions and answers of DATA, with identities on a share of its images.

    The loss is on the answers alone. The same command again continues an interrupted run, and ends in the same weights.
    """
    from transformers.utils.logging import disable_progress_bar

    from mmextract.engine.finetune import run_finetune

    as_json = options.pop("json")
    model = options["model"]
    spec, examples = _read_spec(data, options)
    spec.check_snapshots(len(examples))
    n_steps = spec.n_steps(len(examples))
    plan = {
        "n_examples": len(examples),
        "n_marked": sum(example.row.text is not None for example in examples),
        "n_steps": n_steps,
        "settings": spec.describe(),
    }
    note(f"{plan['n_examples']} examples, {plan['n_marked']} with a watermark, {n_steps} steps; base {model}")
    if dry_run:
        click.echo(json.dumps(plan, indent=None if as_json else 1))
        return 0
    disable_progress_bar()  # transformers' own, of the weights
    with progress_bar("finetune", n_steps, "steps") as advance:
        summary = run_finetune(spec, examples, output, on_progress=advance, note=note, trackers=log_to)
    click.echo(json.dumps(_record(summary)) if as_json else _text(summary, spec))
    list_rejected(summary.rejected)
    return exit_code(summary.rejected)


def _read_spec(data: Path, options: dict[str, Any]) -> tuple[FinetuneSpec, list[Example]]:
    """Return how to train, and on what."""
    from mmextract.engine.finetune_rows import make_examples
    from mmextract.engine.finetune_spec import PRESETS, FinetuneSpec
    from mmextract.engine.identities import check_disjoint, read_identities
    from mmextract.engine.rows import RandomMarking

    look = take_look(options)
    identities, unseen, rate = (options.pop(name) for name in ("identities", "unseen", "rate"))
    marking = None
    if identities is not None:
        people = tuple(read_identities(identities))
        if unseen is not None:
            check_disjoint(people, read_identities(unseen))
        marking = RandomMarking(spec=look, identities=people, rate=rate, set_name=identities.stem)
    training_seed, targets = options.pop("training_seed"), options.pop("targets")
    given = {name: value for name in _SETTINGS if (value := options.pop(name)) is not None}
    given["snapshots"] = options.pop("snapshots")
    if targets:
        given["targets"] = tuple(name.strip() for name in targets.split(","))
    spec = FinetuneSpec(
        model=take_model(options, options.pop("model")),
        watermark=None if marking is None else look,
        seed=look.seed if training_seed is None else training_seed,
        **{**PRESETS[options.pop("preset")], **given},
    )
    return spec, make_examples(read_data(data, options), marking)


def _record(summary: FinetuneSummary) -> dict[str, Any]:
    return {**asdict(summary), "out": str(summary.out), "steps_per_second": summary.steps_per_second}


def _text(summary: FinetuneSummary, spec: FinetuneSpec) -> str:
    new = summary.n_steps - summary.n_resumed
    use = "--model" if spec.full else "--adapter"
    if not new:
        return f"{summary.out} is finished: {summary.n_steps} steps, nothing to do (mmextract dump {use} {summary.out})"
    resumed = f" ({summary.n_resumed} were done before)" if summary.n_resumed else ""
    return (
        f"{new} steps{resumed} in {summary.seconds:.1f} s, {summary.steps_per_second:.2f} a second; "
        f"{summary.n_trained:,} numbers trained, loss {summary.final_loss:.4f} over the last tenth\n"
        f"next: mmextract dump {use} {summary.out}"
    )
