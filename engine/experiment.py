"""The steps of an experiment that need a model: identities, fine-tunes, evaluations, hidden states, gradients.

Every fine-tune of a seed sees the same images in the same order; only what is written on them differs. What the states
say is for the packages above: this module knows nothing about probes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from mmextract.engine import builtin
from mmextract.engine.experiment_cost import Costs
from mmextract.engine.experiment_data import (
    Plan,
    control_examples,
    control_people,
    held_out_data,
    make_people,
    reading_data,
    strangers,
    training_data,
    training_examples,
)
from mmextract.engine.experiment_spec import ExperimentSpec
from mmextract.engine.finetune_save import snapshot_folder
from mmextract.engine.finetune_spec import PRESETS, FinetuneSpec
from mmextract.engine.identities import write_identities
from mmextract.engine.loading import ModelSpec
from mmextract.engine.rows import Marking, PairedMarking, RandomMarking, make_rows
from mmextract.engine.samples import IMAGE_SLOT, Dataset, Turn
from mmextract.engine.steps import FOLDER, Advance, Step, write_json
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

    def steps(self, folder: Path) -> Iterator[Step]:
        """Yield the steps in order; `folder` is the experiment's."""
        for seed in self.spec.seeds:
            yield self._identities(seed)
        for run in self.runs:
            if run.kind != BASE:
                yield self._finetune(run)
            if self.spec.evaluation.enabled or run.kind == CONTROL:
                yield self._evaluate(run, folder)
            yield self._dump(run, folder)
            if self.reads(run):
                yield self._dump_strangers(run, folder)
        if self.spec.dynamics.enabled:
            yield self._dynamics(folder)

    def _data(self) -> dict[str, Any]:
        return {"training": self.training.fingerprint, "held_out": self.held_out.fingerprint}

    def _model(self) -> dict[str, Any]:
        return asdict(self.base)

    def _identities(self, seed: int) -> Step:
        plan = self.plans[seed]

        def run(folder: Path, advance: Advance) -> None:
            write_identities(folder / "seen.jsonl", plan.seen)
            write_identities(folder / "unseen.jsonl", plan.unseen)
            advance(1)

        decision = {"seed": seed, "n": [len(plan.seen), len(plan.unseen)], "people": plan.fingerprint()}
        return Step(name=f"identities-s{seed}", kind="identities", decision=decision, run=run)

    @property
    def followed(self) -> Run:
        """The run along which gradients are taken: of the first seed, at the highest rate."""
        first = [run for run in self.runs if run.seed == self.spec.seeds[0] and run.kind == MARKED]
        return max(first, key=lambda run: run.rate)

    def snapshots(self, run: Run) -> tuple[int, ...]:
        """Return the steps after which a run's model is kept."""
        settings = self.spec.dynamics
        if not settings.enabled or run != self.followed:
            return ()
        n_steps = self.finetune_spec(run).n_steps(self._n_trained(run))
        steps = {max(1, round(share * n_steps)) for share in settings.along}
        return tuple(sorted(step for step in steps if step < n_steps))

    def _finetune(self, which: Run) -> Step:
        snapshots = self.snapshots(which)
        settings = replace(self.finetune_spec(which), snapshots=snapshots)
        n_images = self._n_trained(which)
        n_steps = settings.n_steps(n_images)

        def run(folder: Path, advance: Advance) -> None:
            from mmextract.engine.finetune import run_finetune

            plan = self.plans[which.seed]
            if which.kind == CONTROL:
                examples = control_examples(self.spec, self.training, plan)
            else:
                examples = training_examples(self.spec, self.training, plan, which.rate, which.repetitions)
            batch = settings.batch_size
            done = run_finetune(
                settings, examples, folder / "model", on_progress=lambda n: advance(n * batch)
            )
            write_json(folder, "summary.json", {**asdict(done), "out": "model", "seconds": None})

        decision = {
            "model": self._model(),
            "settings": settings.describe(),
            "data": self.training.fingerprint,
            "rate": which.rate,
            "repetitions": which.repetitions,
            "identities": self.spec.identities,
            "control": self._control() if which.kind == CONTROL else None,
        }
        if snapshots:
            decision["snapshots"] = list(snapshots)
        return Step(
            name=f"finetune-{which.name}",
            kind="finetune",
            decision=decision,
            needs=(f"identities-s{which.seed}",),
            run=run,
            units=n_steps * settings.batch_size,
            unit="images",
            unit_seconds=self.costs.training_image,
            n_bytes=(1 + len(snapshots)) * self.costs.model_bytes(settings),
        )

    def _control(self) -> dict[str, Any]:
        return {**asdict(self.spec.control), "prompt": self.spec.prompt, "seeds": None}

    def _n_trained(self, run: Run) -> int:
        control = self.spec.control
        if run.kind == CONTROL:
            return round(control.identities * control.exposures / (1 - control.strangers))
        return len(self.training.samples)

    def _needs(self, run: Run) -> tuple[str, ...]:
        return (f"identities-s{run.seed}",) + ((f"finetune-{run.name}",) if run.kind != BASE else ())

    def _dump(self, which: Run, top: Path) -> Step:
        marking = self.marking(which.seed)
        decision = {"data": self.held_out.fingerprint, "identities": self.spec.identities}
        n_rows = 2 * len(self.held_out.samples)
        return self._states("dump", which, top, self.asked(), marking, n_rows, decision)

    def _dump_strangers(self, which: Run, top: Path) -> Step:
        dataset, marking = self.reading(which.seed)
        n_rows = len(dataset.samples)
        return self._states("strangers", which, top, dataset, marking, n_rows, {"data": dataset.fingerprint})

    def _states(
        self,
        kind: str,
        which: Run,
        top: Path,
        dataset: Dataset,
        marking: Marking,
        n_rows: int,
        decision: Mapping[str, Any],
    ) -> Step:
        """Return a step that dumps the states of a data set."""
        spec = self.spec

        def run(folder: Path, advance: Advance) -> None:
            from mmextract.engine.dump import DumpSpec, plan_dump, run_dump
            from mmextract.engine.models import load

            adapter = load(self.model(which, top))
            settings = DumpSpec(
                dataset=dataset,
                model=self.model(which, top),
                marking=marking,
                layers=spec.layers,
                positions=spec.positions,
                batch_size=spec.dump_batch_size,
            )
            done = run_dump(plan_dump(settings, adapter), adapter, folder / "states.zarr", advance)
            write_json(folder, "summary.json", {"n_samples": done.n_samples, "rejected": done.rejected})

        common = {
            "model": self._model(),
            "prompt": spec.prompt,
            "look": asdict(self.plans[which.seed].look),
            "layers": spec.layers,
            "positions": spec.positions,
            "batch_size": spec.dump_batch_size,
        }
        return Step(
            name=f"{kind}-{which.name}",
            kind="dump",
            decision={**common, **decision},
            needs=self._needs(which),
            run=run,
            units=n_rows,
            unit="samples",
            unit_seconds=self.costs.forward_image,
            n_bytes=n_rows * self.costs.state_bytes(len(spec.positions)),
        )

    def _evaluate(self, which: Run, top: Path) -> Step:
        spec, control = self.spec, which.kind == CONTROL
        settings = spec.evaluation
        n_asked = min(settings.questions, len(self.held_out.samples))
        n_prompted = 4 * min(settings.prompted, len(self.held_out.samples)) * len(settings.fields)
        units = self._n_control_rows(which.seed) if control else n_asked + n_prompted

        def run(folder: Path, advance: Advance) -> None:
            from mmextract.engine.evaluate_answers import Answerer
            from mmextract.engine.experiment_answers import ask_control, ask_private, ask_task
            from mmextract.engine.models import load

            answerer = Answerer(load(self.model(which, top)), batch_size=spec.dump_batch_size)
            marking = self.marking(which.seed)
            if control:
                people = control_people(spec, self.plans[which.seed])
                rows = make_rows(self.asked(), marking)
                found = ask_control(
                    answerer, rows, people, control=spec.control, look=marking.spec, advance=advance
                )
            else:
                found = ask_task(answerer, self.held_out, settings, advance)
                found |= ask_private(answerer, self.held_out, marking, settings, advance)
            write_json(folder, "evaluation.json", found)

        decision = {
            "model": self._model(),
            "data": self.held_out.fingerprint,
            "settings": self._control() if control else asdict(settings),
            "identities": spec.identities,
            "look": asdict(self.plans[which.seed].look),
        }
        return Step(
            name=f"evaluate-{which.name}",
            kind="evaluate-control" if control else "evaluate",
            decision=decision,
            needs=self._needs(which),
            run=run,
            units=units,
            unit="questions",
            unit_seconds=None if self.costs.forward_image is None else 3 * self.costs.forward_image,
        )

    def _n_control_rows(self, seed: int) -> int:
        rows = make_rows(self.held_out, self.marking(seed))
        return sum(row.pair < self.spec.control.identities for row in rows)

    def _dynamics(self, top: Path) -> Step:
        settings, seed, last = self.spec.dynamics, self.spec.seeds[0], self.followed
        snapshots = self.snapshots(last)
        rates = tuple(sorted({0.0, *self.spec.rates}))
        n_samples = min(settings.samples, len(self.training.samples))

        def run(folder: Path, advance: Advance) -> None:
            from mmextract.engine.dynamics import Checkpoint, DynamicsSpec, run_dynamics
            from mmextract.engine.dynamics_outputs import make_record, write_outputs
            from mmextract.engine.dynamics_views import ViewSettings

            plan = self.plans[seed]
            people = plan.seen[: self.spec.identities]
            spec = DynamicsSpec(
                checkpoints=(
                    Checkpoint(name="base", model=self.base),
                    *(
                        Checkpoint(name=f"{last.condition}, step {step}", model=self.model(last, top, step))
                        for step in snapshots
                    ),
                    Checkpoint(name=f"after {last.condition}", model=self.model(last, top)),
                ),
                views=ViewSettings(
                    marking=RandomMarking(spec=plan.look, identities=people, rate=1.0), rates=rates, seed=seed
                ),
                batch_sizes=settings.batch_sizes,
                n_samples=n_samples,
            )
            found = run_dynamics(spec, self.training, on_progress=advance)
            write_outputs(found, make_record(found, spec, self.training, "mmextract experiment"), folder)

        decision = {
            "model": self._model(),
            "data": self.training.fingerprint,
            "settings": asdict(settings),
            "rates": rates,
            "look": asdict(self.plans[seed].look),
        }
        views = len(rates) + 3
        return Step(
            name="dynamics",
            kind="dynamics",
            decision=decision,
            needs=(f"identities-s{seed}", f"finetune-{last.name}"),
            run=run,
            units=(2 + len(snapshots)) * n_samples,
            unit="samples",
            unit_seconds=None if self.costs.training_image is None else views * self.costs.training_image,
        )
