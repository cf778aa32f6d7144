"""What the sections of `gpu.py` share: where they run, how they time, what a figure is, and the table of all of them.

Works from a checkout alone: mmextract need not be installed. It knows nothing about what is measured.
"""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

ROOT = Path(__file__).resolve().parent.parent


def make_importable() -> None:
    """Let `mmextract.kernels` and `mmextract.engine` be found in this checkout if mmextract is not installed."""
    if importlib.util.find_spec("mmextract") is None:
        package = ModuleType("mmextract")
        package.__path__ = [str(ROOT)]  # the folders are named as the subpackages
        sys.modules["mmextract"] = package


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One line of the table."""

    name: str
    value: float
    unit: str
    """`×` for a ratio to something measured beside it."""
    goal: float | None = None
    must: float | None = None
    higher_is_better: bool = False

    @property
    def verdict(self) -> str:
        """Whether the goal is reached, or at least what must be."""
        if self.goal is None:
            return ""
        if self._reaches(self.goal):
            return "ok"
        return "missed" if self.must is None or not self._reaches(self.must) else "tolerable"

    def _reaches(self, limit: float) -> bool:
        return self.value >= limit if self.higher_is_better else self.value <= limit

    @property
    def limit(self) -> str:
        """The goal in words."""
        sign = "≥" if self.higher_is_better else "≤"
        must = "" if self.must is None else f" (must {sign} {self.must:g})"
        return "" if self.goal is None else f"{sign} {self.goal:g}{must}"


@dataclass(kw_only=True)
class Bench:
    """Where and how large."""

    smoke: bool
    """Tiny sizes on the CPU, to see that everything runs; the timings say nothing."""
    repeats: int
    seed: int = 0
    figures: dict[str, list[Figure]] = field(default_factory=dict)
    """By section."""

    @property
    def device(self) -> torch.device:
        """Where everything runs."""
        import torch

        return torch.device("cpu" if self.smoke else "cuda")

    def generator(self, offset: int = 0) -> torch.Generator:
        """Return a seeded generator on the device."""
        import torch

        return torch.Generator(self.device).manual_seed(self.seed + offset)

    def seconds(
        self,
        work: Mapping[str, Callable[[], object]],
        loops: int = 1,
        repeats: int | None = None,
        *,
        warm_up: bool = True,
    ) -> dict[str, float]:
        """Return the median seconds of one run of each piece of work, taken in turn.

        A measurement is `loops` runs between two waits for the device, so that starting them is hidden as in use.
        warm_up: run each once before, unmeasured; never in a smoke run.
        """
        from harness import alternate

        loops = 1 if self.smoke else loops

        def looped(run: Callable[[], object]) -> Callable[[], None]:
            def repeated() -> None:
                for _ in range(loops):
                    run()

            return repeated

        timings = alternate(
            {name: looped(run) for name, run in work.items()},
            repeats=1 if self.smoke else repeats or self.repeats,
            warm_up=warm_up and not self.smoke,
            clock=self._clock,
        )
        return {name: timing.median / loops for name, timing in timings.items()}

    def _clock(self) -> float:
        self.wait()
        return time.perf_counter()

    def replaying(self, run: Callable[[], object]) -> Callable[[], object]:
        """Return `run` as a CUDA graph's replay, which starts all its kernels at once; itself in a smoke run."""
        import torch

        if self.smoke:
            return run
        run()
        self.wait()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        return graph.replay

    def wait(self) -> None:
        """Wait until the device has done all it was given."""
        import torch

        if not self.smoke:
            torch.cuda.synchronize()

    def peak_memory(self, run: Callable[[], object]) -> int:
        """Return by how many bytes the device's memory in use grows while `run` runs; 0, unrun, in a smoke run."""
        import torch

        if self.smoke:
            return 0
        self.wait()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        self.wait()
        return torch.cuda.max_memory_allocated() - before

    def verdict(self, figure: Figure) -> str:
        """Return the figure's verdict, none for a timing of a smoke run."""
        return "" if self.smoke and figure.unit else figure.verdict

    def record(self) -> dict[str, Any]:
        """Return all figures, JSON-able."""
        return {
            section: [asdict(figure) | {"verdict": self.verdict(figure)} for figure in figures]
            for section, figures in self.figures.items()
        }


def table(bench: Bench) -> str:
    """Return one table of all figures, as text."""
    rows = [("", "", "", "goal", "")]
    for section, figures in bench.figures.items():
        rows.append((section, "", "", "", ""))
        rows += [(f"  {f.name}", _number(f.value), f.unit, f.limit, bench.verdict(f)) for f in figures]
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    lines = (
        f"{name:<{widths[0]}}  {value:>{widths[1]}} {unit:<{widths[2]}}  {goal:<{widths[3]}}  {verdict}".rstrip()
        for name, value, unit, goal, verdict in rows
    )
    return "\n".join(lines)


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) and abs(value) < 1e15 else f"{value:.3g}"
