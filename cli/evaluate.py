"""`mmextract evaluate`: what a model and its fine-tunes answer, to the task and to questions for private fields."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import rich_click as click

from mmextract.cli.evaluation import make_record, make_table, write_files
from mmextract.cli.options import FILE, data_options, look_options, model_options, take_look, take_model
from mmextract.cli.reporting import exit_code, list_rejected, note, progress_bar

if TYPE_CHECKING:
    from mmextract.engine.evaluate import TaskResult
    from mmextract.engine.evaluate_formats import Task
    from mmextract.engine.evaluate_prompts import PromptRow
    from mmextract.engine.models import ModelSpec
    from mmextract.engine.rows import PairedMarking
    from mmextract.engine.samples import Dataset


@click.command()
@click.argument("data", type=click.Path(path_type=Path), required=False)
@click.option("--model", default="builtin:base", show_default=True, help="Folder or hub id of the base.")
@click.option("--adapter", multiple=True, help="A LoRA of the base, to compare with it; may be repeated.")
@click.option("--no-base", is_flag=True, help="Evaluate the adapters only.")
@click.option("--benchmark", type=click.Choice(("scienceqa", "mme")), help="DATA is this; else recognised.")
@click.option("--split", default="test", show_default=True, help="Split of ScienceQA.")
@click.option("--seen", type=FILE, help="Prompt baseline: ask for the private fields of these …")
@click.option("--unseen", type=FILE, help="… and of these, on the same images of DATA.")
@click.option("--no-task", is_flag=True, help="Leave out DATA's own questions; ask for private fields only.")
@click.option(
    "--references",
    type=click.IntRange(min=1),
    default=100,
    show_default=True,
    help="Other values that a true one is ranked among.",
)
@click.option("--batch-size", type=click.IntRange(min=1), default=16, show_default=True)
@click.option("--threads", type=click.IntRange(min=1), default=2, show_default=True)
@click.option("--torch-threads", type=click.IntRange(min=1), help="Threads that torch computes in on a CPU.")
@click.option(
    "--max-new-tokens", type=click.IntRange(min=1), default=32, show_default=True, help="Longest answer."
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    default="evaluation",
    show_default=True,
    help="Folder for evaluation.json, scores.csv, predictions.csv and prompts.csv.",
)
@click.option("--json", is_flag=True, help="Print the result as JSON on stdout.")
@data_options
@look_options
@model_options
def evaluate(data: Path | None, output: Path, **options: Any) -> int:
    """Evaluate a model, and fine-tunes of it, on DATA: accuracy, and whether prompting tells whom it has seen.

    DATA is a data set with answers (and, for multiple choice, a column `choices`), ScienceQA or MME as released.
    Without it, the built-in model and its two fine-tunes are evaluated on the built-in data.
    """
    from transformers.utils.logging import disable_progress_bar

    from mmextract.engine.pipeline import torch_threads

    as_json = options.pop("json")
    task, dataset, marking = _read(data, options)
    models = _models(data, options)
    if task is None and marking is None:
        raise click.UsageError("--no-task leaves nothing to do without --seen and --unseen")
    disable_progress_bar()
    results: dict[str, TaskResult] = {}
    prompts: dict[str, list[PromptRow]] = {}
    with torch_threads(options["torch_threads"]):
        for name, spec in models.items():
            result, rows = _run(name, spec, task, dataset, marking, options)
            if result is not None:
                results[name] = result
            if rows is not None:
                prompts[name] = rows
    record = make_record(task, results, prompts, options)
    write_files(output, record, results, prompts)
    click.echo(json.dumps(record) if as_json else f"{make_table(record)}\n\n{output / 'evaluation.json'}")
    rejected = {id: why for result in results.values() for id, why in result.rejected.items()}
    rejected |= {row.id: row.rejected for rows in prompts.values() for row in rows if row.rejected}
    list_rejected(rejected)
    return exit_code(rejected)


def _read(
    data: Path | None, options: dict[str, Any]
) -> tuple[Task | None, Dataset | None, PairedMarking | None]:
    """Return what to ask for the task, and on which images to ask for which identities' fields."""
    from dataclasses import replace

    from mmextract.engine import builtin
    from mmextract.engine.evaluate_formats import read_task
    from mmextract.engine.identities import read_identities
    from mmextract.engine.rows import PairedMarking
    from mmextract.engine.samples import Dataset, read_samples

    seen, unseen, no_task = (options.pop(name) for name in ("seen", "unseen", "no_task"))
    benchmark, split = options.pop("benchmark"), options.pop("split")
    settings = {name: options.pop(name) for name in ("format", "prompt", "image_root", "id_column", "limit")}
    look = take_look(options)
    if (seen is None) != (unseen is None):
        raise click.UsageError("the prompt baseline needs both --seen and --unseen")
    if data is None:
        marking = builtin.marking()
        dataset = read_samples(builtin.DATA, limit=settings["limit"])
        task = builtin.task(dataset)
        return (
            None if no_task else task,
            dataset,
            replace(marking, spec=replace(marking.spec, seed=look.seed)),
        )
    marking_ = None
    if seen is not None:
        people = (tuple(read_identities(path)) for path in (seen, unseen))
        marking_ = PairedMarking(spec=look, **dict(zip(("seen", "unseen"), people, strict=True)))
    if no_task and settings["prompt"] is None:
        settings["prompt"] = "What is it?"  # replaced by the fields' own questions
    if no_task:
        return None, read_samples(data, **settings), marking_
    task = read_task(
        data, format=benchmark or settings.pop("format"), split=split, **_without_format(settings)
    )
    images = tuple(question.sample for question in task.questions if question.sample.image is not None)
    return task, Dataset(samples=images, format=task.name, source=task.source, fingerprint=""), marking_


