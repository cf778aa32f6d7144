"""Synthetic people: the private content that is watermarked on images.

Made by Faker from a seed. This module knows nothing about images, models or which sample carries whom.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import datetime
from pathlib import Path

FIELDS = ("username", "user_id", "gender", "age", "capture_time", "capture_location")
"""The private fields, in the order in which a watermark shows them (arXiv 2503.01208)."""

IDENTIFYING_FIELDS = ("username", "user_id")
"""The fields that name one person: no two identities, in one file or in two disjoint ones, share a value in them."""

CAPTURE_PERIOD = (datetime(2014, 1, 1), datetime(2024, 1, 1))
"""Fixed dates, so that a seed gives the same people on any day."""


@dataclass(frozen=True, kw_only=True)
class Identity:
    """One synthetic person."""

    username: str
    """Login name, unique in its set."""
    user_id: str
    """Ten decimal digits, unique in its set."""
    gender: str
    """`female`, `male` or `nonbinary`."""
    age: str
    """Years, 18 to 90."""
    capture_time: str
    """When the picture is said to have been taken, `YYYY-MM-DD HH:MM`."""
    capture_location: str
    """A made-up city."""


def make_identities(n: int, *, seed: int, exclude: Iterable[Identity] = ()) -> list[Identity]:
    """Make `n` identities that share no identifying value with each other nor with `exclude`.

    Raises ValueError if n < 1, or if Faker has too few distinct values left.
    """
    if n < 1:
        raise ValueError(f"the number of identities must be at least 1, got {n}")
    from faker import Faker

    fake = Faker("en_US", use_weighting=False)
    fake.seed_instance(seed)
    taken = {(field, getattr(person, field)) for person in exclude for field in IDENTIFYING_FIELDS}

    def fresh(field: str) -> str:
        for _ in range(10_000):
            value = fake.user_name() if field == "username" else fake.numerify("%#########")
            if (field, value) not in taken:
                taken.add((field, value))
                return str(value)
        raise ValueError(f"Faker gave no new {field} in 10,000 tries: ask for fewer than {n} identities")

    return [
        Identity(
            username=fresh("username"),
            user_id=fresh("user_id"),
            gender=fake.random_element(("female", "male", "nonbinary")),
            age=str(fake.random_int(18, 90)),
            capture_time=fake.date_time_between(*CAPTURE_PERIOD).strftime("%Y-%m-%d %H:%M"),
            capture_location=fake.city(),
        )
        for _ in range(n)
    ]


def make_disjoint_pair(
    n: int, *, seed: int, exclude: Iterable[Identity] = ()
) -> tuple[list[Identity], list[Identity]]:
    """Make a seen and an unseen set of `n` each, out of one pool of 2n that is split at random.

    So nothing but chance tells the two apart.
    """
    pool = make_identities(2 * n, seed=seed, exclude=exclude)
    random.Random(seed).shuffle(pool)
    return pool[:n], pool[n:]


def check_disjoint(seen: Sequence[Identity], unseen: Sequence[Identity]) -> None:
    """Raise ValueError if the two sets share a value in an identifying field."""
    for field in IDENTIFYING_FIELDS:
        shared = sorted({getattr(p, field) for p in seen} & {getattr(p, field) for p in unseen})
        if shared:
            raise ValueError(
                f"the two identity sets must share no {field}, but {len(shared)} occur in both "
                f"({', '.join(shared[:3])}{', …' if len(shared) > 3 else ''}): "
                "make the second with `mmextract identities --disjoint-from FIRST`"
            )


def write_identities(path: Path, people: Sequence[Identity]) -> None:
    """Write one JSON object a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(asdict(p), ensure_ascii=False) + "\n" for p in people), "utf-8")


def read_identities(path: Path) -> list[Identity]:
    """Read a JSON Lines file of identities.

    Raises ValueError naming the line if it is not JSON, lacks a field, or repeats an identifying value.
    """
    if not path.is_file():
        raise ValueError(f"no identity file at {path}: make one with `mmextract identities -o {path}`")
    people: list[Identity] = []
    seen_at: dict[tuple[str, str], int] = {}
    for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
        if not line.strip():
            continue
        person = _parse_identity(line, f"{path}:{number}")
        for field in IDENTIFYING_FIELDS:
            key = (field, getattr(person, field))
            if key in seen_at:
                raise ValueError(
                    f"{path}:{number}: {field} {key[1]!r} was already used in line {seen_at[key]}"
                )
            seen_at[key] = number
        people.append(person)
    if not people:
        raise ValueError(f"{path} holds no identity: make one with `mmextract identities -o {path}`")
    return people


def _parse_identity(line: str, where: str) -> Identity:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: expected one JSON object a line: {error}") from error
    names = [f.name for f in fields(Identity)]
    if not isinstance(record, dict):
        raise ValueError(f"{where}: expected a JSON object with the fields {', '.join(names)}")
    missing = [name for name in names if record.get(name) in (None, "")]
    if missing:
        raise ValueError(f"{where}: the identity lacks {', '.join(missing)} (it needs {', '.join(names)})")
    return Identity(**{name: str(record[name]) for name in names})
