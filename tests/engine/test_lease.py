from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest

from mmextract.engine import lease
from mmextract.engine.lease import Holder, Lease, LeaseLostError, StoreBusyError
from mmextract.engine.objects import LocalObjects, make_local

Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def store(tmp_path: Path) -> LocalObjects:
    return make_local(tmp_path / "a.zarr")


@pytest.fixture
def start() -> Iterator[Start]:
    """Start a `lease_process`, which waits for a line of input before it begins."""
    started: list[subprocess.Popen[str]] = []

    def call(*arguments: object) -> subprocess.Popen[str]:
        script = Path(__file__).with_name("lease_process.py")
        process = subprocess.Popen(
            [sys.executable, str(script), *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield call
    for process in started:
        process.kill()
        process.communicate()


def go(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    assert read_line(process) == "ready"
    process.stdin.write("go\n")
    process.stdin.flush()


def read_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def files(store: LocalObjects) -> list[str]:
    """Names of everything in the store's folder of leases, hidden files too."""
    folder = store.root / lease.FOLDER
    return sorted(file.name for file in folder.iterdir()) if folder.is_dir() else []


def write_holder(store: LocalObjects, **changes: object) -> Holder:
    """Leave the lease of a process of another machine, which has run out unless told otherwise."""
    record: dict[str, Any] = {
        "owner": "0" * 32,
        "host": "elsewhere",
        "pid": 1,
        "process_started": 1,
        "kernel": "another boot",
        "since": time.time() - 100,
        "until": time.time() - 10,
        **changes,
    }
    store.put(f"{lease.FOLDER}/{lease.NAME}", [json.dumps(record).encode()])
    return Holder(**record)


def test_a_lease_leaves_nothing_behind(store: LocalObjects) -> None:
    with Lease(objects=store) as held:
        assert files(store) == ["lease"]
        assert lease.is_held(store, held.owner)
    assert files(store) == []


def test_a_lease_is_released_whatever_happens(store: LocalObjects) -> None:
    with pytest.raises(KeyboardInterrupt), Lease(objects=store):
        raise KeyboardInterrupt
    assert files(store) == []


def test_a_second_one_is_refused_and_told_who_holds_the_store(store: LocalObjects) -> None:
    with Lease(objects=store) as first:
        with pytest.raises(StoreBusyError) as refused, Lease(objects=store):
            pass
        message = str(refused.value)
        assert str(os.getpid()) in message and socket.gethostname() in message
        assert message.count("UTC") == 2  # since when, until when
        first.check()
        assert lease.is_held(store, first.owner)


def test_a_live_lease_of_another_machine_is_respected_and_one_that_ran_out_is_taken(
    store: LocalObjects,
) -> None:
    write_holder(store, until=time.time() + 50)
    with pytest.raises(StoreBusyError, match="process 1 on elsewhere"), Lease(objects=store):
        pass
    stale = write_holder(store)
    with Lease(objects=store) as held:
        assert files(store) == ["lease", f"lease-{stale.owner}"]
        assert lease.is_held(store, held.owner) and not lease.is_held(store, stale.owner)
    assert files(store) == []


def test_a_holder_of_this_machine_that_was_killed_is_replaced_at_once(
    store: LocalObjects, start: Start
) -> None:
    process = start("hold", store.root, 600)
    go(process)
    assert read_line(process) == "held"
    with pytest.raises(StoreBusyError, match=f"process {process.pid} on"), Lease(objects=store):
        pass
    process.send_signal(signal.SIGKILL)
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # it is dead, and a zombie
    with Lease(objects=store):
        pass
    assert files(store) == []


def test_a_stopped_holder_keeps_its_lease_until_it_runs_out_and_stops_when_it_wakes(
    store: LocalObjects, start: Start
) -> None:
    process = start("hold", store.root, 3)
    go(process)
    assert read_line(process) == "held"
    process.send_signal(signal.SIGSTOP)
    with pytest.raises(StoreBusyError), Lease(objects=store):
        pass
    time.sleep(3.2)
    with Lease(objects=store) as taker:
        process.send_signal(signal.SIGCONT)
        time.sleep(1.2)
        taker.check()
        assert lease.is_held(store, taker.owner)
    process.communicate("", timeout=20)
    assert files(store) == []


def test_a_recycled_pid_does_not_look_like_the_holder(store: LocalObjects) -> None:
    with Lease(objects=store):
        record = json.loads(store.get("shard_digest/lease") or b"")
    holder = Holder(**record)
    assert not holder.is_gone()
    assert holder.process_started is not None
    assert replace(holder, process_started=holder.process_started - 1).is_gone()
    assert not replace(holder, process_started=1, kernel="another boot").is_gone()


def test_a_lease_is_renewed(store: LocalObjects) -> None:
    with Lease(objects=store, seconds=2) as held:
        time.sleep(2.5)
        held.check()
        with pytest.raises(StoreBusyError), Lease(objects=store):
            pass


def test_who_has_lost_the_lease_is_told_and_leaves_the_other_one_alone(store: LocalObjects) -> None:
    with Lease(objects=store, seconds=0.3) as held:
        other = write_holder(store, owner="1" * 32, until=time.time() + 50)
        deadline = time.monotonic() + 10
        with pytest.raises(LeaseLostError, match="taken over by process 1 on elsewhere"):
            while time.monotonic() < deadline:
                held.check()
                time.sleep(0.02)
    assert lease.is_held(store, other.owner)


def test_of_many_threads_one_gets_the_lease_of_a_dead_holder(store: LocalObjects) -> None:
    n = 8
    for round_number in range(10):
        write_holder(store, owner=f"{round_number:032}")
        together = Barrier(n)

        def attempt(_: int, together: Barrier = together) -> bool:
            together.wait()
            try:
                with Lease(objects=store):
                    together.wait()
            except StoreBusyError:
                together.wait()
                return False
            return True

        with ThreadPoolExecutor(n) as executor:
            assert sum(executor.map(attempt, range(n))) == 1
        assert files(store) == []


@pytest.mark.parametrize("stale", [False, True], ids=["new", "stale"])
def test_of_two_processes_one_gets_the_lease(tmp_path: Path, start: Start, stale: bool) -> None:
    stores = [make_local(tmp_path / str(i)) for i in range(40)]
    for store in stores:
        if stale:
            write_holder(store)
    racers = [start("race", *(store.root for store in stores)) for _ in range(2)]
    for racer in racers:
        go(racer)
    outcomes = [[read_line(racer) for _ in stores] for racer in racers]
    for store, *lines in zip(stores, *outcomes, strict=True):
        assert sorted(lines) == [f"lost {store.root}", f"won {store.root}"]
    for racer in racers:
        racer.communicate("", timeout=20)
    assert all(files(store) == [] for store in stores)


def test_what_a_killed_release_left_is_swept(store: LocalObjects) -> None:
    with Lease(objects=store):
        record = store.get("shard_digest/lease") or b""
    dead = {**json.loads(record), "process_started": 1}
    store.put("shard_digest/lease", [json.dumps(dead).encode()])
    store.put("shard_digest/lease-of-nobody", [json.dumps(dead).encode()])
    (store.root / "shard_digest/.lease.0.partial").write_bytes(b"{")
    lease.sweep(store)
    assert files(store) == []


def test_a_sweep_leaves_a_live_lease_alone(store: LocalObjects) -> None:
    with Lease(objects=store) as held:
        lease.sweep(store)
        assert lease.is_held(store, held.owner)


def test_a_lease_that_nobody_can_read_is_an_error_that_says_what_to_do(
    store: LocalObjects, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "SECONDS_TO_WRITE", 0.1)
    store.put("shard_digest/lease", [b'{"owner": '])
    with pytest.raises(ValueError, match=r"lease of .* is damaged: remove it"), Lease(objects=store):
        pass


def test_an_object_is_created_by_one_of_many(tmp_path: Path) -> None:
    objects = LocalObjects(tmp_path)
    with ThreadPoolExecutor(8) as executor:
        won = list(executor.map(lambda i: objects.put_new("folder/key", bytes([i])), range(32)))
    assert sum(won) == 1
    assert objects.get("folder/key") == bytes([won.index(True)])
    assert [file.name for file in (tmp_path / "folder").iterdir()] == ["key"]


def test_nothing_is_begun_in_the_place_of_a_store_that_went_away(tmp_path: Path) -> None:
    objects = make_local(tmp_path / "some where" / "a.zarr")
    objects.put("shard_digest/c/0", [b"digest"])
    objects.root.rename(tmp_path / "elsewhere")
    for put in (
        lambda: objects.put("zarr.json", [b"root"]),
        lambda: objects.put_all({"hidden_states/c/1": [b"states"], "record/c/1": [b"record"]}),
        lambda: objects.put_new("shard_digest/lease", b"lease"),
    ):
        with pytest.raises(FileNotFoundError, match=str(objects.root)):
            put()
    assert not objects.occupied()


def test_a_holder_says_everything_it_must() -> None:
    assert set(asdict(lease._this_process())) >= {
        "owner",
        "host",
        "pid",
        "process_started",
        "kernel",
        "until",
    }
