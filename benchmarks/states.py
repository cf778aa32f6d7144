"""Real hidden states for benchmarks of the store: every token of easy-vqa's questions, all layers of a real model."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmextract.engine.dump import DumpSpec, plan_dump, run_dump
from mmextract.engine.models import load
from mmextract.engine.store import open_store
from scenarios import SCENARIOS


def real_states(scenario: str, n_vectors: int, scratch: Path) -> NDArray[Any]:
    """Return float32 [N, L, 1, D]: the states of `n_vectors` tokens, in the order of the questions.

    Made by a dump with `--position all`; samples are taken until there are enough tokens, and what there is is
    repeated if the questions run out.
    """
    limit = 64
    while True:
        vectors = _dump(scenario, limit, scratch)
        if len(vectors) >= n_vectors or limit >= 4096:
            break
        limit *= 2
    return np.ascontiguousarray(np.resize(vectors, (n_vectors, *vectors.shape[1:])))


def _dump(scenario: str, limit: int, scratch: Path) -> NDArray[Any]:
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        chosen = SCENARIOS[scenario](Path(folder), limit)
        adapter = load(chosen.model)
        spec = DumpSpec(dataset=chosen.dataset, model=chosen.model, layers="all", positions=("all",))
        run_dump(plan_dump(spec, adapter), adapter, Path(folder) / "a.zarr")
        store = open_store(Path(folder) / "a.zarr")
        states = np.asarray(store.hidden_states[:])  # [sample, layer, token, hidden]
        tokens = store.columns["n_tokens"]
    return np.concatenate([states[i, :, : tokens[i]].swapaxes(0, 1) for i in range(len(states))])[:, :, None]
