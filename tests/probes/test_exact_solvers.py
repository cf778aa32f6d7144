"""Our own solvers find scikit-learn's optimum, on data of every shape that a layer may have."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from mmextract.probes import batches, cholesky, newton, primal
from mmextract.probes.batches import make_batches
from mmextract.probes.dual import DualSolver
from mmextract.probes.primal import PrimalSolver
from mmextract.probes.solvers import FloatArray, IntArray, Job, Solution, Solver, kkt_residual
from mmextract.probes.systems import Gram, Point

PENALTIES = (1e-3, 0.1, 10.0)
SOLVERS = [
    pytest.param(DualSolver(), id="dual"),
    pytest.param(DualSolver(few_labels=0), id="dual, many labels"),
    pytest.param(PrimalSolver(), id="primal"),
]
both = pytest.mark.parametrize("solver", SOLVERS)

Data = tuple[FloatArray, IntArray]


def mixed(n: int, d: int, n_classes: int = 2) -> Data:
    """Correlated features of different sizes, and classes that the features do not tell apart."""
    rng = np.random.default_rng(n + d)
    x = rng.normal(size=(n, d)) @ rng.normal(size=(d, d)) * rng.lognormal(size=d) + rng.normal(size=d)
    return x, rng.permutation(np.arange(n) % n_classes)


def separable() -> Data:
    x, y = mixed(60, 10)
    x[:, 0] += 1e3 * y
    return x, y


def collinear() -> Data:
    x, y = mixed(40, 6)
    return np.hstack([x, x[:, :3], x @ np.ones((6, 2))]), y


def constant() -> Data:
    x, y = mixed(50, 8)
    x[:, 2], x[:, 5] = 7.0, 0.1
    return x, y


def duplicated() -> Data:
    x, y = mixed(40, 60)
    x[20:30] = x[:10]
    return x, y


def far_off() -> Data:
    """Means a million times the spread."""
    x, y = mixed(60, 5)
    return x + 1e6 * x.std(0), y


def tiny() -> Data:
    return np.array([[0.0], [1.0], [3.0]]), np.array([0, 1, 1])


def imbalanced() -> Data:
    x, _ = mixed(80, 12)
    return x, (np.arange(80) >= 77).astype(np.int64)


def identical() -> Data:
    return np.ones((12, 3)), np.arange(12) % 3 % 2


SHAPES: dict[str, Callable[[], Data]] = {
    "tall": lambda: mixed(90, 7),
    "wide": lambda: mixed(30, 90),
    "square": lambda: mixed(40, 40),
    "three classes, tall": lambda: mixed(90, 7, 3),
    "three classes, wide": lambda: mixed(30, 60, 3),
    "five classes": lambda: mixed(60, 12, 5),
    "twelve classes": lambda: mixed(150, 20, 12),
    "separable": separable,
    "collinear": collinear,
    "constant features": constant,
    "duplicated samples": duplicated,
    "far from the origin": far_off,
    "three samples": tiny,
    "three of a class": imbalanced,
    "nothing to tell apart by": identical,
}


def everything(y: IntArray, penalties: tuple[float, ...] = PENALTIES) -> Job:
    return Job(rows=np.arange(len(y)), y=y, penalties=penalties)


def reference(x: FloatArray, job: Job, penalty: float) -> tuple[FloatArray, FloatArray]:
    """Return the decisions [m, outputs] and coefficients, in scaled features, of scikit-learn's exact solver."""
    z = StandardScaler(with_std=job.scale).fit_transform(x[job.rows])
    weight = dict(enumerate(job.class_weights)) or None
    model = LogisticRegression(
        C=penalty, solver="newton-cholesky", tol=1e-13, max_iter=1000, class_weight=weight
    ).fit(z, job.y)
    return model.decision_function(z).reshape(len(z), -1), model.coef_.T


def check(x: FloatArray, job: Job, solutions: list[Solution]) -> None:
    """Fail unless each solution is the optimum, by its gradient and beside scikit-learn."""
    z = StandardScaler(with_std=job.scale).fit(x[job.rows])
    scale = np.ones(x.shape[1]) if z.scale_ is None else z.scale_
    assert [s.penalty for s in solutions] == list(job.penalties)
    for solution in solutions:
        weights = solution.coefficients * scale[:, None]
        shifted = solution.intercept + z.mean_ @ solution.coefficients
        residual = kkt_residual(
            z.transform(x[job.rows]), job.y, solution.penalty, weights, shifted, job.sample_weights
        )
        assert residual <= 1e-8 and solution.residual <= 1e-8 and solution.converged
        decided, coefficients = reference(x, job, solution.penalty)
        np.testing.assert_allclose(solution.decide(x[job.rows]), decided, rtol=1e-6, atol=1e-6)
        distance = np.abs(weights - coefficients).max()
        assert distance <= 1e-6 * np.abs(coefficients).max() + 1e-12


