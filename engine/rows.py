"""Which rows a run has: every sample once, or, in the paired design, once with a seen and once with an unseen identity.

This module knows nothing about pixels, models or stores.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from mmextract.engine import watermark
from mmextract.engine.identities import FIELDS, Identity, check_disjoint
from mmextract.engine.samples import Dataset, Sample
from mmextract.engine.watermark import WatermarkSpec

RUN_COLUMNS = ("condition", "identity_set", "pair", *(f"identity_{name}" for name in FIELDS), "identity")
RESERVED = frozenset({
    *RUN_COLUMNS,
    *("sample", "layer", "position", "hidden", "shard", "image", "question", "answer", "source_sample"),
    *("hidden_states", "vision_states", "shard_digest", "record", "rejected"),
    *("n_tokens", "n_nonfinite", "image_hash", "image_height", "image_width"),
    *("watermark_x", "watermark_y", "watermark_font_px"),
})  # fmt: skip
"""Names that a column of the input must not take in the store; there it is called `input_<name>`."""


@dataclass(frozen=True, kw_only=True)
class RandomMarking:
    """Each sample carries, with a probability of `rate`, an identity drawn uniformly from one set."""

    spec: WatermarkSpec
    """How it looks."""
    identities: tuple[Identity, ...]
    """Who may occur."""
    rate: float
    """Share of samples that are watermarked, 0 to 1."""
    set_name: str = "identities"
    """What the column `identity_set` says of a watermarked sample."""

    def __post_init__(self) -> None:
        if not 0 <= self.rate <= 1:
            raise ValueError(f"the watermark rate must lie in [0, 1], got {self.rate}")
        if not self.identities:
            raise ValueError("watermarking needs at least one identity")


@dataclass(frozen=True, kw_only=True)
class PairedMarking:
    """Each sample occurs twice, at the same place: with the k-th seen and with the k-th unseen identity."""

    spec: WatermarkSpec
    """How it looks."""
    seen: tuple[Identity, ...]
    """Identities of the fine-tuning data."""
    unseen: tuple[Identity, ...]
    """Identities that are in no training data, as many as `seen`."""

    def __post_init__(self) -> None:
        if len(self.seen) != len(self.unseen):
            raise ValueError(
                f"the paired design needs as many unseen identities as seen ones, got {len(self.seen)} seen and "
                f"{len(self.unseen)} unseen"
            )
        if not self.seen:
            raise ValueError("the paired design needs at least one identity of each kind")
        check_disjoint(self.seen, self.unseen)


Marking = RandomMarking | PairedMarking


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of the store: a sample and what is written on its image."""

    id: str
    """Unique in the store."""
    sample: Sample
    """Where it comes from."""
    text: str | None = None
    """The watermark, None for none."""
    texts_to_fit: tuple[str, ...] = ()
    """All texts that must fit at the place where `text` goes."""
    person: Identity | None = None
    """Who is on it."""
    condition: str = ""
    """`seen` or `unseen` in the paired design, else `watermarked` or `clean`; empty in a run without watermarks."""
    identity_set: str = ""
    """Which set the identity is of."""
    pair: int = -1
    """k: the group of the paired design, that holds the k-th seen and the k-th unseen identity out at once."""


def make_rows(dataset: Dataset, marking: Marking | None) -> list[Row]:
    """Return the rows of a run, in the order of the data set."""
    if marking is None:
        return [Row(id=sample.id, sample=sample) for sample in dataset.samples]
    if isinstance(marking, RandomMarking):
        return [_random_row(sample, marking) for sample in dataset.samples]
    return [row for sample in dataset.samples for row in _paired_rows(sample, marking)]


def _random_row(sample: Sample, marking: RandomMarking) -> Row:
    chosen = watermark.choose_identity(marking.spec, sample.id, len(marking.identities), marking.rate)
    row = Row(id=sample.id, sample=sample, condition="clean")
    if chosen is None or sample.image is None:
        return row
    person = marking.identities[chosen]
    text = marking.spec.text(person)
    return replace(
        row,
        text=text,
        texts_to_fit=(text,),
        person=person,
        condition="watermarked",
        identity_set=marking.set_name,
    )


