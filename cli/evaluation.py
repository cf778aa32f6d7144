"""What an evaluation leaves behind: a record, CSV files, and a table of models beside each other."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmextract.cli.reporting import printable

if TYPE_CHECKING:
    from mmextract.engine.evaluate import TaskResult
    from mmextract.engine.evaluate_formats import Task
    from mmextract.engine.evaluate_prompts import PromptRow

SCORES = ("exact", "similarity", "log_likelihood", "exposure")
"""What of a `PromptRow` may tell seen from unseen."""


def make_record(
    task: Task | None,
    results: Mapping[str, TaskResult],
    prompts: Mapping[str, Sequence[PromptRow]],
    options: Mapping[str, Any],
) -> dict[str, Any]:
    """Return what evaluation.json holds; a number that there is none of is null."""
    record = {
        "task": None
        if task is None
        else {"name": task.name, "source": task.source, "n": len(task.questions)},
        "scores": {name: result.scores() for name, result in results.items()},
        "fields": {name: _separations(rows) for name, rows in prompts.items()},
        "settings": {name: options[name] for name in ("references", "max_new_tokens", "batch_size")},
    }
    return dict(_plain(record))


def _separations(rows: Sequence[PromptRow]) -> dict[str, dict[str, Any]]:
    """Return field (`username`, or `username, clean` without the watermark) → score → how well it tells them apart."""
    from mmextract.probes.prompting import separate

    found: dict[str, dict[str, Any]] = {}
    for field in dict.fromkeys(map(_title, rows)):
        of = [row for row in rows if _title(row) == field]
        found[field] = {
            score: asdict(
                separate(
                    [getattr(row, score) for row in of],
                    [row.condition == "seen" for row in of],
                    [row.pair for row in of],
                )
            )
            for score in SCORES
        }
    return found


def _title(row: PromptRow) -> str:
    return row.field if row.marked else f"{row.field}, clean"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_files(
    output: Path,
    record: Mapping[str, Any],
    results: Mapping[str, TaskResult],
    prompts: Mapping[str, Sequence[PromptRow]],
) -> None:
    """Write evaluation.json, scores.csv and, where there is something to say, predictions.csv and prompts.csv."""
    from mmextract.engine.objects import make_local

    folder = make_local(output)
    scores = [
        {"model": model, "score": name, "value": value}
        for model, of in record["scores"].items()
        for name, value in of.items()
    ]
    scores += [
        {"model": model, "score": f"auroc/{field}/{name}", "value": found["auroc"], "low": found["low"],
         "high": found["high"]}
        for model, fields in record["fields"].items()
        for field, of in fields.items()
        for name, found in of.items()
    ]  # fmt: skip
    predictions = [
        {"model": model, **asdict(prediction)}
        for model, result in results.items()
        for prediction in result.predictions
    ]
    asked = [{"model": model, **asdict(row)} for model, rows in prompts.items() for row in rows]
    for name, table in (("scores", scores), ("predictions", predictions), ("prompts", asked)):
        if table:
            folder.put(f"{name}.csv", [_csv(table)])
    folder.put("evaluation.json", [json.dumps(record, indent=1, ensure_ascii=False).encode()])


def _csv(rows: Sequence[Mapping[str, Any]]) -> bytes:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    file = io.StringIO()
    writer = csv.DictWriter(file, columns, lineterminator="\n", restval="")
    writer.writeheader()
    writer.writerows(
        {key: json.dumps(value) if isinstance(value, tuple) else value for key, value in row.items()}
        for row in rows
    )
    return file.getvalue().encode()


def make_table(record: Mapping[str, Any]) -> str:
    """Return one column a model: scores, then AUROC with interval a field and score."""
    models = list(record["scores"] or record["fields"])
    rows: list[tuple[str, list[str]]] = []
    for name in dict.fromkeys(name for of in record["scores"].values() for name in of):
        rows.append((name, [_number(record["scores"][model].get(name)) for model in models]))
    fields = record["fields"]
    for field in dict.fromkeys(field for of in fields.values() for field in of):
        rows.append(
            (f"{field}, exactly right (seen / unseen)", [_rates(fields[m][field]["exact"]) for m in models])
        )
        for score in SCORES[2:]:
            title = f"{field}, AUROC by {score.replace('_', ' ')}"
            rows.append((title, [_interval(fields[model][field][score]) for model in models]))
    width = max(len(title) for title, _ in rows)
    columns = [max(len(printable(m)), *(len(v[i]) for _, v in rows)) for i, m in enumerate(models)]
    lines = [" " * width + "".join(f"  {printable(m):>{w}}" for m, w in zip(models, columns, strict=True))]
    for title, values in rows:
        lines.append(
            f"{printable(title):<{width}}"
            + "".join(f"  {value:>{w}}" for value, w in zip(values, columns, strict=True))
        )
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}" if abs(value) > 1 else f"{value:.3f}"


def _rates(found: Mapping[str, Any]) -> str:
    return f"{_number(found['seen'])} / {_number(found['unseen'])}"


def _interval(found: Mapping[str, Any]) -> str:
    if found["auroc"] is None or found["low"] is None:
        return _number(found["auroc"])
    return f"{found['auroc']:.2f} ({found['low']:.2f}–{found['high']:.2f})"
