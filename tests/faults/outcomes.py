"""Where the fault matrix writes what it found: cases, losses and what reproduces them, row by row.

Nothing is written unless MMEXTRACT_FAULTS_JSON names a file, as `make test-faults` does. With MMEXTRACT_FAULTS_RESUME
set, rows that the same sources have passed by that file are skipped.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from hashlib import blake2s
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import pytest
from filelock import FileLock

PACKAGES = ("mmextract", "numpy", "zarr", "numcodecs", "xxhash", "dask", "distributed", "obstore", "torch")
COMMAND = "make test-faults"
ROOT = Path(__file__).parents[2]
SOURCES = ("engine", "kernels", "probes", "cli", "tests")

Case = TypeVar("Case")


def sweep(row: str, cases: Iterable[Case], run: Callable[[Case], Mapping[str, float] | None]) -> None:
    """Run every case of a row, record the outcome, then fail if any case did.

    A case is whatever reproduces itself when printed: its seed, or its name. `run` raises for a loss and may return
    figures, of which the largest is recorded. Whatever a case raises, the row goes on to its end.
    """
    skip_if_passed(row)
    started = time.monotonic()
    losses: dict[str, str] = {}
    figures: dict[str, float] = {}
    n_cases = 0
    for case in cases:
        n_cases += 1
        try:
            found = run(case) or {}
        except Exception as failure:
            losses[str(case)] = f"{type(failure).__name__}: {failure}".partition("\n")[0][:500]
        else:
            figures |= {name: max(value, figures.get(name, value)) for name, value in found.items()}
    outcome = {"cases": n_cases, "losses": len(losses), "reproduce": losses, "largest": figures}
    record(row, outcome, time.monotonic() - started)
    assert not losses, f"{len(losses)} of {n_cases} cases of row {row}: {losses}"


def record(row: str, outcome: Mapping[str, Any], seconds: float) -> None:
    """Put the outcome of a row into the file that MMEXTRACT_FAULTS_JSON names, beside what is there of other rows.

    outcome: `losses`, their number, is what tells a row that passed.
    """
    path = _place()
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        rows = _rows(path)
        rows[row] = {**outcome, "seconds": round(seconds, 1), **_version()}
        written = {"command": COMMAND, "machine": machine(), "rows": dict(sorted(rows.items()))}
        path.write_text(json.dumps(written, indent=1) + "\n", "utf-8")


def skip_if_passed(row: str) -> None:
    """Skip the test of a row that these sources have passed, if that is asked for."""
    path = _place()
    if path is None or not os.environ.get("MMEXTRACT_FAULTS_RESUME"):
        return
    found = _rows(path).get(row, {})
    if found.get("losses") == 0 and found.get("sources") == _version()["sources"]:
        pytest.skip(f"row {row} is recorded in {path} for these sources")


def machine() -> dict[str, Any]:
    """Return hardware and versions."""
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "platform": platform.platform(),
        "python": platform.python_version(),
    } | {name: metadata.version(name) for name in PACKAGES}


def _cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def _place() -> Path | None:
    place = os.environ.get("MMEXTRACT_FAULTS_JSON")
    return Path(place) if place else None


def _rows(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text("utf-8"))["rows"]) if path.exists() else {}


@cache
def _version() -> dict[str, str]:
    """Return what was tested: the commit, if there is one, and a digest of the sources, committed or not."""
    digest = blake2s(digest_size=8)
    for folder in SOURCES:
        for file in sorted((ROOT / folder).rglob("*.py")):
            digest.update(str(file.relative_to(ROOT)).encode() + b"\0" + file.read_bytes())
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        described = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except FileNotFoundError:
        described = ""
    return {"commit": described or "none", "sources": digest.hexdigest()}
