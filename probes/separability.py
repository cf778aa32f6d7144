"""How states lie, without a probe: how far classes stand apart, and in how many dimensions all of it lies.

Everything is computed from the samples' inner products [n, n], so that shuffled labels and left-out groups cost a
product with a matrix of ones and zeros each, and never another pass over the features. This module knows nothing
about stores, probes or files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mmextract.probes.design import Design
from mmextract.probes.groups import IntArray
from mmextract.probes.jackknife import make_blocks, make_interval, sum_pairs
from mmextract.probes.metrics import FloatArray
from mmextract.probes.tasks import shuffle_labels

LEFT_OUT = -1
"""As a class: the sample does not take part."""
LABELLINGS_AT_ONCE = 64
"""Memory: [n, 64, classes] numbers of 8 bytes."""

Statistic = Callable[["Geometry", IntArray], FloatArray]


@dataclass(frozen=True, kw_only=True)
class Measure:
    """A statistic of one layer and position."""

    metric: str
    """A key of METRICS."""
    value: float
    """NaN where it is not defined, such as for states that are all the same."""
    low: float | None
    """Lower end of the interval by the jackknife over groups (see `jackknife`), None where there is none."""
    high: float | None
    """Its upper end."""
    null_mean: float | None = None
    """Mean over shuffled labels; None for what has no labels, and for a mixed design."""
    null_low: float | None = None
    """Their 2.5 % quantile."""
    null_high: float | None = None
    """Their 97.5 % quantile."""
    p: float | None = None
    """Share of the shuffles, the label included, that separate at least as well; not corrected for layers."""
    n_shuffles: int = 0
    """Shuffles behind it."""


class Geometry:
    """Inner products and distances of states x [n, D]; float64 throughout."""

    def __init__(self, x: FloatArray) -> None:
        mean = x.mean(0)
        centred = x - mean
        self.n = len(x)
        self.products: FloatArray = centred @ centred.T
        """[n, n] of the states less their mean."""
        self.along_mean: FloatArray = centred @ mean
        """[n] of those and the mean."""
        self.mean_square = float(mean @ mean)

    def distances(self) -> FloatArray:
        """Return [n, n], Euclidean."""
        square = np.diag(self.products)
        squares = square[:, None] + square - 2 * self.products
        np.fill_diagonal(squares, 0.0)
        return np.sqrt(np.maximum(squares, 0.0))


def fisher_ratio(geometry: Geometry, labels: IntArray) -> FloatArray:
    """Return [M]: scatter between classes over scatter within, tr S_b / tr S_w, of labellings [M, n].

    S_b = Σ_k n_k (m_k − m)(m_k − m)ᵀ and S_w = Σ_k Σ_{i in k} (x_i − m_k)(x_i − m_k)ᵀ: the criterion J₄ of Fukunaga
    1990, Introduction to Statistical Pattern Recognition, section 10.2. It does not change when states are turned
    or scaled as a whole. Labels that say nothing give about (K − 1)/(n − K) for K classes, not 0.
    """
    within, total = [], []
    for chosen in _one_hot(labels):  # [n, m, K]
        sums = np.einsum("nmk,nmk->mk", _product(geometry.products, chosen), chosen)
        counts = chosen.sum(0)
        squares = np.einsum("n,nmk->m", np.diag(geometry.products), chosen)
        taken = chosen.sum(2)  # [n, m]
        whole = np.einsum("nm,nm->m", geometry.products @ taken, taken) / taken.sum(0)
        with np.errstate(divide="ignore", invalid="ignore"):
            within.append(squares - (sums / counts).sum(1))
        total.append(squares - whole)
    inside, everything = np.concatenate(within), np.concatenate(total)
    # what rounding leaves of states that are all the same, or of classes that are points, is no scatter
    inside = np.where(inside > 1e-12 * np.abs(np.diag(geometry.products)).sum(), inside, 0.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray((everything - inside) / inside)


def silhouette(geometry: Geometry, labels: IntArray) -> FloatArray:
    """Return [M]: the mean over samples of (b − a)/max(a, b), of labellings [M, n].

    a: mean Euclidean distance to the others of the class; b: to the nearest of the other classes; 0 for a class of one
    sample (Rousseeuw 1987). Equals sklearn.metrics.silhouette_score, which takes one labelling at a time.
    """
    distances = geometry.distances()
    return np.concatenate([_silhouettes(distances, chosen) for chosen in _one_hot(labels)])


def _silhouettes(distances: FloatArray, chosen: FloatArray) -> FloatArray:
    counts = chosen.sum(0)  # [m, K]
    sums = _product(distances, chosen)  # [n, m, K]
    with np.errstate(divide="ignore", invalid="ignore"):
        own = (sums * chosen).sum(2) / ((counts * chosen).sum(2) - 1)
        other = np.where(chosen > 0, np.inf, sums / counts).min(2)
        width = (other - own) / np.maximum(own, other)
    alone = (counts * chosen).sum(2) == 1
    taken = chosen.sum(2)
    width = np.where((taken > 0) & ~alone, np.nan_to_num(width, nan=0.0), 0.0)
    return np.asarray(width.sum(0) / taken.sum(0))


def class_mean_cosine(geometry: Geometry, labels: IntArray) -> FloatArray:
    """Return [M]: the cosine of the angle between class means, mean over pairs of classes, of labellings [M, n].

    cos(m_k, m_l) = m_k·m_l / (|m_k| |m_l|), of means that are *not* centred: of two centred means of equally large
    classes it would be −1 whatever they are. 1 where the classes have the same mean direction.
    """
    results = []
    for chosen in _one_hot(labels):
        shares = chosen / chosen.sum(0)
        inner = np.einsum("nmk,nml->mkl", _product(geometry.products, shares), shares)
        along = np.einsum("n,nmk->mk", geometry.along_mean, shares)
        inner += along[:, :, None] + along[:, None, :] + geometry.mean_square
        norms = np.sqrt(np.einsum("mkk->mk", inner))
        with np.errstate(divide="ignore", invalid="ignore"):
            cosines = inner / (norms[:, :, None] * norms[:, None, :])
        first, second = np.triu_indices(chosen.shape[2], 1)
        results.append(cosines[:, first, second].mean(1))
    return np.concatenate(results)


def effective_dimension(geometry: Geometry, blocks: IntArray) -> FloatArray:
    """Return [1 + J]: the participation ratio of all samples, and with each of J blocks of samples [n] left out.

    (Σλ)²/Σλ² over the eigenvalues λ of the covariance, = (tr C)²/tr C² (Gao et al. 2017, bioRxiv 214262,
    doi:10.1101/214262): D for white noise, 1 for states on a line. n samples cannot show more than n − 1, so
    that it comes out too low where it is not far below n.
    """
    n, sum_all, square_all, cross, traces = sum_pairs(geometry.products, geometry.products, blocks)
    with np.errstate(divide="ignore", invalid="ignore"):
        trace = traces - sum_all[0] / n
        square = square_all - 2 / n * cross + sum_all[0] ** 2 / n**2
        return np.asarray(trace**2 / square)


METRICS: Mapping[str, str] = {
    "fisher_ratio": "Fisher ratio: scatter between classes over scatter within",
    "silhouette": "silhouette: nearer to the own class (1) or to another (−1)",
    "class_mean_cosine": "cosine between the classes’ means",
    "effective_dimension": "effective dimension: participation ratio of the covariance",
}
"""What is measured of each layer and position, in words."""

_LABELLED: Mapping[str, tuple[Statistic, int, tuple[float, float]]] = {
    "fisher_ratio": (fisher_ratio, 1, (0.0, np.inf)),
    "silhouette": (silhouette, 1, (-1.0, 1.0)),
    "class_mean_cosine": (class_mean_cosine, -1, (-1.0, 1.0)),
}
"""Function, sign of separating well, and bounds."""


@dataclass(frozen=True)
class Labellings:
    """The label, the label with each block of groups left out, and its shuffles: the same for all layers."""

    labels: IntArray
    """[1 + J + B, n]; LEFT_OUT where a sample does not take part."""
    blocks: IntArray
    """[n] block of groups that is left out at once, of J."""

    @property
    def n_blocks(self) -> int:
        """J."""
        return int(self.blocks.max()) + 1


def make_labellings(design: Design, *, n_shuffles: int, seed: int) -> Labellings:
    """Shuffle the labels of a design as `tasks.SHUFFLES` says; a mixed design gets no shuffles (see `permutation`)."""
    rng = np.random.default_rng([seed, 5])
    blocks = make_blocks(design.groups, seed)
    kept = [np.where(blocks == block, LEFT_OUT, design.y) for block in range(int(blocks.max()) + 1)]
    n = 0 if design.structure == "mixed" else n_shuffles
    shuffled = [shuffle_labels(design.y, design.groups, design.structure, rng) for _ in range(n)]
    return Labellings(np.stack([design.y, *kept, *shuffled]).astype(np.int64), blocks)


def measure(x: FloatArray, labellings: Labellings) -> list[Measure]:
    """Return all METRICS of states x [n, D]."""
    geometry, j = Geometry(x), labellings.n_blocks
    measures = []
    for metric, (statistic, sign, bounds) in _LABELLED.items():
        values = statistic(geometry, labellings.labels)
        low, high = make_interval(values[0], values[1 : 1 + j], bounds)
        null = values[1 + j :]
        reference = _hold_against(values[0], null, sign) if len(null) and np.isfinite(null).all() else {}
        measures.append(
            Measure(
                metric=metric, value=float(values[0]), low=low, high=high, n_shuffles=len(null), **reference
            )
        )
    values = effective_dimension(geometry, labellings.blocks)
    low, high = make_interval(values[0], values[1:], (1.0, np.inf))
    return [*measures, Measure(metric="effective_dimension", value=float(values[0]), low=low, high=high)]


def _hold_against(value: float, null: FloatArray, sign: int) -> dict[str, float]:
    low, high = np.quantile(null, [0.025, 0.975]).tolist()
    # equal values come out of sums in different orders: the last bits must not decide
    slack = 1e-12 * max(1.0, abs(float(value)))
    as_extreme = int((sign * null >= sign * value - slack).sum())
    p = (1 + as_extreme) / (1 + len(null))
    return {"null_mean": float(null.mean()), "null_low": low, "null_high": high, "p": p}


def _one_hot(labels: IntArray) -> Iterator[FloatArray]:
    """Yield [n, m, K] for a few labellings at a time: 1 where a sample is of a class, all 0 where it is left out."""
    classes = np.arange(int(labels.max()) + 1)
    for start in range(0, len(labels), LABELLINGS_AT_ONCE):
        some = labels[start : start + LABELLINGS_AT_ONCE].T
        yield (some[:, :, None] == classes).astype(np.float64)


def _product(matrix: FloatArray, chosen: FloatArray) -> NDArray[np.float64]:
    """Return matrix [n, n] @ chosen [n, m, K] as [n, m, K]."""
    return np.asarray((matrix @ chosen.reshape(len(chosen), -1)).reshape(chosen.shape))
