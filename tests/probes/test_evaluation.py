from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import pytest

from mmextract.probes.choice import AutoSolver
from mmextract.probes.design import Design, make_design
from mmextract.probes.evaluation import TaskScores, evaluate, evaluate_baselines
from mmextract.probes.metrics import FloatArray
from mmextract.probes.settings import ProbeSettings
from mmextract.probes.solvers import Job, Solution
from mmextract.probes.states import ArrayStates
from mmextract.probes.tasks import make_tasks
from tests.probes.stores import paired_columns, paired_states

QUICK = ProbeSettings(penalties=(0.01, 1.0))


def paired(
    *, n_images: int = 60, signal: float = 0.0, seed: int = 0, group: str | None = None
) -> tuple[FloatArray, Design]:
    columns = {
        name: np.array(v, object) for name, v in paired_columns(n_images, n_images // 2, seed=seed).items()
    }
    columns |= {"pair": columns["pair"].astype(np.int64), "rejected": np.full(2 * n_images, "", object)}
    design = make_design(columns, np.ones(2 * n_images, bool), label="identity_set", group=group)
    states = paired_states(paired_columns(n_images, n_images // 2, seed=seed), 12, signal=signal, seed=seed)
    return states.astype(np.float64), design


def score(x: FloatArray, design: Design, settings: ProbeSettings = QUICK) -> dict[str, TaskScores]:
    tasks = make_tasks(design, settings)
    states = ArrayStates(x, AutoSolver("cpu"))
    results = evaluate(states, design.groups, tasks, settings)
    results += evaluate_baselines(states, design.groups, tasks[0], settings.seed)
    return {result.task: result for result in results}


def auroc(scores: TaskScores) -> float:
    return scores.values["auroc"]


def test_a_signal_is_found_and_its_control_is_not() -> None:
    scores = score(*paired(signal=1.0))
    assert auroc(scores["label"]) > 0.8
    assert abs(auroc(scores["control"]) - 0.5) < 0.15
    assert auroc(scores["majority"]) == 0.5 and scores["majority"].values["accuracy"] == 0.5


def test_splitting_pairs_puts_noise_far_below_chance_and_grouping_does_not() -> None:
    seeds = range(3)
    grouped = np.mean([auroc(score(*paired(seed=seed))["label"]) for seed in seeds])
    ungrouped = np.mean([auroc(score(*paired(seed=seed, group="none"))["label"]) for seed in seeds])
    assert ungrouped < 0.42
    assert 0.44 < grouped < 0.56


def test_every_sample_is_scored_once_a_repeat_by_a_probe_that_has_not_seen_it() -> None:
    x, design = paired(signal=0.5)
    tasks = make_tasks(design, QUICK)
    label = score(x, design)["label"]
    assert label.decisions is not None and label.decisions.shape == (2, 120, 1)
    assert np.isfinite(label.decisions).all()
    changed = x.copy()
    moved = tasks[0].folds[0] == 0
    changed[moved] = 1e3
    again = score(changed, design)["label"]
    assert again.decisions is not None
    # the probe of fold 0 in repeat 0 never saw these samples: what it says of the old ones is what it said before
    slope = (again.decisions - label.decisions)[0, moved]
    assert (slope != 0).all()
    part = ArrayStates(np.where(moved[:, None], x, changed), AutoSolver("cpu"))
    train_only = evaluate(part, design.groups, tasks, QUICK)[0]
    assert train_only.decisions is not None
    np.testing.assert_array_equal(train_only.decisions[0, moved], label.decisions[0, moved])


def test_c_is_chosen_inside_the_training_folds() -> None:
    noise = score(*paired(signal=0.0))["label"]
    signal = score(*paired(signal=2.0))["label"]
    assert len(noise.penalties) == 10
    assert np.mean(noise.penalties) < np.mean(signal.penalties)


def test_a_single_c_is_not_searched_for() -> None:
    label = score(*paired(), replace(QUICK, penalties=(0.1,)))["label"]
    assert label.n_fits == 10 and set(label.penalties) == {0.1}


def test_majority_scores_are_those_of_the_training_frequencies() -> None:
    y = np.repeat((np.arange(40) % 4 == 0).astype(np.int64), 2)
    design = Design(
        label="x", classes=("a", "b"), group="g", rows=np.arange(80), y=y, groups=np.repeat(np.arange(40), 2)
    )
    majority = score(np.random.default_rng(0).normal(size=(80, 4)), design)["majority"].values
    assert majority["accuracy"] == 0.75 and majority["balanced_accuracy"] == 0.5
    assert majority["log_loss"] == pytest.approx(-(0.75 * np.log(0.75) + 0.25 * np.log(0.25)))


def test_more_than_two_classes_are_told_apart() -> None:
    y = np.tile(np.arange(3), 40)
    design = Design(
        label="x", classes=("a", "b", "c"), group=None, rows=np.arange(120), y=y, groups=np.arange(120)
    )
    x = np.random.default_rng(0).normal(size=(120, 5))
    x[np.arange(120), y] += 3
    scores = score(x, design)
    assert scores["label"].decisions is not None and scores["label"].decisions.shape == (2, 120, 3)
    assert auroc(scores["label"]) > 0.95 and abs(auroc(scores["control"]) - 0.5) < 0.15
    assert scores["majority"].values["accuracy"] == pytest.approx(1 / 3)


class Unfinished:
    """A solver that says that it did not get there."""

    def solve(self, x: FloatArray, jobs: Sequence[Job]) -> Iterator[list[Solution]]:
        for solutions in AutoSolver("cpu").solve(x, jobs):
            yield [replace(solution, residual=0.5) for solution in solutions]


def test_probes_that_did_not_converge_are_counted() -> None:
    x, design = paired()
    label = evaluate(ArrayStates(x, Unfinished()), design.groups, make_tasks(design, QUICK), QUICK)[0]
    assert label.n_unconverged == label.n_fits == 10 * (3 * 2 + 1)
    assert label.worst_residual == 0.5
    assert score(x, design)["label"].n_unconverged == 0


def test_random_directions_know_a_strong_signal_a_little_and_noise_not_at_all() -> None:
    assert abs(auroc(score(*paired())["random"]) - 0.5) < 0.06
    scores = score(*paired(signal=2.0))
    assert 0.55 < auroc(scores["random"]) < auroc(scores["label"])


def test_balanced_weights_find_a_rare_class_that_equal_weights_pass_over() -> None:
    y = (np.arange(200) % 10 == 0).astype(np.int64)
    design = Design(
        label="x", classes=("a", "b"), group=None, rows=np.arange(200), y=y, groups=np.arange(200)
    )
    x = np.random.default_rng(0).normal(size=(200, 3))
    x[:, 0] += y
    plain, balanced = (
        score(x, design, replace(QUICK, class_weight=how))["label"].values["balanced_accuracy"]
        for how in ("none", "balanced")
    )
    assert plain < 0.6 and balanced > plain + 0.08
