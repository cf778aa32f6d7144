"""What a run left behind, as figures and the report read it: the record of probe.json and the projections.

It is the same whether the run ended a moment ago or was made by an earlier version, whose rows have fewer
columns. This module knows nothing about how results are drawn or came about.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from mmextract.probes.metrics import FloatArray

RECORD = "probe.json"
PROJECTIONS = "projections.parquet"
FORMATS = (1, 2)
"""Of the record, that this version reads."""
CHANCE = 0.5
"""AUROC of a probe that knows nothing."""
MOST_POSITIONS = 6
"""With more positions than this, curves are drawn of those with the highest scores only, beside the map of all."""

Row = Mapping[str, Any]
Cell = tuple[int, str]


@dataclass(frozen=True)
class Results:
    """A run's record, read for drawing."""

    record: Mapping[str, Any]
    """What probe.json holds."""
    projections: pa.Table | None = None
    """What projections.parquet holds, if projections were made."""

    @property
    def layers(self) -> list[int]:
        """Those probed; −1 is the embedding."""
        return list(self.record["layers"])

    @property
    def positions(self) -> list[str]:
        """Those probed."""
        return list(self.record["positions"])

    @property
    def classes(self) -> list[str]:
        """In the order of their numbers."""
        return list(self.record["design"]["classes"])

    @property
    def is_paper(self) -> bool:
        """Whether this is the published protocol."""
        return bool(self.record["settings"]["preset"] == "paper")

    @property
    def metric(self) -> str:
        """The metric by which layers are compared."""
        return "accuracy" if self.is_paper else "auroc"

    @property
    def percent(self) -> str:
        """The coverage that intervals aim at."""
        return f"{100 * self.confidence:g} %"

    @property
    def confidence(self) -> float:
        """The same as a share."""
        return float(self.record["settings"]["confidence"])

    @property
    def statement(self) -> str:
        """One sentence: what was found and how sure it is."""
        return str(self.record.get("statement") or self.record["headline"])

    @property
    def qualification(self) -> str:
        """What has to be said beside it."""
        return str(self.record.get("qualification") or "")

    @property
    def n_permutations(self) -> int:
        """Shuffles of the permutation test, 0 if there was none."""
        return int((self.record.get("permutations") or {}).get("n") or 0)

    @property
    def compared_with(self) -> str | None:
        """The other store, if there was one."""
        compare = self.record.get("compare")
        return str(compare["path"]) if compare else None

    @cached_property
    def _by_key(self) -> dict[tuple[str, str, int, str], Row]:
        return {
            (row["task"], row["metric"], row["layer"], row["position"]): row for row in self.record["rows"]
        }

    def row(self, task: str, metric: str, cell: Cell) -> Row | None:
        """Return a row, None if the run does not have it."""
        return self._by_key.get((task, metric, *cell))

    def curve(self, task: str, metric: str, position: str, part: str = "value") -> FloatArray:
        """Return one entry of the rows of a task, by layer [L]; NaN where there is none."""
        rows = [self.row(task, metric, (layer, position)) for layer in self.layers]
        return _floats([row.get(part) if row else None for row in rows])

    @cached_property
    def tasks(self) -> set[str]:
        """Those that have rows."""
        return {str(row["task"]) for row in self.record["rows"]}

    @cached_property
    def metrics(self) -> list[str]:
        """Those that the label has, the one that decides first."""
        names = dict.fromkeys(row["metric"] for row in self.record["rows"] if row["task"] == "label")
        return sorted(names, key=lambda name: name != self.metric)

    @property
    def best(self) -> Cell:
        """Layer and position of the highest score."""
        return self.record["best"]["layer"], self.record["best"]["position"]

    @cached_property
    def shown_positions(self) -> list[str]:
        """Those of which curves are drawn: all, or the MOST_POSITIONS with the highest scores, in their order."""
        if len(self.positions) <= MOST_POSITIONS:
            return self.positions
        tops = {
            p: float(np.nanmax(self.curve("label", self.metric, p), initial=-np.inf)) for p in self.positions
        }
        chosen = set(sorted(tops, key=lambda p: -tops[p])[:MOST_POSITIONS])
        return [position for position in self.positions if position in chosen]

    def is_found(self, row: Row) -> bool:
        """Tell whether a row of `label` or `difference` stands out with all layers and positions taken together."""
        if row.get("p_corrected") is not None:
            return bool(row["p_corrected"] <= 1 - self.confidence + 1e-12)
        low = row.get("simultaneous_low")
        return low is not None and low > self.chance(row)

    def chance(self, row: Row) -> float:
        """Return what a probe that knows nothing scores."""
        chance = row.get("chance")
        if chance is None:
            return 0.0 if row["task"] in ("difference", "selectivity") else CHANCE
        return float(chance)

    @property
    def separability(self) -> list[Row]:
        """Rows of separability, none if it was not measured."""
        return list((self.record.get("separability") or {}).get("rows", ()))

    @cached_property
    def separability_metrics(self) -> list[str]:
        """In the order in which they were measured."""
        return list(dict.fromkeys(row["metric"] for row in self.separability))

    def separability_curve(self, metric: str, position: str, part: str = "value") -> FloatArray:
        """Return one entry of the rows of a metric of separability, by layer [L]."""
        found = {
            row["layer"]: row[part]
            for row in self.separability
            if row["metric"] == metric and row["position"] == position
        }
        return _floats([found.get(layer) for layer in self.layers])

    @cached_property
    def maps(self) -> dict[tuple[str, str], dict[int, pa.Table]]:
        """The projections by method and position, then by layer; in the order of the file."""
        found: dict[tuple[str, str], dict[int, pa.Table]] = {}
        for (method, position, layer), table in _split(self.projections):
            found.setdefault((method, position), {})[layer] = table
        return found

    @property
    def figure_maps(self) -> list[tuple[str, str]]:
        """Methods and positions of which there are figures: the best position, or the first that was projected."""
        keys = [key for key in self.maps if key[1] == self.best[1]]
        return keys or list(self.maps)[:1]

    def shares(self, method: str, cell: Cell) -> tuple[float, float] | None:
        """Return the shares of the variance along the axes of a projection, if the method has any."""
        shares = (self.record.get("projections") or {}).get("shares", ())
        for share in shares:
            if (share["method"], share["layer"], share["position"]) == (method, *cell):
                return share["x"], share["y"]
        return None


