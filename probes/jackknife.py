"""The jackknife over groups: how far a statistic of pairs of samples moves when some groups are left out.

The delete-a-group jackknife (Kott 2001, Journal of Official Statistics 17; Efron & Tibshirani 1993, chapter 11):
groups are dealt into J blocks, the statistic is computed without each, and its standard error is
√((J−1)/J Σ_j (θ_j − θ̄)²). Unlike the bootstrap it never holds a sample against its own copy, which would pull
every statistic of pairs. This module knows nothing about what the statistics mean.
"""

from __future__ import annotations

import numpy as np
from scipy.stats import t as student

from mmextract.probes.groups import IntArray
from mmextract.probes.metrics import FloatArray

BLOCKS = 20
CONFIDENCE = 0.95


def make_blocks(groups: IntArray, seed: int) -> IntArray:
    """Return int64 [n], the block of each sample: groups [n] are dealt out at random, evenly, none is torn."""
    names, number = np.unique(groups, return_inverse=True)
    dealt = np.arange(len(names)) % min(BLOCKS, len(names))
    return np.asarray(np.random.default_rng([seed, 4]).permutation(dealt)[number], np.int64)


def make_interval(
    value: float, left_out: FloatArray, bounds: tuple[float, float]
) -> tuple[float | None, float | None]:
    """Return value ± t·error within bounds, from the values with each block left out [J]; None where undefined."""
    j = len(left_out)
    if j < 3 or not np.isfinite([value, *left_out]).all():
        return None, None
    error = np.sqrt((j - 1) / j * ((left_out - left_out.mean()) ** 2).sum())
    reach = float(student.ppf(0.5 + CONFIDENCE / 2, j - 1) * error)
    return max(float(value) - reach, bounds[0]), min(float(value) + reach, bounds[1])


def sum_pairs(
    gram_x: FloatArray, gram_y: FloatArray, blocks: IntArray
) -> tuple[FloatArray, FloatArray, FloatArray, FloatArray, FloatArray]:
    """Return sums over pairs of samples of symmetric K, L [n, n]: of all, and with each block [n] left out.

    Over the n_S samples that are left, each [1 + J]: n_S; (Σ_ij K_ij, Σ_ij L_ij); Σ_ij K_ij L_ij;
    Σ_i (Σ_j K_ij)(Σ_j L_ij); Σ_i K_ii. The centred inner product tr(HKHL) and its unbiased kin are made of them.
    """
    left = leave_out(blocks)  # [n, J], 1 where a sample is not there; the first column leaves out none
    n = len(left) - left.sum(0)
    rows_k, rows_l = (matrix.sum(1)[:, None] - matrix @ left for matrix in (gram_x, gram_y))
    kept = 1 - left
    totals = np.stack([(rows_k * kept).sum(0), (rows_l * kept).sum(0)])
    both = gram_x * gram_y
    inner = ((both.sum(1)[:, None] - both @ left) * kept).sum(0)
    return n, totals, inner, (rows_k * rows_l * kept).sum(0), np.diag(gram_x) @ kept


def leave_out(blocks: IntArray) -> FloatArray:
    """Return float64 [n, 1 + J]: 1 where a sample is left out; first of all nothing, then each block."""
    return np.asarray(blocks[:, None] == np.arange(-1, int(blocks.max()) + 1), np.float64)
