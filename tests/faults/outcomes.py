"""Where the fault matrix writes what it found: one JSON file, one entry a row."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from filelock import FileLock


def record(row: str, outcome: dict[str, Any]) -> None:
    """Set a row's outcome in the file that MMEXTRACT_FAULTS_JSON names; do nothing if it names none."""
    name = os.environ.get("MMEXTRACT_FAULTS_JSON")
    if not name:
        return
    path = Path(name)
    with FileLock(f"{path}.lock"):
        rows = json.loads(path.read_text("utf-8")) if path.exists() else {}
        rows[row] = outcome
        path.write_text(json.dumps(dict(sorted(rows.items())), indent=1) + "\n", "utf-8")
