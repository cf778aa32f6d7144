"""The whole run on tiny checkpoints of every family, against transformers itself."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

from mmextract.engine.dump import DumpPlan, DumpSpec, DumpSummary, plan_dump, run_dump
from mmextract.engine.identities import make_disjoint_pair
from mmextract.engine.models import Adapter
from mmextract.engine.rows import PairedMarking
from mmextract.engine.samples import read_samples
from mmextract.engine.store import Store, open_store
from mmextract.engine.watermark import WatermarkSpec, apply, place
from mmextract.engine.writer import OtherRunError
from tests.engine.test_store import tree

QUESTIONS = ("what is it?", "what color is the shape in the picture?", "is it a dog?")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 images of several sizes, three questions of different length, two labels, in JSON Lines."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    lines = []
    for i in range(24):
        size = ((64, 80, 3), (96, 60, 3), (64, 64, 3))[i % 3]
        Image.fromarray(rng.integers(0, 256, size, dtype=np.uint8)).save(folder / f"{i}.png")
        lines.append(
            {"id": f"s{i}", "image": f"{i}.png", "question": QUESTIONS[i // 3 % 3], "answer": "no", "k": i}
        )
    (folder / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def make_plan(adapter: Adapter, path: Path, **settings: Any) -> DumpPlan:
    dataset = read_samples(path, prompt=settings.pop("prompt", None))
    chosen: dict[str, Any] = {"batch_size": 4, "shard_samples": 7, "threads": 2, **settings}
    return plan_dump(DumpSpec(dataset=dataset, model=adapter.spec, **chosen), adapter)


def dump(adapter: Adapter, path: Path, out: Path, **settings: Any) -> tuple[Store, DumpSummary]:
    summary = run_dump(make_plan(adapter, path, **settings), adapter, out)
    return open_store(out), summary


def reference_states(folder: Path, image: Image.Image | None, question: str) -> tuple[torch.Tensor, Any]:
    """[layers + 1, T, D] by transformers alone, and its final norm."""
    if image is None:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        model: Any = AutoModelForCausalLM.from_pretrained(folder)
        chat = [{"role": "user", "content": question}]
        inputs = tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
    else:
        processor: Any = AutoProcessor.from_pretrained(folder)
        model = AutoModelForImageTextToText.from_pretrained(folder)
        content = [{"type": "image"}, {"type": "text", "text": question}]
        text = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
        inputs = processor(text=[text], images=[image], return_tensors="pt")
    with torch.inference_mode():
        states = model(**inputs, output_hidden_states=True).hidden_states
    return torch.cat(states), model.get_decoder().norm


@pytest.mark.parametrize("family", ["llava", "qwen2-vl"])
def test_at_batch_size_one_the_store_holds_what_transformers_gives(
    tiny_folders: dict[str, Path], tiny_adapters: dict[str, Adapter], data: Path, tmp_path: Path, family: str
) -> None:
    settings = {"layers": "embed,all", "positions": ("last", "-2", "first"), "batch_size": 1}
    store, summary = dump(tiny_adapters[family], data / "samples.jsonl", tmp_path / "a.zarr", **settings)
    assert summary.n_samples == 24 and not summary.rejected
    for row in (0, 1, 5, 23):
        image = Image.open(data / f"{row}.png").convert("RGB")
        states, norm = reference_states(tiny_folders[family], image, QUESTIONS[row // 3 % 3])
        assert store.columns["n_tokens"][row] == states.shape[1]
        for position, token in (("last", -1), ("-2", -2), ("first", 0)):
            for layer in store.layers[:-1]:
                assert torch.equal(
                    torch.from_numpy(store.read(int(layer), position)[row]), states[layer + 1, token]
                )
            last = torch.from_numpy(store.read(int(store.layers[-1]), position)[row])
            with torch.inference_mode():
                assert torch.equal(norm(last), states[-1, token])


def test_a_text_model_takes_prompts_without_images(
    tiny_folders: dict[str, Path], tiny_adapters: dict[str, Adapter], tmp_path: Path
) -> None:
    rows = [
        {"id": f"q{i}", "question": f"{'why ' * (i % 3)}number {i}?", "topic": "ab"[i % 2]} for i in range(9)
    ]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    store, _ = dump(tiny_adapters["llama"], tmp_path / "q.jsonl", tmp_path / "a.zarr", batch_size=1)
    for row in (0, 4, 8):
        states, _ = reference_states(tiny_folders["llama"], None, str(rows[row]["question"]))
        assert torch.equal(torch.from_numpy(store.read(1, "last")[row]), states[2, -1])
    assert store.columns["topic"].tolist() == [row["topic"] for row in rows]
    assert "image_hash" not in store.columns


def test_batches_change_no_more_than_the_last_bits(
    tiny_adapters: dict[str, Adapter], data: Path, tmp_path: Path
) -> None:
    alone, _ = dump(tiny_adapters["qwen2-vl"], data / "samples.jsonl", tmp_path / "a.zarr", batch_size=1)
    together, _ = dump(tiny_adapters["qwen2-vl"], data / "samples.jsonl", tmp_path / "b.zarr", batch_size=8)
    for layer in alone.layers:
        a, b = alone.read(int(layer), "last"), together.read(int(layer), "last")
        assert np.abs(a - b).max() <= 1e-5 * np.abs(a).max()


def test_all_tokens_are_padded_with_nan_to_the_longest_sample(
    tiny_adapters: dict[str, Adapter], data: Path, tmp_path: Path
) -> None:
    every, _ = dump(
        tiny_adapters["qwen2-vl"], data / "samples.jsonl", tmp_path / "a.zarr", positions=("all",)
    )
    last, _ = dump(tiny_adapters["qwen2-vl"], data / "samples.jsonl", tmp_path / "b.zarr")
    lengths = every.columns["n_tokens"]
    assert len(every.positions) == lengths.max() > lengths.min()
    states = np.asarray(every.hidden_states[:, 2])
    for row, length in enumerate(lengths):
        assert np.array_equal(states[row, length - 1], last.read(2, "last")[row])
        assert np.isfinite(states[row, :length]).all() and np.isnan(states[row, length:]).all()


def test_a_run_that_stops_is_continued_to_the_same_bytes(
    tiny_adapters: dict[str, Adapter], data: Path, tmp_path: Path
) -> None:
    adapter = tiny_adapters["llava"]
    dump(adapter, data / "samples.jsonl", tmp_path / "whole.zarr", positions=("last", "image"))
    done = 0

    def stop_in_the_third_shard(n_rows: int) -> None:
        nonlocal done
        done += n_rows
        if done > 15:
            raise KeyboardInterrupt

    plan = make_plan(adapter, data / "samples.jsonl", positions=("last", "image"))
    with pytest.raises(KeyboardInterrupt):
        run_dump(plan, adapter, tmp_path / "part.zarr", stop_in_the_third_shard)
    assert open_store(tmp_path / "part.zarr").missing == 10
    summary = run_dump(plan, adapter, tmp_path / "part.zarr")
    assert summary.n_resumed == 14
    assert tree(tmp_path / "part.zarr") == tree(tmp_path / "whole.zarr")


def test_a_finished_run_does_nothing(tiny_adapters: dict[str, Adapter], data: Path, tmp_path: Path) -> None:
    dump(tiny_adapters["llava"], data / "samples.jsonl", tmp_path / "a.zarr")
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "a.zarr").rglob("*")}
    _, summary = dump(tiny_adapters["llava"], data / "samples.jsonl", tmp_path / "a.zarr")
    assert summary.n_resumed == summary.n_samples and summary.bytes_written == 0
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "a.zarr").rglob("*")} == before


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"layers": "0"}, "layers"),
        ({"batch_size": 3}, "batch_size"),
        ({"prompt": "who?"}, "data.fingerprint"),
        ({"positions": ("first",)}, "positions"),
    ],
)
def test_another_run_does_not_touch_the_store(
    tiny_adapters: dict[str, Adapter], data: Path, tmp_path: Path, change: dict[str, Any], named: str
) -> None:
    dump(tiny_adapters["llava"], data / "samples.jsonl", tmp_path / "a.zarr")
    with pytest.raises(OtherRunError, match=named.replace(".", r"\.")):
        dump(tiny_adapters["llava"], data / "samples.jsonl", tmp_path / "a.zarr", **change)


def test_what_cannot_be_used_keeps_its_row_its_reason_and_no_numbers(
    tiny_adapters: dict[str, Adapter], data: Path, tmp_path: Path
) -> None:
    rows = [json.loads(line) for line in (data / "samples.jsonl").read_text().splitlines()][:9]
    for row in rows:
        (tmp_path / row["image"]).write_bytes((data / row["image"]).read_bytes())
    (tmp_path / "2.png").write_bytes((data / "2.png").read_bytes()[:200])
    (tmp_path / "5.png").unlink()
    rows[7]["question"] = "why? " * 200
    (tmp_path / "s.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    store, summary = dump(tiny_adapters["llava"], tmp_path / "s.jsonl", tmp_path / "a.zarr", shard_samples=4)
    assert set(summary.rejected) == {"s2", "s5", "s7"}
    assert "at most" in summary.rejected["s7"]
    bad = np.isin(store.columns["sample"].tolist(), ["s2", "s5", "s7"])
    assert ((store.columns["rejected"] != "") == bad).all()
    assert (np.isnan(store.read(0, "last")).all(1) == bad).all()
    assert (store.columns["n_tokens"][bad] == -1).all()
    again = run_dump(
        make_plan(tiny_adapters["llava"], tmp_path / "s.jsonl", shard_samples=4),
        tiny_adapters["llava"],
        tmp_path / "a.zarr",
    )
    assert again.rejected == summary.rejected


def test_the_paired_design_differs_from_itself_in_the_text_alone(
    tiny_folders: dict[str, Path], tiny_adapters: dict[str, Adapter], data: Path, tmp_path: Path
) -> None:
    seen, unseen = make_disjoint_pair(4, seed=0)
    spec = WatermarkSpec(fields=("user_id",), field_names=False, font_px=8)
    marking = PairedMarking(spec=spec, seen=tuple(seen), unseen=tuple(unseen))
    store, _ = dump(
        tiny_adapters["llava"], data / "samples.jsonl", tmp_path / "a.zarr", marking=marking, batch_size=1
    )
    columns = store.columns
    assert columns["identity_set"].tolist() == ["seen", "unseen"] * 24
    assert (columns["watermark_x"][::2] == columns["watermark_x"][1::2]).all()
    row = 11  # the unseen rendering of sample 5, made here by hand
    person = unseen[int(columns["pair"][row])]
    pixels = np.asarray(Image.open(data / "5.png"))
    texts = [seen[int(columns["pair"][row])].user_id, person.user_id]
    at = place(spec, "s5", pixels.shape[1], pixels.shape[0], texts)
    image = Image.fromarray(apply(pixels, spec, person.user_id, at))
    states, _ = reference_states(tiny_folders["llava"], image, QUESTIONS[5 // 3 % 3])
    assert torch.equal(torch.from_numpy(store.read(1, "last")[row]), states[2, -1])


def test_a_watermark_that_does_not_fit_rejects_its_sample(
    tiny_adapters: dict[str, Adapter], data: Path, tmp_path: Path
) -> None:
    seen, unseen = make_disjoint_pair(2, seed=0)
    marking = PairedMarking(spec=WatermarkSpec(font_px=20), seen=tuple(seen), unseen=tuple(unseen))
    _, summary = dump(tiny_adapters["llava"], data / "samples.jsonl", tmp_path / "a.zarr", marking=marking)
    assert len(summary.rejected) == 48
    assert "does not fit" in summary.rejected["s0#seen"]


def down_projection(adapter: Adapter, layer: int) -> torch.Tensor:
    block: Any = adapter.layers[layer]
    weight: torch.Tensor = block.mlp.down_proj.weight
    return weight


def test_states_too_large_for_half_precision_are_refused(
    tiny_adapters: dict[str, Adapter], data: Path, tmp_path: Path
) -> None:
    adapter = tiny_adapters["llava"]
    weight = down_projection(adapter, 0)
    before = weight.detach().clone()
    try:
        with torch.no_grad():
            weight.mul_(1e9)
        with pytest.raises(ValueError, match="too large for float16"):
            dump(adapter, data / "samples.jsonl", tmp_path / "a.zarr", dtype="float16")
        assert open_store(tmp_path / "a.zarr").missing == 24
    finally:
        with torch.no_grad():
            weight.copy_(before)


def test_values_that_are_not_finite_are_counted(
    tiny_adapters: dict[str, Adapter], data: Path, tmp_path: Path
) -> None:
    adapter = tiny_adapters["llava"]
    weight = down_projection(adapter, 2)
    before = weight.detach().clone()
    try:
        with torch.no_grad():
            weight[3] = torch.nan
        store, summary = dump(adapter, data / "samples.jsonl", tmp_path / "a.zarr")
        assert summary.n_nonfinite == 24
        assert summary.nonfinite_layers == dict.fromkeys(range(2, adapter.n_layers), 24)
        assert (store.columns["n_nonfinite"] > 0).all()
    finally:
        with torch.no_grad():
            weight.copy_(before)


def test_images_for_a_text_model_are_refused(tiny_adapters: dict[str, Adapter], data: Path) -> None:
    with pytest.raises(ValueError, match="takes no images"):
        make_plan(tiny_adapters["llama"], data / "samples.jsonl")


@pytest.mark.parametrize(("layers", "message"), [("9", "0 to 3"), ("two", "not understood")])
def test_a_layer_that_is_not_there_names_the_valid_range(
    tiny_adapters: dict[str, Adapter], data: Path, layers: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make_plan(tiny_adapters["llava"], data / "samples.jsonl", layers=layers)


def test_a_shard_holds_64_mib_unless_told_otherwise(tiny_adapters: dict[str, Adapter], data: Path) -> None:
    plan = make_plan(tiny_adapters["llava"], data / "samples.jsonl", shard_samples=None)
    assert plan.layout.shard_samples == 24
    huge = replace(plan.layout, hidden_size=4096, layers=tuple(range(32)), shard_samples=128)
    assert huge.empty_shard().nbytes == 64 << 20


@pytest.fixture(autouse=True)
def few_threads() -> Iterator[None]:
    """Bit for bit equality holds for one number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
