"""Projections: the states of a layer laid out in a plane by PCA, t-SNE or UMAP, the same every time.

t-SNE is set as in the published study: 100 principal components, then sklearn's TSNE(2, init="pca", random_state=42).
Distances in t-SNE's and UMAP's planes mean little, and an island is no test: the probes are. This module knows nothing
about stores, classes or files.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from mmextract.probes.metrics import FloatArray

METHODS = {"pca": "PCA", "tsne": "t-SNE", "umap": "UMAP"}
DEVICES = ("cpu", "cuda")
COMPONENTS = 100
"""Principal components that t-SNE and UMAP are given."""
SEED = 42
PERPLEXITY = 30.0
NEIGHBOURS = 15
"""Defaults of TSNE and UMAP, lowered where there are too few samples for them."""
LEAST_SAMPLES = 4
BEST = "best"


@dataclass(frozen=True)
class Wish:
    """A method, and whether for the best layer and position alone; see `parse_wishes`."""

    method: str
    """A key of METHODS."""
    best_only: bool = False


@dataclass(frozen=True)
class Projection:
    """Where each sample came to lie."""

    coordinates: NDArray[np.float32]
    """[n, 2]."""
    shares: tuple[float, float] | None = None
    """PCA: the shares of the variance along the two axes."""


def parse_wishes(text: str) -> tuple[Wish, ...]:
    """Read a list such as `pca,tsne@best`; `none` and the empty text wish for nothing. Raises ValueError."""
    wishes = []
    for part in () if text.strip() in ("", "none") else text.split(","):
        method, at, where = part.strip().partition("@")
        if method not in METHODS or (at and where != BEST):
            raise ValueError(
                f"expected projections out of {', '.join(METHODS)}, each with @best for the best layer and position "
                f"alone, or none; got {part.strip()!r}"
            )
        wishes.append(Wish(method, bool(at)))
    return tuple(wishes)


def check_wishes(wishes: Sequence[Wish], device: str) -> None:
    """Raise ImportError or ValueError, before any work is done, if a package or the GPU is not there."""
    if device not in DEVICES:
        raise ValueError(f"projections are made on {' or '.join(DEVICES)}, got {device!r}")
    if not wishes:
        return
    if device == "cuda":
        _require_gpu()
        _load("cuml.manifold", "cuML", "mmextract[gpu]")
    elif any(wish.method == "umap" for wish in wishes):
        _load("umap", "UMAP", "mmextract[umap]")


def project(x: FloatArray, method: str, *, device: str = "cpu") -> Projection:
    """Lay states x [n, D] out in a plane. device: `cuda` takes cuML's implementations.

    The same x gives the same coordinates with the same versions of the packages, however many cores there are;
    cuML's t-SNE alone may differ in the last digits. Raises ValueError for fewer than LEAST_SAMPLES samples or a
    method that is not one of METHODS; ImportError where a package is missing, saying what to install.
    """
    if method not in METHODS:
        raise ValueError(f"the projection must be one of {', '.join(METHODS)}, got {method!r}")
    if len(x) < LEAST_SAMPLES:
        raise ValueError(f"a projection needs at least {LEAST_SAMPLES} samples, got {len(x)}")
    if device == "cuda":
        return _project_on_gpu(x, method)
    with threadpool_limits(
        1
    ):  # the last bits of a product depend on the number of threads, and t-SNE amplifies them
        return _project(x, method)


def _project(x: FloatArray, method: str) -> Projection:
    if method == "pca":
        return _pca(x)
    components = PCA(_n_components(x), random_state=SEED).fit_transform(x)
    components = np.pad(components, ((0, 0), (0, max(0, 2 - components.shape[1]))))  # their start takes two
    if method == "tsne":
        model = TSNE(2, init="pca", random_state=SEED, perplexity=_perplexity(len(x)))
    else:
        model = _load("umap", "UMAP", "mmextract[umap]").UMAP(
            n_neighbors=_neighbours(len(x)), random_state=SEED, n_jobs=1
        )
    return Projection(np.asarray(model.fit_transform(components), np.float32))


def _pca(x: FloatArray) -> Projection:
    # arpack finds the two exactly; the full decomposition takes ten times as long
    solver = "arpack" if min(x.shape) > 2 else "full"
    model = PCA(min(2, x.shape[1]), svd_solver=solver, random_state=SEED)
    flat = np.allclose(x, x[0], rtol=0, atol=0)
    found = np.zeros((len(x), 2), np.float32)
    if flat:
        return Projection(found, (0.0, 0.0))
    coordinates = model.fit_transform(x)
    found[:, : coordinates.shape[1]] = coordinates
    first, second = (*model.explained_variance_ratio_.tolist(), 0.0)[:2]
    return Projection(found, (float(first), float(second)))


def _project_on_gpu(x: FloatArray, method: str) -> Projection:
    """The same with cuML, in float32, its only precision for t-SNE and UMAP; its t-SNE starts from random places."""
    _require_gpu()
    states = np.asarray(x, np.float32)
    decomposition = _load("cuml.decomposition", "cuML", "mmextract[gpu]")
    n_components = 2 if method == "pca" else _n_components(x)
    pca = decomposition.PCA(n_components=n_components, output_type="numpy")
    components = np.asarray(pca.fit_transform(states))
    if method == "pca":
        first, second = np.asarray(pca.explained_variance_ratio_).tolist()
        return Projection(components.astype(np.float32), (first, second))
    manifold = _load("cuml.manifold", "cuML", "mmextract[gpu]")
    if method == "tsne":
        model = manifold.TSNE(
            n_components=2, random_state=SEED, perplexity=_perplexity(len(x)), output_type="numpy"
        )
    else:
        model = manifold.UMAP(
            n_components=2, random_state=SEED, n_neighbors=_neighbours(len(x)), output_type="numpy"
        )
    return Projection(np.asarray(model.fit_transform(components), np.float32))


def align_signs(projections: Sequence[Projection]) -> list[Projection]:
    """Flip axes so that each PCA lies as the one before it does: signs are arbitrary, and a slider should not jump.

    Labels take no part in it. All must be of the same samples, in the same order.
    """
    aligned: list[Projection] = []
    for projection in projections:
        coordinates = projection.coordinates
        if aligned:
            agreement = (aligned[-1].coordinates * coordinates).sum(0)
            coordinates = coordinates * np.where(agreement < 0, -1, 1).astype(np.float32)
        aligned.append(Projection(coordinates, projection.shares))
    return aligned


def _n_components(x: FloatArray) -> int:
    n, d = x.shape
    return int(min(COMPONENTS, n, d))


def _perplexity(n: int) -> float:
    return min(PERPLEXITY, (n - 1) / 3)


def _neighbours(n: int) -> int:
    return min(NEIGHBOURS, n - 1)


def _require_gpu() -> None:
    import torch

    if not torch.cuda.is_available():
        raise ValueError("projections on cuda need a GPU, and there is none that torch can use: take cpu")


def _load(module: str, name: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"{name} is not installed: pip install '{package}', or leave it out") from error
