"""Row H of the fault matrix: what happens to a cluster while it writes a store, which must end in the same bytes.

Workers are killed, segfaulted, retired and stopped under a run; schedulers and clients are killed, and runs launched
twice. Each case is a kind and a seed, that decides when it strikes, and whom.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Self

import pytest
from distributed import Client, LocalCluster

from mmextract.engine.distributed import run_distributed
from mmextract.engine.dump import DumpPlan, DumpSpec
from mmextract.engine.lease import StoreBusyError
from mmextract.engine.store import open_store
from tests.cli.test_distributed import dask, scheduler, worker_options
from tests.engine import cluster_runs
from tests.engine.cluster_runs import (
    dump_here,
    local_cluster,
    make_spec,
    plan_on,
    worker_pids,
    write_data,
)
from tests.engine.test_store import tree
from tests.engine.tiny_models import save_text_model
from tests.faults.outcomes import sweep

N_SAMPLES = 96
N_WORKERS = 2
SECONDS_TO_STRIKE = 1.0
SECONDS_TO_RESTART = 60.0
SECONDS_A_CASE = 300.0
WORKER_KINDS = ("killed", "segfaulted", "retired", "stopped")
CLIENT_KINDS = ("scheduler killed", "client killed", "launched twice")
SIGNALS = {"killed": signal.SIGKILL, "segfaulted": signal.SIGSEGV, "stopped": signal.SIGSTOP}

Case = tuple[str, int]


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What every case runs, and must end in."""

    folder: Path
    data: Path
    model: Path
    spec: DumpSpec
    whole: dict[str, bytes]

    def check(self, store: Path) -> None:
        """Hold a finished store to the bytes of an undisturbed run in one process."""
        found = tree(store)
        differs = sorted(name for name in {*found, *self.whole} if found.get(name) != self.whole.get(name))
        assert not differs, f"after recovery these differ: {differs[:5]}"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    folder = tmp_path_factory.mktemp("inputs")
    data, model = write_data(folder, N_SAMPLES), save_text_model(folder / "model")
    spec = make_spec(data, model)
    dump_here(spec, folder / "whole.zarr")
    return Inputs(folder=folder, data=data, model=model, spec=spec, whole=tree(folder / "whole.zarr"))


class Clusters:
    """Gives a cluster that is whole: the last one, or another where a case has damaged that. A context manager."""

    def __init__(self) -> None:
        self._opened = ExitStack()
        self._client: Client | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.discard()

    def client(self) -> Client:
        """Return a client of a cluster that has all its workers."""
        if self._client is None or not _is_whole(self._client):
            self.discard()
            self._client = self._opened.enter_context(local_cluster(N_WORKERS))
        return self._client

    def discard(self) -> None:
        """Close the cluster; the next case gets another."""
        self._client = None
        with suppress(OSError, CancelledError):  # what is left of a struck cluster may not answer in time
            self._opened.close()


def _is_whole(client: Client) -> bool:
    """Tell whether all workers are there, or soon are: dask starts those again that died, not those that retired."""
    try:
        client.wait_for_workers(N_WORKERS, timeout=SECONDS_TO_RESTART)
        return len(worker_pids(client)) == N_WORKERS
    except OSError:
        return False


@contextmanager
def no_longer_than(seconds: float) -> Iterator[None]:
    """Raise AssertionError in the main thread if what is inside takes longer: a hang does not end the row."""

    def give_up(number: int, frame: FrameType | None) -> None:
        raise AssertionError(f"it was not done after {seconds:.0f} s")

    before = signal.signal(signal.SIGUSR1, give_up)
    timer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGUSR1))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        signal.signal(signal.SIGUSR1, before)


@pytest.fixture(scope="module")
def clusters() -> Iterator[Clusters]:
    with Clusters() as opened:
        yield opened


def strike_worker(client: Client, kind: str, rng: random.Random) -> None:
    """Do to one worker what the case says, after a while; a stopped one goes on again after another while."""
    victims = worker_pids(client)
    address = rng.choice(sorted(victims))
    time.sleep(rng.uniform(0, SECONDS_TO_STRIKE))
    if kind == "retired":
        client.retire_workers([address])
        return
    with suppress(ProcessLookupError):
        os.kill(victims[address], SIGNALS[kind])
        if kind == "stopped":
            time.sleep(rng.uniform(0.2, 3))
            os.kill(victims[address], signal.SIGCONT)


