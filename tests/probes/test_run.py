from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mmextract.probes.run import choose_scheduler, plan_probe, run_probe
from mmextract.probes.settings import ProbeSettings
from mmextract.probes.summary import Summary
from tests.probes.conftest import QUICK, summarise
from tests.probes.stores import make_paired_store, make_store, paired_columns, paired_states

FAST = ProbeSettings(penalties=(0.1,), repeats=1, permutations=0)


def test_a_planted_signal_is_found_where_it_is_and_nowhere_else(summary: Summary) -> None:
    assert [(row.layer, row.position) for row in summary.above_chance] == [(1, "image")]
    assert (summary.best.layer, summary.best.position) == (1, "image")


@pytest.mark.parametrize(("workers", "scheduler"), [(1, None), (2, "threads"), (2, "processes")])
def test_how_the_work_is_spread_changes_nothing(
    store: Path, summary: Summary, workers: int, scheduler: str | None
) -> None:
    scores = run_probe(plan_probe(store, QUICK), workers=workers, scheduler=scheduler)
    assert Summary(summary.plan, scores).rows == summary.rows


def test_long_work_goes_to_processes_and_short_work_does_not(store: Path) -> None:
    long = replace(plan_probe(store, ProbeSettings()), hidden_size=4096, positions=tuple(map(str, range(20))))
    assert choose_scheduler(long, 2) == "processes"
    assert choose_scheduler(long, 1) == "synchronous"
    assert choose_scheduler(plan_probe(store, FAST), 2) == "synchronous"


@pytest.mark.parametrize("solver", ["dual", "primal"])
def test_our_own_solvers_score_as_scikit_learn_does(store: Path, solver: str) -> None:
    chosen = replace(QUICK, repeats=1, layers=(1,), positions=("image",))
    found, want = (summarise(store, chosen, solver=name) for name in (solver, "sklearn"))
    assert {row.solver for row in found.rows if row.task == "label"} == {f"{solver} cpu"}
    for row, other in zip(found.rows, want.rows, strict=True):
        assert (row.task, row.metric, row.c) == (other.task, other.metric, other.c)
        assert row.value == pytest.approx(other.value, abs=1e-6)


def test_progress_adds_up_to_the_layers_and_positions(store: Path) -> None:
    done: list[int] = []
    run_probe(plan_probe(store, FAST), on_progress=done.append)
    assert sum(done) == 6


def test_layers_and_positions_can_be_chosen(store: Path) -> None:
    made = summarise(store, FAST, layers=(1, -1), positions=("image",))
    assert list(made.scores) == [(1, "image"), (-1, "image")]


def test_a_task_reads_the_states_of_its_own_layer_only(tmp_path: Path) -> None:
    store = make_paired_store(tmp_path / "s.zarr", signals=[[0], [0]])
    for shard in (store / "hidden_states" / "c").rglob("*"):
        if (
            shard.is_file()
        ):  # the chunk of layer 0 comes second in a shard: ruin it, and not the index at the end
            data = bytearray(shard.read_bytes())
            middle = (len(data) - 2 * 16 - 4) * 3 // 4
            data[middle : middle + 8] = b"\xff" * 8
            shard.write_bytes(data)
    summarise(store, FAST, layers=(-1,))


def test_a_layer_or_position_that_is_not_there_is_named_with_those_that_are(store: Path) -> None:
    with pytest.raises(LookupError, match="no layer 7: it has embed, 0, 1"):
        plan_probe(store, ProbeSettings(layers=(7,)))
    with pytest.raises(LookupError, match="no position 'prompt': it has last, image"):
        plan_probe(store, ProbeSettings(positions=("prompt",)))


def test_a_store_that_is_not_there_is_an_error_that_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="mmextract dump"):
        plan_probe(tmp_path / "none.zarr", ProbeSettings())


def test_an_incomplete_store_is_refused_and_can_be_probed_all_the_same(tmp_path: Path) -> None:
    store = make_paired_store(tmp_path / "s.zarr", signals=[[0]], n_shards_written=3)
    with pytest.raises(ValueError, match=r"24 of 120 samples are missing.*--allow-incomplete"):
        plan_probe(store, FAST)
    made = summarise(store, FAST, allow_incomplete=True)
    assert made.plan.design.n_samples == 96
    assert made.plan.design.dropped == {"not in the store yet": 24}


