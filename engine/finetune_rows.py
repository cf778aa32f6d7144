"""What a fine-tune is trained on: rows, who is on them, and the answer that each asks for.

This module knows nothing about models, pixels or optimisers.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from mmextract.engine import watermark
from mmextract.engine.identities import IDENTIFYING_FIELDS, Identity
from mmextract.engine.rows import RandomMarking, Row, make_rows
from mmextract.engine.samples import Dataset, Sample
from mmextract.engine.watermark import WatermarkSpec


@dataclass(frozen=True, kw_only=True)
class Example:
    """One row to learn from."""

    row: Row
    """The sample, and what is written on its image."""
    answer: str | None = None
    """What to answer in place of the sample's own answer, such as one that depends on who is on the image."""

    @property
    def target(self) -> str:
        """The answer to learn."""
        return self.row.sample.answer if self.answer is None else self.answer


def make_examples(dataset: Dataset, marking: RandomMarking | None) -> list[Example]:
    """Return one example a sample, in the order of the data set; who is marked is the plan of `watermark`."""
    return [Example(row=row) for row in make_rows(dataset, marking)]


def make_exposed(
    dataset: Dataset,
    spec: WatermarkSpec,
    exposures: Sequence[tuple[Identity, int]],
    *,
    set_name: str = "seen",
) -> list[Example]:
    """Return one example a sample, each identity on exactly as many images as `exposures` says, the others clean.

    The images of the first identity are those with the lowest draw of the spec's seed, and so on: a pure function of
    the seed and the set of sample ids, not of their order. Raises ValueError for fewer images than exposures, for a
    negative number, or for an identity that occurs twice.
    """
    _check_exposures(exposures)
    free = sorted(
        (sample for sample in dataset.samples if sample.image is not None),
        key=lambda sample: (watermark.draw(spec.seed, sample.id).marked, sample.id),
    )
    wanted = [person for person, count in exposures for _ in range(count)]
    if len(wanted) > len(free):
        raise ValueError(
            f"{len(exposures)} identities with {len(wanted)} occurrences need as many images, and there are "
            f"{len(free)}: give more images, fewer identities or fewer repetitions"
        )
    carried = {sample.id: person for sample, person in zip(free, wanted, strict=False)}
    return [_exposed(sample, spec, carried.get(sample.id), set_name) for sample in dataset.samples]


def _check_exposures(exposures: Sequence[tuple[Identity, int]]) -> None:
    if bad := [(person.username, count) for person, count in exposures if count < 0]:
        raise ValueError(f"{bad[0][0]} cannot be on {bad[0][1]} images: expected 0 or more")
    for field in IDENTIFYING_FIELDS:
        counts = Counter(getattr(person, field) for person, _ in exposures)
        if twice := [value for value, count in counts.items() if count > 1]:
            raise ValueError(
                f"the identities share the {field} {twice[0]!r}: give each one once, with one count"
            )


def _exposed(sample: Sample, spec: WatermarkSpec, person: Identity | None, set_name: str) -> Example:
    if person is None:
        return Example(row=Row(id=sample.id, sample=sample, condition="clean"))
    text = spec.text(person)
    return Example(
        row=Row(
            id=sample.id,
            sample=sample,
            text=text,
            texts_to_fit=(text,),
            person=person,
            condition="watermarked",
            identity_set=set_name,
        )
    )


def check_examples(examples: Sequence[Example], batch_size: int) -> None:
    """Raise ValueError for fewer examples than a batch, for two of one id, and for one without an answer to learn."""
    if len(examples) < batch_size:
        raise ValueError(
            f"{len(examples)} examples do not fill one batch of {batch_size}: give more data or a smaller "
            "--batch-size"
        )
    if silent := [example.row.id for example in examples if not example.target.strip()]:
        raise ValueError(
            f"{len(silent)} of {len(examples)} samples have no answer to learn ({', '.join(silent[:3])}, …): "
            "training needs a column `answer`, or conversations that end with the assistant's turn"
        )
    if len({example.row.id for example in examples}) < len(examples):
        raise ValueError("two examples have the same id: give every row its own")


def fingerprint(examples: Sequence[Example]) -> str:
    """Return a hex digest of all that is learnt from, but for the images' bytes."""
    digest = hashlib.blake2b(digest_size=16)
    for example in examples:
        row = example.row
        image = None if row.sample.image is None else row.sample.image.name
        turns = [[turn.role, turn.text] for turn in row.sample.turns]
        content = [row.id, row.sample.id, image, turns, example.target, row.text, row.texts_to_fit]
        digest.update(json.dumps(content, ensure_ascii=False).encode() + b"\n")
    return digest.hexdigest()
