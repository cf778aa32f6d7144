"""Shards on real workers: the bytes of a run in one process, whatever happens to workers."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from distributed import Client, LocalCluster

from mmextract.engine import distributed, workers
from mmextract.engine.distributed import ShardsFailedError, run_distributed
from mmextract.engine.dump import DumpPlan, DumpSpec, plan_dump
from mmextract.engine.lease import Lease, LeaseLostError, StoreBusyError
from mmextract.engine.models import load
from mmextract.engine.objects import LocalObjects
from mmextract.engine.store import open_store
from mmextract.engine.versions import WorkerMismatchError, check_same, find_versions
from tests.engine.cluster_runs import dump_here, local_cluster, make_spec, plan_on, worker_pids, write_data
from tests.engine.test_store import tree
from tests.engine.tiny_models import save_text_model

N_SAMPLES = 40


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with local_cluster(2) as connected:
        yield connected


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> DumpSpec:
    folder = tmp_path_factory.mktemp("inputs")
    return make_spec(write_data(folder, N_SAMPLES), save_text_model(folder / "model"))


@pytest.fixture(scope="module")
def plan(client: Client, spec: DumpSpec) -> DumpPlan:
    return plan_on(client, spec)


@pytest.fixture(scope="module")
def whole(spec: DumpSpec, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What a run in this process writes."""
    folder = tmp_path_factory.mktemp("whole")
    dump_here(spec, folder / "a.zarr")
    return tree(folder / "a.zarr")


def test_a_distributed_run_writes_the_bytes_of_one_process(
    client: Client, plan: DumpPlan, whole: dict[str, bytes], tmp_path: Path
) -> None:
    rows: list[int] = []
    summary = run_distributed(plan, client, tmp_path / "a.zarr", rows.append)
    assert tree(tmp_path / "a.zarr") == whole
    assert sum(rows) == N_SAMPLES and summary.n_resumed == 0
    assert set(summary.rejected) == {f"q{N_SAMPLES // 2}"}
    assert summary.bytes_written == sum(
        len(whole[name]) for name in whole if name.startswith("hidden_states/c")
    )
    assert summary.bottleneck in ("decode and preprocess", "forward", "encode and write")


def test_a_plan_made_with_a_workers_model_is_that_of_this_process(spec: DumpSpec, plan: DumpPlan) -> None:
    here = plan_dump(spec, load(spec.model))
    assert (plan.layout, plan.attributes) == (here.layout, here.attributes)


def test_the_longest_prompt_is_measured_on_the_workers(
    client: Client, spec: DumpSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distributed, "ROWS_TO_MEASURE", 7)
    every = replace(spec, positions=("all",))
    assert plan_on(client, every).layout == plan_dump(every, load(spec.model)).layout


def test_a_worker_that_is_killed_costs_nothing(
    client: Client, plan: DumpPlan, whole: dict[str, bytes], tmp_path: Path
) -> None:
    victims = list(worker_pids(client).values())

    def kill_one(n_rows: int) -> None:
        if n_rows and victims:
            os.kill(victims.pop(), signal.SIGKILL)
            victims.clear()

    run_distributed(plan, client, tmp_path / "a.zarr", kill_one)
    assert tree(tmp_path / "a.zarr") == whole


def test_a_scheduler_that_was_lost_before_the_run_is_named(plan: DumpPlan, tmp_path: Path) -> None:
    with LocalCluster(
        n_workers=0, host="127.0.0.1", dashboard_address="127.0.0.1:0", silence_logs="CRITICAL"
    ) as cluster:
        client = Client(cluster.scheduler_address, timeout=5, set_as_default=False)
    try:
        with pytest.raises(OSError, match="connection to the scheduler was lost"):
            run_distributed(plan, client, tmp_path / "a.zarr")
    finally:
        client.close(timeout=1)


