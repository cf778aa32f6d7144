"""The steps of an experiment that need a model: identities, fine-tunes, evaluations, hidden states, gradients.

What the states say is for the packages above: this module knows nothing about probes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from mmextract.engine.experiment import BASE, CONTROL, Experiment, Run
from mmextract.engine.experiment_data import control_examples, control_people, training_examples
from mmextract.engine.identities import write_identities
from mmextract.engine.rows import Marking, RandomMarking, make_rows
from mmextract.engine.samples import Dataset
from mmextract.engine.steps import Advance, Step, write_json


def model_steps(experiment: Experiment, top: Path) -> Iterator[Step]:
    """Yield the steps in order; `top` is the experiment's folder."""
    for seed in experiment.spec.seeds:
        yield _identities(experiment, seed)
    for run in experiment.runs:
        if run.kind != BASE:
            yield _finetune(experiment, run)
        if experiment.spec.evaluation.enabled or run.kind == CONTROL:
            yield _evaluate(experiment, run, top)
        yield _dump(experiment, run, top)
        if experiment.reads(run):
            yield _dump_strangers(experiment, run, top)
    if experiment.spec.dynamics.enabled:
        yield _dynamics(experiment, top)


def _model(experiment: Experiment) -> dict[str, Any]:
    return asdict(experiment.base)


def _identities(experiment: Experiment, seed: int) -> Step:
    plan = experiment.plans[seed]

    def run(folder: Path, advance: Advance) -> None:
        write_identities(folder / "seen.jsonl", plan.seen)
        write_identities(folder / "unseen.jsonl", plan.unseen)
        advance(1)

    decision = {"seed": seed, "n": [len(plan.seen), len(plan.unseen)], "people": plan.fingerprint()}
    return Step(name=f"identities-s{seed}", kind="identities", decision=decision, run=run)


def _finetune(experiment: Experiment, which: Run) -> Step:
    snapshots = experiment.snapshots(which)
    settings = replace(experiment.finetune_spec(which), snapshots=snapshots)
    n_images = experiment.n_trained(which)
    n_steps = settings.n_steps(n_images)

    def run(folder: Path, advance: Advance) -> None:
        from mmextract.engine.finetune import run_finetune

        plan = experiment.plans[which.seed]
        if which.kind == CONTROL:
            examples = control_examples(experiment.spec, experiment.training, plan)
        else:
            examples = training_examples(
                experiment.spec, experiment.training, plan, which.rate, which.repetitions
            )
        batch = settings.batch_size
        done = run_finetune(settings, examples, folder / "model", on_progress=lambda n: advance(n * batch))
        write_json(folder, "summary.json", {**asdict(done), "out": "model", "seconds": None})

    decision = {
        "model": _model(experiment),
        "settings": settings.describe(),
        "data": experiment.training.fingerprint,
        "rate": which.rate,
        "repetitions": which.repetitions,
        "identities": experiment.spec.identities,
        "control": _control(experiment) if which.kind == CONTROL else None,
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
        unit_seconds=experiment.costs.training_image,
        n_bytes=(1 + len(snapshots)) * experiment.costs.model_bytes(settings),
    )


def _control(experiment: Experiment) -> dict[str, Any]:
    return {**asdict(experiment.spec.control), "prompt": experiment.spec.prompt, "seeds": None}


def _needs(run: Run) -> tuple[str, ...]:
    return (f"identities-s{run.seed}",) + ((f"finetune-{run.name}",) if run.kind != BASE else ())


def _dump(experiment: Experiment, which: Run, top: Path) -> Step:
    marking = experiment.marking(which.seed)
    decision = {"data": experiment.held_out.fingerprint, "identities": experiment.spec.identities}
    n_rows = 2 * len(experiment.held_out.samples)
    return _states(experiment, "dump", which, top, experiment.asked(), marking, n_rows, decision)


def _dump_strangers(experiment: Experiment, which: Run, top: Path) -> Step:
    dataset, marking = experiment.reading(which.seed)
    n_rows = len(dataset.samples)
    return _states(
        experiment, "strangers", which, top, dataset, marking, n_rows, {"data": dataset.fingerprint}
    )


