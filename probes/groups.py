"""Groups: what is held out together, how classes lie in it, and what a grouping lets slip.

It sees an image's two renderings, or one identity, on both sides of a split. This module knows nothing about
hidden states, folds or scores.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmextract.probes.settings import UNGROUPED

IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]
Columns = Mapping[str, NDArray[Any]]

STRUCTURES = {
    "paired": "every group holds every class equally often",
    "within": "nearly every group holds several classes",
    "between": "every group holds one class",
    "mixed": "some groups hold one class and some hold several",
    "rows": "every sample is a group of its own",
}
"""How classes and groups lie to each other; decides what a shuffled label may exchange (see `tasks`)."""

NEARLY_ALL = 0.9
"""Share of samples in groups of several classes from which on labels are said to vary within groups."""


def require(columns: Columns, name: str, role: str) -> None:
    """Raise LookupError, saying what there is, if there is no column `name`. role: the option that gave it."""
    if name not in columns:
        raise LookupError(
            f"the store has no column {name!r} to use as {role}; give --{role} one of: "
            f"{', '.join(sorted(columns))}"
        )


def is_missing(values: NDArray[Any]) -> BoolArray:
    """Return bool [n]: where a text is empty or a number is NaN."""
    if values.dtype.kind == "f":
        return np.asarray(np.isnan(values))
    if values.dtype.kind in "OUT":
        return np.asarray(values.astype(str) == "")
    return np.zeros(len(values), bool)


def choose_group(columns: Columns, asked: str | None) -> tuple[str | None, str | None]:
    """Return the column to group by (None: every sample alone) and, where the choice was ours, a note on it.

    Without a wish it is `pair`, the identity pair of the paired design, if the store has it; else `image` if
    several samples share an image; else none. Raises LookupError for a column that is not there.
    """
    if asked == UNGROUPED:
        return None, None
    if asked is not None:
        require(columns, asked, "group")
        return asked, None
    if "pair" in columns and not _stands_alone(columns["pair"]).all():
        return "pair", None
    if "image" in columns and _has_repeats(columns["image"]):
        return "image", "grouped by image, because several samples share one; --group chooses otherwise"
    return None, "not grouped: every sample counts as independent of the others; --group says which are not"


def _has_repeats(values: NDArray[Any]) -> bool:
    present = values[~is_missing(values)].astype(str)
    return len(np.unique(present)) < len(present)


def _stands_alone(values: NDArray[Any]) -> BoolArray:
    """Return bool [n]: where there is no group, which is an empty text, NaN or a negative integer."""
    return values < 0 if values.dtype.kind == "i" else is_missing(values)


def encode_groups(values: NDArray[Any]) -> IntArray:
    """Return the number of the group of each sample, int64 [n]; samples without one each get their own."""
    keys = values.astype(str).astype(object)
    alone = np.flatnonzero(_stands_alone(values))
    keys[alone] = [f"\0{index}" for index in alone]
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
    share = counts[n_present > 1].sum() / counts.sum()
    return "within" if share >= NEARLY_ALL else "mixed"


def find_leaks(columns: Columns, y: IntArray, groups: IntArray, group: str | None) -> Sequence[str]:
    """Return a warning for each way in which this grouping lets a split separate what belongs together."""
    how = f"grouping by {group!r}" if group else "without groups"
    warnings = []
    pairs = encode_groups(columns["pair"]) if "pair" in columns else np.arange(len(y))
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
        same, opposite = _shared(encode_groups(columns[key]), y, groups)
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
