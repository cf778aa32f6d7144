"""What `benchmarks/gpu_dump.py` holds a dump against, and what it drops. That it runs: see `test_benchmarks`."""

from __future__ import annotations

import importlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

from mmextract.engine import builtin
from mmextract.engine.layout import Layout
from mmextract.engine.models import ModelSpec, load
from mmextract.engine.objects import LocalObjects
from mmextract.engine.store import open_store
from mmextract.engine.writer import open_writer

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def gpu_dump(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("gpu_dump")


def test_the_null_sink_drops_hidden_states_and_nothing_else(tmp_path: Path, gpu_dump: ModuleType) -> None:
    layout = Layout(n_samples=5, layers=(0, 1), positions=("last",), hidden_size=8, shard_samples=2)
    files = []
    with ThreadPoolExecutor(1) as executor:
        for place in (LocalObjects(tmp_path / "whole"), gpu_dump.WithoutStates(tmp_path / "dropped")):
            writer = open_writer(place, layout, {"sample": list("abcde")}, {"run": {}}, executor)
            n_bytes = [
                writer.write_shard(shard, layout.empty_shard() * 0, layout.empty_records(), {})
                for shard in range(layout.n_shards)
            ]
            writer.finalise()
            assert min(n_bytes) > 0  # encoded all the same
            files.append(
                {
                    str(file.relative_to(place.root)): file.read_bytes()
                    for file in place.root.rglob("*")
                    if file.is_file()
                }
            )
    whole, dropped = files
    states = {name for name in whole if name.startswith("hidden_states/c/")}
    assert len(states) == 3 and dropped == {name: whole[name] for name in whole if name not in states}


@pytest.mark.parametrize("shard_samples", [1, 5])
def test_the_bare_forward_is_of_the_batches_of_the_dump(
    tmp_path: Path, gpu_dump: ModuleType, shard_samples: int
) -> None:
    bench = gpu_dump.Bench(smoke=False, repeats=1)
    adapter = load(ModelSpec(model=builtin.locate_model("builtin:base")[0], device="cpu"))
    dataset = gpu_dump.write_samples(bench, tmp_path / "samples", 7)
    case = replace(gpu_dump.CASES[0], n_samples=7, batch_size=2)
    plan = gpu_dump.make_plan(bench, adapter, dataset, case, shard_samples=shard_samples)
    dump = gpu_dump.Dumps(plan, adapter, tmp_path / "whole", keeps_states=True)
    with gpu_dump.recording(adapter) as wanted:
        dump()
    found = gpu_dump.record(bench, adapter, dataset, case, shard_samples, tmp_path / "recorded")
    sizes = [len(inputs["input_ids"]) for inputs in found]
    assert sizes == ([1] * 7 if shard_samples == 1 else [2, 2, 1, 2])
    assert [inputs.keys() for inputs in found] == [inputs.keys() for inputs in wanted]
    for inputs, as_dumped in zip(found, wanted, strict=True):
        assert all(torch.equal(inputs[name], as_dumped[name]) for name in inputs)
    columns = open_store(tmp_path / "whole" / "0").columns
    assert all(columns["condition"] == "watermarked") and (columns["n_tokens"] > 0).all()
