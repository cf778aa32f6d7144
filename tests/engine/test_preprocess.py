"""Pixel values and token ids equal to the processor's, to the bit, by whatever way; and when the processor must do."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from mmextract.engine.dump import DumpSpec, plan_dump, run_dump
from mmextract.engine.identities import make_disjoint_pair
from mmextract.engine.images import RejectedSample
from mmextract.engine.models import Adapter
from mmextract.engine.preprocess import NoPlanError, derive_plan
from mmextract.engine.preprocess_choice import choose
from mmextract.engine.preprocess_host import make_host_path
from mmextract.engine.rows import PairedMarking
from mmextract.engine.samples import read_samples
from mmextract.engine.watermark import WatermarkSpec
from tests.cli.conftest import save_photos
from tests.engine import tiny_models
from tests.engine.test_store import tree
from tests.engine.tiny_adapters import image, on_cpu, user

CLIP: dict[str, Any] = {"size": {"shortest_edge": 56}, "crop_size": {"height": 56, "width": 56}}
ODD: dict[str, Any] = {"size": {"shortest_edge": 30}, "crop_size": {"height": 33, "width": 41}}
SQUARE: dict[str, Any] = {"size": {"height": 48, "width": 48}}
SHORT_AND_LONG: dict[str, Any] = {"do_center_crop": False, "size": {"shortest_edge": 40, "longest_edge": 60}}
WITHIN: dict[str, Any] = {"size": {"max_height": 50, "max_width": 40}, "do_center_crop": False}

PROCESSORS: dict[str, Callable[[], Any]] = {
    "clip": lambda: hf.CLIPImageProcessor(**CLIP),
    "clip-pil": lambda: CLIPImageProcessorPil(**CLIP),
    "clip odd crop": lambda: hf.CLIPImageProcessor(**ODD),
    "clip-pil odd crop": lambda: CLIPImageProcessorPil(**ODD),
    "clip short and long": lambda: hf.CLIPImageProcessor(**SHORT_AND_LONG),
    "clip-pil within": lambda: CLIPImageProcessorPil(**WITHIN),
    "siglip": lambda: hf.SiglipImageProcessor(**SQUARE),
    "siglip-pil": lambda: SiglipImageProcessorPil(**SQUARE),
    "siglip bilinear": lambda: hf.SiglipImageProcessor(resample=2, **SQUARE),
    "siglip-pil lanczos": lambda: SiglipImageProcessorPil(resample=1, **SQUARE),
    "siglip-pil box": lambda: SiglipImageProcessorPil(resample=4, **SQUARE),
    "siglip levels": lambda: hf.SiglipImageProcessor(do_normalize=False, do_rescale=False, **SQUARE),
    "siglip unscaled": lambda: hf.SiglipImageProcessor(do_rescale=False, **SQUARE),
    "siglip as it is": lambda: hf.SiglipImageProcessor(do_resize=False),
    "vit": lambda: hf.ViTImageProcessor(**SQUARE),
    "qwen2-vl": lambda: hf.Qwen2VLImageProcessor(size={"shortest_edge": 56**2, "longest_edge": 20 * 28**2}),
    "qwen2-vl-pil": lambda: Qwen2VLImageProcessorPil(
        size={"shortest_edge": 56**2, "longest_edge": 9 * 28**2}
    ),
    "qwen2-vl patch 16": lambda: hf.Qwen2VLImageProcessor(patch_size=16, merge_size=1, temporal_patch_size=1),
    "llava square": lambda: hf.LlavaImageProcessor(do_pad=True, **CLIP),
    "llava-pil square": lambda: LlavaImageProcessorPil(do_pad=True, **CLIP),
    "llava": lambda: hf.LlavaImageProcessor(**CLIP),
}
SIZES = [
    (56, 56),
    (57, 55),
    (150, 200),
    (333, 217),
    (40, 300),
    (300, 40),
    (5, 7),
    (1, 1),
    (1, 99),
    (70, 1),
    (48, 48),
]


@pytest.mark.parametrize("name", PROCESSORS)
def test_pixel_values_are_the_processors_own(name: str) -> None:
    processor = PROCESSORS[name]()
    path = make_host_path(derive_plan(processor), processor)
    n_compared = 0
    for number, size in enumerate(SIZES):
        pixels = image(number, *size)
        pixels.flags.writeable = bool(number % 2)
        try:
            wanted = processor(Image.fromarray(pixels), return_tensors="pt")["pixel_values"]
        except (ValueError, RuntimeError):
            with pytest.raises(ValueError, match=r"aspect ratio|would be resized"):
                path.pixel_values(pixels)
            continue
        got = path.pixel_values(pixels)
        assert got.dtype == wanted.dtype and got.is_contiguous() and torch.equal(got, wanted), size
        n_compared += got.numel()
    assert n_compared > 10_000


def test_the_two_operations_that_replace_the_table_are_used_only_where_they_give_all_of_it() -> None:
    exact = hf.CLIPImageProcessor(**CLIP)
    assert make_host_path(derive_plan(exact), exact).affine is not None
    rounded = CLIPImageProcessorPil(**CLIP)  # which rescales in float64
    assert make_host_path(derive_plan(rounded), rounded).affine is None


Clip: Any = hf.CLIPImageProcessor


class OwnResize(Clip):  # type: ignore[misc]
    def resize(self, *args: Any, **kwargs: Any) -> Any:
        return super().resize(*args, **kwargs)


class OwnSteps(Clip):  # type: ignore[misc]
    def _preprocess(self, *args: Any, **kwargs: Any) -> Any:
        return super()._preprocess(*args, **kwargs)


class Mirrored(Clip):  # type: ignore[misc]
    """A processor whose steps look like transformers' own, and that does more for wide images."""

    def preprocess(self, images: Any, *args: Any, **kwargs: Any) -> Any:
        made = super().preprocess(images, *args, **kwargs)
        first = images[0] if isinstance(images, list) else images
        if first.width > 2 * first.height:
            made["pixel_values"] = made["pixel_values"].flip(3)
        return made


