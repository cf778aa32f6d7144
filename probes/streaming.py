"""Where states are while probes are fitted: held in memory or streamed from the store, decided once and said.

This module knows nothing about solvers or scores.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from mmextract.probes.choice import find_device
from mmextract.probes.cost import choose_permutations
from mmextract.probes.planning import describe_states, fits, fits_amply, predict_bytes

if TYPE_CHECKING:
    from distributed import Client

    from mmextract.probes.run import ProbePlan

MOST_ELEMENTS, USUAL_ELEMENTS, LEAST_ELEMENTS = 1 << 31, 1 << 28, 1 << 22
"""Elements that the solver takes at once, of 8 bytes and up to 2.5 times in all: most where this machine has plenty of
memory, the usual number where that suffices, or less. The more it takes, the fewer are the passes over the store."""


def choose_states(plan: ProbePlan, client: Client | None = None) -> ProbePlan:
    """Return the plan with its number of permutations, and with states streamed if they have to be, or are asked to.

    Where they are streamed a note says so. client: of the cluster that will take the tasks. Raises ValueError if states
    are to be streamed that cannot be.
    """
    held = choose_permutations(plan)
    settings = plan.settings
    if settings.stream == "always" and settings.why_held:
        raise ValueError(
            f"--stream always: {settings.why_held}: choose what can be streamed, or --stream auto"
        )
    if settings.stream == "never" or settings.why_held:
        return held  # and where that does not fit, `choose_workers` says so
    if settings.stream == "auto" and fits(held, client):
        return held
    streamed = replace(_find_size(plan, client), held_bytes=predict_bytes(held))
    why = "as asked for" if settings.stream == "always" else "because they do not fit into memory"
    notes = (*streamed.design.notes, f"states are {describe_states(streamed)}: {why} (--stream)")
    return replace(streamed, design=replace(streamed.design, notes=notes))


def _find_size(plan: ProbePlan, client: Client | None) -> ProbePlan:
    """Return the plan with states streamed in as few passes as fit into memory."""
    known = (
        client is None and find_device() == "cpu"
    )  # otherwise the memory is that of a GPU, or of machines elsewhere
    elements = MOST_ELEMENTS if known else USUAL_ELEMENTS
    while True:
        streamed = choose_permutations(replace(plan, streamed_elements=elements))
        fitting = fits_amply(streamed) if elements > USUAL_ELEMENTS else fits(streamed, client)
        if elements <= LEAST_ELEMENTS or fitting:
            return streamed
        elements //= 2
