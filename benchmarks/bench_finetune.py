"""What a training step costs beside its mathematics: `python benchmarks/bench_finetune.py`.

The built-in base, a LoRA on its decoder, batches of the built-in images with half of them watermarked. Per step: a bare
loop over batches that are ready, transformers' Trainer over the same, `run_finetune` while every image is met for the
first time (decoded, watermarked and preprocessed in threads) and once they are kept. Processor seconds of all threads,
which a busy machine distorts less than time on the clock. Figures are ratios to the bare loop.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import transformers

from harness import save, show
from mmextract.engine import builtin
from mmextract.engine.finetune import run_finetune
from mmextract.engine.finetune_data import Preparer, answer_loss, collate
from mmextract.engine.finetune_model import Trainee, make_trainee, parameter_groups
from mmextract.engine.finetune_rows import Example, make_examples
from mmextract.engine.finetune_spec import FinetuneSpec
from mmextract.engine.models import ModelSpec
from mmextract.engine.pipeline import torch_threads
from mmextract.engine.rows import RandomMarking
from mmextract.engine.samples import read_samples

Tick = Callable[[], None]


def make_data(n: int) -> list[Example]:
    """Return n examples of easy-VQA's questions, half of them watermarked."""
    dataset = read_samples(builtin.DATA, limit=n)
    samples = [question.sample for question in builtin.task(dataset).questions]
    marking = builtin.marking()
    design = RandomMarking(spec=marking.spec, identities=marking.seen, rate=0.5, set_name="seen")
    return make_examples(replace(dataset, samples=samples), design)


def batches(trainee: Trainee, spec: FinetuneSpec, data: list[Example], n_steps: int) -> list[dict[str, Any]]:
    """Return every step's batch, ready."""
    prepare = Preparer(trainee.adapter, spec.watermark, spec.max_length)
    return [collate([prepare(data[i]) for i in spec.batch(step, len(data))], 0) for step in range(n_steps)]


def run_bare(spec: FinetuneSpec, data: list[Example], n_steps: int, tick: Tick) -> None:
    """Do forward, backward, clipping and AdamW alone."""
    trainee = make_trainee(spec)
    ready = batches(trainee, spec, data, n_steps)
    parameters = list(trainee.parameters.values())
    optimizer = torch.optim.AdamW(parameter_groups(trainee, spec), fused=True)
    model = trainee.adapter.model.train()
    for batch in ready:
        optimizer.zero_grad(set_to_none=True)
        loss, n_tokens = answer_loss(model, batch, trainee.adapter.device)
        (loss / n_tokens).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        tick()


def run_trainer(spec: FinetuneSpec, data: list[Example], n_steps: int, tick: Tick) -> None:
    """Do the same in transformers' Trainer."""
    trainee = make_trainee(spec)
    ready: Any = batches(trainee, spec, data, n_steps)

    class Timed(transformers.Trainer):  # type: ignore[misc]
        def get_train_dataloader(self) -> Any:
            return torch.utils.data.DataLoader(ready, batch_size=None, shuffle=False)

    class Ticking(transformers.TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            tick()

    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            output_dir=folder,
            max_steps=n_steps,
            learning_rate=spec.learning_rate,
            optim="adamw_torch_fused",
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
        )
        Timed(model=trainee.adapter.model, args=arguments, callbacks=[Ticking()]).train()


def run_ours(spec: FinetuneSpec, data: list[Example], n_steps: int, tick: Tick) -> None:
    """Do all of it, watermarks, log and all."""
    with tempfile.TemporaryDirectory() as folder:
        settings = replace(spec, steps=n_steps)
        run_finetune(settings, data, Path(folder) / "out", on_progress=lambda n: tick() if n else None)


def seconds_a_step(
    run: Callable[..., None], spec: FinetuneSpec, data: list[Example], n_steps: int, skip: int
) -> float:
    """Return the mean processor seconds of the steps after the first `skip`."""
    ticks: list[float] = []
    run(spec, data, n_steps, lambda: ticks.append(time.process_time()))
    steps = [b - a for a, b in pairwise(ticks)]
    return statistics.mean(steps[skip:])


def main() -> None:
    """Do what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=12, help="steps of an epoch")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    n_steps, size = arguments.steps, arguments.batch_size
    spec = FinetuneSpec(
        model=ModelSpec(model=builtin.locate_model("builtin:base")[0], device="cpu"),
        watermark=builtin.LOOK,
        batch_size=size,
        checkpoint_steps=1 << 30,
    )
    data = make_data(n_steps * size)
    work: dict[str, Callable[[], float]] = {
        "bare loop": lambda: seconds_a_step(run_bare, spec, data, n_steps, 1),
        "Trainer": lambda: seconds_a_step(run_trainer, spec, data, n_steps, 1),
        "ours, images met first": lambda: seconds_a_step(run_ours, spec, data, n_steps, 1),
        "ours, images kept": lambda: seconds_a_step(run_ours, spec, data, 2 * n_steps, n_steps),
    }
    found: dict[str, list[float]] = {name: [] for name in work}
    with torch_threads(1):
        for _ in range(arguments.repeats):
            for name, measure in work.items():
                found[name].append(measure())
    medians = {name: statistics.median(values) for name, values in found.items()}
    ratios = {name: value / medians["bare loop"] for name, value in medians.items()}
    rows = [[name, 1e3 * value, ratios[name]] for name, value in medians.items()]
    show(f"a step of {size} images", ["", "processor ms", "÷ bare loop"], rows)
    settings = {"steps": n_steps, "batch_size": size, "repeats": arguments.repeats}
    save(arguments.json, {"settings": settings, "seconds": found, "ratios": ratios})


if __name__ == "__main__":
    main()
