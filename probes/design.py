"""From a store's columns to what is probed: which samples, which classes, which groups are held out together.

It also sees what a grouping would let slip: an image's two renderings, or one identity, on both sides of a
split. This module knows nothing about hidden states, solvers or folds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmextract.probes.settings import MAX_CLASSES, UNGROUPED
from mmextract.probes.where import select

IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]
Columns = Mapping[str, NDArray[Any]]

STRUCTURES = {
    "paired": "every group holds every class equally often",
    "within": "every group holds several classes",
    "between": "every group holds one class",
    "mixed": "some groups hold one class and some hold several",
    "rows": "every sample is a group of its own",
}
"""How classes and groups lie to each other; decides what a shuffled label may exchange (see `tasks`)."""

NEGATIVE_CLASSES = ("unseen", "clean")
"""Classes of a binary label that count as negative though they do not come first in the order of the
alphabet."""


@dataclass(frozen=True, kw_only=True)
class Design:
    """The samples of a run, in the order of the store, with their classes and groups."""

    label: str
    """Column that gives the classes."""
    classes: tuple[str, ...]
    """Names of the classes, the positive one last if there are two."""
    group: str | None
    """Column that gives the groups, None if every sample is its own."""
    rows: IntArray
    """[n] rows of the store."""
    y: IntArray
    """[n] index into `classes`."""
    groups: IntArray
    """[n] 0-based number of the group."""
    dropped: Mapping[str, int] = field(default_factory=dict)
    """Reason → number of samples of the store that are not probed."""
    notes: tuple[str, ...] = ()
    """Decisions that were taken for the user."""
    warnings: tuple[str, ...] = ()
    """What makes the result misleading."""

    @property
    def n_samples(self) -> int:
        """Samples that are probed."""
        return len(self.rows)

    @property
    def n_groups(self) -> int:
        """Groups among them."""
        return int(self.groups.max()) + 1

    @property
    def structure(self) -> str:
        """How classes and groups lie to each other: a key of STRUCTURES."""
        return classify(self.y, self.groups)


def make_design(
    columns: Columns,
    committed: BoolArray,
    *,
    label: str,
    group: str | None = None,
    where: str | None = None,
    largest_class: int | None = None,
    positive_last: bool = True,
) -> Design:
    """Choose samples, classes and groups.

    columns: arrays [n_samples] by name, among them `sample` and `rejected`. committed: which samples the
    store has. label: column of classes; a missing value (empty text, NaN) leaves its sample out. group: see
    `choose_group`. where: see `where`. largest_class: keep so many of each class, the first in the order of
    the store. positive_last: classes come in the order of their values, but for the NEGATIVE_CLASSES.

    Raises LookupError for a column that is not there, ValueError for a label that gives no classes to tell
    apart.
    """
    _require(columns, label, "label")
    keep = committed.copy()
    dropped = {"not in the store yet": int((~committed).sum())}

    def leave_out(reason: str, out: BoolArray) -> None:
        dropped[reason] = int((keep & out).sum())
        keep[out] = False

    leave_out("rejected by the dump", columns["rejected"].astype(str) != "")
    if where is not None:
        leave_out(f"not selected by {where}", ~select(where, columns, len(keep)))
    leave_out(f"without a {label}", _is_missing(columns[label]))
    _require_some(keep, dropped)
    if largest_class is not None:
        leave_out(
            f"beyond the first {largest_class} of a class", ~_first(columns[label], keep, largest_class)
        )
    rows = np.flatnonzero(keep)
    classes, y = encode_classes(columns[label][rows], label, dropped[f"without a {label}"])
    if positive_last and len(classes) == 2 and classes[1] in NEGATIVE_CLASSES:
        classes, y = classes[::-1], 1 - y
    kept = {name: values[rows] for name, values in columns.items()}
    name, note = choose_group(kept, group)
    groups = _encode_groups(kept[name]) if name else np.arange(len(rows))
    return Design(
        label=label,
        classes=classes,
        group=name,
        rows=rows,
        y=y,
        groups=groups,
        dropped={reason: count for reason, count in dropped.items() if count},
        notes=(note,) if note else (),
        warnings=tuple(find_leaks(kept, y, groups, name)),
    )


def _require(columns: Columns, name: str, role: str) -> None:
    if name not in columns:
        raise LookupError(
            f"the store has no column {name!r} to use as {role}; give --{role} one of: "
            f"{', '.join(sorted(columns))}"
        )


def _require_some(keep: BoolArray, dropped: Mapping[str, int]) -> None:
    if not keep.any():
        reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.items() if count)
        raise ValueError(f"no sample is left to probe: of {len(keep)}, {reasons}")


def _is_missing(values: NDArray[Any]) -> BoolArray:
    if values.dtype.kind == "f":
        return np.asarray(np.isnan(values))
    if values.dtype.kind in "OUT":
        return np.asarray(values.astype(str) == "")
    return np.zeros(len(values), bool)


def _first(values: NDArray[Any], keep: BoolArray, n: int) -> BoolArray:
    """Return where a kept sample is among the first n of its class."""
    first = np.zeros(len(values), bool)
    for value in np.unique(values[keep].astype(str)):
        first[np.flatnonzero(keep & (values.astype(str) == value))[:n]] = True
    return first


def encode_classes(values: NDArray[Any], label: str, n_without: int = 0) -> tuple[tuple[str, ...], IntArray]:
    """Return the names of the classes, in the order of their values, and the class of each value, int64 [n].

    Raises ValueError where there is one class only, or more than MAX_CLASSES. n_without: samples left out
    because they have no value, to be told then.
    """
    values = values.astype(str) if values.dtype.kind in "OUT" else values
    distinct, y = np.unique(values, return_inverse=True)
    names = tuple(str(value) for value in distinct.tolist())
    if len(names) == 1:
        hint = f" ({n_without} more samples have no value in that column)" if n_without else ""
        raise ValueError(
            f"the label {label!r} has one class only, {names[0]!r}, in all {len(values)} samples{hint}; "
            "a probe needs two: choose another --label or --where"
        )
    if len(names) > MAX_CLASSES:
        kind = "looks continuous" if values.dtype.kind == "f" else "looks like an identifier or a measurement"
        raise ValueError(
            f"the label {label!r} {kind}: {len(names)} distinct values in {len(values)} samples "
            f"({', '.join(names[:3])}, …); a probe tells at most {MAX_CLASSES} classes apart"
        )
    return names, y.astype(np.int64)


def choose_group(columns: Columns, asked: str | None) -> tuple[str | None, str | None]:
    """Return the column to group by (None: every sample alone) and, where the choice was ours, a note on it.

    Without a wish it is `pair`, the identity pair of the paired design, if the store has it; else `image` if
    several samples share an image; else none. Raises LookupError for a column that is not there.
    """
    if asked == UNGROUPED:
        return None, None
    if asked is not None:
        _require(columns, asked, "group")
        return asked, None
    if "pair" in columns and (columns["pair"] >= 0).any():
        return "pair", None
    if "image" in columns and _has_repeats(columns["image"]):
        return "image", "grouped by image, because several samples share one; --group chooses otherwise"
    return None, "not grouped: every sample counts as independent of the others; --group says which are not"


def _has_repeats(values: NDArray[Any]) -> bool:
    present = values[~_is_missing(values)].astype(str)
    return len(np.unique(present)) < len(present)


def _encode_groups(values: NDArray[Any]) -> IntArray:
    """Number the groups; samples without a value (empty, NaN, −1) each get one of their own."""
    missing = _is_missing(values)
    if values.dtype.kind == "i":
        missing = values < 0
    keys = values.astype(str).astype(object)
    keys[missing] = [f"\0{index}" for index in np.flatnonzero(missing)]
    return np.unique(keys.astype(str), return_inverse=True)[1].astype(np.int64)


def count(y: IntArray, groups: IntArray) -> IntArray:
    """Return int64 [n_groups, n_classes]: samples of each class in each group."""
    counts = np.zeros((int(groups.max()) + 1, int(y.max()) + 1), np.int64)
    np.add.at(counts, (groups, y), 1)
    return counts


def classify(y: IntArray, groups: IntArray) -> str:
    """Return the key of STRUCTURES that describes the classes y [n] in the groups [n]."""
    counts = count(y, groups)
    n_present = (counts > 0).sum(1)
    if (counts.sum(1) == 1).all():
        return "rows"
    if (n_present == 1).all():
        return "between"
    if (counts == counts[:, :1]).all():
        return "paired"
    return "within" if (n_present > 1).all() else "mixed"


def find_leaks(columns: Columns, y: IntArray, groups: IntArray, group: str | None) -> Sequence[str]:
    """Return a warning for each way in which this grouping lets a split separate what belongs together."""
    how = f"grouping by {group!r}" if group else "without groups"
    warnings = []
    pairs = _encode_groups(columns["pair"]) if "pair" in columns else np.arange(len(y))
    n_split = int(_spread(pairs, groups).sum())
    if n_split:
        warnings.append(
            f"{how}, {n_split} identity pairs fall into training and test at once: the probe can score by "
            "reading watermarks it was trained on, which is not memory, or, where an image's two renderings "
            "are separated, fall below chance. Group by pair (the default) for a valid result."
        )
    for key in ("source_sample", "image"):
        if key not in columns or group == key:
            continue
        same, opposite = _shared(_encode_groups(columns[key]), y, groups)
        what = "samples" if key == "source_sample" else "images"
        if opposite:
            warnings.append(
                f"{how}, {opposite} {what} occur with opposite labels in different groups: the probe is "
                f"trained on the other label of the very {what[:-1]} it is tested on, and its AUROC can fall "
                f"below chance. Group by {'pair' if 'pair' in columns else key}."
            )
        if same:
            warnings.append(
                f"{how}, {same} {what} occur with the same label in different groups: the probe can "
                f"recognise them, and its scores are inflated. Group by {key}."
            )
        if same or opposite:
            break  # a sample has one image: the same fact need not be told twice
    return warnings


def _spread(keys: IntArray, groups: IntArray) -> BoolArray:
    """Return bool [n_keys]: which keys occur in more than one group."""
    cells = np.unique(np.stack([keys, groups]), axis=1)
    return np.bincount(cells[0]) > 1


def _shared(keys: IntArray, y: IntArray, groups: IntArray) -> tuple[int, int]:
    """Count the keys that occur in several groups (with one label, with several).

    A key that has all its labels equally often in each of its groups tells a probe nothing, and is not
    counted.
    """
    cells, cell = np.unique(np.stack([keys, groups]), axis=1, return_inverse=True)
    counts = count(y, cell.reshape(-1))  # [cell, class]
    unbalanced = np.bincount(cells[0], (counts != counts[:, :1]).any(1)) > 0
    leaking = _spread(keys, groups) & unbalanced
    several = (count(y, keys) > 0).sum(1) > 1
    return int((leaking & ~several).sum()), int((leaking & several).sum())
