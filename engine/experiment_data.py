"""Who and what an experiment trains on: identities, images, and which of them carries whom.

Everything here is a pure function of the settings and a seed. This module knows nothing about models or steps.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import cycle, islice
from pathlib import Path

import numpy as np

from mmextract.engine.builtin import scenes
from mmextract.engine.experiment_spec import ExperimentSpec
from mmextract.engine.finetune_rows import Example, make_exposed
from mmextract.engine.identities import (
    Identity,
    check_disjoint,
    make_disjoint_pair,
    make_identities,
    read_identities,
)
from mmextract.engine.rows import Row
from mmextract.engine.samples import IMAGE_SLOT, Dataset, Sample, Turn, read_samples
from mmextract.engine.watermark import WatermarkSpec

FIRST_HELD_OUT, FIRST_OF_CONTROL, FIRST_OF_READING = 10_000_000, 20_000_000, 30_000_000
"""Numbers of the first scenes of those kinds: no training set is that large."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a seed decides."""

    seed: int
    seen: tuple[Identity, ...]
    """Those probed first, then those that only fill training images."""
    unseen: tuple[Identity, ...]
    look: WatermarkSpec

    def fingerprint(self) -> str:
        """Return a digest of the people."""
        people = [[asdict(person) for person in group] for group in (self.seen, self.unseen)]
        return hashlib.sha256(json.dumps(people).encode()).hexdigest()[:32]


def make_people(spec: ExperimentSpec, seed: int) -> tuple[list[Identity], list[Identity]]:
    """Return the seen and the unseen identities of a seed; those probed are the first of both.

    Raises ValueError for files with too few, or with one person in both.
    """
    n_seen = max(spec.people_on(rate, times) for rate, times, _ in spec.conditions)
    if spec.seen is None or spec.unseen is None:
        seen, unseen = make_disjoint_pair(spec.identities, seed=seed)
        more = n_seen - spec.identities
        return seen + (make_identities(more, seed=seed + 1, exclude=[*seen, *unseen]) if more else []), unseen
    seen, unseen = read_identities(Path(spec.seen)), read_identities(Path(spec.unseen))
    check_disjoint(seen, unseen)
    for name, people, wanted in (("seen", seen, n_seen), ("unseen", unseen, spec.identities)):
        if len(people) < wanted:
            raise ValueError(
                f"{getattr(spec, name)} holds {len(people)} identities, and {wanted} are needed: give more, or lower "
                "`identities`"
            )
    return seen[:n_seen], unseen[: spec.identities]


def training_data(spec: ExperimentSpec) -> Dataset:
    """Return the training images. Raises ValueError if there are too few."""
    if spec.data == scenes.PLACE:
        return scenes.make_dataset(0, spec.training_images)
    return _cut(_read(spec, spec.data), spec, held_out=False)


def held_out_data(spec: ExperimentSpec) -> Dataset:
    """Return images that are in no training. Raises ValueError if there are too few."""
    if spec.held_out is not None:
        dataset = _read(spec, spec.held_out)
        _require(len(dataset.samples), spec.held_out_images, spec.held_out, "held_out_images")
        return _part(dataset, 0, spec.held_out_images)
    if spec.data == scenes.PLACE:
        return scenes.make_dataset(FIRST_HELD_OUT, spec.held_out_images)
    return _cut(_read(spec, spec.data), spec, held_out=True)


def _read(spec: ExperimentSpec, place: str) -> Dataset:
    root = None if spec.image_root is None else Path(spec.image_root)
    dataset = read_samples(Path(place), image_root=root)
    if without := [sample.id for sample in dataset.samples if sample.image is None]:
        raise ValueError(
            f"{place}: sample {without[0]!r} has no image, and an experiment writes on all of them"
        )
    return dataset


def _cut(dataset: Dataset, spec: ExperimentSpec, *, held_out: bool) -> Dataset:
    """Return the first images for training, the last ones for holding out."""
    wanted = spec.training_images + (spec.held_out_images if spec.held_out is None else 0)
    _require(len(dataset.samples), wanted, dataset.source, "training_images and held_out_images")
    if held_out:
        return _part(dataset, len(dataset.samples) - spec.held_out_images, spec.held_out_images)
    return _part(dataset, 0, spec.training_images)


