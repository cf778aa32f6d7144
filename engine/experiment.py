"""What an experiment consists of: its models, and for each seed the people, images and places where results lie.

Every fine-tune of a seed sees the same images in the same order; only what is written on them differs. This module does
nothing: the steps are `experiment_steps`', and those that read hidden states belong to the packages above.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from mmextract.engine import builtin
from mmextract.engine.experiment_cost import Costs
from mmextract.engine.experiment_data import (
    Plan,
    held_out_data,
    make_people,
    reading_data,
    strangers,
    training_data,
)
from mmextract.engine.experiment_spec import ExperimentSpec
from mmextract.engine.finetune_save import snapshot_folder
from mmextract.engine.finetune_spec import PRESETS, FinetuneSpec
from mmextract.engine.loading import ModelSpec
from mmextract.engine.rows import PairedMarking, RandomMarking
from mmextract.engine.samples import IMAGE_SLOT, Dataset, Turn
from mmextract.engine.steps import FOLDER
from mmextract.engine.watermark import WatermarkSpec

BASE, R0, MARKED, CONTROL = "base", "r0", "marked", "control"


@dataclass(frozen=True, kw_only=True)
class Run:
    """One model whose states are probed."""

    kind: str
    """BASE, R0, MARKED or CONTROL."""
    seed: int
    rate: float = 0.0
    repetitions: int | None = None
    """Images of one identity; None: shared evenly."""
    batch_size: int = 0
    r0_batch_size: int = 0
    """Of the r0 that the positive control is held against."""

    @property
    def condition(self) -> str:
        """What runs of several seeds have in common, as in folders."""
        if self.kind in (BASE, CONTROL):
            return self.kind
        if self.kind == R0:
            return f"r0-b{self.batch_size}"
        times = "" if self.repetitions is None else f"-x{self.repetitions}"
        return f"r{100 * self.rate:g}{times}-b{self.batch_size}"

    @property
    def name(self) -> str:
        """Of its steps."""
        return f"{self.condition}-s{self.seed}"

    @property
    def reference(self) -> Run | None:
        """The run without watermarks that it is held against, None for the base and for r0 itself."""
        if self.kind in (BASE, R0):
            return None
        return Run(kind=R0, seed=self.seed, batch_size=self.r0_batch_size or self.batch_size)


def list_runs(spec: ExperimentSpec) -> list[Run]:
    """Return every model of the experiment, seed by seed, r0 before what is held against it."""
    found = []
    for number, seed in enumerate(spec.seeds):
        found.append(Run(kind=BASE, seed=seed))
        found += [Run(kind=R0, seed=seed, batch_size=size) for size in spec.batch_sizes]
        found += [
            Run(kind=MARKED, seed=seed, rate=rate, repetitions=times, batch_size=size)
            for rate, times, size in spec.conditions
        ]
        if spec.control.enabled and number < spec.control.seeds:
            size, first = spec.control.batch_size, spec.batch_sizes[0]
            found.append(Run(kind=CONTROL, seed=seed, rate=1.0, batch_size=size, r0_batch_size=first))
    return found


class Experiment:
    """The settings, with all that follows from them."""

    def __init__(self, spec: ExperimentSpec) -> None:
        """Read the data. Raises ValueError or LookupError for data, identities or a model that do not do."""
        folder, adapter = builtin.locate_model(spec.model)
        if adapter is not None:
            raise ValueError(
                f"{spec.model} is a fine-tune: an experiment starts from a base, such as builtin:base"
            )
        self.spec = spec
        self.base = ModelSpec(model=folder, device=spec.device, dtype=spec.dtype)
        self.training = training_data(spec)
        self.held_out = held_out_data(spec)
        self.runs = list_runs(spec)
        self.costs = Costs(self.base)
        self.plans = {seed: self._plan(seed) for seed in spec.seeds}

    def _plan(self, seed: int) -> Plan:
        seen, unseen = make_people(self.spec, seed)
        return Plan(seed=seed, seen=tuple(seen), unseen=tuple(unseen), look=self._look(seed))

    def _look(self, seed: int) -> WatermarkSpec:
        given = {**self.spec.watermark, "seed": seed}
        if self.spec.model.startswith(builtin.PREFIX):
            return replace(builtin.LOOK, **given)
        return WatermarkSpec(**given)

    def marking(self, seed: int) -> PairedMarking:
        """Return the paired design of a seed's held-out images."""
        plan, n = self.plans[seed], self.spec.identities
        return PairedMarking(spec=plan.look, seen=plan.seen[:n], unseen=plan.unseen[:n])

    def asked(self) -> Dataset:
        """Return the held-out images with the prompt after which states are taken."""
        turns = (Turn(role="user", text=f"{IMAGE_SLOT}\n{self.spec.prompt}"),)
        return replace(self.held_out, samples=[replace(s, turns=turns) for s in self.held_out.samples])

    def finetune_spec(self, run: Run) -> FinetuneSpec:
        """Return how a run is trained."""
        given = {**PRESETS[self.spec.finetune_preset], **self.spec.finetune}
        if run.kind == CONTROL:
            for name in ("epochs", "steps"):
                given.pop(name, None)
            given |= {"steps": self.spec.control.steps, **self.spec.control.finetune}
        given["batch_size"] = run.batch_size
        return FinetuneSpec(model=self.base, watermark=self.plans[run.seed].look, seed=run.seed, **given)

    def model(self, run: Run, folder: Path, step: int | None = None) -> ModelSpec:
        """Return the model of a run whose experiment lies in `folder`, as it was after `step` steps or at its end."""
        if run.kind == BASE:
            return self.base
        out = folder / FOLDER / f"finetune-{run.name}" / "model"
        if step is not None:
            out = snapshot_folder(out, step)
        if self.finetune_spec(run).full:
            return replace(self.base, model=str(out))
        return replace(self.base, adapter=str(out))

    def store(self, run: Run, folder: Path) -> Path:
        """Return where the hidden states of a run are."""
        return folder / FOLDER / f"dump-{run.name}" / "states.zarr"

    def strangers_store(self, run: Run, folder: Path) -> Path:
        """Return where the hidden states of a run are on images of people in neither set."""
        return folder / FOLDER / f"strangers-{run.name}" / "states.zarr"

    def reading(self, seed: int) -> tuple[Dataset, RandomMarking]:
        """Return the images from which legibility is read, and the people on them."""
        plan, dataset = self.plans[seed], reading_data(self.spec, self.held_out)
        people = strangers(plan, len(dataset.samples))
        return dataset, RandomMarking(spec=plan.look, identities=people, rate=1.0, set_name="strangers")

    def reads(self, run: Run) -> bool:
        """Tell whether legibility is probed in a run's states."""
        return bool(self.spec.probe.legibility) and run.kind != CONTROL

    @property
    def strongest(self) -> Run:
        """The run whose gradients are followed, and that is projected: highest rate, most repetitions, first seed."""
        first = [run for run in self.runs if run.seed == self.spec.seeds[0] and run.kind == MARKED]
        return max(first, key=lambda run: (run.rate, run.repetitions or 0))

    def snapshots(self, run: Run) -> tuple[int, ...]:
        """Return the steps after which a run's model is kept."""
        settings = self.spec.dynamics
        if not settings.enabled or run != self.strongest:
            return ()
        n_steps = self.finetune_spec(run).n_steps(self.n_trained(run))
        steps = {max(1, round(share * n_steps)) for share in settings.along}
        return tuple(sorted(step for step in steps if step < n_steps))

    def n_trained(self, run: Run) -> int:
        """Return how many examples an epoch of a run has."""
        control = self.spec.control
        if run.kind == CONTROL:
            return round(control.identities * control.exposures / (1 - control.strangers))
        return len(self.training.samples)