@pytest.mark.parametrize(
    ("processor", "reason"),
    [
        (lambda: OwnResize(**CLIP), "OwnResize has a resize of its own"),
        (lambda: OwnSteps(**CLIP), "OwnSteps has steps of its own"),
        (lambda: hf.LlavaNextImageProcessor(), "has steps of its own"),
        (lambda: hf.SiglipImageProcessor(do_pad=True), "pads to the largest image"),
        (lambda: object(), "object is built on neither"),
    ],
    ids=["resize", "steps", "llava-next", "pad", "foreign"],
)
def test_a_processor_whose_steps_cannot_be_told_has_no_plan(
    processor: Callable[[], Any], reason: str
) -> None:
    with pytest.raises(NoPlanError, match=reason):
        derive_plan(processor())


def as_processor(image_processor: Any) -> Any:
    tokenizer = tiny_models.make_tokenizer("<image>", bos=True)
    settings = {
        "patch_size": 14,
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,
    }
    return hf.LlavaProcessor(image_processor=image_processor, tokenizer=tokenizer, **settings)


def test_a_plan_that_differs_for_some_images_is_found_out_and_not_used() -> None:
    processor, cpu = as_processor(Mirrored(**CLIP)), torch.device("cpu")
    derive_plan(processor.image_processor)
    chosen = choose("auto", processor, cpu, torch.float32)
    assert chosen.path == "processor" and chosen.host is None
    assert "other pixel_values than its plan" in str(chosen.reason)
    with pytest.raises(ValueError, match=r"--preprocess cpu is not possible .* other pixel_values"):
        choose("cpu", processor, cpu, torch.float32)


def test_kernels_without_a_gpu_are_refused_with_the_reason() -> None:
    processor = as_processor(hf.CLIPImageProcessor(**CLIP))
    with pytest.raises(ValueError, match=r"--preprocess kernels is not possible .* (Triton|GPU)"):
        choose("kernels", processor, torch.device("cpu"), torch.float32)
    assert choose("auto", processor, torch.device("cpu"), torch.float32).describe() == {
        "path": "cpu",
        "mode": "torchvision",
        "reason": None,
    }


