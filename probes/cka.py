"""Linear CKA: how alike two checkpoints lay out the same samples, layer by layer.

1 where one layer's states are the other's, turned, shifted and scaled as a whole; no labels take part. This
module knows nothing about probes or files.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mmextract.engine.store import Store
from mmextract.probes.blocks import read_rows
from mmextract.probes.groups import IntArray, encode_groups
from mmextract.probes.jackknife import make_blocks, make_interval, sum_pairs
from mmextract.probes.metrics import FloatArray
from mmextract.probes.separability import Geometry

MOST_SAMPLES = 2_000
"""More are drawn from: inner products take n² numbers."""
LEAST_SAMPLES = 5
"""The debiased variant divides by n − 3, with a block left out."""

_Inner = Callable[[FloatArray, FloatArray, IntArray], FloatArray]

METRICS = {
    "cka": "linear CKA with the other checkpoint, biased upwards where features are many",
    "cka_debiased": "linear CKA with the other checkpoint, debiased",
}


@dataclass(frozen=True, kw_only=True)
class Alignment:
    """CKA of one layer and position in two stores. Each metric comes with its 95 % interval by the jackknife."""

    layer: int
    position: str
    metric: str
    """A key of METRICS."""
    value: float
    """NaN where either layer's states are all the same."""
    low: float | None
    high: float | None
    n_samples: int
    """Samples that both stores have."""


def linear_cka(gram_x: FloatArray, gram_y: FloatArray, blocks: IntArray) -> FloatArray:
    """Return [1 + J]: linear CKA of inner products K = XXᵀ and L = YYᵀ [n, n], and with each block [n] left out.

    tr(KHLH) / √(tr(KHKH) tr(LHLH)) with H = I − 11ᵀ/n, = ‖YᵀX‖²_F / (‖XᵀX‖_F ‖YᵀY‖_F) of centred X, Y
    (Kornblith et al. 2019, arXiv 1905.00414). Biased upwards: independent states of D ≫ n features come out
    near 1.
    """
    return _cosine(_centred_inner, gram_x, gram_y, blocks)


def debiased_cka(gram_x: FloatArray, gram_y: FloatArray, blocks: IntArray) -> FloatArray:
    """Return [1 + J]: the same from the unbiased estimator of HSIC, which is 0 on average for independent states.

    With K, L of diagonal 0: HSIC₁ = [tr(KL) + 1ᵀK1·1ᵀL1/((n−1)(n−2)) − 2/(n−2)·1ᵀKL1] / (n(n−3)) (Song et al.
    2012, JMLR 13, equation 5), and CKA = HSIC₁(K,L)/√(HSIC₁(K,K) HSIC₁(L,L)) (Nguyen, Raghu & Kornblith 2021,
    arXiv 2010.15327, there for minibatches). It can be negative.
    """
    gram_x, gram_y = gram_x.copy(), gram_y.copy()
    np.fill_diagonal(gram_x, 0.0)
    np.fill_diagonal(gram_y, 0.0)
    return _cosine(_unbiased_inner, gram_x, gram_y, blocks)


def _cosine(inner: _Inner, gram_x: FloatArray, gram_y: FloatArray, blocks: IntArray) -> FloatArray:
    with np.errstate(divide="ignore", invalid="ignore"):
        own_k, own_l = inner(gram_x, gram_x, blocks), inner(gram_y, gram_y, blocks)
        return np.asarray(inner(gram_x, gram_y, blocks) / np.sqrt(own_k * own_l))


def _centred_inner(gram_x: FloatArray, gram_y: FloatArray, blocks: IntArray) -> FloatArray:
    n, (sum_k, sum_l), inner, cross, _ = sum_pairs(gram_x, gram_y, blocks)
    return np.asarray(inner - 2 / n * cross + sum_k * sum_l / n**2)


def _unbiased_inner(gram_x: FloatArray, gram_y: FloatArray, blocks: IntArray) -> FloatArray:
    n, (sum_k, sum_l), inner, cross, _ = sum_pairs(gram_x, gram_y, blocks)
    whole = inner + sum_k * sum_l / ((n - 1) * (n - 2)) - 2 / (n - 2) * cross
    return np.asarray(whole / (n * (n - 3)))


def cka_between(
    store_a: Store,
    store_b: Store,
    layers: Sequence[int],
    position: str,
    *,
    samples: Sequence[str] | None = None,
    group: str | None = None,
    seed: int = 0,
) -> list[Alignment]:
    """Return both METRICS of each layer at a position, over the samples that two stores share, matched by their ids.

    samples: take none but these. group: column of store_a whose values are left out together for the interval.
    At most MOST_SAMPLES are taken, drawn by `seed`; those whose states are not finite in either store are left
    out, layer by layer. Raises LookupError for a layer, position or column that is not there, ValueError for
    too few samples in common.
    """
    rows_a, rows_b = _match(store_a, store_b, samples, seed)
    if group is not None and group not in store_a.columns:
        raise LookupError(f"{store_a.url} has no column {group!r}: it has {', '.join(store_a.columns)}")
    groups = np.arange(len(rows_a)) if group is None else encode_groups(store_a.columns[group][rows_a])
    found = []
    for layer in layers:
        x = read_rows(store_a, layer, position, rows_a)
        y = read_rows(store_b, layer, position, rows_b)
        there = np.isfinite(x).all(1) & np.isfinite(y).all(1)
        if there.sum() < LEAST_SAMPLES:
            raise ValueError(
                f"layer {layer}, position {position}: {int(there.sum())} samples have finite states in both "
                f"{store_a.url} and {store_b.url}, and CKA needs {LEAST_SAMPLES}"
            )
        found += align(x[there], y[there], make_blocks(groups[there], seed), layer=layer, position=position)
    return found


def align(x: FloatArray, y: FloatArray, blocks: IntArray, *, layer: int, position: str) -> list[Alignment]:
    """Return both METRICS of states x [n, D] and y [n, E] of the same samples; blocks [n]: see `jackknife`."""
    gram_x, gram_y = Geometry(x).products, Geometry(y).products
    results = []
    for metric, values, least in (
        ("cka", linear_cka(gram_x, gram_y, blocks), 0.0),
        ("cka_debiased", debiased_cka(gram_x, gram_y, blocks), -1.0),
    ):
        low, high = make_interval(values[0], values[1:], (least, 1.0))
        results.append(
            Alignment(
                layer=layer,
                position=position,
                metric=metric,
                value=float(values[0]),
                low=low,
                high=high,
                n_samples=len(x),
            )
        )
    return results


def _match(
    store_a: Store, store_b: Store, samples: Sequence[str] | None, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the rows [n] of the same samples in either store, in the order of the first."""
    first, second = (_find_rows(store) for store in (store_a, store_b))
    wanted = first.keys() if samples is None else set(samples)
    common = [name for name in first if name in second and name in wanted]
    if len(common) < LEAST_SAMPLES:
        raise ValueError(
            f"{store_a.url} and {store_b.url} have {len(common)} samples in common, and CKA needs "
            f"{LEAST_SAMPLES}: dump both from the same data"
        )
    drawn = np.random.default_rng([seed, 6]).permutation(len(common))[:MOST_SAMPLES]
    names = [common[index] for index in np.sort(drawn)]
    return np.array([first[name] for name in names]), np.array([second[name] for name in names])


def _find_rows(store: Store) -> dict[str, int]:
    committed = store.committed
    return {str(name): row for row, name in enumerate(store.columns["sample"]) if committed[row]}
