"""Images and prompts to a model's inputs, ours against its processor: `python benchmarks/bench_preprocess.py`.

Both get decoded pixels and a prompt, and give pixel_values, token ids and whatever else the model takes; every value
of them is compared. Images are scikit-image's photos and synthetic ones (smooth under noise) from 224² to 12
megapixels. Timed image by image in one thread, alternating, and all images together in threads as a dump does. Beside
it the ceiling: what decoding the same images as JPEG takes.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image

from harness import alternate, save, show
from mmextract.engine.builtin.architecture import make_tokenizer
from mmextract.engine.images import RejectedSample, decode
from mmextract.engine.preprocess_choice import check_image, choose
from mmextract.engine.samples import read_samples
from mmextract.kernels.reference import Uint8Array

hf: Any = transformers  # its annotations are wrong in too many places for mypy

SIZES = ((224, 224), (336, 448), (480, 640), (768, 1024), (1080, 1920), (3000, 4000))
Encode = Callable[[Uint8Array], Mapping[str, Any]]


def llava(image_processor: Any) -> Any:
    """A processor as LLaVA's, with 576 or 729 image tokens."""
    settings = {"patch_size": 14, "vision_feature_select_strategy": "full"}
    return hf.LlavaProcessor(image_processor=image_processor, tokenizer=make_tokenizer([]), **settings)


def qwen2_vl(image_processor: Any) -> Any:
    """A processor as Qwen2-VL's."""
    words = make_tokenizer([]).backend_tokenizer
    tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|image_pad|>", "<|video_pad|>"]})
    video_processor = hf.Qwen2VLVideoProcessor()
    return hf.Qwen2VLProcessor(
        image_processor=image_processor, tokenizer=tokenizer, video_processor=video_processor
    )


