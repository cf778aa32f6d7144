"""The tables of `results/memorisation`, from finished experiments: `python benchmarks/memorisation.py RUN … -o DIR`.

Each RUN is a folder of `mmextract experiment`. DIR gets `tables.md`, with a section a run, and DIR/RUN's name its
`experiment.csv`, `experiment.json` (less its rows), gradients and figures. Nothing is computed here but which cell of
a row of layers and positions is the largest, and what seeds that differ as they do would find.
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median

from scipy.stats import t as student

Row = Mapping[str, str]

FIGURES = ("memorisation", "auroc", "legibility", "positive-control", "published", "dynamics")
SHOWN_BATCHES = ("1", "4", "16", "64")
"""Batch sizes whose gradients are listed; the Parquet files have all, part by part."""


def main() -> None:
    """Write everything."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of finished experiments")
    parser.add_argument(
        "-o", "--output", type=Path, required=True, help="folder for tables.md and the results"
    )
    arguments = parser.parse_args()
    sections = ["# Tables\n\nWritten by `benchmarks/memorisation.py`; see README.md for what was run."]
    for run in arguments.runs:
        if not (run / "experiment.csv").is_file():
            raise SystemExit(
                f"{run} holds no experiment.csv: give the folder of a finished `mmextract experiment`"
            )
        keep(run, arguments.output / run.name)
        sections.append(describe(run))
    rows = [row for run in arguments.runs for row in read_rows(run / "experiment.csv")]
    sections.append("## All runs\n\n" + resolution(rows))
    path = arguments.output / "tables.md"
    path.write_text("\n\n".join(sections) + "\n", "utf-8")
    print(path)


def keep(run: Path, place: Path) -> None:
    """Copy what a run found."""
    place.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(run / "experiment.csv", place / "experiment.csv")
    record = json.loads((run / "experiment.json").read_text("utf-8"))
    del record["rows"]  # they are the CSV
    text = json.dumps(record, indent=1, ensure_ascii=False, sort_keys=True)
    (place / "experiment.json").write_text(text + "\n", "utf-8")
    for name in FIGURES:
        if (run / f"{name}.png").is_file():
            shutil.copyfile(run / f"{name}.png", place / f"{name}.png")
    for name in ("cosines.parquet", "noise.parquet"):
        if (run / "steps" / "dynamics" / name).is_file():
            shutil.copyfile(run / "steps" / "dynamics" / name, place / name)


def describe(run: Path) -> str:
    """Return a run's tables as Markdown."""
    rows = read_rows(run / "experiment.csv")
    record = json.loads((run / "experiment.json").read_text("utf-8"))
    said = [record["statement"], record["qualification"], *record["sensitivity"]]
    parts = [f"## {run.name}", "\n".join(f"> {sentence}" for sentence in said)]
    tables = (memory(rows), learnt(rows), control(rows), published(rows), prompts(rows))
    parts += [table for table in tables if table]
    if (run / "steps" / "dynamics" / "cosines.csv").is_file():
        parts += gradients(run / "steps" / "dynamics")
    return "\n\n".join(parts)


def read_rows(path: Path) -> list[Row]:
    """Return the lines of a CSV file."""
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def memory(rows: Sequence[Row]) -> str:
    """The memorisation score: the largest difference of each condition."""
    lines = []
    for condition, cells in by_condition(rows, "memorisation"):
        best = max(cells, key=number("value"))
        mean = sum(map(number("value"), cells)) / len(cells)
        n_found = sum(number("value")(cell) > 0 and number("p_corrected")(cell) <= 0.05 for cell in cells)
        seeds = [f"{value:+.3f}" for value in json.loads(best["by_seed"])]
        lines.append(
            (
                *(
                    condition,
                    f"{number('repetitions')(best):g}",
                    f"{number('value')(best):+.3f}",
                    where(best),
                ),
                *(interval(best), f"{number('p_corrected')(best):.3f}", f"{number('detectable')(best):.3f}"),
                *(f"{n_found} of {len(cells)}", f"{mean:+.3f}", " ".join(seeds)),
            )
        )
    head = (
        *("condition", "images an identity", "largest AUROC − r0's", "where", "95 % interval", "corrected p"),
        *("would be found (power 0.8)", "cells found", "mean of all cells", "largest, by seed"),
    )
    return table("Memorisation score", head, lines)


def resolution(rows: Sequence[Row]) -> str:
    """Which differences would have been found, over all layers, positions and conditions."""
    cells = [row for row in rows if row["measure"] == "memorisation"]
    counts = {
        "for these models, corrected within the run": list(map(number("detectable"), cells)),
        "over seeds, by Student's t, uncorrected": list(map(found_by_seeds, cells)),
        "upper end of the 95 % interval": list(map(number("high"), cells)),
    }
    lines = [
        (name, str(len(found)), *(f"{of(found):.3f}" for of in (min, median, max)))
        for name, found in counts.items()
    ]
    return table(
        "Would be found (power 0.8)", ("counted", "differences", "least", "median", "largest"), lines
    )


def found_by_seeds(row: Row) -> float:
    """Return the difference that as many seeds find with a probability of 0.8, by a test at 5 %, from its interval."""
    degrees = number("n_seeds")(row) - 1
    quantile = float(student.ppf(0.975, degrees))
    half = (number("high")(row) - number("low")(row)) / 2
    return half / quantile * (quantile + float(student.ppf(0.8, degrees)))


