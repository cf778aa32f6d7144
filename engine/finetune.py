"""Fine-tune a model on examples, some of them watermarked: plan, train, resume, save.

The loop is plain torch rather than transformers' Trainer or accelerate, because a killed run must end in the weights
of an undisturbed one: every step is a function of (trained weights, moments, step number), with order, dropout and
learning rate derived from the number, and a checkpoint is one safetensors file instead of pickled generators and a
data loader to be wound forward. On a CPU that holds bit for bit for one number of threads. It trains in one process;
`device_map` spreads a model that one GPU does not hold. This module composes the others and draws nothing on a screen.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from mmextract.engine.finetune_checkpoints import Checkpoints
from mmextract.engine.finetune_data import Preparer, answer_loss, collate, micro_batches
from mmextract.engine.finetune_feed import Batch, Feed
from mmextract.engine.finetune_log import Step, TrainingLog
from mmextract.engine.finetune_model import Trainee, make_trainee, parameter_groups
from mmextract.engine.finetune_record import hold, read_record, refuse_other, write_record
from mmextract.engine.finetune_rows import Example, check_examples, fingerprint
from mmextract.engine.finetune_save import require_snapshots, save_result, save_snapshot
from mmextract.engine.finetune_spec import PRESETS, FinetuneSpec
from mmextract.engine.pipeline import torch_threads

__all__ = ["PRESETS", "FinetuneSpec", "FinetuneSummary", "run_finetune"]

LAST_SHARE = 0.1
"""Share of the steps, at the end, whose mean loss a summary gives."""


@dataclass(kw_only=True)
class FinetuneSummary:
    """What a run did."""

    out: Path
    """A folder that is a LoRA for `--adapter` or, with `full`, a model for `--model`."""
    n_steps: int
    """Optimiser steps of the whole run."""
    n_resumed: int
    """Those that an earlier call had done."""
    n_examples: int
    """Examples of the data."""
    n_marked: int
    """Those of them with a watermark."""
    n_trained: int
    """Numbers that were trained."""
    final_loss: float
    """Mean over the last tenth of the steps, in nats a token."""
    seconds: float = 0.0
    """Wall time of this call, loading included."""
    rejected: dict[str, str] = field(default_factory=dict)
    """Id → why an example could not be had."""

    @property
    def steps_per_second(self) -> float:
        """Of this call."""
        return (self.n_steps - self.n_resumed) / self.seconds if self.seconds else 0.0


def run_finetune(
    spec: FinetuneSpec,
    examples: Sequence[Example],
    out: Path,
    *,
    on_progress: Callable[[int], None] = lambda n_steps: None,
    note: Callable[[str], None] = lambda text: None,
    trackers: Sequence[str] = (),
) -> FinetuneSummary:
    """Train, or go on training, and leave the result in `out` with `finetune.json`, `log.csv` and what is to be kept
    of its way there (`step-100/`).

    on_progress is called with the number of steps done since the last call, note with what a user should hear.
    trackers: of `finetune_log.TRACKERS`. Raises ValueError or LookupError for what cannot be done with this model and
    these examples, `writer.OtherRunError` if another run made `out`, OSError if another one is training in it, it
    cannot be written, or memory is short. Whatever stops it, the same call continues.
    """
    started = time.perf_counter()
    check_examples(examples, spec.batch_size)
    spec.check_snapshots(len(examples))
    with hold(out), _generator_of_its_own():
        record = read_record(out)
        threads = record["torch_threads"] if record else spec.torch_threads
        with torch_threads(threads):
            torch.manual_seed(spec.seed)
            trainee = make_trainee(spec)
            run = describe_run(spec, examples, trainee)
            if record is None:
                record = {"run": run, "torch_threads": torch.get_num_threads(), "finished": None}
                write_record(out, record)
            refuse_other(out, record["run"], run)
            if record["finished"]:
                require_snapshots(out, spec, record["finished"]["n_steps"])
            run_ = None if record["finished"] else _Run(spec, examples, out, trainee, note)
            if run_ is not None:
                record["finished"] = run_.train(on_progress, trackers, run)
                write_record(out, record)
            Checkpoints(out / "checkpoints").remove()
            resumed = record["finished"]["n_steps"] if run_ is None else run_.n_resumed
    return FinetuneSummary(
        out=out, n_resumed=resumed, seconds=time.perf_counter() - started, **record["finished"]
    )


def describe_run(spec: FinetuneSpec, examples: Sequence[Example], trainee: Trainee) -> dict[str, Any]:
    """Return, JSON-able, all that decides the trained weights."""
    run = {
        "settings": spec.describe(),
        "model": trainee.adapter.describe(),
        "autocast": trainee.autocast,
        "device": trainee.adapter.device.type,
        "examples": {
            "fingerprint": fingerprint(examples),
            "n": len(examples),
            "n_marked": sum(example.row.text is not None for example in examples),
        },
    }
    return dict(json.loads(json.dumps(run)))  # as it is read back, without tuples


class _Run:
    """One training, from its checkpoint to its result."""

    def __init__(
        self,
        spec: FinetuneSpec,
        examples: Sequence[Example],
        out: Path,
        trainee: Trainee,
        note: Callable[[str], None],
    ) -> None:
        self.spec = spec
        self.examples = examples
        self.out = out
        self.trainee = trainee
        self.n_steps = spec.n_steps(len(examples))
        self.parameters = trainee.parameters
        self.optimizer = torch.optim.AdamW(
            parameter_groups(trainee, spec), betas=spec.betas, eps=1e-8, fused=True
        )
        self.checkpoints = Checkpoints(out / "checkpoints", spec.keep_checkpoints)
        self.n_resumed = self.checkpoints.restore(self.parameters, self.optimizer, note)
        require_snapshots(out, spec, self.n_resumed)
        adapter = trainee.adapter
        self.feed = Feed(
            spec=spec, examples=examples, prepare=Preparer(adapter, spec.watermark, spec.max_length)
        )

    def train(
        self, on_progress: Callable[[int], None], trackers: Sequence[str], run: dict[str, Any]
    ) -> dict[str, Any]:
        """Do the steps that are missing, save the result, and return what the record says of it."""
        self.trainee.adapter.model.train()
        on_progress(self.n_resumed)
        with TrainingLog(self.out, self.n_resumed, trackers, run) as log:
            before = time.perf_counter()
            for step, batch in enumerate(self.feed.batches(self.n_resumed, self.n_steps), self.n_resumed):
                loss, norm, n_tokens = self._step(step, batch)
                now = time.perf_counter()
                log.add(self._describe(step, batch, loss, norm, n_tokens, now - before))
                before = now
                on_progress(1)
                done = step + 1
                if done in self.spec.snapshots:
                    save_snapshot(self.out, done, self.trainee, self.spec)
                if done % self.spec.checkpoint_steps == 0 and done < self.n_steps:
                    log.flush()
                    self.checkpoints.save(done, self.parameters, self.optimizer)
        self.trainee.adapter.model.eval()
        save_result(self.out, self.trainee, self.spec)
        last = log.steps[-max(1, round(LAST_SHARE * self.n_steps)) :]
        return {
            "n_steps": self.n_steps,
            "n_examples": len(self.examples),
            "n_marked": run["examples"]["n_marked"],
            "n_trained": sum(parameter.numel() for parameter in self.parameters.values()),
            "final_loss": sum(step.loss for step in last) / len(last),
            "rejected": dict(sorted(self.feed.rejected.items())),
        }

    def _step(self, step: int, batch: Batch) -> tuple[float, float, int]:
        """Take one optimiser step; return loss, norm of the gradient and the number of tokens learnt from."""
        torch.manual_seed(int(np.random.SeedSequence([self.spec.seed, step]).generate_state(1, np.uint64)[0]))
        factor = self.spec.rate_factor(step, self.n_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        with _naming_what_to_lower(self.spec, self.trainee.adapter.device):
            loss, n_tokens = self._backward(batch)
            norm = nn.utils.clip_grad_norm_(self.parameters.values(), self.spec.max_grad_norm)
            if not math.isfinite(loss) or not math.isfinite(norm):
                raise ValueError(
                    f"the loss of step {step + 1} is {loss} and its gradient's norm {norm:g}: lower the learning rate, "
                    "or use --precision float32"
                )
            self.optimizer.step()
        return loss, float(norm), n_tokens

    def _backward(self, batch: Batch) -> tuple[float, int]:
        self.optimizer.zero_grad(set_to_none=True)
        adapter = self.trainee.adapter
        n_tokens = sum(item.n_answer_tokens for item in batch.prepared)
        pad = adapter.tokenizer.pad_token_id
        losses = []
        for group in micro_batches(batch.prepared, self.spec.micro_batch_size or self.spec.batch_size):
            inputs = collate(group, 0 if pad is None else pad)
            with torch.autocast(adapter.device.type, torch.bfloat16, enabled=self.trainee.autocast):
                summed, _ = answer_loss(adapter.model, inputs, adapter.device)
            loss = summed / n_tokens
            loss.backward()
            losses.append(loss.detach())
        return float(torch.stack(losses).sum()), n_tokens

    def _describe(
        self, step: int, batch: Batch, loss: float, norm: float, n_tokens: int, seconds: float
    ) -> Step:
        return Step(
            step=step + 1,
            epoch=self.spec.epoch(step + 1, len(self.examples)),
            loss=loss,
            learning_rate=self.optimizer.param_groups[0]["lr"],
            grad_norm=norm,
            n_examples=len(batch.examples),
            n_marked=sum(example.row.text is not None for example in batch.examples),
            n_answer_tokens=n_tokens,
            seconds=seconds,
        )


@contextmanager
def _generator_of_its_own() -> Iterator[None]:
    """Leave torch's random generators as they were."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):
        yield


@contextmanager
def _naming_what_to_lower(spec: FinetuneSpec, device: torch.device) -> Iterator[None]:
    """Let an error of memory say what would need less of it."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not is_out_of_memory(error):
            raise
        size = spec.micro_batch_size or spec.batch_size
        advice = [f"a --micro-batch-size below {size}"] if size > 1 else []
        advice += [] if spec.gradient_checkpointing else ["--gradient-checkpointing"]
        advice += ["--precision bfloat16"] if spec.precision == "float32" else []
        advice += ["a LoRA rather than --full"] if spec.full else [f"a --rank below {spec.rank}"]
        advice += [f"a --max-length below {spec.max_length}"]
        raise OSError(
            f"no memory left on {device} for a step of {spec.batch_size} examples, {size} at a time. "
            f"Use {', '.join(advice)}. ({str(error).splitlines()[0]})"
        ) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error of torch is about memory: a GPU's, or the host's, which is a plain RuntimeError."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)
