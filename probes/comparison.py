"""Two stores of the same samples, from two checkpoints: which row of the other is which of ours, and do they agree.

What is compared must differ in the model alone, so samples, images, labels and groups have to be the same; where they
are not, this says in how many samples. This module knows nothing about hidden states or scores.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmextract.engine.store import Store
from mmextract.probes.groups import BoolArray, Columns, IntArray, choose_group, encode_groups
from mmextract.probes.where import select

IMAGE = "image_hash"
"""Column with the hash of each image's bytes."""


@dataclass(frozen=True, kw_only=True)
class OtherStore:
    """The store compared with, its rows matched to ours."""

    place: str | Path
    """A path, or s3://bucket/name."""
    attributes: Mapping[str, Any]
    """How it was made."""
    layers: tuple[int, ...]
    """That it has."""
    positions: tuple[str, ...]
    """That it has."""
    columns: Columns
    """Its columns, in its own order; a plan that was checked has none."""
    usable: BoolArray
    """[n_samples] of ours: whether it has states of that sample."""
    rows: IntArray
    """[n_samples] its row of each sample of ours."""


def match_store(store: Store, ours: Columns) -> OtherStore:
    """Find the samples of ours, those of the columns `ours`, in another store.

    Raises ValueError for those that it has not.
    """
    theirs = read_columns(store)
    at = {name: row for row, name in enumerate(theirs["sample"].astype(str).tolist())}
    names = ours["sample"].astype(str).tolist()
    absent = [name for name in names if name not in at]
    if absent:
        raise ValueError(
            f"{store.url} lacks {len(absent)} of the {len(names)} samples it is to be compared on (the first is "
            f"{absent[0]!r}): compare two dumps of the same data"
        )
    rows = np.array([at[name] for name in names], np.int64)
    usable = store.committed & (theirs["rejected"].astype(str) == "")
    return OtherStore(
        place=store.url,
        attributes=store.attributes,
        layers=tuple(int(layer) for layer in store.layers),
        positions=tuple(store.positions),
        columns=theirs,
        usable=np.asarray(usable[rows]),
        rows=rows,
    )


def read_columns(store: Store) -> dict[str, NDArray[Any]]:
    """Return the columns of a store, texts as objects: NumPy's variable-width texts know few operations."""
    return {name: v.astype(object) if v.dtype.kind == "T" else v for name, v in store.columns.items()}


def add_character(
    columns: dict[str, NDArray[Any]],
    label: str,
    *,
    where: str | None = None,
    group: str | None = None,
    least: int = 1,
) -> dict[str, NDArray[Any]]:
    """Return the columns with that of a label such as `identity_user_id[0]` or `identity_user_id[0]<5`.

    The first is the first character of another column; characters that occur in fewer than `least` groups, of the
    samples with states that `where` selects, are left empty: so many does a class need to be split into folds, and how
    many different texts begin with it does not matter. group: see `groups.choose_group`; without groups every sample
    counts.
    The second tells those before "5", by their code points, from the rest: two classes, which fewer samples suffice
    for. Any other label leaves the columns as they are. Raises LookupError for a group that is no column.
    """
    found = re.fullmatch(r"(.+)\[(\d+)\](?:<(.))?", label)
    if found is None or label in columns or found[1] not in columns:
        return columns
    at, texts = int(found[2]), columns[found[1]].astype(str)
    characters = np.array([text[at : at + 1] for text in texts], object)
    if (limit := found[3]) is not None:
        halves = [("<" if c < limit else "≥") + limit if c else "" for c in characters]
        return {**columns, label: np.array(halves, object)}
    keep = np.ones(len(texts), bool) if where is None else select(where, columns, len(texts))
    if "rejected" in columns:
        keep = keep & (columns["rejected"].astype(str) == "")
    kept = {name: values[keep] for name, values in columns.items()}
    name, _ = choose_group(kept, group)
    groups = encode_groups(kept[name]) if name else np.arange(int(keep.sum()))
    shared = Counter(c for c, _ in set(zip(characters[keep].tolist(), groups.tolist(), strict=True)))
    rare = np.array([shared[character] < least for character in characters])
    return {**columns, label: np.where(rare, "", characters)}


def check_same(other: OtherStore, ours: Columns, probed: IntArray, columns: Sequence[str]) -> None:
    """Raise ValueError unless the probed rows agree in each of `columns` (and in their images, if both know those)."""
    for name in dict.fromkeys([*columns, *([IMAGE] if IMAGE in ours and IMAGE in other.columns else [])]):
        if name not in other.columns:
            raise ValueError(f"{other.place} has no column {name!r}: compare two dumps of the same data")
        mine, theirs = ours[name][probed].astype(str), other.columns[name][other.rows[probed]].astype(str)
        different = np.flatnonzero(mine != theirs)
        if len(different):
            first = different[0]
            raise ValueError(
                f"{other.place} differs in {name} in {len(different)} of {len(probed)} samples (the first is "
                f"{ours['sample'][probed[first]]}: {theirs[first]!r} there, {mine[first]!r} here): compare two dumps "
                "of the same data"
            )


def require_cells(other: OtherStore, layers: Sequence[int], positions: Sequence[str]) -> None:
    """Raise LookupError, saying what to do, for a layer or position that the other store has not."""
    missing = [f"layer {layer}" for layer in layers if layer not in other.layers]
    missing += [f"position {name}" for name in positions if name not in other.positions]
    if missing:
        raise LookupError(
            f"{other.place}, to be compared with, has no {', '.join(missing)}: choose what both stores have with "
            "--layers and --position"
        )