@both
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning", "ignore::UserWarning")
@pytest.mark.parametrize("shape", SHAPES)
def test_the_optimum_is_found_and_is_scikit_learns(solver: Solver, shape: str) -> None:
    x, y = SHAPES[shape]()
    job = everything(y)
    (solutions,) = solver.solve(x, [job])
    check(x, job, solutions)


@both
@pytest.mark.parametrize("n_classes", [2, 3])
@pytest.mark.parametrize("scale", [True, False])
def test_classes_weigh_as_they_are_told_to(solver: Solver, n_classes: int, scale: bool) -> None:
    x, y = mixed(40, 50, n_classes)
    job = replace(everything(y), class_weights=(0.2, 3.0, 1.5)[:n_classes], scale=scale)
    (solutions,) = solver.solve(x, [job])
    check(x, job, solutions)
    (unweighted,) = solver.solve(x, [replace(job, class_weights=())])
    assert np.abs(unweighted[1].coefficients - solutions[1].coefficients).max() > 1e-4


@both
def test_each_of_many_jobs_gets_its_own_solution_in_its_own_place(solver: Solver) -> None:
    """Folds of different size, several labels on the same rows, two and three classes, scaled and not, at once."""
    x, y = mixed(50, 20)
    rng = np.random.default_rng(0)
    rows = [np.flatnonzero(np.arange(50) % 3 != fold) for fold in range(3)] + [np.arange(9, 50)]
    jobs = [
        Job(rows=r, y=labels[r], penalties=penalties, scale=scale)
        for r in rows
        for labels in (y, rng.permutation(y), rng.permutation(np.arange(50) % 3))  # no fold lacks a class
        for scale, penalties in ((True, PENALTIES), (False, (0.01,)), (True, (0.5, 2.0, 7.0)))
    ]
    for job, solutions in zip(jobs, solver.solve(x, jobs), strict=True):
        (alone,) = solver.solve(x, [job])
        for found, want in zip(solutions, alone, strict=True):
            assert found.penalty == want.penalty
            np.testing.assert_allclose(found.decide(x), want.decide(x), atol=1e-6, rtol=1e-6)
    check(x, jobs[-1], solutions)


@both
def test_a_start_from_another_penalty_ends_where_a_cold_start_does(solver: Solver) -> None:
    x, y = mixed(40, 60)
    (warm,) = solver.solve(x, [everything(y, (1e-4, 1e-2, 1.0, 100.0))])
    for solution in warm:
        ((cold,),) = solver.solve(x, [everything(y, (solution.penalty,))])
        np.testing.assert_allclose(
            solution.coefficients, cold.coefficients, atol=1e-6 * np.abs(cold.coefficients).max()
        )
    assert warm[1].n_iter < 20


@both
def test_the_same_jobs_give_the_same_bits(solver: Solver) -> None:
    x, y = mixed(60, 40)
    jobs = [everything(y), replace(everything(y[:50]), rows=np.arange(50))]
    for some, others in zip(solver.solve(x, jobs), solver.solve(x.copy(), jobs), strict=True):
        for found, again in zip(some, others, strict=True):
            np.testing.assert_array_equal(found.coefficients, again.coefficients)
            np.testing.assert_array_equal(found.intercept, again.intercept)


@both
def test_samples_outside_a_training_set_change_nothing(solver: Solver) -> None:
    x, y = mixed(60, 30)
    job = replace(everything(y[:45]), rows=np.arange(45))
    (before,) = solver.solve(x, [job])
    x[45:] = 1e6
    (after,) = solver.solve(x, [job])
    np.testing.assert_array_equal(before[0].coefficients, after[0].coefficients)


