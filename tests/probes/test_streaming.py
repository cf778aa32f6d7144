"""States that are read from the store in each pass give the scores that states in memory give, and this is said."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
from click.testing import CliRunner
from distributed import Client, LocalCluster

from mmextract.cli.probe import probe
from mmextract.probes import blocks, planning, states, streaming
from mmextract.probes.outputs import make_table
from mmextract.probes.rows import Row
from mmextract.probes.run import ProbePlan, plan_probe, run_probe
from mmextract.probes.settings import ProbeSettings
from mmextract.probes.stream_cost import count_passes
from mmextract.probes.streaming import MOST_ELEMENTS, USUAL_ELEMENTS, choose_states
from mmextract.probes.summary import Summary
from tests.probes.stores import make_paired_store, make_store, paired_columns, paired_states

FAST = ProbeSettings(folds=3, repeats=1, inner_folds=2, penalties=(0.01, 1.0), permutations=19)
TOLERANCE = 1e-7
"""Of any score: weights of either way are right to some 1e-9, and AUROC and accuracy only change where ranks do."""


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of two shards, and decisions and projections in several passes."""
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", 12 * 50)
    monkeypatch.setattr(states, "MOST_DECIDED", 300)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two checkpoints' stores of the same samples, those of the second in another order."""
    path, columns = tmp_path_factory.mktemp("streaming"), paired_columns(60, 30)
    columns["third"] = [str(row // 2 % 3) for row in range(120)]
    signals = (0.5, 0.1)
    orders = (np.arange(120), np.random.default_rng(3).permutation(120))
    for name, signal, order in zip("ab", signals, orders, strict=True):
        made = paired_states(columns, 12, signal=signal, seed=ord(name))[order, None, None]
        made[..., 5] = 0.1  # which has no exact mean
        shuffled = {column: [values[row] for row in order] for column, values in columns.items()}
        make_store(path / name, made, layers=[0], positions=["last"], columns=shuffled)
    return path / "a", path / "b"


def score(plan: ProbePlan) -> list[Row]:
    return list(Summary(plan, run_probe(plan)).rows)


def assert_same(rows: list[Row], held: list[Row]) -> None:
    assert len(rows) == len(held)
    for row, want in zip(rows, held, strict=True):
        assert (row.task, row.metric, row.n_samples, row.c) == (
            want.task,
            want.metric,
            want.n_samples,
            want.c,
        )
        for name in ("value", "error", "low", "high", "p", "p_corrected", "detectable"):
            got, expected = getattr(row, name), getattr(want, name)
            assert got == pytest.approx(expected, abs=TOLERANCE, nan_ok=True), (row.task, row.metric, name)


@pytest.mark.parametrize(
    ("changes", "most_elements"),
    [
        pytest.param({}, 1 << 28, id="paired, in few batches"),
        pytest.param({"repeats": 1}, 20_000, id="paired, in many batches"),
        pytest.param({"label": "third", "group": "image", "permutations": 0}, 1 << 28, id="three classes"),
        pytest.param({"group": "none", "class_weight": "balanced"}, 1 << 28, id="ungrouped and weighted"),
    ],
)
def test_scores_are_those_of_states_in_memory(
    pair: tuple[Path, Path], changes: dict[str, Any], most_elements: int
) -> None:
    """With a comparison, whose other store has its samples in another order."""
    settings = replace(FAST, **changes)
    held = plan_probe(pair[0], settings, compare_with=pair[1])
    streamed = plan_probe(pair[0], replace(settings, stream="always"), compare_with=pair[1])
    assert not held.streamed_elements and streamed.streamed_elements
    assert_same(score(replace(streamed, streamed_elements=most_elements)), score(held))


def test_fewer_samples_than_features_are_no_less_exact(tmp_path: Path) -> None:
    columns = paired_columns(24, 12)
    made = paired_states(columns, 70, signal=0.3)[:, None, None]
    store = make_store(tmp_path / "s.zarr", made, layers=[0], positions=["last"], columns=columns)
    plan = plan_probe(store, replace(FAST, stream="always"))
    cell = run_probe(plan)[0, "last"].find("label")
    assert cell.solver == "primal cpu" and cell.n_unconverged == 0 and cell.worst_residual < 1e-8
    assert_same(score(plan), score(plan_probe(store, FAST)))


def test_the_command_writes_what_is_found_of_states_in_memory(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    options = ["--folds", "3", "--repeats", "1", "--c", "0.1", "--permutations", "19", "--projections", "pca"]
    options += ["--compare", str(pair[1]), "--stream", "always", "-o", str(tmp_path / "out")]
    done = CliRunner().invoke(probe, [str(pair[0]), *options])
    assert done.exit_code == 0, done.output
    plan = plan_probe(pair[0], replace(FAST, inner_folds=3, penalties=(0.1,)), compare_with=pair[1])
    held = make_table(score(plan)).drop(["solver"]).to_pylist()
    written = pyarrow.parquet.read_table(tmp_path / "out/probe.parquet").drop(["solver"]).to_pylist()
    for got, want in zip(written, held, strict=True):
        assert got == pytest.approx(want, abs=TOLERANCE, nan_ok=True)
    record = json.loads((tmp_path / "out/probe.json").read_text("utf-8"))
    assert record["states"].startswith("read from the store in each of some")
    assert "GiB a worker" in record["states"] and "as asked for (--stream)" in record["notes"][-1]
    assert record["notes"][-1] in done.stderr.replace("\n", " ")
    assert (tmp_path / "out/probe.csv").exists() and (tmp_path / "out/report.html").exists()
    assert {row["n_samples"] for row in record["separability"]["rows"]} == {120}


def test_states_that_are_not_finite_are_the_same_error(tmp_path: Path) -> None:
    columns = paired_columns(60, 30)
    made = paired_states(columns, 12)[:, None, None]
    made[[4, 99], 0, 0, 2] = np.nan, np.inf
    store = make_store(tmp_path / "s.zarr", made, layers=[0], positions=["last"], columns=columns)
    told = []
    for how in ("never", "always"):
        with pytest.raises(ValueError, match=r"layer 0, position last: 2 of 120 samples.*2#seen") as caught:
            run_probe(plan_probe(store, replace(FAST, stream=how)))
        told.append(str(caught.value))
    assert told[0] == told[1]


def test_an_incomplete_store_is_probed_where_it_is_there(tmp_path: Path) -> None:
    store = make_paired_store(tmp_path / "s.zarr", signals=[[0.5]], n_shards_written=3)
    settings = replace(FAST, allow_incomplete=True, permutations=0)
    streamed = plan_probe(store, replace(settings, stream="always"))
    assert streamed.design.n_samples == 96
    assert_same(score(streamed), score(plan_probe(store, settings)))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"solver": "dual"}, "the solver dual holds states in memory; auto and primal do not have to"),
        ({"solver": "sklearn"}, "the solver sklearn holds"),
        ({"solver": "cuml"}, "the solver cuml holds"),
        ({"preset": "paper"}, "the published protocol holds states in memory; the preset default"),
    ],
)
def test_what_cannot_be_streamed_is_refused_with_what_can(
    store: Path, changes: dict[str, Any], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = replace(FAST, **changes)
    with pytest.raises(ValueError, match=f"--stream always: {told}"):
        plan_probe(store, replace(settings, stream="always"))
    monkeypatch.setattr(planning, "available_bytes", lambda: 1)
    plan = plan_probe(store, settings)
    assert not plan.streamed_elements
    with pytest.raises(ValueError, match=f"do not fit.*choose what can be streamed .{told}"):
        run_probe(plan)


def huge(store: Path, settings: ProbeSettings) -> ProbePlan:
    """Return a plan for 1.2 million samples of 4096 features: 37 GiB in double precision."""
    plan = plan_probe(store, replace(settings, permutations=0))
    task = plan.tasks[0]
    repeated = {name: np.tile(getattr(task, name), 10_000) for name in ("y", "folds", "inner_folds")}
    tasks = tuple(replace(task, name=one.name, **repeated) for one in plan.tasks)
    design = replace(plan.design, rows=plan.design.rows.repeat(10_000))
    return replace(
        plan, settings=settings, design=design, tasks=tasks, hidden_size=4096, n_stored=len(design.rows)
    )


def test_states_are_streamed_only_where_no_worker_could_hold_them(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = huge(store, ProbeSettings())
    monkeypatch.setattr(planning, "available_bytes", lambda: 16 << 30)
    chosen = choose_states(plan)
    assert chosen.streamed_elements and chosen.settings.permutations == 0
    assert "because they do not fit into memory (--stream)" in chosen.design.notes[-1]
    assert planning.choose_workers(chosen, 0, cores=8) >= 1
    assert "read from the store" in planning.describe(chosen, 0, 1.0)
    never = choose_states(replace(plan, settings=ProbeSettings(stream="never")))
    with pytest.raises(ValueError, match=r"do not fit.*--stream always.*larger machine"):
        planning.choose_workers(never, 0, cores=8)
    monkeypatch.setattr(planning, "available_bytes", lambda: 200 << 30)
    assert not choose_states(plan).streamed_elements


def test_the_less_memory_the_less_is_solved_at_once(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = huge(store, ProbeSettings(stream="always"))
    monkeypatch.setattr(planning, "available_bytes", lambda: 1 << 40)
    most = choose_states(plan)
    size, free = planning.predict_bytes(most), planning.predict_bytes(most) - 1
    monkeypatch.setattr(planning, "available_bytes", lambda: free)
    less = choose_states(plan)
    assert 0 < less.streamed_elements < most.streamed_elements
    assert planning.predict_bytes(less) < size
    assert count_passes(less) > count_passes(most)


def test_much_memory_is_taken_only_where_all_workers_that_may_run_have_it(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = huge(store, ProbeSettings(stream="always"))
    monkeypatch.setattr(planning, "count_cores", lambda: 4)
    monkeypatch.setattr(streaming, "find_device", lambda: "cpu")
    found = {}
    for free in (16, 64, 1024):
        monkeypatch.setattr(planning, "available_bytes", lambda free=free: free << 30)
        found[free] = choose_states(plan)
    sizes = [chosen.streamed_elements for chosen in found.values()]
    assert sizes[0] <= USUAL_ELEMENTS < sizes[1] < sizes[2] == MOST_ELEMENTS
    assert 4 * planning.predict_bytes(found[64]) <= 0.8 * (64 << 30)
    passes = [count_passes(chosen) for chosen in found.values()]
    assert passes[0] > 2 * passes[1] and passes[1] > passes[2]
    monkeypatch.setattr(streaming, "find_device", lambda: "cuda")  # whose memory is another's
    assert choose_states(plan).streamed_elements == USUAL_ELEMENTS


def test_a_cluster_of_unknown_memory_is_not_asked_for_much(store: Path) -> None:
    with (
        LocalCluster(
            n_workers=1, threads_per_worker=1, processes=False, dashboard_address=None, memory_limit=0
        ) as cluster,
        Client(cluster) as client,
    ):
        chosen = choose_states(huge(store, ProbeSettings(stream="always")), client)
    assert chosen.streamed_elements == USUAL_ELEMENTS


def test_a_cluster_streams_what_its_workers_cannot_hold(store: Path, pair: tuple[Path, Path]) -> None:
    with (
        LocalCluster(
            n_workers=1, threads_per_worker=1, processes=False, dashboard_address=None, memory_limit="4GiB"
        ) as cluster,
        Client(cluster) as client,
    ):
        assert choose_states(huge(store, ProbeSettings()), client).streamed_elements
        plan = plan_probe(pair[0], replace(FAST, stream="always"), client=client)
        rows = list(Summary(plan, run_probe(plan, client=client)).rows)
    assert_same(rows, score(plan_probe(pair[0], FAST)))