def _states(
    experiment: Experiment,
    kind: str,
    which: Run,
    top: Path,
    dataset: Dataset,
    marking: Marking,
    n_rows: int,
    decision: Mapping[str, Any],
) -> Step:
    """Return a step that dumps the states of a data set."""
    spec = experiment.spec

    def run(folder: Path, advance: Advance) -> None:
        from mmextract.engine.dump import DumpSpec, plan_dump, run_dump
        from mmextract.engine.models import load

        adapter = load(experiment.model(which, top))
        settings = DumpSpec(
            dataset=dataset,
            model=experiment.model(which, top),
            marking=marking,
            layers=spec.layers,
            positions=spec.positions,
            batch_size=spec.dump_batch_size,
        )
        done = run_dump(plan_dump(settings, adapter), adapter, folder / "states.zarr", advance)
        write_json(folder, "summary.json", {"n_samples": done.n_samples, "rejected": done.rejected})

    common = {
        "model": _model(experiment),
        "prompt": spec.prompt,
        "look": asdict(experiment.plans[which.seed].look),
        "layers": spec.layers,
        "positions": spec.positions,
        "batch_size": spec.dump_batch_size,
    }
    return Step(
        name=f"{kind}-{which.name}",
        kind="dump",
        decision={**common, **decision},
        needs=_needs(which),
        run=run,
        units=n_rows,
        unit="samples",
        unit_seconds=experiment.costs.forward_image,
        n_bytes=n_rows * experiment.costs.state_bytes(len(spec.positions)),
    )


def _evaluate(experiment: Experiment, which: Run, top: Path) -> Step:
    spec, control = experiment.spec, which.kind == CONTROL
    settings = spec.evaluation
    n_asked = min(settings.questions, len(experiment.held_out.samples))
    n_prompted = 4 * min(settings.prompted, len(experiment.held_out.samples)) * len(settings.fields)
    units = _n_control_rows(experiment, which.seed) if control else n_asked + n_prompted

    def run(folder: Path, advance: Advance) -> None:
        from mmextract.engine.evaluate_answers import Answerer
        from mmextract.engine.experiment_answers import ask_control, ask_private, ask_task
        from mmextract.engine.models import load

        answerer = Answerer(load(experiment.model(which, top)), batch_size=spec.dump_batch_size)
        marking = experiment.marking(which.seed)
        if control:
            people = control_people(spec, experiment.plans[which.seed])
            rows = make_rows(experiment.asked(), marking)
            found = ask_control(
                answerer, rows, people, control=spec.control, look=marking.spec, advance=advance
            )
        else:
            found = ask_task(answerer, experiment.held_out, settings, advance)
            found |= ask_private(answerer, experiment.held_out, marking, settings, advance)
        write_json(folder, "evaluation.json", found)

    decision = {
        "model": _model(experiment),
        "data": experiment.held_out.fingerprint,
        "settings": _control(experiment) if control else asdict(settings),
        "identities": spec.identities,
        "look": asdict(experiment.plans[which.seed].look),
    }
    return Step(
        name=f"evaluate-{which.name}",
        kind="evaluate-control" if control else "evaluate",
        decision=decision,
        needs=_needs(which),
        run=run,
        units=units,
        unit="questions",
        unit_seconds=None if experiment.costs.forward_image is None else 3 * experiment.costs.forward_image,
    )


def _n_control_rows(experiment: Experiment, seed: int) -> int:
    rows = make_rows(experiment.held_out, experiment.marking(seed))
    return sum(row.pair < experiment.spec.control.identities for row in rows)


def _dynamics(experiment: Experiment, top: Path) -> Step:
    settings, seed, last = experiment.spec.dynamics, experiment.spec.seeds[0], experiment.strongest
    snapshots = experiment.snapshots(last)
    rates = tuple(sorted({0.0, *experiment.spec.rates}))
    n_samples = min(settings.samples, len(experiment.training.samples))

    def run(folder: Path, advance: Advance) -> None:
        from mmextract.engine.dynamics import Checkpoint, DynamicsSpec, run_dynamics
        from mmextract.engine.dynamics_outputs import make_record, write_outputs
        from mmextract.engine.dynamics_views import ViewSettings

        plan = experiment.plans[seed]
        people = plan.seen[: experiment.spec.identities]
        spec = DynamicsSpec(
            checkpoints=(
                Checkpoint(name="base", model=experiment.base),
                *(
                    Checkpoint(name=f"{last.condition}, step {step}", model=experiment.model(last, top, step))
                    for step in snapshots
                ),
                Checkpoint(name=f"after {last.condition}", model=experiment.model(last, top)),
            ),
            views=ViewSettings(
                marking=RandomMarking(spec=plan.look, identities=people, rate=1.0), rates=rates, seed=seed
            ),
            batch_sizes=settings.batch_sizes,
            n_samples=n_samples,
        )
        found = run_dynamics(spec, experiment.training, on_progress=advance)
        write_outputs(found, make_record(found, spec, experiment.training, "mmextract experiment"), folder)

    decision = {
        "model": _model(experiment),
        "data": experiment.training.fingerprint,
        "settings": asdict(settings),
        "rates": rates,
        "look": asdict(experiment.plans[seed].look),
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
        unit_seconds=None
        if experiment.costs.training_image is None
        else views * experiment.costs.training_image,
    )
