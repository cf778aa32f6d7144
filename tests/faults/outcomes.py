"""Where the fault matrix writes what it found: cases, losses and the seeds that reproduce them, a row of the matrix each.

Nothing is written unless MMEXTRACT_FAULTS_JSON names a file, as `make test-faults` does.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock

PACKAGES = ("mmextract", "numpy", "zarr", "numcodecs", "xxhash", "dask", "distributed")

Case = TypeVar("Case")


def sweep(row: str, cases: Iterable[Case], run: Callable[[Case], Mapping[str, float] | None]) -> None:
    """Run every case of a row, record the outcome, then fail if any case did.

    A case is whatever reproduces itself when printed: its seed, or its name. `run` raises AssertionError for a loss
    and may return figures, of which the largest is recorded.
    """
    losses: dict[str, str] = {}
    figures: dict[str, float] = {}
    n_cases = 0
    for case in cases:
        n_cases += 1
        try:
            found = run(case) or {}
        except AssertionError as failure:
            losses[str(case)] = str(failure).partition("\n")[0][:500]
        else:
            figures |= {name: max(value, figures.get(name, value)) for name, value in found.items()}
    record(row, {"cases": n_cases, "losses": len(losses), "reproduce": losses, "largest": figures})
    assert not losses, f"{len(losses)} of {n_cases} cases of row {row}: {losses}"


def record(row: str, outcome: Mapping[str, Any]) -> None:
    """Put the outcome of a row into the file that MMEXTRACT_FAULTS_JSON names, beside what is there of other rows."""
    place = os.environ.get("MMEXTRACT_FAULTS_JSON")
    if not place:
        return
    path = Path(place)
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        rows = json.loads(path.read_text("utf-8"))["rows"] if path.exists() else {}
        rows[row] = dict(outcome)
        written = {"machine": machine(), "rows": dict(sorted(rows.items()))}
        path.write_text(json.dumps(written, indent=1) + "\n", "utf-8")
        Path(f"{path}.lock").unlink(missing_ok=True)


def machine() -> dict[str, Any]:
    """Return hardware and versions."""
    return {
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "platform": platform.platform(),
        "python": platform.python_version(),
    } | {name: metadata.version(name) for name in PACKAGES}
