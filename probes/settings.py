"""What a probe run is asked to do.

This module knows nothing about stores, solvers or files.
"""

from __future__ import annotations

from dataclasses import dataclass

PRESETS = ("default", "paper")
CLASS_WEIGHTS = ("none", "balanced")
STREAMS = ("auto", "always", "never")
STREAMING_SOLVERS = ("auto", "primal")
"""Those that fit states that are read from the store in each pass."""

FEWEST_PERMUTATIONS = 19
"""With fewer no p-value falls to 0.05."""

UNGROUPED = "none"
"""As a group's name: every sample stands alone."""

MAX_CLASSES = 20
"""A label with more distinct values than this is taken for an identifier or a measurement."""


@dataclass(frozen=True, kw_only=True)
class ProbeSettings:
    """One run. The defaults are the valid protocol; `preset="paper"` is the published one (see `paper`)."""

    label: str = "identity_set"
    """Column whose values are to be told apart."""
    group: str | None = None
    """Column whose values are held out together; None chooses (see `groups.choose_group`), `none` groups nothing."""
    layers: tuple[int, ...] | None = None
    """Layers as numbered in the store (−1 is the embedding); None for all."""
    positions: tuple[str, ...] | None = None
    """Names of positions in the store; None for all."""
    where: str | None = None
    """Keeps the samples for which this holds, such as `condition == 'seen'` (see `where`)."""
    preset: str = "default"
    """`default`, or `paper`, which ignores `group` and what follows but `allow_incomplete`."""
    folds: int = 5
    """K of the outer cross-validation, at least 2."""
    repeats: int = 2
    """Times that the samples are split anew into folds; scores are averaged."""
    inner_folds: int = 3
    """K of the cross-validation inside each training set, that chooses C."""
    penalties: tuple[float, ...] = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
    """Values of C to choose from, for features scaled to unit variance; a single one is used as it is."""
    solver: str = "auto"
    """A name of `choice.SOLVER_NAMES`; `auto` chooses by shape and device."""
    seed: int = 0
    """Decides folds, shuffled labels and resampled groups."""
    permutations: int | None = None
    """Shuffles of the label behind each p-value and interval; 0 for none, and then no p-values (see `intervals`);
    None chooses by what they cost (see `run.choose_permutations`)."""
    class_weight: str = "none"
    """`balanced` weighs each sample by the inverse of its class's share of the training set."""
    confidence: float = 0.95
    """Coverage that the intervals aim at; a p-value is small at 1 − this."""
    allow_incomplete: bool = False
    """Probe the samples that are there, though the store lacks some."""
    stream: str = "auto"
    """Whether states are read from the store in each pass in place of being held in memory: `always`, `never`, or
    `auto`, where not even one worker could hold them. Scores are the same to the solvers' tolerance; where the number
    of permutations is left open there are fewer of them, since each costs more."""

    def __post_init__(self) -> None:
        if self.preset not in PRESETS:
            raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {self.preset!r}")
        if self.stream not in STREAMS:
            raise ValueError(f"stream must be one of {', '.join(STREAMS)}, got {self.stream!r}")
        if self.class_weight not in CLASS_WEIGHTS:
            raise ValueError(
                f"class weight must be one of {', '.join(CLASS_WEIGHTS)}, got {self.class_weight!r}"
            )
        for name, least in (
            ("folds", 2),
            ("repeats", 1),
            ("inner_folds", 2),
            ("permutations", 0),
            ("seed", 0),
        ):
            if (getattr(self, name) or 0) < least:
                raise ValueError(
                    f"{name.replace('_', ' ')} must be at least {least}, got {getattr(self, name)}"
                )
        if not self.penalties or not all(0 < penalty < float("inf") for penalty in self.penalties):
            raise ValueError(f"each C must be a positive number, got {self.penalties}")
        if not 0.5 <= self.confidence < 1:
            raise ValueError(f"confidence must lie in [0.5, 1), got {self.confidence}")
        if self.permutations and self.permutations < FEWEST_PERMUTATIONS:
            raise ValueError(
                f"permutations must be 0, for none, or at least {FEWEST_PERMUTATIONS}: with {self.permutations} no "
                f"p-value falls below {1 / (1 + self.permutations):.2g}"
            )

    @property
    def why_held(self) -> str:
        """Why states cannot be streamed; empty if they can."""
        if self.preset == "paper":
            return "the published protocol holds states in memory; the preset default does not have to"
        if self.solver not in STREAMING_SOLVERS:
            able = " and ".join(STREAMING_SOLVERS)
            return f"the solver {self.solver} holds states in memory; {able} do not have to"
        return ""

    @property
    def alpha(self) -> float:
        """The corrected p-value up to which something is said to be found."""
        return round(1 - self.confidence, 12)

    @property
    def n_permutations(self) -> int:
        """Shuffles of the label; 0 where they are yet to be chosen, too."""
        return self.permutations or 0

    @property
    def test_penalties(self) -> tuple[float, ...]:
        """Values of C that the permutation test tries: at most three of the grid, evenly spread, ascending.

        AUROC changes little from one value of the grid to the next, and each costs a fit a shuffle and fold."""
        grid = sorted(set(self.penalties))
        last = len(grid) - 1
        return tuple(grid[at] for at in sorted({0, last // 2, last}))