def learnt(rows: Sequence[Row]) -> str:
    """What the models can do: their task, and reading strangers."""
    lines = []
    for condition, (task, *_) in by_condition(rows, "task accuracy"):
        line = [condition, f"{number('value')(task):.3f}", interval(task)]
        legible = [row for row in rows if row["measure"] == "legibility" and row["condition"] == condition]
        for metric in ("accuracy", "auroc"):
            cells = [row for row in legible if row["metric"] == metric]
            best = max(cells, key=number("value"), default=None)
            line += (
                [""] * 3 if best is None else [f"{number('value')(best):.3f}", interval(best), where(best)]
            )
        read = [row for row in legible if row["metric"] == "auroc" and row["p_corrected"]]
        smallest = min(map(number("p_corrected"), read), default=None)
        lines.append((*line, "" if smallest is None else f"{smallest:.3f}"))
    head = (
        *("condition", "task accuracy", "95 % interval", "legibility, accuracy", "95 % interval", "where"),
        *("AUROC", "95 % interval", "where", "smallest corrected p in every seed"),
    )
    return table("Task and legibility", head, lines)


def control(rows: Sequence[Row]) -> str:
    """The positive control: learnt, and found?"""
    answers = {row["label"]: number("value")(row) for row in rows if row["measure"] == "control's answers"}
    cells = [row for row in rows if row["measure"] == "positive control"]
    if not cells:
        return ""
    best = max(cells, key=number("value"))
    line = (
        *(f"{answers[name]:.3f}" for name in ("known", "strangers", "told")),
        *(f"{number('value')(best):+.3f}", where(best), interval(best), best["over"], best["n_seeds"]),
        f"{number('p_corrected')(best):.3f}",
    )
    head = (
        *("known answered as trained", "strangers", "balanced accuracy", "largest AUROC − r0's", "where"),
        *("95 % interval", "over", "seeds", "corrected p"),
    )
    return table("Positive control", head, [line])


def published(rows: Sequence[Row]) -> str:
    """What the published protocol says of the same states, beside the valid design."""
    lines = []
    valid = dict(by_condition(rows, "seen/unseen"))
    for condition, cells in by_condition(rows, "published protocol"):
        best, sound = (max(of, key=number("value")) for of in (cells, valid[condition]))
        lines.append(
            (
                *(condition, f"{number('value')(best):.3f}", where(best), f"{number('chance')(best):.3f}"),
                *(f"{number('value')(sound):.3f}", where(sound)),
            )
        )
    head = ("condition", "published: highest accuracy", "where", "majority", "valid: highest AUROC", "where")
    return table("Published protocol", head, lines)


def prompts(rows: Sequence[Row]) -> str:
    """Whether asking the model tells seen from unseen."""
    lines = [
        (condition, cell["label"], f"{number('value')(cell):.3f}", interval(cell))
        for condition, cells in by_condition(rows, "prompt baseline")
        for cell in cells
    ]
    return table("Prompt baseline", ("condition", "asked and scored", "AUROC", "95 % interval"), lines)


def gradients(folder: Path) -> list[str]:
    """Cosines of all weights' gradients with the clean one, and the noise scale."""
    cosines = [
        (row["checkpoint"], row["batch_size"], row["view"], rounded(row["cosine"]), interval(row))
        for row in read_rows(folder / "cosines.csv")
        if row["group"] == row["matrix"] == "all" and row["batch_size"] in SHOWN_BATCHES
    ]
    noise = [
        (
            *(row["checkpoint"], row["view"], row["small_batch"], row["batch_size"]),
            *(rounded(row["noise_scale"]), interval(row)),
        )
        for row in read_rows(folder / "noise.csv")
        if row["group"] == row["matrix"] == "all" and row["noise_scale"]
    ]
    return [
        table(
            "Cosine with the clean gradient",
            ("checkpoint", "batch", "view", "cosine", "95 % interval"),
            cosines,
        ),
        table(
            "Gradient noise scale",
            ("checkpoint", "view", "small batch", "batch", "noise scale", "95 % interval"),
            noise,
        ),
    ]


def by_condition(rows: Sequence[Row], measure: str) -> Iterable[tuple[str, list[Row]]]:
    """Yield (condition, its rows of a measure), in the order of the file."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        if row["measure"] == measure:
            found.setdefault(row["condition"], []).append(row)
    return found.items()


def number(name: str) -> Callable[[Row], float]:
    """Return what reads a column's number."""
    return lambda row: float(row[name])


def rounded(text: str) -> str:
    """Return a number of a file to three digits."""
    return f"{float(text):.3g}" if text else ""


def where(row: Row) -> str:
    """Return layer and position."""
    layer = "embedding" if row["layer"] == "-1" else f"layer {row['layer']}"
    return f"{layer}, {row['position']}"


def interval(row: Row) -> str:
    """Return a row's interval."""
    return f"{float(row['low']):.3g} to {float(row['high']):.3g}" if row["low"] and row["high"] else ""


def table(title: str, head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table, nothing for one without lines."""
    if not lines:
        return ""
    cells = [head, ["---"] * len(head), *lines]
    return "\n".join([f"**{title}**", "", *("| " + " | ".join(line) + " |" for line in cells)])


if __name__ == "__main__":
    main()