def run_worker_case(client: Client, plan: DumpPlan, inputs: Inputs, case: Case) -> None:
    """Run with a worker struck; the run itself must come to its end."""
    kind, seed = case
    store = inputs.folder / f"{kind}-{seed}.zarr"
    striker = threading.Thread(target=strike_worker, args=(client, kind, random.Random(f"{kind} {seed}")))
    striker.start()
    try:
        run_distributed(plan, client, store)
    finally:
        striker.join()
    inputs.check(store)


def start_client(inputs: Inputs, store: Path, scheduler_address: str, n_shards: int) -> subprocess.Popen[str]:
    script = Path(cluster_runs.__file__)
    return subprocess.Popen(
        [sys.executable, script, inputs.data, inputs.model, store, scheduler_address, str(n_shards)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )


def wait_for_line(process: subprocess.Popen[str], wanted: str) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if line.strip() in (wanted, "finished"):
            return


def run_client_case(client: Client, plan: DumpPlan, inputs: Inputs, case: Case) -> None:
    """Kill a client, or launch a second one beside it, and run again on the same cluster."""
    kind, seed = case
    store = inputs.folder / f"{kind}-{seed}.zarr"
    cluster = client.cluster
    assert isinstance(cluster, LocalCluster)
    n_shards = random.Random(f"{kind} {seed}").randrange(1, 16)
    process = start_client(inputs, store, cluster.scheduler_address, n_shards)
    try:
        wait_for_line(process, "there")
        if kind == "launched twice":
            process.send_signal(signal.SIGSTOP)  # so that it cannot finish before the second one begins
            with suppress(StoreBusyError):
                run_distributed(plan, client, store)
                assert not open_store(store).missing, "two runs wrote one store at a time"
            process.send_signal(signal.SIGCONT)
            process.communicate(timeout=120)
            assert process.returncode == 0, f"the first launcher left with {process.returncode}"
    finally:
        process.kill()
        process.wait()
    run_distributed(plan, client, store)
    inputs.check(store)


def run_scheduler_case(inputs: Inputs, case: Case) -> None:
    """Kill the scheduler under a client, which must say so; the run is then finished in one process."""
    kind, seed = case
    folder = inputs.folder / f"{kind}-{seed}"
    folder.mkdir()
    store = folder / "a.zarr"
    rng = random.Random(f"{kind} {seed}")
    with (
        scheduler(folder) as file,
        dask(*worker_options(file), "--local-directory", folder),
        Client(scheduler_file=str(file), timeout=60, set_as_default=False) as connected,
    ):
        connected.wait_for_workers(1, timeout=120)
        pid = connected.run_on_scheduler(os.getpid)
        plan = plan_on(connected, inputs.spec)
        threading.Timer(rng.uniform(0, SECONDS_TO_STRIKE), os.kill, (pid, signal.SIGKILL)).start()
        with suppress(OSError):
            run_distributed(plan, connected, store)
    dump_here(inputs.spec, store)
    inputs.check(store)


def run_case(clusters: Clusters, inputs: Inputs) -> Callable[[Case], None]:
    """Return what runs a case, on a cluster that is whole."""

    def run(case: Case) -> None:
        if case[0] == "scheduler killed":
            run_scheduler_case(inputs, case)
            return
        client = clusters.client()
        plan = plan_on(client, inputs.spec)
        (run_worker_case if case[0] in WORKER_KINDS else run_client_case)(client, plan, inputs, case)

    def run_bounded(case: Case) -> None:
        whole = False
        try:
            with no_longer_than(SECONDS_A_CASE):
                run(case)
            whole = case[0] != "retired"
        finally:
            if not whole:
                clusters.discard()

    return run_bounded


@pytest.mark.parametrize("kind", ["killed", "client killed"])
def test_a_sample_of_row_h_ends_in_the_same_bytes(clusters: Clusters, inputs: Inputs, kind: str) -> None:
    run_case(clusters, inputs)((kind, 0))


@pytest.mark.faults
@pytest.mark.timeout(3600)
def test_row_h_workers(clusters: Clusters, inputs: Inputs) -> None:
    cases = [(kind, seed) for seed in range(15) for kind in WORKER_KINDS]
    sweep("H workers", cases, run_case(clusters, inputs))


@pytest.mark.faults
@pytest.mark.timeout(3600)
def test_row_h_clients_and_schedulers(clusters: Clusters, inputs: Inputs) -> None:
    kinds = [CLIENT_KINDS[number % len(CLIENT_KINDS)] for number in range(20)]
    sweep("H launchers", list(zip(kinds, range(20), strict=True)), run_case(clusters, inputs))