@both
@pytest.mark.parametrize("n_classes", [2, 3])
def test_where_conjugate_gradients_are_slow_the_hessian_is_factorised(
    solver: Solver, n_classes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, y = mixed(60, 30, n_classes)
    job = everything(y)
    monkeypatch.setattr(newton, "PATIENCE", 0)
    (solutions,) = solver.solve(x, [job])
    check(x, job, solutions)
    monkeypatch.setattr(newton, "LARGEST_HESSIAN", 0)
    (solutions,) = solver.solve(x, [job])
    check(x, job, solutions)


@pytest.mark.parametrize("solver", SOLVERS[1:])
def test_many_classes_take_few_products_and_no_factorisation(
    solver: Solver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """33 products were measured, and 119 with a preconditioner that takes each class for itself."""
    n, d, n_classes = 200, 48, 10
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(n, d)) / np.arange(1, d + 1)) @ rng.normal(size=(d, d))
    job = everything(rng.permutation(np.arange(n) % n_classes), (1.0,))
    products, apply = [], newton._Newton.apply

    def count(self: newton._Newton, v: torch.Tensor) -> torch.Tensor:
        products.append(v.shape)
        return apply(self, v)

    monkeypatch.setattr(newton._Newton, "apply", count)
    monkeypatch.setattr(newton._Newton, "_solve", lambda *_: pytest.fail("a Hessian was factorised"))
    (solutions,) = solver.solve(x, [job])
    assert 10 < len(products) < 60
    check(x, job, solutions)