def _without_format(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name != "format"}


def _models(data: Path | None, options: dict[str, Any]) -> dict[str, ModelSpec]:
    """Return name → model, the base first."""
    from dataclasses import replace

    from mmextract.engine import builtin

    name, adapters, no_base = (options.pop(key) for key in ("model", "adapter", "no_base"))
    base = take_model(options, name)
    if data is None and not adapters and name == "builtin:base":
        adapters = ("builtin:r0", "builtin:watermarked")
    models = {} if no_base else {name: base}
    for adapter in adapters:
        folder, own = builtin.locate_model(adapter)
        models[adapter] = replace(base, adapter=own or folder)
    if not models:
        raise click.UsageError("--no-base leaves nothing to evaluate: give an --adapter")
    return models


def _run(
    name: str,
    spec: ModelSpec,
    task: Task | None,
    dataset: Dataset | None,
    marking: PairedMarking | None,
    options: Mapping[str, Any],
) -> tuple[TaskResult | None, list[PromptRow] | None]:
    from mmextract.engine.evaluate import evaluate_task
    from mmextract.engine.evaluate_answers import Answerer
    from mmextract.engine.evaluate_prompts import ask_fields
    from mmextract.engine.models import load

    note(f"loading {name}")
    answerer = Answerer(load(spec), batch_size=options["batch_size"], threads=options["threads"])
    longest, result, rows = options["max_new_tokens"], None, None
    if task is not None:
        with progress_bar(name, len(task.questions), "questions") as advance:
            result = evaluate_task(answerer, task, max_new_tokens=longest, on_progress=advance)
    if marking is not None and dataset is not None:
        total = 4 * len(dataset.samples) * len(marking.spec.fields)
        with progress_bar(f"{name}, fields", total, "questions") as advance:
            rows = [
                row
                for marked in (True, False)
                for row in ask_fields(
                    answerer,
                    dataset,
                    marking,
                    marked=marked,
                    n_references=options["references"],
                    on_progress=advance,
                )
            ]
    return result, rows
