"""Where the rows of the fault matrix put what they found."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock


def record(row: str, outcome: Mapping[str, Any]) -> None:
    """Put a row's outcome into the JSON file that MMEXTRACT_FAULTS_JSON names; nothing if it names none."""
    place = os.environ.get("MMEXTRACT_FAULTS_JSON")
    if not place:
        return
    file = Path(place)
    with FileLock(f"{file}.lock"):
        rows = json.loads(file.read_text("utf-8")) if file.exists() else {}
        rows[row] = dict(outcome)
        file.write_text(json.dumps(rows, indent=1, sort_keys=True) + "\n", "utf-8")