def test_a_run_that_stops_is_continued_by_one_process(
    client: Client, spec: DumpSpec, plan: DumpPlan, whole: dict[str, bytes], tmp_path: Path
) -> None:
    def stop(n_rows: int) -> None:
        if n_rows:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_distributed(plan, client, tmp_path / "a.zarr", stop)
    assert open_store(tmp_path / "a.zarr").missing
    dump_here(spec, tmp_path / "a.zarr")
    assert tree(tmp_path / "a.zarr") == whole


def test_a_finished_run_is_only_looked_at(client: Client, spec: DumpSpec, tmp_path: Path) -> None:
    dump_here(spec, tmp_path / "a.zarr")
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "a.zarr").rglob("*")}
    client.run(workers._load.cache_clear)
    summary = run_distributed(plan_on(client, spec), client, tmp_path / "a.zarr")
    loaded = client.run(lambda: workers._load.cache_info().currsize)
    assert sum(loaded.values()) == 1, "only the plan needs a model, that of one worker"
    assert summary.seconds < 2
    assert summary.n_resumed == N_SAMPLES and summary.bytes_written == 0
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "a.zarr").rglob("*")} == before


def test_a_second_launcher_is_refused(client: Client, spec: DumpSpec, plan: DumpPlan, tmp_path: Path) -> None:
    def launch_again(n_rows: int) -> None:
        with pytest.raises(StoreBusyError, match=f"process {os.getpid()} on"):
            run_distributed(plan, client, tmp_path / "a.zarr")
        with pytest.raises(StoreBusyError, match=f"process {os.getpid()} on"):
            dump_here(spec, tmp_path / "a.zarr")

    run_distributed(plan, client, tmp_path / "a.zarr", lambda n: launch_again(n) if not n else None)


def test_a_run_whose_lease_was_taken_stops_and_its_workers_commit_nothing_more(
    client: Client, plan: DumpPlan, tmp_path: Path
) -> None:
    store = tmp_path / "a.zarr"

    def lose(n_rows: int) -> None:
        if not n_rows:  # it holds the lease by now, and has begun nothing
            (store / "shard_digest/lease").unlink()
            Lease(objects=LocalObjects(store)).__enter__()

    with pytest.raises((LeaseLostError, WorkerMismatchError), match=r"no longer holds|finds no lease"):
        run_distributed(plan, client, store, lose)
    assert open_store(store).missing == N_SAMPLES


def test_a_shard_that_cannot_be_written_fails_the_run_once_the_others_are(
    client: Client, plan: DumpPlan, tmp_path: Path
) -> None:
    store = tmp_path / "a.zarr"
    notices: list[str] = []

    def block(n_rows: int) -> None:
        if not n_rows:
            (store / "hidden_states/c").mkdir(exist_ok=True)
            (store / "hidden_states/c/3").write_text("in the way")

    with pytest.raises(ShardsFailedError, match=r"(?s)1 shards .* shard 3: .*Error"):
        run_distributed(plan, client, store, block, notices.append)
    assert open_store(store).missing == 4
    assert len(notices) == 1 and "shard 3" in notices[0]


def test_a_worker_with_another_model_is_refused(
    client: Client, spec: DumpSpec, plan: DumpPlan, tmp_path: Path
) -> None:
    other = save_text_model(tmp_path / "other", seed=1)
    wrong = replace(plan, spec=replace(spec, model=replace(spec.model, model=str(other))))
    with pytest.raises(WorkerMismatchError, match=r"another model .* model\.weights"):
        run_distributed(wrong, client, tmp_path / "a.zarr")


def test_other_versions_are_named_with_their_workers() -> None:
    ours = find_versions()
    with pytest.raises(WorkerMismatchError) as refused:
        check_same(ours, {"tcp://a:1": ours, "tcp://b:2": {**ours, "torch": "1.0"}})
    assert f"worker tcp://b:2 has torch 1.0, this process has {ours['torch']}" in str(refused.value)
    assert "tcp://a:1" not in str(refused.value)
