"""Tasks of layers and positions on real worker processes that die."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from distributed import Client, Future, LocalCluster

from mmextract.engine import cluster
from mmextract.engine.versions import WorkerMismatchError, find_versions
from mmextract.probes import on_cluster
from mmextract.probes.on_cluster import map_cells
from tests.engine.cluster_runs import local_cluster, worker_pids

Function = Callable[[int, int, str], tuple[int, str]]
CELLS = [(layer, "last") for layer in range(6)]


@pytest.fixture
def add() -> Function:
    """A function that takes a while; it goes to workers by value, as they do not find this module."""

    def slow(shared: int, layer: int, position: str) -> tuple[int, str]:
        time.sleep(0.3)
        return shared + layer, position

    return slow


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with local_cluster(2) as connected:
        yield connected


def test_all_workers_may_die_and_others_come(client: Client, add: Function) -> None:
    victims = list(worker_pids(client).values())
    done: list[int] = []

    def kill_all(n_cells: int) -> None:
        done.append(n_cells)
        while victims:
            os.kill(victims.pop(), signal.SIGKILL)

    found = map_cells(client, add, 10, CELLS, patience=60, on_progress=kill_all)
    assert found == {cell: (10 + cell[0], "last") for cell in CELLS}
    assert list(found) == CELLS and sum(done) == len(CELLS) and not victims


def test_a_worker_that_dies_as_a_run_ends_does_not_cost_its_results(client: Client, add: Function) -> None:
    client.wait_for_workers(2, timeout=60)
    done: list[int] = []

    def kill_at_the_end(n_cells: int) -> None:
        done.append(n_cells)
        if len(done) == len(CELLS):
            os.kill(next(iter(worker_pids(client).values())), signal.SIGKILL)

    found = map_cells(client, add, 10, CELLS, patience=60, on_progress=kill_at_the_end)
    assert found == {cell: (10 + cell[0], "last") for cell in CELLS}


def test_a_result_that_dies_before_it_is_fetched_is_computed_again(
    client: Client, add: Function, monkeypatch: pytest.MonkeyPatch
) -> None:
    client.wait_for_workers(2, timeout=60)
    monkeypatch.setattr(cluster, "SECONDS_TO_FETCH", 1)
    take, outcomes = cluster._take, list[object]()

    def kill_and_take(future: Future[Any]) -> Any:
        if not outcomes:  # all who may hold it, just after they said that it is done
            for pid in worker_pids(client).values():
                os.kill(pid, signal.SIGKILL)
        try:
            outcomes.append(take(future))
        except TimeoutError as error:
            outcomes.append(error)
            raise
        return outcomes[-1]

    monkeypatch.setattr(cluster, "_take", kill_and_take)
    found = map_cells(client, add, 10, CELLS, patience=60, on_progress=lambda n_cells: None)
    assert found == {cell: (10 + cell[0], "last") for cell in CELLS}
    assert isinstance(outcomes[0], TimeoutError) and len(outcomes) > len(CELLS)


@pytest.mark.parametrize("kind", [ValueError, FileNotFoundError])
def test_a_task_that_fails_is_raised_and_leaves_nothing_on_the_workers(
    client: Client, kind: type[Exception]
) -> None:
    def refuse(shared: int, layer: int, position: str) -> None:
        raise kind(f"layer {layer} of {shared} is not there")

    client.wait_for_workers(2, timeout=60)
    with pytest.raises(kind, match=r"layer \d of 10 is not there"):
        map_cells(client, refuse, 10, CELLS, patience=60, on_progress=lambda n: None)
    assert not any(find_shared(client))


def test_a_worker_of_other_versions_is_named(
    client: Client, add: Function, monkeypatch: pytest.MonkeyPatch
) -> None:
    client.wait_for_workers(1, timeout=60)
    monkeypatch.setattr(on_cluster, "find_versions", lambda: {**find_versions(), "torch": "1.0"})
    with pytest.raises(WorkerMismatchError, match=r"worker tcp://\S+ has torch 2\S+, this process has 1\.0"):
        map_cells(client, add, 10, CELLS, patience=60, on_progress=lambda n_cells: None)


def test_an_interrupted_run_leaves_nothing_on_the_workers(client: Client, add: Function) -> None:
    def interrupt(n_cells: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        map_cells(client, add, 10, CELLS, patience=60, on_progress=interrupt)
    assert not any(find_shared(client))


def find_shared(client: Client) -> list[list[str]]:
    """Return what runs have on each worker."""

    def find(dask_worker: object) -> list[str]:
        return [name for name in dask_worker.plugins if name.startswith("mmextract-")]  # type: ignore[attr-defined]

    found = list(client.run(find).values())
    assert len(found) == 2
    return found


def test_a_cluster_that_stays_without_workers_is_an_error(add: Function) -> None:
    with (
        LocalCluster(
            n_workers=1, threads_per_worker=1, host="127.0.0.1", dashboard_address="127.0.0.1:0"
        ) as cluster,
        Client(cluster, set_as_default=False) as connected,
    ):
        connected.submit(int).result()

        def stop_all(n_cells: int) -> None:
            cluster.scale(0)

        with pytest.raises(OSError, match="no worker is left, and none came for 2 s"):
            map_cells(connected, add, 10, CELLS, patience=2, on_progress=stop_all)