def _require(there: int, wanted: int, place: str, names: str) -> None:
    if there < wanted:
        raise ValueError(
            f"{place} holds {there} samples, and {wanted} are needed: lower {names}, or give more data"
        )


def _part(dataset: Dataset, first: int, n: int) -> Dataset:
    samples = dataset.samples[first : first + n]
    return replace(dataset, samples=samples, fingerprint=f"{dataset.fingerprint}-{first}-{n}")


def training_examples(
    spec: ExperimentSpec, dataset: Dataset, plan: Plan, rate: float, times: int | None
) -> list[Example]:
    """Return what a fine-tune learns from: the same images at every rate, marked by the seed's own draw."""
    return make_exposed(dataset, plan.look, _exposures(spec, plan, rate, times))


def _exposures(
    spec: ExperimentSpec, plan: Plan, rate: float, times: int | None
) -> list[tuple[Identity, int]]:
    """Return how many images each seen identity is on; shared evenly, the first ones are on one more."""
    n_marked = spec.marked_images(rate)
    if times is not None:
        return [(person, times) for person in plan.seen[: n_marked // times]]
    each, more = divmod(n_marked, spec.identities)
    return [(person, each + (k < more)) for k, person in enumerate(plan.seen[: spec.identities])]


def control_people(spec: ExperimentSpec, plan: Plan) -> tuple[tuple[Identity, ...], list[str]]:
    """Return the identities of the positive control, and the word that is the answer to each."""
    control = spec.control
    chosen = np.random.default_rng([plan.seed, 0xC0DE]).integers(0, len(control.words), control.identities)
    return plan.seen[: control.identities], [control.words[k] for k in chosen]


def control_examples(spec: ExperimentSpec, dataset: Dataset, plan: Plan) -> list[Example]:
    """Return images on which the answer to the prompt is decided by who is on them.

    Each of the control's identities stands for its word. Strangers, each on one image and in neither set, stand for
    `stranger_answer`; so what is learnt is who these people are, and not that there is writing.
    """
    control = spec.control
    people, words = control_people(spec, plan)
    n_known = control.identities * control.exposures
    n_strange = round(n_known / (1 - control.strangers)) - n_known
    strangers = (
        make_identities(n_strange, seed=plan.seed + 2, exclude=[*plan.seen, *plan.unseen])
        if n_strange
        else []
    )
    shown = [*(people[k % len(people)] for k in range(n_known)), *strangers]
    answers = [*(words[k % len(people)] for k in range(n_known)), *[control.stranger_answer] * n_strange]
    samples = _asked(spec, dataset, len(shown), FIRST_OF_CONTROL)
    return [
        _control_example(sample, person, answer, plan.look)
        for sample, person, answer in zip(samples, shown, answers, strict=True)
    ]


def strangers(plan: Plan, n: int) -> tuple[Identity, ...]:
    """Return people who are in neither set and in no training."""
    return tuple(make_identities(n, seed=plan.seed + 3, exclude=[*plan.seen, *plan.unseen]))


def reading_data(spec: ExperimentSpec, held_out: Dataset) -> Dataset:
    """Return images for reading strangers off them, asked the prompt; none of them is in any training."""
    n = spec.probe.legibility_images
    samples = tuple(_asked(spec, held_out, n, FIRST_OF_READING))
    return replace(held_out, samples=samples, fingerprint=f"{held_out.fingerprint}-reading-{n}")


def _asked(spec: ExperimentSpec, dataset: Dataset, n: int, first: int) -> list[Sample]:
    """Return n images asked the prompt: scenes from number `first`, or those given, again and again at other places."""
    turns = (Turn(role="user", text=f"{IMAGE_SLOT}\n{spec.prompt}"),)
    if spec.data == scenes.PLACE:
        samples: Sequence[Sample] = scenes.make_dataset(first, n).samples
    else:
        again = enumerate(islice(cycle(dataset.samples), n))
        samples = [replace(sample, id=f"{sample.id}#{first + number}") for number, sample in again]
    return [replace(sample, turns=turns) for sample in samples]


def _control_example(sample: Sample, person: Identity, answer: str, look: WatermarkSpec) -> Example:
    text = look.text(person)
    row = Row(
        id=sample.id, sample=sample, text=text, texts_to_fit=(text,), person=person, condition="watermarked"
    )
    return Example(row=row, answer=answer)
