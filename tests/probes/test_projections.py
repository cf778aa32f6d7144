from __future__ import annotations

import importlib.util
import sys

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from sklearn.metrics import silhouette_score

from mmextract.probes.groups import IntArray
from mmextract.probes.metrics import FloatArray
from mmextract.probes.projections import (
    Projection,
    Wish,
    align_signs,
    check_wishes,
    parse_wishes,
    project,
)

NO_UMAP = importlib.util.find_spec("umap") is None
METHODS = [
    "pca",
    "tsne",
    pytest.param("umap", marks=pytest.mark.skipif(NO_UMAP, reason="umap-learn is not installed")),
]


def two_clouds(n: int = 60, d: int = 20) -> tuple[FloatArray, IntArray]:
    rng = np.random.default_rng(0)
    y = np.arange(n, dtype=np.int64) % 2
    return rng.normal(size=(n, d)) + 12 * y[:, None] * np.eye(d)[3], y


@pytest.mark.parametrize("method", METHODS)
def test_what_lies_apart_is_laid_apart_and_the_same_again(method: str) -> None:
    x, y = two_clouds()
    first, again = project(x, method), project(x, method)
    assert first.coordinates.shape == (60, 2) and first.coordinates.dtype == np.float32
    np.testing.assert_array_equal(first.coordinates, again.coordinates)
    assert silhouette_score(first.coordinates, y) > 0.5


def test_pca_is_the_two_first_axes_of_the_full_decomposition() -> None:
    x, _ = two_clouds()
    full = PCA(svd_solver="full").fit(x)
    found = project(x, "pca")
    np.testing.assert_allclose(abs(found.coordinates), abs(full.transform(x)[:, :2]), rtol=1e-4, atol=1e-5)
    assert found.shares == pytest.approx(tuple(full.explained_variance_ratio_[:2]))


def test_tsne_is_the_published_preset() -> None:
    x = np.random.default_rng(0).normal(size=(120, 130))
    components = PCA(100, random_state=42).fit_transform(x)
    published = TSNE(2, init="pca", random_state=42).fit_transform(components)
    found = project(x, "tsne").coordinates
    distances = [np.linalg.norm(c[:, None] - c, axis=2).ravel() for c in (found, published)]
    assert np.corrcoef(*distances)[0, 1] > 0.99


@pytest.mark.parametrize("method", ["pca", "tsne"])
@pytest.mark.parametrize("shape", [(4, 1), (5, 2), (7, 300)])
def test_few_samples_and_few_features_are_laid_out_too(method: str, shape: tuple[int, int]) -> None:
    coordinates = project(np.random.default_rng(0).normal(size=shape), method).coordinates
    assert coordinates.shape == (shape[0], 2) and np.isfinite(coordinates).all()


def test_states_that_are_all_the_same_lie_on_one_point() -> None:
    assert (project(np.full((10, 4), 3.1), "pca").coordinates == 0).all()


def test_signs_follow_the_layer_before() -> None:
    x, _ = two_clouds()
    first = project(x, "pca")
    flipped = Projection(first.coordinates * np.array([-1, 1], np.float32), first.shares)
    aligned = align_signs([first, flipped, first])
    np.testing.assert_array_equal(aligned[1].coordinates, first.coordinates)
    assert aligned[2].shares == first.shares


def test_wishes_are_read_and_wrong_ones_refused() -> None:
    assert parse_wishes("pca, tsne@best") == (Wish("pca"), Wish("tsne", best_only=True))
    assert parse_wishes("none") == parse_wishes("") == ()
    for wrong in ("pcs", "pca,", "tsne@worst", "tsne@"):
        with pytest.raises(ValueError, match="expected projections out of pca, tsne, umap"):
            parse_wishes(wrong)


def test_what_is_not_there_is_said_before_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "umap", None)
    with pytest.raises(ImportError, match=r"pip install 'mmextract\[umap\]'"):
        check_wishes(parse_wishes("umap"), "cpu")
    check_wishes(parse_wishes("pca,tsne"), "cpu")
    with pytest.raises(ValueError, match="cpu or cuda"):
        check_wishes((), "tpu")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="need a GPU"):
            check_wishes(parse_wishes("pca"), "cuda")


def test_too_few_samples_and_unknown_methods_are_errors() -> None:
    with pytest.raises(ValueError, match="at least 4 samples, got 3"):
        project(np.ones((3, 4)), "pca")
    with pytest.raises(ValueError, match="pca, tsne, umap"):
        project(np.ones((9, 4)), "isomap")
