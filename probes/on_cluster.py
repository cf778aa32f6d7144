"""A function of each layer and position, computed on the workers of a cluster, which may come, go and die.

This module knows nothing about what is computed.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from mmextract.engine.cluster import InFlight, installed, run_tasks
from mmextract.engine.versions import check_same, find_versions
from mmextract.probes.results import Cell

if TYPE_CHECKING:
    from distributed import Client

Result = TypeVar("Result")

RETRIES = 2
"""Times that a cluster repeats a task that raised."""


def map_cells(
    client: Client,
    function: Callable[[Any, int, str], Result],
    shared: object,
    cells: Sequence[Cell],
    *,
    patience: float,
    on_progress: Callable[[int], None],
) -> dict[Cell, Result]:
    """Return function(shared, layer, position) of each cell; shared goes to each worker once.

    Workers that come later are held against this process's versions, too. patience: seconds that the cluster may be
    without workers. on_progress is called with the number of tasks done since its last call. Raises what a task raised;
    ClusterLostError if the cluster is lost; WorkerMismatchError, with who has what, for a worker of other versions.
    """
    from distributed import WorkerPlugin

    if not cells:
        return {}

    class Shared(WorkerPlugin):
        def __init__(self, value: object, versions: Mapping[str, str]) -> None:
            self.value = value
            self.versions = versions

    name = f"mmextract-{uuid.uuid4().hex}"
    with (
        installed(client, Shared(shared, find_versions()), name),
        InFlight[Cell](client, patience=patience, retries=RETRIES) as tasks,
    ):
        arguments = ((cell, (name, function, *cell)) for cell in cells)
        done = run_tasks(tasks, _call, arguments, lambda cell: on_progress(1))
    return {cell: done[cell] for cell in cells}


def _call(name: str, function: Callable[[Any, int, str], Result], layer: int, position: str) -> Result:
    from distributed import get_worker

    worker = get_worker()
    brought: Any = worker.plugins[name]
    check_same(brought.versions, {worker.address: find_versions()})
    return function(brought.value, layer, position)
