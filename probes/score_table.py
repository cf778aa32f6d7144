"""What each probe said of each sample that it had not seen: scores.parquet, written a part at a time.

All of it at once would take a hundred bytes for each sample, repeat, task, layer and position.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import IO

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from mmextract.probes.summary import Summary

COLUMNS = {
    "sample": "id of the sample in the store",
    "group": "its value of the group column; the sample itself if there are no groups",
    "label": "column of the store that gave the classes",
    "class": "the sample's class, as this task has it (shuffled, of a control)",
    "layer": "decoder block; -1 is the embedding",
    "position": "token or span of tokens",
    "task": "label, control, or other: the label in the store compared with",
    "repeat": "which of the repeated splits",
    "fold": "fold of that split in which the sample was tested, by a probe that has not seen its group",
    "score": "logit of the positive class; of more than two classes, of the class in the column's name",
}
"""What each column means."""

ROWS_AT_ONCE = 1 << 18
"""Of a row group; in memory are up to twice as many."""


def write_scores(summary: Summary, file: IO[bytes]) -> None:
    """Write a row a (layer, position, task, repeat, sample) as Parquet, in that order, to an open file.

    COLUMNS, written into the file, say what each column means; with more than two classes there is one
    `score_<class>` each in place of `score`.
    """
    schema = _make_schema(summary.plan.design.classes)
    with pa.parquet.ParquetWriter(file, schema, compression="zstd") as writer:
        waiting: list[pa.Table] = []
        n_rows = 0
        for table in _make_tables(summary, schema):
            if n_rows + len(table) > ROWS_AT_ONCE:
                writer.write_table(pa.concat_tables(waiting))
                waiting, n_rows = [], 0
            waiting.append(table)
            n_rows += len(table)
        writer.write_table(pa.concat_tables(waiting))


def _make_schema(classes: tuple[str, ...]) -> pa.Schema:
    scores = ["score"] if len(classes) == 2 else [f"score_{name}" for name in classes]
    kinds = {"layer": pa.int32(), "repeat": pa.int16(), "fold": pa.int16()}
    fields = [(name, kinds.get(name, pa.string()), name) for name in COLUMNS if name != "score"]
    fields += [(name, pa.float64(), "score") for name in scores]
    return pa.schema(
        [pa.field(name, kind, metadata={"about": COLUMNS[about]}) for name, kind, about in fields]
    )


def _make_tables(summary: Summary, schema: pa.Schema) -> Iterator[pa.Table]:
    """Yield tables of at most ROWS_AT_ONCE rows, each of one task of a layer and position."""
    plan = summary.plan
    names = {"sample": plan.samples, "group": plan.group_names, "class": plan.design.classes}
    texts = {name: pa.array(values, pa.string()) for name, values in names.items()}
    for (layer, position), found in summary.scores.items():
        for scores in found.tasks:
            if scores.decisions is None or scores.folds is None:
                continue
            same = {"label": plan.design.label, "layer": layer, "position": position, "task": scores.task}
            repeats, indices = np.nonzero(scores.folds >= 0)
            for start in range(0, len(indices), ROWS_AT_ONCE):
                repeat, index = (some[start : start + ROWS_AT_ONCE] for some in (repeats, indices))
                rows = pa.array(index)
                known = {
                    "sample": texts["sample"].take(rows),
                    "group": texts["group"].take(rows),
                    "class": texts["class"].take(pa.array(scores.y[index])),
                    "repeat": repeat,
                    "fold": scores.folds[repeat, index],
                    **{name: pa.repeat(value, len(index)) for name, value in same.items()},
                }
                decided = scores.decisions[repeat, index].T
                known |= dict(zip(schema.names[len(known) :], decided, strict=True))
                yield pa.table(
                    [pa.array(known[field.name]).cast(field.type) for field in schema], schema=schema
                )