def test_rejected_samples_are_left_out(tmp_path: Path) -> None:
    store = make_paired_store(tmp_path / "s.zarr", signals=[[0]], rejected={3: "no image", 40: "no image"})
    design = plan_probe(store, FAST).design
    assert design.dropped == {"rejected by the dump": 2, "whose other rendering is not there": 2}


@pytest.mark.parametrize("scheduler", ["threads", "processes"])
def test_states_that_are_not_finite_are_an_error_that_says_where(tmp_path: Path, scheduler: str) -> None:
    columns = paired_columns(30, 15)
    states = np.repeat(paired_states(columns, 4)[:, None, None], 2, axis=1)
    states[[4, 9], 1, 0, 2] = np.nan, np.inf
    store = make_store(tmp_path / "s.zarr", states, layers=[0, 1], positions=["last"], columns=columns)
    with pytest.raises(
        ValueError, match=r"layer 1, position last: 2 of 60 samples.*the first is 2#seen"
    ) as caught:
        run_probe(plan_probe(store, FAST), workers=2, scheduler=scheduler)
    assert "Traceback" not in str(caught.value)


def test_constant_features_are_no_error(tmp_path: Path) -> None:
    columns = paired_columns(30, 15)
    states = np.ones((60, 1, 1, 4), np.float32)
    store = make_store(tmp_path / "s.zarr", states, layers=[0], positions=["last"], columns=columns)
    best = summarise(store, FAST).best
    assert best.value == best.low == best.high == 0.5


def test_a_class_that_would_be_missing_from_a_fold_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    columns = paired_columns(60, 60)
    columns["rare"] = ["yes" if pair < 4 else "no" for pair in columns["pair"]]
    states = np.zeros((120, 1, 1, 4), np.float32)
    store = make_store(tmp_path / "s.zarr", states, layers=[0], positions=["last"], columns=columns)
    with pytest.raises(
        ValueError, match=r"class 'yes' of 'rare' occurs in 4 groups .pair., and 5 folds.*lower --folds"
    ):
        plan_probe(store, replace(FAST, label="rare"))


def test_a_design_that_cannot_be_shuffled_has_intervals_but_no_p_values_and_says_so(tmp_path: Path) -> None:
    columns = paired_columns(60, 30)
    both = zip(columns["pair"], columns["condition"], strict=True)
    columns["half"] = ["a" if pair < 15 or name == "seen" else "b" for pair, name in both]
    states = np.random.default_rng(0).normal(size=(120, 1, 1, 4)).astype(np.float32)
    store = make_store(tmp_path / "s.zarr", states, layers=[0], positions=["last"], columns=columns)
    made = summarise(store, replace(FAST, label="half", permutations=19))
    assert made.plan.design.structure == "mixed"
    assert not made.is_tested and made.best.low is not None
    assert any("no p-values: some groups (pair) hold one class" in text for text in made.warnings)


def test_of_a_store_of_all_tokens_the_positions_that_every_sample_has_are_probed(tmp_path: Path) -> None:
    columns = paired_columns(30, 15)
    states = np.zeros((60, 1, 10, 4), np.float32)
    states[:, :, 7:] = np.nan  # every sample of these stores has 7 tokens
    tokens = [str(index) for index in range(10)]
    store = make_store(
        tmp_path / "s.zarr", states, layers=[0], positions=tokens, columns=columns, run={"positions": ["all"]}
    )
    assert plan_probe(store, FAST).positions == tuple(tokens[:7])


def test_settings_that_make_no_sense_are_refused() -> None:
    for wrong in (
        {"folds": 1},
        {"penalties": (0.0,)},
        {"penalties": ()},
        {"preset": "papers"},
        {"confidence": 1.0},
        {"permutations": -1},
        {"permutations": 5},
        {"class_weight": "equal"},
    ):
        with pytest.raises(ValueError, match=r"must|each"):
            ProbeSettings(**wrong)


@pytest.mark.parametrize("scheduler", ["synchronous", "threads"])
def test_torch_has_its_threads_back_afterwards(store: Path, scheduler: str) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        run_probe(plan_probe(store, FAST), workers=2, scheduler=scheduler)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
