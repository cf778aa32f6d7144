from __future__ import annotations

import numpy as np
import pytest
import torch

from mmextract.cli.probe import probe
from mmextract.probes.choice import DUAL_BELOW, SOLVER_NAMES, AutoSolver, choose, make_solver, one_thread
from mmextract.probes.solvers import Job


def make_job(n: int) -> Job:
    return Job(rows=np.arange(n), y=np.arange(n) % 2, penalties=(0.1,))


def test_auto_solves_each_job_with_what_suits_its_shape_and_says_so() -> None:
    assert choose(100, 1000, "cpu") == "dual" and choose(10_000, 100, "cpu") == "primal"
    x = np.random.default_rng(0).normal(size=(90, 10))
    jobs = [make_job(90), make_job(int(10 * DUAL_BELOW["cpu"]) - 4), make_job(60)]
    methods = [solution.method for (solution,) in AutoSolver("cpu").solve(x, jobs)]
    assert methods == ["primal cpu", "dual cpu", "primal cpu"]


@pytest.mark.parametrize("name", ["auto", "dual", "primal", "sklearn"])
def test_every_solver_is_found_by_its_name_and_agrees_with_the_others(name: str) -> None:
    x = np.random.default_rng(0).normal(size=(30, 12))
    ((solution,),) = make_solver(name).solve(x, [make_job(30)])
    ((want,),) = make_solver("primal").solve(x, [make_job(30)])
    assert name == "auto" or solution.method.startswith(name)
    np.testing.assert_allclose(solution.coefficients, want.coefficients, atol=1e-6)


def test_an_unknown_solver_is_refused_with_the_names_there_are() -> None:
    with pytest.raises(LookupError, match="auto, dual, primal, sklearn, cuml"):
        make_solver("liblinear")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuml_without_a_gpu_is_refused_and_says_what_to_do() -> None:
    with pytest.raises(ValueError, match=r"needs a GPU.*take auto"):
        make_solver("cuml")


def test_the_command_offers_every_solver() -> None:
    (option,) = (p for p in probe.params if p.name == "solver")
    assert tuple(option.type.choices) == SOLVER_NAMES  # type: ignore[attr-defined]


def test_threads_are_given_back() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(ValueError), one_thread():
            assert torch.get_num_threads() == 1
            raise ValueError
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
