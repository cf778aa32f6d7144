from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import log_softmax
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from mmextract.probes.solvers import Job, SklearnSolver, kkt_residual

SHAPES = [(60, 8), (30, 50), (40, 40)]


def problem(n: int, d: int, n_classes: int = 2) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(n + d)
    x = rng.normal(size=(n, d)) @ rng.normal(size=(d, d)) * rng.lognormal(size=d) + rng.normal(size=d)
    return x, np.arange(n) % n_classes


@pytest.mark.parametrize(("n", "d"), SHAPES)
@pytest.mark.parametrize("n_classes", [2, 3])
@pytest.mark.parametrize("method", ["newton-cholesky", "lbfgs"])
def test_solutions_are_optimal_and_equal_scikit_learn_on_scaled_features(
    n: int, d: int, n_classes: int, method: str
) -> None:
    x, y = problem(n, d, n_classes)
    rows = np.arange(0, n - 3)
    (solutions,) = SklearnSolver(method).solve(x, [Job(rows=rows, y=y[rows], penalties=(0.01, 1.0))])
    scaler = StandardScaler().fit(x[rows])
    for solution, penalty in zip(solutions, (0.01, 1.0), strict=True):
        model = LogisticRegression(C=penalty, solver="newton-cholesky", tol=1e-10, max_iter=1000)
        model.fit(scaler.transform(x[rows]), y[rows])
        want = model.decision_function(scaler.transform(x)).reshape(n, -1)
        assert solution.converged and solution.penalty == penalty
        np.testing.assert_allclose(solution.decide(x), want, atol=2e-4 if method == "lbfgs" else 1e-6)


def test_the_objective_is_the_documented_one() -> None:
    x, y = problem(40, 3, 3)

    def objective(parameters: np.ndarray) -> float:
        w, b = parameters[:9].reshape(3, 3), parameters[9:]
        return float((w**2).sum() / 2 - 0.5 * log_softmax(x @ w + b, axis=1)[np.arange(40), y].sum())

    best = minimize(objective, np.zeros(12), tol=1e-10).fun
    (solution,) = next(
        SklearnSolver().solve(x, [Job(rows=np.arange(40), y=y, penalties=(0.5,), scale=False)])
    )
    found = objective(np.r_[solution.coefficients.ravel(), solution.intercept])
    assert found == pytest.approx(best, rel=1e-6)


def test_the_residual_is_zero_at_the_optimum_and_nowhere_near_it_elsewhere() -> None:
    x, y = problem(60, 5)
    x = StandardScaler().fit_transform(x)
    (solution,) = next(
        SklearnSolver().solve(x, [Job(rows=np.arange(60), y=y, penalties=(1.0,), scale=False)])
    )
    assert kkt_residual(x, y, 1.0, solution.coefficients, solution.intercept) < 1e-9
    assert kkt_residual(x, y, 1.0, solution.coefficients + 0.01, solution.intercept) > 1e-4
    assert kkt_residual(x, y, 1.0, solution.coefficients, solution.intercept + 0.01) > 1e-4


def test_a_constant_feature_is_harmless() -> None:
    x, y = problem(40, 6)
    x[:, 2] = 7.0
    (solution,) = next(SklearnSolver().solve(x, [Job(rows=np.arange(40), y=y, penalties=(1.0,))]))
    assert solution.converged and np.isfinite(solution.coefficients).all()


def test_each_job_is_scaled_by_its_own_rows_only() -> None:
    x, y = problem(40, 6)
    job = Job(rows=np.arange(30), y=y[:30], penalties=(1.0,))
    (before,) = next(SklearnSolver().solve(x, [job]))
    x[30:] = 1e6
    (after,) = next(SklearnSolver().solve(x, [job]))
    assert (before.coefficients == after.coefficients).all()


def test_newton_is_taken_for_few_parameters_and_lbfgs_for_many() -> None:
    x, y = problem(40, 6)
    wide = np.random.default_rng(0).normal(size=(1010, 1005))
    jobs = [Job(rows=np.arange(40), y=y, penalties=(1e-3,))]
    assert next(SklearnSolver().solve(x, jobs))[0].method == "sklearn newton-cholesky"
    jobs = [Job(rows=np.arange(1010), y=np.arange(1010) % 2, penalties=(1e-4,))]
    assert next(SklearnSolver().solve(wide, jobs))[0].method == "sklearn lbfgs"
