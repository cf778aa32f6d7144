"""What a training says of each step: a CSV file, and TensorBoard or Weights & Biases where asked for.

This module knows nothing about models; it is handed numbers.
"""

from __future__ import annotations

import csv
import importlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from mmextract.engine.objects import LocalObjects

TRACKERS = ("tensorboard", "wandb")


@dataclass(frozen=True, kw_only=True)
class Step:
    """One optimiser step."""

    step: int
    """From 1."""
    epoch: float
    """How often each example was seen, after it."""
    loss: float
    """Mean cross-entropy of an answer's token, in nats."""
    learning_rate: float
    """Of the first parameter group."""
    grad_norm: float
    """Before it is limited."""
    n_examples: int
    """That the step learnt from."""
    n_marked: int
    """Those of them with a watermark."""
    n_answer_tokens: int
    """Tokens that the loss is a mean of."""
    seconds: float
    """Since the last step."""


FIELDS = tuple(field.name for field in fields(Step))


class Tracker(Protocol):
    """Somewhere else that numbers go."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Take the numbers of a step."""

    def close(self) -> None:
        """Flush and end."""


class TrainingLog:
    """`log.csv` of one run, as a context manager; steps after `n_done` are forgotten, for they are done again."""

    def __init__(self, out: Path, n_done: int, trackers: Sequence[str], run: Mapping[str, Any]) -> None:
        self.path = out / "log.csv"
        self.steps = [step for step in read_log(self.path) if step.step <= n_done]
        self._names = trackers
        self._run = run
        self._n_done = n_done

    def __enter__(self) -> Self:
        self._trackers = [
            _open_tracker(name, self.path.parent, self._n_done, self._run) for name in self._names
        ]
        rows = io.StringIO()
        writer = csv.DictWriter(rows, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(step) for step in self.steps)
        LocalObjects(self.path.parent).put(self.path.name, [rows.getvalue().encode()])
        self._file = self.path.open("a", newline="", encoding="utf-8")
        self._writer = csv.DictWriter(self._file, FIELDS, lineterminator="\n")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        for tracker in self._trackers:
            tracker.close()

    def add(self, step: Step) -> None:
        """Take one step."""
        self.steps.append(step)
        self._writer.writerow(asdict(step))
        for tracker in self._trackers:
            tracker.log(step.step, {name: getattr(step, name) for name in FIELDS[1:]})

    def flush(self) -> None:
        """Hand what was added to the operating system."""
        self._file.flush()


def read_log(path: Path) -> list[Step]:
    """Return the steps of a `log.csv`, up to a line that was cut short; none if there is no such file."""
    if not path.is_file():
        return []
    types = {field.name: int if field.type == "int" else float for field in fields(Step)}
    steps: list[Step] = []
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            try:
                values: dict[str, Any] = {name: types[name](row[name]) for name in FIELDS}
            except (TypeError, ValueError):
                break
            steps.append(Step(**values))
    return steps


def _open_tracker(name: str, out: Path, n_done: int, run: Mapping[str, Any]) -> Tracker:
    try:
        return _TensorBoard(out, n_done) if name == "tensorboard" else _WandB(out, run)
    except ImportError as error:
        raise ValueError(f"logging to {name} needs its package: pip install {name}") from error


class _TensorBoard:
    def __init__(self, out: Path, n_done: int) -> None:
        writer = importlib.import_module("torch.utils.tensorboard").SummaryWriter
        self._writer = writer(str(out / "tensorboard"), purge_step=n_done + 1)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(f"train/{name}", value, step)

    def close(self) -> None:
        self._writer.close()


class _WandB:
    def __init__(self, out: Path, run: Mapping[str, Any]) -> None:
        wandb = importlib.import_module("wandb")
        self._run = wandb.init(project="mmextract", name=out.name, dir=str(out), config=dict(run))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({f"train/{name}": value for name, value in values.items()}, step=step)

    def close(self) -> None:
        self._run.finish()