def _split(table: pa.Table | None) -> Iterator[tuple[tuple[str, str, int], pa.Table]]:
    """Yield each run of rows of the same method, position and layer."""
    if table is None or not len(table):
        return
    keys = np.stack([np.asarray(table[name].to_pylist(), object) for name in ("method", "position", "layer")])
    starts = np.flatnonzero(np.r_[True, (keys[:, 1:] != keys[:, :-1]).any(0)])
    for start, end in zip(starts, np.r_[starts[1:], len(table)], strict=True):
        method, position, layer = keys[:, start]
        yield (str(method), str(position), int(layer)), table.slice(start, end - start)


def _floats(values: Sequence[float | None]) -> FloatArray:
    return np.array([np.nan if value is None else value for value in values], np.float64)


def load_results(folder: Path) -> Results:
    """Read what a run wrote into a folder. Raises ValueError, with what to do, if it is not that of a run."""
    try:
        record = json.loads((folder / RECORD).read_text("utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{folder} has no {RECORD}: give a folder that `mmextract probe` wrote") from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{folder / RECORD} cannot be read as JSON ({error}): probe again") from error
    if not isinstance(record, dict) or record.get("format") not in FORMATS:
        found = record.get("format") if isinstance(record, dict) else type(record).__name__
        raise ValueError(
            f"{folder / RECORD} is not a record of format {' or '.join(map(str, FORMATS))}, but {found}: probe again"
        )
    path = folder / PROJECTIONS
    wanted = bool(record.get("projections"))
    if wanted and not path.exists():
        raise ValueError(f"{path} is missing, which {RECORD} tells of: probe again")
    return Results(record, pyarrow.parquet.read_table(path) if wanted else None)
