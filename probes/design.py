"""From a store's columns to what is probed: which samples, which classes, which groups.

This module knows nothing about hidden states, solvers or folds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmextract.probes.groups import (
    BoolArray,
    Columns,
    IntArray,
    choose_group,
    classify,
    count,
    encode_groups,
    find_leaks,
    is_missing,
    require,
)
from mmextract.probes.settings import MAX_CLASSES
from mmextract.probes.where import select

NEGATIVE_CLASSES = ("unseen", "clean")
"""Classes of a binary label that count as negative though they do not come first in the order of the alphabet."""


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
        """How classes and groups lie to each other: a key of `groups.STRUCTURES`."""
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
    usable: BoolArray | None = None,
) -> Design:
    """Choose samples, classes and groups.

    columns: arrays [n_samples] by name, among them `sample` and `rejected`. committed: which samples the
    store has. label: column of classes; a missing value (empty text, NaN) leaves its sample out. group: see
    `choose_group`. where: see `where`. largest_class: keep so many of each class, the first in the order of
    the store. positive_last: classes come in the order of their values, but for the NEGATIVE_CLASSES. usable: which
    samples the store compared with has, if there is one.

    Raises LookupError for a column that is not there, ValueError for a label that gives no classes to tell
    apart.
    """
    require(columns, label, "label")
    keep = committed.copy()
    dropped = {"not in the store yet": int((~committed).sum())}

    def leave_out(reason: str, out: BoolArray) -> None:
        dropped[reason] = int((keep & out).sum())
        keep[out] = False

    leave_out("rejected by the dump", columns["rejected"].astype(str) != "")
    if usable is not None:
        leave_out("rejected or not yet in the store compared with", ~usable)
    leave_out("whose other rendering is not there", _lost_their_twin(columns, label, keep))
    if where is not None:
        leave_out(f"not selected by {where}", ~select(where, columns, len(keep)))
    leave_out(f"without a value of {label}", is_missing(columns[label]))
    _require_some(keep, dropped)
    if largest_class is not None:
        leave_out(
            f"beyond the first {largest_class} of a class", ~_first(columns[label], keep, largest_class)
        )
    rows = np.flatnonzero(keep)
    classes, y = encode_classes(columns[label][rows], label, dropped[f"without a value of {label}"])
    if positive_last and len(classes) == 2 and classes[1] in NEGATIVE_CLASSES:
        classes, y = classes[::-1], 1 - y
    kept = {name: values[rows] for name, values in columns.items()}
    name, note = choose_group(kept, group)
    groups = encode_groups(kept[name]) if name else np.arange(len(rows))
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


def _lost_their_twin(columns: Columns, label: str, keep: BoolArray) -> BoolArray:
    """Return which samples came from an input sample that shows every class, and of which a rendering is
    lost.

    Without this a few rejected images would unbalance the paired design, and with it the classes of a group.
    """
    lost = np.zeros(len(keep), bool)
    if "pair" not in columns or "source_sample" not in columns:
        return lost
    _, source = np.unique(columns["source_sample"].astype(str), return_inverse=True)
    _, value = np.unique(columns[label].astype(str), return_inverse=True)
    counts = count(value.astype(np.int64), source.astype(np.int64))
    paired = (counts == counts[:, :1]).all(1) & (counts.shape[1] > 1)
    return np.asarray((paired & (np.bincount(source, ~keep) > 0))[source])


def _require_some(keep: BoolArray, dropped: Mapping[str, int]) -> None:
    if not keep.any():
        reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.items() if count)
        raise ValueError(f"no sample is left to probe: of {len(keep)}, {reasons}")


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