@pytest.mark.parametrize("family", ["llava", "llava-siglip", "qwen2-vl"])
def test_every_input_is_that_of_the_processor(family: str, tiny_folders: dict[str, Path]) -> None:
    quick, slow = (on_cpu(tiny_folders[family], preprocess=way) for way in ("cpu", "processor"))
    assert (quick.preprocessing.path, slow.preprocessing.path) == ("cpu", "processor")
    questions = [
        "<image>\nWhat?",
        "<image>What?",
        "Look: <image>",
        "  <image>  \n\n Ünïcode 🙂 is it?",
        "a<image>b",
    ]
    for number, question in enumerate(questions):
        pixels = image(number, 30 + 17 * number, 80 - 11 * number)
        text = quick.render(user(question))
        ours, theirs = quick.encode(text, pixels), slow.encode(text, pixels)
        assert ours.inputs.keys() == theirs.inputs.keys()
        for name, value in theirs.inputs.items():
            assert ours.inputs[name].dtype == value.dtype and torch.equal(ours.inputs[name], value), name
        assert ours.batch_key == theirs.batch_key and torch.equal(ours.image_mask, theirs.image_mask)
        n_tokens = quick.count_tokens(text, (pixels.shape[0], pixels.shape[1]))
        assert n_tokens == ours.n_tokens == theirs.n_tokens


@pytest.mark.parametrize(
    ("question", "size"),
    [("What?", (40, 90)), ("<image>\nWhat?", (2, 500)), ("<image>\n" + "x" * 200, (40, 40))],
)
def test_what_is_refused_is_refused_in_the_same_words(
    question: str, size: tuple[int, int], tiny_folders: dict[str, Path]
) -> None:
    reasons = []
    for way in ("cpu", "processor"):
        adapter = on_cpu(tiny_folders["qwen2-vl"], preprocess=way)
        with pytest.raises(RejectedSample) as refused:
            adapter.encode(adapter.render(user(question)), image(0, *size))
        reasons.append(str(refused.value))
    assert reasons[0] == reasons[1]


def dump(adapter: Adapter, photos: Path, out: Path, stop_after: int | None = None) -> None:
    seen, unseen = make_disjoint_pair(3, seed=0)
    spec = WatermarkSpec(fields=("user_id",), field_names=False, font_px=8)
    marking = PairedMarking(spec=spec, seen=tuple(seen), unseen=tuple(unseen))
    dataset = read_samples(photos, prompt="what?")
    settings: dict[str, Any] = {
        "positions": ("last", "image"),
        "batch_size": 4,
        "shard_samples": 5,
        "threads": 2,
    }
    plan = plan_dump(DumpSpec(dataset=dataset, model=adapter.spec, marking=marking, **settings), adapter)
    done = 0

    def count(n_rows: int) -> None:
        nonlocal done
        done += n_rows
        if stop_after is not None and done > stop_after:
            raise KeyboardInterrupt

    run_dump(plan, adapter, out, count)


def contents(store: Path) -> dict[str, Any]:
    """All objects of a store, less what it says of how its images were preprocessed, and the digest of that."""
    found: dict[str, Any] = dict(tree(store))
    root = json.loads((store / "zarr.json").read_text())
    del root["attributes"]["preprocess"], root["attributes"]["digests"]["zarr.json"]
    return found | {"zarr.json": root}


@pytest.mark.parametrize("family", ["llava", "qwen2-vl"])
def test_the_way_changes_no_byte_of_a_store_and_a_run_may_change_ways(
    family: str, tiny_folders: dict[str, Path], tmp_path: Path
) -> None:
    photos = save_photos(tmp_path / "photos", 6)
    quick, slow = (on_cpu(tiny_folders[family], preprocess=way) for way in ("cpu", "processor"))
    dump(slow, photos, tmp_path / "slow.zarr")
    dump(quick, photos, tmp_path / "quick.zarr")
    with pytest.raises(KeyboardInterrupt):
        dump(slow, photos, tmp_path / "both.zarr", stop_after=6)
    dump(quick, photos, tmp_path / "both.zarr")
    assert (
        contents(tmp_path / "quick.zarr")
        == contents(tmp_path / "slow.zarr")
        == contents(tmp_path / "both.zarr")
    )
    said = [
        json.loads((tmp_path / f"{n}.zarr/zarr.json").read_text())["attributes"]["preprocess"]
        for n in ("quick", "slow")
    ]
    assert said[0] == {"path": "cpu", "mode": "torchvision", "reason": None}
    assert said[1] == {"path": "processor", "mode": None, "reason": None}


def test_an_image_smaller_than_one_tap_and_one_in_a_read_only_array_are_exact() -> None:
    processor = CLIPImageProcessorPil(**CLIP)
    path = make_host_path(derive_plan(processor), processor)
    pixels = np.full((1, 1, 3), 7, np.uint8)
    pixels.flags.writeable = False
    assert torch.equal(
        path.pixel_values(pixels), processor(Image.fromarray(pixels), return_tensors="pt")["pixel_values"]
    )
