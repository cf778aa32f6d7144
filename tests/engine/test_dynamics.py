from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mmextract.engine.dynamics import Checkpoint, Dynamics, DynamicsSpec, run_dynamics
from mmextract.engine.dynamics_gradients import GradientMeter, Unit, sort_units
from mmextract.engine.dynamics_outputs import make_record, write_outputs
from mmextract.engine.dynamics_rows import ALL, DEAD_A, CosineRow, make_cosine_rows, select_parts
from mmextract.engine.dynamics_sums import Measured, NestedSums, multiply
from mmextract.engine.dynamics_views import CLEAN, IMAGE, TEXT, ViewSettings
from mmextract.engine.finetune_data import Preparer
from mmextract.engine.identities import make_identities
from mmextract.engine.loading import ModelSpec
from mmextract.engine.models import Adapter
from mmextract.engine.parts import part_of
from mmextract.engine.rows import RandomMarking, make_rows
from mmextract.engine.samples import Dataset, read_samples
from mmextract.engine.watermark import WatermarkSpec, draw
from tests.engine.tiny_adapters import on_cpu

LOOK = WatermarkSpec(fields=("username",), field_names=False, font_px=20, opacity=255)
PEOPLE = tuple(make_identities(5, seed=1))
N_SAMPLES = 8


def settings(**changed: Any) -> ViewSettings:
    marking = RandomMarking(spec=LOOK, identities=PEOPLE, rate=1.0)
    return ViewSettings(marking=marking, **({"rates": (0.0, 0.4, 1.0)} | changed))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Eight images of noise that is smooth enough for an augmentation to keep something of it."""
    root = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    lines = []
    for index in range(N_SAMPLES):
        coarse = Image.fromarray(rng.integers(0, 256, (4, 6, 3), np.uint8))
        coarse.resize((180, 140), Image.Resampling.BICUBIC).save(root / f"{index}.png")
        entry = {
            "id": f"s{index}",
            "image": f"{index}.png",
            "question": "is it big?",
            "answer": "ab"[index % 2],
        }
        lines.append(json.dumps(entry | {"other": "is it large?"}))
    (root / "data.jsonl").write_text("\n".join(lines))
    return read_samples(root / "data.jsonl")


@pytest.fixture(scope="module")
def spec(tiny_folders: dict[str, Path]) -> DynamicsSpec:
    model = ModelSpec(model=str(tiny_folders["llava"]), device="cpu")
    return DynamicsSpec(
        checkpoints=(Checkpoint(name="tiny", model=model),),
        views=settings(),
        batch_sizes=(1, 2, 8),
        n_samples=8,
    )


@pytest.fixture(scope="module")
def found(spec: DynamicsSpec, dataset: Dataset) -> Dynamics:
    return run_dynamics(spec, dataset)


@pytest.fixture
def lora(tiny_folders: dict[str, Path], tmp_path: Path) -> Callable[..., Path]:
    """Saves a LoRA, as it is before its first step or with random B."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForImageTextToText

    def saved(*, trained: bool) -> Path:
        torch.manual_seed(3)
        model = AutoModelForImageTextToText.from_pretrained(tiny_folders["llava"], dtype=torch.float32)
        targets = r".*language_model\.layers.*\.(q_proj|down_proj)"
        with warnings.catch_warnings():  # peft asks transformers for it by its old name
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            tuned = get_peft_model(model, LoraConfig(r=2, lora_alpha=4, target_modules=targets))
        for name, parameter in tuned.named_parameters():
            if trained and "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.3)
        tuned.save_pretrained(tmp_path / f"lora-{trained}")
        return tmp_path / f"lora-{trained}"

    return saved


def rows_of(rows: Sequence[CosineRow], **wanted: object) -> list[CosineRow]:
    wanted = {"group": ALL, "matrix": ALL} | wanted
    return [row for row in rows if all(getattr(row, name) == value for name, value in wanted.items())]


