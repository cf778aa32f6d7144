"""`--workers`, `--scheduler` and `--scheduler-file`, with real schedulers and workers."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psutil
import pytest
from distributed import Client

from mmextract.engine.store import open_store
from tests.cli.conftest import Ran
from tests.engine.test_store import tree
from tests.probes.stores import make_paired_store

Run = Callable[..., Ran]
SMALL = ("--limit", 6, "--layers", "0,-1", "--shard-samples", 4, "--batch-size", 2, "--torch-threads", 1)


@contextmanager
def dask(*arguments: object, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run `dask ARGUMENTS`, and end it. -P: this folder's `kernels` must not be found in place of Hugging Face's."""
    command = [sys.executable, "-P", "-m", "dask", *map(str, arguments)]
    process = subprocess.Popen(
        command, env=os.environ | environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        yield process
    finally:
        process.terminate()
        process.wait()


@contextmanager
def scheduler(folder: Path) -> Iterator[Path]:
    """Run a scheduler, and yield the file that it wrote its address into."""
    file = folder / "scheduler.json"
    with dask("scheduler", "--host", "127.0.0.1", "--port", 0, "--no-dashboard", "--scheduler-file", file):
        deadline = time.monotonic() + 120
        while not file.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        yield file


def worker_options(file: Path) -> list[object]:
    return ["worker", "--scheduler-file", file, "--nthreads", 1, "--no-dashboard", "--host", "127.0.0.1"]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A scheduler with one worker."""
    folder = tmp_path_factory.mktemp("cluster")
    with scheduler(folder) as file, dask(*worker_options(file), "--local-directory", folder):
        yield file


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What one process writes."""
    store = tmp_path_factory.mktemp("whole") / "a.zarr"
    command = [str(Path(sys.executable).parent / "mmextract"), "dump", *map(str, SMALL), "-o", str(store)]
    subprocess.run(command, check=True, capture_output=True)
    return tree(store)


def test_workers_of_this_machine_write_the_bytes_of_one_process(
    run: Run, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ran = run("dump", *SMALL, "--workers", 2, "-o", "a.zarr", "--json")
    assert ran.code == 0, ran.err
    assert json.loads(ran.out)["n_samples"] == 12
    assert tree(tmp_path / "a.zarr") == whole


def test_workers_of_a_scheduler_write_the_bytes_of_one_process(
    run: Run, cluster: Path, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ran = run("dump", *SMALL, "--scheduler-file", cluster, "-o", "a.zarr")
    assert ran.code == 0, ran.err
    assert tree(tmp_path / "a.zarr") == whole
    address = json.loads(cluster.read_text())["address"]
    again = run("dump", *SMALL, "--scheduler", address, "-o", "a.zarr")
    assert again.code == 0 and "nothing to do" in again.out


def test_a_dry_run_plans_on_a_worker_and_writes_nothing(run: Run, cluster: Path, tmp_path: Path) -> None:
    ran = run("dump", *SMALL, "--scheduler-file", cluster, "--dry-run", "--json", "-o", tmp_path / "a.zarr")
    assert ran.code == 0 and json.loads(ran.out)["n_shards"] == 3
    assert not (tmp_path / "a.zarr").exists()


def test_probes_on_a_cluster_score_as_here(run: Run, cluster: Path, tmp_path: Path) -> None:
    store = make_paired_store(tmp_path / "store.zarr", signals=[[0, 0], [0, 1.0]])
    options = ("--c", 0.1, "--repeats", 1, "--json")
    here = run("probe", store, *options, "-o", tmp_path / "here")
    there = run("probe", store, *options, "-o", tmp_path / "there", "--scheduler-file", cluster)
    assert here.code == there.code == 0, there.err
    assert json.loads(here.out)["rows"] == json.loads(there.out)["rows"]


def test_a_scheduler_that_dies_during_a_probe_is_said_once_and_clearly(tmp_path: Path) -> None:
    store = make_paired_store(tmp_path / "store.zarr", signals=[[0, 0], [0, 1.0]])
    command = [str(Path(sys.executable).parent / "mmextract"), "probe", str(store), "--permutations", "20000"]
    with scheduler(tmp_path) as file, dask(*worker_options(file), "--local-directory", tmp_path):
        process = subprocess.Popen(
            [*command, "--scheduler-file", str(file), "-o", str(tmp_path / "out")],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        with Client(json.loads(file.read_text())["address"]) as client:
            deadline = time.monotonic() + 120
            while not any(client.processing().values()) and time.monotonic() < deadline:
                time.sleep(0.1)
            os.kill(client.run_on_scheduler(os.getpid), signal.SIGKILL)
        _, error = process.communicate(timeout=60)
    assert process.returncode == 1, error
    assert error.count(b"the connection to the scheduler was lost") == 1
    assert b"Traceback" not in error and not (tmp_path / "out").exists()


def free_port() -> int:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return int(opened.getsockname()[1])


@pytest.mark.parametrize("command", ["dump", "probe"])
def test_a_scheduler_that_is_not_there_is_a_clear_error_within_ten_seconds(
    run: Run, tmp_path: Path, command: str
) -> None:
    store = make_paired_store(tmp_path / "store.zarr", signals=[[0, 1.0]])
    address = f"tcp://127.0.0.1:{free_port()}"
    arguments = (*SMALL, "-o", tmp_path / "a.zarr") if command == "dump" else (store, "-o", tmp_path / "p")
    with_modules = run(command, "--help")
    started = time.monotonic()
    ran = run(command, *arguments, "--scheduler", address)
    assert with_modules.code == 0 and ran.code == 1
    assert f"no dask scheduler at {address}" in ran.err and "Traceback" not in ran.err
    assert time.monotonic() - started < 20  # the rest is for imports on a busy machine
    assert not (tmp_path / "a.zarr").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--scheduler-file", "MISSING"), 1, "there is no scheduler file"),
        (("--scheduler-file", "GARBAGE"), 1, "names no address"),
        (("--scheduler", "tcp://a:1", "--scheduler-file", "GARBAGE"), 2, "only one"),
        (("--scheduler", "tcp://a:1", "--workers", 2), 2, "only one"),
        (("--workers", 0), 2, "--workers"),
    ],
)
def test_a_mistake_is_one_clear_message(
    run: Run, tmp_path: Path, arguments: tuple[object, ...], code: int, message: str
) -> None:
    (tmp_path / "GARBAGE").write_text("{}")
    given = [str(tmp_path / str(a)) if a in ("MISSING", "GARBAGE") else a for a in arguments]
    ran = run("dump", *SMALL, "-o", tmp_path / "a.zarr", *given)
    assert ran.code == code, ran.err
    assert message in ran.err and "Traceback" not in ran.err


def test_a_scheduler_without_workers_is_waited_for_and_then_an_error(run: Run, tmp_path: Path) -> None:
    options = ("-o", tmp_path / "a.zarr", "--wait-for-workers", 1)
    with scheduler(tmp_path) as file:
        ran = run("dump", *SMALL, *options, "--scheduler-file", file)
    assert ran.code == 1
    assert "no workers yet" in ran.err and "in 1 s" in ran.err and "Traceback" not in ran.err


def test_a_worker_of_another_version_is_named(run: Run, tmp_path: Path) -> None:
    fake = tmp_path / "other/mmextract-9.9.dist-info"
    fake.mkdir(parents=True)
    (fake / "METADATA").write_text("Metadata-Version: 2.1\nName: mmextract\nVersion: 9.9\n")
    with ExitStack() as started:
        file = started.enter_context(scheduler(tmp_path))
        options = (*worker_options(file), "--no-nanny", "--local-directory", tmp_path)
        started.enter_context(dask(*options, PYTHONPATH=str(fake.parent)))
        ran = run("dump", *SMALL, "-o", tmp_path / "a.zarr", "--scheduler-file", file)
    assert ran.code == 1
    assert "has mmextract 9.9, this process has" in ran.err and "worker tcp://127.0.0.1:" in ran.err
    assert "Traceback" not in ran.err and not (tmp_path / "a.zarr").exists()


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_interrupted_ends_its_workers_and_is_continued(
    run: Run, tmp_path: Path, sent: signal.Signals
) -> None:
    options = (
        "--layers",
        "all",
        "--shard-samples",
        2,
        "--batch-size",
        2,
        "--torch-threads",
        1,
        "--limit",
        150,
    )
    command = [str(Path(sys.executable).parent / "mmextract"), "dump", *map(str, options), "--workers", "1"]
    process = subprocess.Popen(
        [*command, "-o", str(tmp_path / "a.zarr")],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    digests = tmp_path / "a.zarr/shard_digest/c"
    deadline = time.monotonic() + 200
    while not any(digests.glob("[0-9]*")) and time.monotonic() < deadline:
        time.sleep(0.02)
    children = psutil.Process(process.pid).children(recursive=True)
    started = time.monotonic()
    if sent == signal.SIGINT:
        os.killpg(process.pid, sent)  # as a terminal does
    else:
        process.send_signal(sent)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    assert time.monotonic() - started < 10
    assert b"Run the same command again" in error and b"Traceback" not in error
    _, alive = psutil.wait_procs(children, timeout=5)
    assert children and not alive
    assert 0 < open_store(tmp_path / "a.zarr").missing < 300
    assert not list((tmp_path / "a.zarr/shard_digest").glob("lease*"))