@both
def test_a_problem_that_is_given_up_says_so(solver: Solver, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = mixed(40, 60)
    monkeypatch.setattr(newton, "MOST_STEPS", 1)
    monkeypatch.setattr(cholesky, "MOST_STEPS", 1)
    ((solution,),) = solver.solve(x, [everything(y, (10.0,))])
    assert solution.n_iter == 1 and not solution.converged


def test_a_matrix_that_single_precision_cannot_factorise_is_factorised_in_double() -> None:
    x, _ = duplicated()
    gram = Gram(x @ x.T)
    single, double = (gram.factorise(np.full(40, root)) for root in (1e-6, 1e2))
    assert single.matrix.dtype == np.float32 and double.matrix.dtype == np.float64
    right = np.arange(40.0)
    solved = double.solve(right)
    np.testing.assert_allclose(1e4 * (x @ (x.T @ solved)) + solved, right, atol=1e-3)


@pytest.mark.parametrize("patience", [0, 1000])
def test_old_factors_and_new_ones_lead_to_the_same_optimum(
    patience: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, y = mixed(40, 60)
    job = everything(y)
    monkeypatch.setattr(cholesky, "PATIENCE", patience)
    (solutions,) = DualSolver().solve(x, [job])
    check(x, job, solutions)


@pytest.mark.parametrize(
    "penalties", [(10.0, 1e-3, 0.1), (1.0, 1.0, 1.0), (1e-6, 1e6), (1e3, 0.9e3)], ids=str
)
@pytest.mark.parametrize("shape", ["wide", "separable", "duplicated samples", "three samples"])
def test_penalties_come_in_any_order(shape: str, penalties: tuple[float, ...]) -> None:
    x, y = SHAPES[shape]()
    job = everything(y, penalties)
    (solutions,) = DualSolver().solve(x, [job])
    assert [solution.penalty for solution in solutions] == list(penalties)
    for solution in solutions:
        ((alone,),) = DualSolver().solve(x, [everything(y, (solution.penalty,))])
        assert solution.converged
        np.testing.assert_allclose(solution.decide(x), alone.decide(x), rtol=1e-5, atol=1e-6)


def test_an_optimum_is_followed_to_the_next_penalty() -> None:
    x, y = mixed(200, 400)
    z = x - x.mean(0)
    gram = Gram(z @ z.T)

    def optimum(penalty: float, start: cholesky.DualOptimum | None = None) -> cholesky.DualOptimum:
        problem = cholesky.Problem(y=y.astype(np.float64), weights=np.ones(len(y)), penalty=penalty)
        return cholesky.minimise(gram, problem, start)

    def size(penalty: float) -> float:  # for which the features count as much as in every other test
        return penalty / float(np.square(z).sum(1).mean())

    first = optimum(size(10.0))

    def guess(penalty: float, start: cholesky.DualOptimum) -> tuple[list[Point], list[float]]:
        problem = cholesky.Problem(y=y.astype(np.float64), weights=np.ones(len(y)), penalty=penalty)
        attempt = cholesky._Search(gram, problem, start)
        guesses = attempt._guess(start)
        for point in guesses:
            np.testing.assert_allclose(point.image, gram.matrix @ point.a, atol=1e-9)
            assert abs(point.a.sum()) < 1e-9 * np.abs(point.a).sum()
        return guesses, [attempt._objective(point) for point in guesses]

    first = optimum(size(10.0))
    near = optimum(size(10.0 * 1.0001), first)
    assert near.chord is not None
    guesses, _ = guess(near.penalty, first)
    tangent = first.at.moved(guesses[1], -1)
    slope = near.chord.slope
    np.testing.assert_allclose(-tangent.a / near.chord.way, slope.a, atol=0.02 * np.abs(slope.a).max())
    assert -tangent.b / near.chord.way == pytest.approx(slope.b, rel=0.02)
    # steps that are shorter and longer than the last one, and back
    for penalty in (60.0, 90.0, 200.0, 20.0, 15.0):
        second = optimum(size(30.0), first)  # anew, as its factor is used
        guesses, objectives = guess(size(penalty), second)
        assert len(guesses) == 4 and objectives[0] > objectives[1] > min(objectives[2:])
        followed, cold = optimum(size(penalty), second), optimum(size(penalty))
        np.testing.assert_allclose(followed.at.a, cold.at.a, atol=1e-9 * size(penalty))
        assert followed.n_steps < cold.n_steps


@both
def test_more_penalties_than_are_measured_together_give_the_same(
    solver: Solver, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, y = mixed(40, 60)
    rng = np.random.default_rng(0)
    jobs = [everything(rng.permutation(y), tuple(10.0 ** np.arange(-4.0, 3))) for _ in range(3)]
    together = list(solver.solve(x, jobs))  # 3 × 7 logits
    monkeypatch.setattr(batches, "MEASURED_COLUMNS", 1)
    for job, some, others in zip(jobs, together, solver.solve(x, jobs), strict=True):
        check(x, job, some)
        for one, other in zip(some, others, strict=True):
            np.testing.assert_allclose(one.coefficients, other.coefficients, rtol=1e-6, atol=1e-12)


@both
def test_each_penalty_has_its_own_residual(solver: Solver, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = mixed(40, 60)
    monkeypatch.setattr(newton, "MOST_STEPS", 1)  # so that there is one to speak of
    monkeypatch.setattr(cholesky, "MOST_STEPS", 1)
    scaler = StandardScaler().fit(x)
    (solutions,) = solver.solve(x, [everything(y, (1e-3, 0.1, 10.0, 100.0))])
    for solution in solutions:
        weights = solution.coefficients * scaler.scale_[:, None]
        shifted = solution.intercept + scaler.mean_ @ solution.coefficients
        residual = kkt_residual(scaler.transform(x), y, solution.penalty, weights, shifted)
        assert residual > 1e-6 and solution.residual == pytest.approx(residual, rel=1e-6)


def test_labels_share_their_rows_and_batches_stay_within_their_size() -> None:
    y = np.arange(12) % 2
    jobs = [
        Job(rows=np.arange(m), y=labels[:m], penalties=(1.0,)) for m in (8, 12, 10) for labels in (y, 1 - y)
    ]
    made = list(make_batches(jobs, lambda row_set: len(row_set.rows), 20))
    assert [[len(row_set.rows) for row_set in batch] for batch in made] == [[8, 10], [12]]
    assert [row_set.jobs for batch in made for row_set in batch] == [(0, 1), (4, 5), (2, 3)]


@both
def test_no_jobs_are_no_work(solver: Solver) -> None:
    assert list(solver.solve(np.zeros((4, 2)), [])) == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("kind", [DualSolver, PrimalSolver])
def test_a_gpu_finds_the_same_optimum(kind: type[DualSolver] | type[PrimalSolver]) -> None:
    x, y = mixed(80, 60, 3)
    job = everything(y)
    (solutions,) = kind("cuda").solve(x, [job])
    check(x, job, solutions)
    assert "cuda" in solutions[0].method


@pytest.mark.parametrize("n_features", [1, 40, 128, 300, 1100])
@pytest.mark.parametrize("n_rows", [0, 1, 70])
def test_second_moments_are_added_up_in_place(n_rows: int, n_features: int) -> None:
    rng = np.random.default_rng(0)
    sums = torch.zeros(2, n_features, n_features, dtype=torch.float64)
    x = rng.normal(size=(2, n_rows, n_features))
    for some in x:
        primal._add_square(sums[1], torch.from_numpy(some))
    wanted = np.triu(x[0].T @ x[0] + x[1].T @ x[1])
    np.testing.assert_allclose(np.triu(sums[1].numpy()), wanted, atol=1e-11)
    assert not sums[0].any()
