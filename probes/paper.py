"""The published protocol (arXiv 2503.01208, released code): one split, nothing held out, accuracy only.

LogisticRegression(max_iter=5000) with scikit-learn's defaults, no scaling, `train_test_split(test_size=.2,
random_state=42, stratify=y)`, at most 500 samples a class, accuracy rounded to four digits. Samples come in
the order of the store. States are taken as float64, which is what the released code's text files give; lbfgs
stops elsewhere on float32, and now and then one test sample changes sides.

What it cannot tell is in `groups.find_leaks`' warnings. This module knows nothing about stores or files.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split

from mmextract.probes.design import Design
from mmextract.probes.evaluation import TaskScores
from mmextract.probes.metrics import FloatArray
from mmextract.probes.solvers import kkt_residual
from mmextract.probes.tasks import Task

LARGEST_CLASS = 500
TEST_SHARE = 0.2
SPLIT_SEED = 42
MAX_ITER = 5000
DIGITS = 4


def make_paper_task(design: Design) -> Task:
    """Return the label with the one split of the protocol: fold 0 is the test set, −1 the training set.

    Raises ValueError if the samples do not suffice to have every class in both.
    """
    smallest = int(np.bincount(design.y).min())
    n_test = int(np.ceil(TEST_SHARE * design.n_samples))
    if smallest < 2 or n_test < len(design.classes):
        raise ValueError(
            f"one stratified split needs at least 2 samples of each class and {len(design.classes)} to test "
            f"on; {design.label!r} has a class of {smallest}, and {n_test} samples would be tested"
        )
    _, test = train_test_split(
        np.arange(design.n_samples), test_size=TEST_SHARE, random_state=SPLIT_SEED, stratify=design.y
    )
    folds = np.full((1, design.n_samples), -1, np.int16)
    folds[0, test] = 0
    return Task(
        name="label", y=design.y, folds=folds, inner_folds=np.empty((1, 0, design.n_samples), np.int16)
    )


def evaluate_paper(x: FloatArray, task: Task) -> list[TaskScores]:
    """Fit on the training set of `make_paper_task` and return its accuracy, with that of the majority class.

    x: float64 [n, D]. A fit counts as unconverged where it used up its iterations, as the protocol would see
    it.
    """
    train, test = task.folds[0] < 0, task.folds[0] == 0
    model = LogisticRegression(max_iter=MAX_ITER)
    model.fit(x[train], task.y[train])
    decided = model.decision_function(x[test]).reshape(int(test.sum()), -1)
    decisions = np.full((1, len(x), decided.shape[1]), np.nan)
    decisions[0, test] = decided
    y_train, y_test = task.y[train], task.y[test]
    return [
        TaskScores(
            task=task.name,
            y=task.y,
            values=_accuracy(model.predict(x[test]) == y_test),
            decisions=decisions,
            folds=task.folds,
            penalties=(1.0,),
            solver="sklearn lbfgs",
            n_fits=1,
            n_unconverged=int(model.n_iter_.max() >= MAX_ITER),
            worst_residual=kkt_residual(x[train], y_train, 1.0, model.coef_.T, model.intercept_),
        ),
        TaskScores(task="majority", y=task.y, values=_accuracy(y_test == np.bincount(y_train).argmax())),
    ]


def _accuracy(right: NDArray[np.bool_]) -> dict[str, float]:
    return {"accuracy": round(float(np.mean(right)), DIGITS)}