def one(rows: Sequence[CosineRow], **wanted: object) -> CosineRow:
    (row,) = rows_of(rows, **wanted)
    return row


# sums and products


def test_the_sums_of_nested_batches_are_those_of_their_examples() -> None:
    gradients = torch.randn(8, 3, 10, generator=torch.Generator().manual_seed(0))  # [examples, V, P]
    sums = NestedSums(sizes=(1, 2, 8), unit_sizes=(4, 6))
    for example in gradients:
        sums.add(example)
    for measured in sums.measured():
        batches = gradients.double().reshape(-1, measured.size, 3, 10).sum(1)
        assert measured.own.shape == (8 // measured.size, 3, 2)
        for unit, part in enumerate((slice(0, 4), slice(4, 10))):
            own = (batches[:, :, part] ** 2).sum(2)
            cross = (batches[:, :, part] * batches[:, :1, part]).sum(2)
            np.testing.assert_allclose(measured.own[:, :, unit], own, rtol=1e-5)
            np.testing.assert_allclose(measured.cross[:, :, unit], cross, rtol=1e-4, atol=1e-5)


def test_parts_of_a_gradient_add_up_to_the_whole() -> None:
    gradients = torch.randn(2, 600_000, generator=torch.Generator().manual_seed(0))
    whole, parts = multiply(gradients, (600_000,)), multiply(gradients, (1, 0, 299_999, 300_000))
    for one_number, split in zip(whole, parts, strict=True):
        np.testing.assert_allclose(split.sum(1), one_number[:, 0], rtol=1e-12)


def test_cosines_of_a_linear_model_are_those_of_its_closed_form() -> None:
    """½(w·x − y)² has the gradient (w·x − y) x: of one example the cosine is that of x and x′, up to a sign."""
    rng = np.random.default_rng(0)
    w, x, y = rng.normal(size=5), rng.normal(size=(4, 5)), rng.normal(size=4)
    marked = x + 0.3 * rng.normal(size=x.shape)
    sums = NestedSums(sizes=(1, 4), unit_sizes=(5,))
    for example in zip(x, marked, y, strict=True):
        rows = []
        for features in example[:2]:
            weights = torch.tensor(w, requires_grad=True)
            (0.5 * (weights @ torch.tensor(features) - example[2]) ** 2).backward()
            assert weights.grad is not None
            rows.append(weights.grad)
        sums.add(torch.stack(rows))
    rows_found = list(
        make_cosine_rows(
            "m", (CLEAN, "rate 1"), sums.measured(), [Unit(group="head", matrix="weights")], seed=0
        )
    )

    def closed(first: np.ndarray, second: np.ndarray) -> float:
        return float(first @ second / np.linalg.norm(first) / np.linalg.norm(second))

    clean, other = (x @ w - y)[:, None] * x, (marked @ w - y)[:, None] * marked
    of_one = np.mean([closed(a, b) for a, b in zip(clean, other, strict=True)])
    assert one(rows_found, batch_size=1, view="rate 1").cosine == pytest.approx(of_one)
    assert one(rows_found, batch_size=4, view="rate 1").cosine == pytest.approx(
        closed(clean.sum(0), other.sum(0))
    )


def test_every_part_is_reported_whole_and_a_lora_by_matrix_too() -> None:
    units = sort_units({Unit(group=g, matrix=m) for g in ("layer 10", "layer 2") for m in "AB"})
    units = [*sort_units({Unit(group="projector", matrix="weights")}), *units]
    parts = {(group, matrix): numbers for group, matrix, numbers in select_parts(units)}
    assert parts["all", ALL] == [0, 1, 2, 3, 4] and parts["all", "A"] == [1, 3]
    assert parts["layer 2", ALL] == [1, 2] and parts["layer 10", "B"] == [4]
    assert ("projector", "weights") not in parts


# gradients


def prepared(adapter: Adapter, dataset: Dataset) -> list[Any]:
    rows = make_rows(dataset, None)
    preparer = Preparer(adapter, None, 128)
    from mmextract.engine.finetune_rows import Example

    return [preparer(Example(row=row)) for row in rows]


def test_a_gradient_is_that_of_the_answers_loss_and_adds_up_over_examples(
    tiny_folders: dict[str, Path], dataset: Dataset
) -> None:
    adapter = on_cpu(tiny_folders["llava"])
    examples = prepared(adapter, dataset)[:3]
    meter = GradientMeter(adapter, full=True)
    assert sum(p.numel() for p in adapter.model.parameters()) == meter.n_parameters == sum(meter.sizes)
    singles = [meter.gradient([example]) for example in examples]
    torch.testing.assert_close(meter.gradient(examples), sum(singles), rtol=1e-4, atol=1e-5)
    # transformers' own loss is the mean over the answer's tokens
    first = examples[0]
    loss = adapter.model(**first.inputs, labels=first.labels[None]).loss * first.n_answer_tokens
    parameters = dict(adapter.model.named_parameters())
    expected = torch.autograd.grad(loss, [parameters[n] for n in meter.names], allow_unused=True)
    flat = [
        torch.zeros(parameters[n].numel()) if g is None else g.flatten()
        for n, g in zip(meter.names, expected, strict=True)
    ]
    torch.testing.assert_close(singles[0], torch.cat(flat), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("family", ["llava", "llava-siglip", "qwen2-vl"])
def test_groups_are_the_parts_of_the_model_in_the_order_of_the_data(
    tiny_folders: dict[str, Path], family: str
) -> None:
    adapter = on_cpu(tiny_folders[family])
    meter = GradientMeter(adapter, full=True)
    groups = [unit.group for unit in meter.units]
    layers = [f"layer {index}" for index in range(adapter.n_layers)]
    assert groups[:-2] == ["vision", "projector", "embedding", *layers] or groups[:-1] == [
        *("vision", "projector", "embedding"),
        *layers,
    ]
    assert "final norm" in groups
    vision = dict(zip(groups, meter.sizes, strict=True))["vision"]
    model = adapter.model
    assert vision == sum(p.numel() for n, p in model.named_parameters() if part_of(model, n) == "vision")


def test_weights_of_another_model_are_refused(tiny_folders: dict[str, Path]) -> None:
    meter = GradientMeter(on_cpu(tiny_folders["llava"]), full=True)
    with pytest.raises(ValueError, match="checkpoint of another model: 1 of its 1 tensors"):
        meter.put({"nothing.weight": torch.zeros(2)}, "step-1")


# a run


def test_the_same_images_have_a_cosine_of_exactly_one(found: Dynamics) -> None:
    unmarked = [row for row in found.cosines if row.view == "rate 0"]
    assert {row.batch_size for row in unmarked} == {1, 2, 8} and len({row.group for row in unmarked}) > 5
    for row in unmarked:
        assert row.cosine == 1.0 and row.n_same == row.n_batches, row


def test_watermarks_and_augmentations_turn_the_gradient(found: Dynamics) -> None:
    for view in ("rate 1", IMAGE, TEXT):
        row = one(found.cosines, batch_size=1, view=view)
        assert row.cosine is not None and row.cosine < 0.999 and row.n_same == 0, row
        assert row.low is not None and row.high is not None and row.low <= row.cosine <= row.high


def test_a_rate_marks_just_the_images_of_the_plan(found: Dynamics, dataset: Dataset) -> None:
    n_marked = sum(draw(LOOK.seed, sample.id).marked < 0.4 for sample in dataset.samples)
    assert 0 < n_marked < N_SAMPLES
    row = one(found.cosines, batch_size=1, view="rate 0.4")
    assert row.n_same == N_SAMPLES - n_marked and row.n_batches == N_SAMPLES


def test_few_batches_have_no_interval_but_a_reason(found: Dynamics) -> None:
    row = one(found.cosines, batch_size=8, view="rate 1")
    assert row.n_batches == 1 and row.low is None and row.high is None
    assert row.cosine is not None and "too few" in row.reason


def test_noise_scales_are_given_for_every_larger_batch(found: Dynamics) -> None:
    scales = [row for row in found.noise if row.group == row.matrix == ALL and row.view == CLEAN]
    assert [(row.small_batch, row.batch_size) for row in scales] == [(1, 2), (1, 8)]
    assert all(row.noise_scale is not None or row.reason for row in scales)


def test_a_run_repeats_and_does_not_depend_on_the_order_of_the_data(
    spec: DynamicsSpec, dataset: Dataset, found: Dynamics
) -> None:
    turned = replace(dataset, samples=dataset.samples[::-1])
    assert run_dynamics(replace(spec, threads=1), turned).cosines == found.cosines


def test_the_first_step_of_a_lora_has_no_gradient_in_a_and_says_so(
    spec: DynamicsSpec, dataset: Dataset, lora: Callable[..., Path]
) -> None:
    model = spec.checkpoints[0].model
    checkpoints = tuple(
        Checkpoint(name=name, model=replace(model, adapter=str(lora(trained=name == "warm"))))
        for name in ("first", "warm")
    )
    rows = run_dynamics(replace(spec, checkpoints=checkpoints), dataset).cosines
    for group in (ALL, "layer 0", "layer 3"):
        dead = one(rows, checkpoint="first", group=group, matrix="A", batch_size=2, view="rate 1")
        assert dead.cosine is None and dead.reason == DEAD_A and dead.n_batches == 0
        live = one(rows, checkpoint="first", group=group, matrix="B", batch_size=2, view="rate 1")
        assert live.cosine is not None
        whole = one(rows, checkpoint="first", group=group, batch_size=2, view="rate 1")
        assert whole.cosine == live.cosine
        for matrix in ("A", "B"):
            warm = one(rows, checkpoint="warm", group=group, matrix=matrix, batch_size=2, view="rate 1")
            assert warm.cosine is not None
    assert not rows_of(rows, group="vision")


def test_a_checkpoint_of_a_training_is_put_over_the_weights(
    spec: DynamicsSpec, dataset: Dataset, lora: Callable[..., Path], tmp_path: Path
) -> None:
    from safetensors.torch import save_file

    model = spec.checkpoints[0].model
    warm = replace(model, adapter=str(lora(trained=True)))
    trained = {
        n: p
        for n, p in on_cpu(Path(model.model), adapter=warm.adapter).model.named_parameters()
        if "lora" in n
    }
    save_file({f"weight/{name}": p.detach() for name, p in trained.items()}, tmp_path / "step-1.safetensors")
    cold = replace(model, adapter=str(lora(trained=False)))
    checkpoints = (
        Checkpoint(name="whole", model=warm),
        Checkpoint(name="kept", model=cold, weights=tmp_path / "step-1.safetensors"),
    )
    rows = run_dynamics(replace(spec, checkpoints=checkpoints), dataset).cosines
    whole, kept = ([replace(r, checkpoint="") for r in rows if r.checkpoint == c.name] for c in checkpoints)
    assert whole == kept


def test_the_text_of_a_column_is_asked_in_place_of_the_question(spec: DynamicsSpec, dataset: Dataset) -> None:
    rules = run_dynamics(replace(spec, views=settings(rates=())), dataset)
    column = run_dynamics(replace(spec, views=settings(rates=(), text_column="other")), dataset)
    # both replace `big` by `large`, so the gradients are the same
    assert one(rules.cosines, batch_size=2, view=TEXT) == one(column.cosines, batch_size=2, view=TEXT)
    with pytest.raises(LookupError, match=r"no column `nothing` .its columns are: other"):
        run_dynamics(replace(spec, views=settings(text_column="nothing")), dataset)


def test_an_image_that_cannot_be_read_is_left_out_and_named(
    spec: DynamicsSpec, dataset: Dataset, tmp_path: Path
) -> None:
    lines = [json.dumps({"id": "bad", "image": "bad.png", "question": "?", "answer": "a"})]
    for sample in dataset.samples:
        assert sample.image is not None
        (tmp_path / f"{sample.id}.png").write_bytes(sample.image.read())
        lines.append(
            json.dumps(
                {"id": sample.id, "image": f"{sample.id}.png", "question": "is it big?", "answer": "a"}
            )
        )
    (tmp_path / "bad.png").write_bytes(b"no image")
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    found = run_dynamics(replace(spec, n_samples=9), read_samples(tmp_path / "data.jsonl"))
    assert set(found.rejected) == {"bad"} and found.n_samples == N_SAMPLES


def test_the_outputs_hold_every_row(
    spec: DynamicsSpec, dataset: Dataset, found: Dynamics, tmp_path: Path
) -> None:
    import pyarrow.csv
    import pyarrow.parquet

    record = make_record(found, spec, dataset, "mmextract dynamics")
    paths = write_outputs(found, record, tmp_path)
    assert {path.suffix for path in paths} == {".csv", ".parquet", ".png", ".svg", ".json"}
    written = json.loads((tmp_path / "dynamics.json").read_text())
    table = pyarrow.parquet.read_table(tmp_path / "cosines.parquet").to_pylist()
    assert written["cosines"] == table and len(table) == len(found.cosines)
    assert pyarrow.csv.read_csv(tmp_path / "noise.csv").num_rows == len(found.noise)
    assert Image.open(tmp_path / "dynamics.png").size[0] > 1000
    again = write_outputs(found, record, tmp_path / "again")
    assert [path.read_bytes() for path in paths] == [path.read_bytes() for path in again]


# what is refused


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"batch_sizes": (1, 3, 4)}, "multiple of the one before, so that batches nest; 4"),
        ({"batch_sizes": (2, 1)}, "multiple of the one before"),
        ({"batch_sizes": ()}, "at least 1, got none"),
        ({"n_samples": 7}, "7 samples do not fill one batch of 8"),
        ({"checkpoints": ()}, "at least one model"),
    ],
)
def test_a_run_that_cannot_be_is_refused(spec: DynamicsSpec, changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(spec, **changed)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"rates": (0.5, 1.5)}, r"must lie in \[0, 1\], got 1.5"),
        ({"rates": (0.5, 0.5)}, "given once, got 0.5, 0.5"),
        ({"augment_text": False, "text_column": "other"}, "needs the text augmentation"),
    ],
)
def test_views_that_cannot_be_are_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settings(**changed)


def test_data_that_cannot_be_used_is_refused(spec: DynamicsSpec, dataset: Dataset) -> None:
    with pytest.raises(ValueError, match="have no answer"):
        run_dynamics(spec, replace(dataset, samples=[replace(s, answer="") for s in dataset.samples]))
    with pytest.raises(ValueError, match="has no images"):
        run_dynamics(spec, replace(dataset, samples=[replace(s, image=None) for s in dataset.samples]))
    with pytest.raises(ValueError, match="only 4 samples have an image"):
        run_dynamics(spec, replace(dataset, samples=dataset.samples[:4]))


def test_a_model_without_a_lora_is_differentiated_whole_or_refused(tiny_folders: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match="has no LoRA"):
        GradientMeter(on_cpu(tiny_folders["llava"]), full=False)


def test_measured_is_one_array_a_size() -> None:
    sums = NestedSums(sizes=(1,), unit_sizes=(2,))
    sums.add(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
    (measured,) = sums.measured()
    assert isinstance(measured, Measured)
    assert measured.own.tolist() == [[[25.0], [0.0]]] and measured.cross.tolist() == [[[25.0], [0.0]]]