def _paired_rows(sample: Sample, marking: PairedMarking) -> list[Row]:
    if sample.image is None:
        raise ValueError(f"sample {sample.id!r} has no image, and the paired design puts a watermark on each")
    pair = watermark.choose_identity(marking.spec, sample.id, len(marking.seen))
    assert pair is not None
    people = {"seen": marking.seen[pair], "unseen": marking.unseen[pair]}
    texts = {name: marking.spec.text(person) for name, person in people.items()}
    return [
        Row(
            id=f"{sample.id}#{name}",
            sample=sample,
            text=texts[name],
            texts_to_fit=tuple(texts.values()),
            person=person,
            condition=name,
            identity_set=name,
            pair=pair,
        )
        for name, person in people.items()
    ]


def describe_marking(marking: Marking | None) -> Mapping[str, Any] | None:
    """Return, JSON-able, all that decides the watermarks: the look, the design and a fingerprint of the people."""
    if marking is None:
        return None
    spec = asdict(marking.spec)
    if isinstance(marking, RandomMarking):
        people = {"identities": _fingerprint(marking.identities)}
        return {
            "design": "random",
            "rate": marking.rate,
            "set_name": marking.set_name,
            "spec": spec,
            **people,
        }
    people = {"seen": _fingerprint(marking.seen), "unseen": _fingerprint(marking.unseen)}
    return {"design": "paired", "n_pairs": len(marking.seen), "spec": spec, **people}


def _fingerprint(people: Sequence[Identity]) -> str:
    return hashlib.sha256(json.dumps([asdict(person) for person in people]).encode()).hexdigest()


def make_columns(rows: Sequence[Row], marking: Marking | None) -> dict[str, list[Any]]:
    """Return what is known of each row before the run, as columns of one type each.

    Columns of the input keep their names, or become `input_<name>` where the store needs the name for itself. A
    column of integers, of numbers or of truth values without gaps keeps its type; a numeric one with gaps becomes
    float with NaN; everything else becomes text.
    """
    columns: dict[str, list[Any]] = {
        "sample": [row.id for row in rows],
        "question": ["\n".join(t.text for t in row.sample.turns if t.role == "user") for row in rows],
        "answer": [row.sample.answer for row in rows],
    }
    if any(row.sample.image is not None for row in rows):
        columns["image"] = ["" if row.sample.image is None else row.sample.image.name for row in rows]
    if marking is not None:
        columns["condition"] = [row.condition for row in rows]
        columns["identity_set"] = [row.identity_set for row in rows]
        columns["identity"] = ["" if row.person is None else row.person.username for row in rows]
        for name in FIELDS:
            columns[f"identity_{name}"] = [
                "" if row.person is None else getattr(row.person, name) for row in rows
            ]
    if isinstance(marking, PairedMarking):
        columns["source_sample"] = [row.sample.id for row in rows]
        columns["pair"] = [row.pair for row in rows]
    for name in dict.fromkeys(key for row in rows for key in row.sample.columns):
        stored = store_name(name)
        while stored in columns:
            stored = f"input_{stored}"
        columns[stored] = _one_type([row.sample.columns.get(name) for row in rows])
    return columns


def store_name(column: str) -> str:
    """Return the name under which the store keeps a column of the input."""
    name = column.replace("/", "_").strip() or "unnamed"
    if name in RESERVED or name.startswith(("__", ".")) or name == "zarr.json":
        return f"input_{name.lstrip('.')}"
    return name


def _one_type(values: list[Any]) -> list[Any]:
    kinds = {type(value) for value in values if value is not None}
    gaps = any(value is None for value in values)
    if kinds == {bool} and not gaps:
        return values
    if kinds == {int} and not gaps and all(-(2**63) <= value < 2**63 for value in values):
        return values
    if kinds and kinds <= {int, float}:
        return [float("nan") if value is None else float(value) for value in values]
    return ["" if value is None else str(value) for value in values]