def processors() -> dict[str, Callable[[], Any]]:
    """Return every family in both of transformers' backends."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    clip = {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}}
    square = {"size": {"height": 384, "width": 384}}
    return {
        "llava": lambda: llava(hf.CLIPImageProcessor(**clip)),
        "llava-pil": lambda: llava(CLIPImageProcessorPil(**clip)),
        "llava-square": lambda: llava(hf.LlavaImageProcessor(do_pad=True, **clip)),
        "siglip": lambda: llava(hf.SiglipImageProcessor(**square)),
        "siglip-pil": lambda: llava(SiglipImageProcessorPil(**square)),
        "qwen2-vl": lambda: qwen2_vl(hf.Qwen2VLImageProcessor()),
        "qwen2-vl-pil": lambda: qwen2_vl(Qwen2VLImageProcessorPil()),
    }


def make_images(limit: int | None, largest: int) -> list[Uint8Array]:
    """Return photos and synthetic images of at most `largest` pixels, at most `limit` of each kind.

    A photo that a dump would reject is left out.
    """
    import skimage

    found = []
    for sample in read_samples(Path(skimage.__file__).parent / "data", prompt="?").samples[:limit]:
        assert sample.image is not None
        with suppress(RejectedSample):
            found.append(decode(sample.image).pixels)
    found += [check_image(*size) for size in SIZES[:limit]]
    return [pixels for pixels in found if pixels.shape[0] * pixels.shape[1] <= largest]


def ways(processor: Any) -> tuple[Encode, Encode, dict[str, Any]]:
    """Return what makes inputs of pixels, by the processor and by us, and how we do it."""
    text = f"What is in the picture? {processor.image_token} Answer in one word."
    options = {"return_tensors": "pt", "padding": False, "truncation": False}
    ours = choose("cpu", processor, torch.device("cpu"), torch.float32)
    assert ours.host is not None and ours.expander is not None
    host, expander = ours.host, ours.expander

    def by_processor(pixels: Uint8Array) -> Mapping[str, Any]:
        made: Mapping[str, Any] = processor(text=[text], images=[Image.fromarray(pixels)], **options)
        return made

    def by_plan(pixels: Uint8Array) -> Mapping[str, Any]:
        output = host.plan.geometry(*pixels.shape[:2]).window[2:]
        inputs = expander.expand(text, output, True)
        assert inputs is not None
        return {**inputs, "pixel_values": host.pixel_values(pixels)}

    return by_processor, by_plan, ours.describe()


def compare(images: Sequence[Uint8Array], theirs: Encode, ours: Encode) -> tuple[int, int]:
    """Return how many values were compared, and how many differ."""
    n_compared = n_differing = 0
    for pixels in images:
        wanted, got = theirs(pixels), ours(pixels)
        assert wanted.keys() == got.keys()
        for name, value in wanted.items():
            n_compared += value.numel()
            same = value.shape == got[name].shape and value.dtype == got[name].dtype
            n_differing += int((value != got[name]).sum()) if same else value.numel()
    return n_compared, n_differing


def measure(processor: Any, images: Sequence[Uint8Array], threads: int, repeats: int) -> dict[str, Any]:
    """Return the figures of one family."""
    theirs, ours, how = ways(processor)
    n_compared, n_differing = compare(images, theirs, ours)
    single: dict[str, list[float]] = {"processor": [], "ours": []}
    for pixels in images:
        found = alternate(
            {"processor": partial(theirs, pixels), "ours": partial(ours, pixels)}, repeats=repeats
        )
        for name, timing in found.items():
            single[name].append(timing.median)
    with ThreadPoolExecutor(threads) as executor:
        together = alternate(
            {
                "processor": lambda: list(executor.map(lambda p: len(theirs(p)), images)),
                "ours": lambda: list(executor.map(lambda p: len(ours(p)), images)),
            },
            repeats=repeats,
        )
    ratios = [mine / other for mine, other in zip(single["ours"], single["processor"], strict=True)]
    in_threads = {name: timing.median for name, timing in together.items()}
    return {
        **how,
        "values_compared": n_compared,
        "values_differing": n_differing,
        "ours_over_processor": sum(single["ours"]) / sum(single["processor"]),
        "ours_over_processor_median_image": statistics.median(ratios),
        "ours_over_processor_worst_image": max(ratios),
        "ours_over_processor_in_threads": in_threads["ours"] / in_threads["processor"],
        "images_per_second": len(images) / sum(single["ours"]),
        "images_per_second_processor": len(images) / sum(single["processor"]),
        "images_per_second_in_threads": len(images) / in_threads["ours"],
        "milliseconds": {
            f"{pixels.shape[0]}×{pixels.shape[1]} {number}": [1e3 * other, 1e3 * mine]
            for number, (pixels, other, mine) in enumerate(
                zip(images, single["processor"], single["ours"], strict=True)
            )
        },
    }


def decode_ceiling(images: Sequence[Uint8Array], repeats: int) -> dict[str, float]:
    """Return how many of the images, as JPEG of quality 90, one thread decodes in a second."""
    encoded = []
    for pixels in images:
        file = BytesIO()
        Image.fromarray(pixels).save(file, "JPEG", quality=90)
        encoded.append(file.getvalue())
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        for data in encoded:
            np.array(Image.open(BytesIO(data)).convert("RGB"))
        seconds.append(time.perf_counter() - started)
    megapixels = sum(pixels.shape[0] * pixels.shape[1] for pixels in images) / 1e6
    middle = statistics.median(seconds)
    return {"images_per_second": len(images) / middle, "megapixels_per_second": megapixels / middle}


def main() -> None:
    """Run the families asked for."""
    families = processors()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("families", nargs="*", choices=[[], *families], help="all if none is named")
    parser.add_argument("--limit", type=int, help="take the first N photos and the first N synthetic images")
    parser.add_argument("--largest", type=int, default=13_000_000, help="leave out images of more pixels")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the figures there too")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    images = make_images(arguments.limit, arguments.largest)
    results: dict[str, Any] = {
        name: measure(families[name](), images, arguments.threads, arguments.repeats)
        for name in arguments.families or families
    }
    ceiling = decode_ceiling(images, arguments.repeats)
    columns = ("family", "mode", "compared", "differing", "÷ processor", "median image", "worst image")
    show(
        f"{len(images)} images to inputs, one thread, ours against the processor",
        (*columns, f"÷ in {arguments.threads} threads", "images/s", "÷ decode"),
        [
            (
                name,
                found["mode"],
                found["values_compared"],
                found["values_differing"],
                found["ours_over_processor"],
                found["ours_over_processor_median_image"],
                found["ours_over_processor_worst_image"],
                found["ours_over_processor_in_threads"],
                found["images_per_second"],
                found["images_per_second"] / ceiling["images_per_second"],
            )
            for name, found in results.items()
        ],
    )
    save(arguments.json, {"n_images": len(images), "decode": ceiling, "families": results})


if __name__ == "__main__":
    main()
