"""What a probe run is asked to do.

This module knows nothing about stores, solvers or files.
"""

from __future__ import annotations

from dataclasses import dataclass

PRESETS = ("default", "paper")
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
    resamples: int = 2000
    """Bootstrap replicates behind each interval."""
    confidence: float = 0.95
    """Coverage that the intervals aim at."""
    allow_incomplete: bool = False
    """Probe the samples that are there, though the store lacks some."""

    def __post_init__(self) -> None:
        if self.preset not in PRESETS:
            raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {self.preset!r}")
        for name, least in (
            ("folds", 2),
            ("repeats", 1),
            ("inner_folds", 2),
            ("resamples", 100),
            ("seed", 0),
        ):
            if getattr(self, name) < least:
                raise ValueError(
                    f"{name.replace('_', ' ')} must be at least {least}, got {getattr(self, name)}"
                )
        if not self.penalties or not all(0 < penalty < float("inf") for penalty in self.penalties):
            raise ValueError(f"each C must be a positive number, got {self.penalties}")
        if not 0.5 <= self.confidence < 1:
            raise ValueError(f"confidence must lie in [0.5, 1), got {self.confidence}")
