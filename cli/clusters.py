"""Where work is distributed to: a cluster that is started here, or one whose scheduler is named.

It gives a connected dask client whose workers are there and of the right versions, and says on stderr what it waits
for. This module knows nothing about dumps and probes.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import rich_click as click

from mmextract.cli.reporting import note
from mmextract.engine.cluster import SECONDS_WITHOUT_WORKERS

if TYPE_CHECKING:
    from distributed import Client, WorkerPlugin
    from distributed.deploy.cluster import Cluster

    from mmextract.engine.models import ModelSpec

Command = TypeVar("Command", bound=Callable[..., Any])

SECONDS_TO_CONNECT = 8.0


def scheduler_options(command: Command) -> Command:
    """Add the options that name a scheduler, and say how long its workers are waited for."""
    command = click.option(
        "--wait-for-workers",
        "patience",
        type=click.IntRange(min=1),
        default=int(SECONDS_WITHOUT_WORKERS),
        show_default=True,
        metavar="SECONDS",
        help="How long the cluster may be without workers: their jobs may still be queueing.",
    )(command)
    command = click.option(
        "--scheduler-file",
        type=click.Path(path_type=Path, dir_okay=False),
        help="File that a dask scheduler wrote its address into.",
    )(command)
    return click.option("--scheduler", help="Address of a dask scheduler, such as tcp://node1:8786.")(command)


@contextmanager
def connect(scheduler: str | None, scheduler_file: Path | None, patience: float) -> Iterator[Client]:
    """Connect to a scheduler that has workers.

    Raises OSError if there is none, or if it has no workers for `patience` seconds; ValueError for an address or a file
    that is none; WorkerMismatchError, naming workers and packages, if versions differ.
    """
    if scheduler and scheduler_file:
        raise click.UsageError("give either --scheduler or --scheduler-file")
    address = scheduler or _read_address(scheduler_file)
    with _client(address) as client:
        _wait_for_workers(client, address, patience)
        _check_versions(client)
        yield client


@contextmanager
def start(n_workers: int, model: ModelSpec) -> Iterator[Client]:
    """Start workers on this machine, each a process: one a GPU where there are GPUs and the model may use them.

    They end with the context. Raises ValueError for more workers than GPUs, ImportError where dask-cuda is missing.
    """
    import dask

    # dask blames every task that a dying worker had, so that workers that are killed now and then fail innocent ones
    with dask.config.set({"distributed.scheduler.allowed-failures": 5}), _start(n_workers, model) as cluster:
        from distributed import Client

        with Client(cluster, set_as_default=False) as client:
            client.register_plugin(_make_plugin())
            yield client


def _make_plugin() -> WorkerPlugin:
    """Return what leaves Ctrl-C, which a terminal sends to workers of its machine too, to the client, who ends them.

    It goes to workers by value: one that gets no work, since all is done, imports nothing of ours for it.
    """
    from distributed import WorkerPlugin

    class IgnoreInterrupts(WorkerPlugin):
        name = "mmextract-ignore-interrupts"

        def setup(self, worker: object) -> None:
            import signal

            signal.signal(signal.SIGINT, signal.SIG_IGN)  # dask calls this in the main thread

    return IgnoreInterrupts()


def _start(n_workers: int, model: ModelSpec) -> Cluster:
    import torch

    # the memory of a worker is its model's and its shard's: there is nothing to spill
    settings: dict[str, Any] = {
        "threads_per_worker": 1,
        "host": "127.0.0.1",
        "dashboard_address": "127.0.0.1:0",
    }
    # what goes wrong in a task comes back to the client, which says it; and a task that is overtaken by the end of an
    # interrupted run is no error
    settings |= {"memory_limit": None, "silence_logs": "CRITICAL"}
    if model.device == "cpu" or not torch.cuda.is_available():
        from distributed import LocalCluster

        return LocalCluster(n_workers=n_workers, processes=True, **settings)
    if model.device not in ("auto", "cuda") or model.device_map:
        raise ValueError(
            "with --workers each worker takes a GPU of its own: leave out --device and --device-map"
        )
    try:
        from dask_cuda import LocalCUDACluster
    except ImportError as error:
        raise ImportError(
            "workers on GPUs need dask-cuda: install it with `pip install 'mmextract[gpu]'`, or give --device cpu"
        ) from error
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = given.split(",") if given else [str(index) for index in range(torch.cuda.device_count())]
    if n_workers > len(gpus):
        raise ValueError(f"--workers {n_workers} need as many GPUs, and there are {len(gpus)}")
    cluster: Cluster = LocalCUDACluster(
        CUDA_VISIBLE_DEVICES=gpus[:n_workers], n_workers=n_workers, **settings
    )
    return cluster


def _client(address: str) -> Client:
    from distributed import Client

    # dask logs a traceback when the scheduler is lost, which the run says itself
    logging.getLogger("distributed.client").setLevel(logging.CRITICAL)
    try:
        return Client(address, timeout=SECONDS_TO_CONNECT, set_as_default=False)
    except OSError as error:  # a timeout too
        raise OSError(
            f"there is no dask scheduler at {address} (waited for {SECONDS_TO_CONNECT:.0f} s): start one with "
            "`dask scheduler`, or correct the address"
        ) from error
    except ValueError as error:
        raise ValueError(
            f"{address!r} is not the address of a scheduler, such as tcp://node1:8786"
        ) from error


def _read_address(file: Path | None) -> str:
    assert file is not None
    try:
        return str(json.loads(file.read_text("utf-8"))["address"])
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"there is no scheduler file {file}: start a scheduler with `dask scheduler --scheduler-file {file}`"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is not a file that a dask scheduler wrote (it names no address)") from error


def _wait_for_workers(client: Client, address: str, patience: float) -> None:
    if client.scheduler_info(n_workers=0)["n_workers"]:
        return
    note(f"the scheduler at {address} has no workers yet; waiting for the first one")
    try:
        client.wait_for_workers(1, timeout=patience)
    except TimeoutError as error:
        raise OSError(
            f"no worker came to the scheduler at {address} in {patience:g} s: start some with "
            f"`dask worker {address} --nthreads 1`, or wait longer for them (--wait-for-workers)"
        ) from error


def _check_versions(client: Client) -> None:
    from mmextract.engine.versions import PACKAGES, check_same, find_versions

    names = PACKAGES

    def ask() -> dict[str, str]:
        # sent by value, for a worker without mmextract must be able to say so
        import platform
        from importlib import metadata

        versions = {"python": platform.python_version()}
        for name in names:
            try:
                versions[name] = metadata.version(name)
            except metadata.PackageNotFoundError:
                versions[name] = "not installed"
        return versions

    check_same(find_versions(), client.run(ask))
