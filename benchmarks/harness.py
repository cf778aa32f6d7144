"""What every benchmark shares: alternating timings, the machine and versions beside the figures, a table, a JSON file.

Figures are ratios to something measured in the same run, because seconds do not travel between machines.
"""

from __future__ import annotations

import json
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = (
    "mmextract",
    "torch",
    "torchvision",
    "triton",
    "transformers",
    "zarr",
    "numcodecs",
    "numpy",
    "pillow",
    "tokenizers",
)


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Seconds of one thing, measured several times."""

    seconds: tuple[float, ...]
    processor_seconds: tuple[float, ...]
    """Of all threads of this process."""

    @property
    def median(self) -> float:
        """Half of the runs took longer."""
        return statistics.median(self.seconds)

    @property
    def median_processor(self) -> float:
        """Half of the runs took more seconds of a processor."""
        return statistics.median(self.processor_seconds)


def alternate(
    work: Mapping[str, Callable[[], object]],
    *,
    repeats: int,
    warm_up: bool = True,
    clock: Callable[[], float] = time.perf_counter,
    before: Callable[[str], object] = lambda name: None,
) -> dict[str, Timing]:
    """Time each piece of work `repeats` times, in turn, after one unmeasured round if it is to warm up.

    In turn, so that a machine that slows down slows all of them; each round in another order, so that none always
    comes after one that leaves a disk busy or a processor hot. `before` is called with its name, and not timed.
    """
    measured: dict[str, list[tuple[float, float]]] = {name: [] for name in work}
    order = random.Random(0)
    for number in range(-1 if warm_up else 0, repeats):
        for name in order.sample(list(work), len(work)):
            before(name)
            started, worked = clock(), time.process_time()
            work[name]()
            if number >= 0:
                measured[name].append((clock() - started, time.process_time() - worked))
    columns = {name: tuple(zip(*values, strict=True)) for name, values in measured.items()}
    return {name: Timing(seconds=took, processor_seconds=worked) for name, (took, worked) in columns.items()}


def machine() -> dict[str, Any]:
    """Return hardware and versions, None for what is not installed."""
    import torch

    found = {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "torch_threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "python": platform.python_version(),
    }
    return found | {name: _version(name) for name in PACKAGES}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text("utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left")
    for row in rows:
        table.add_row(*(f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in row))
    Console(width=140).print(table)


def save(path: Path | None, results: Mapping[str, Any]) -> None:
    """Write results with the command, the machine and the versions, if there is a path."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    command = " ".join(["python", *sys.argv])
    record = {"command": command, "machine": machine(), "results": results}
    path.write_text(json.dumps(record, indent=1) + "\n", "utf-8")
