"""One adapter for every model: prompt → inputs → forward pass, and where its decoder blocks are.

Families are told by their structure (a decoder with as many blocks as the config says, an image token in the
config), never by name. This module knows nothing about which layers or tokens are wanted, nor about stores.
"""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from mmextract.engine.images import RejectedSample
from mmextract.engine.loading import Loaded, ModelSpec, choose_device, load_model
from mmextract.engine.preprocess import Size
from mmextract.engine.preprocess_choice import Preprocessing, choose
from mmextract.engine.preprocess_device import Packed, Waiting
from mmextract.engine.prompts import Answered, ChatFormat
from mmextract.engine.samples import Turn
from mmextract.engine.watermark import Stamp
from mmextract.kernels.reference import Uint8Array

__all__ = ["Adapter", "Encoded", "ModelSpec", "load"]

PACKAGES = ("torch", "torchvision", "transformers", "tokenizers", "peft", "pillow")
"""Whose versions can change the numbers."""


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """One sample as the model takes it."""

    inputs: dict[str, torch.Tensor]
    """What the processor returns for a batch of one, on the CPU; `input_ids` is int64 [1, T]. Without pixel_values
    if there is an image in waiting."""
    n_tokens: int
    """T, image tokens included."""
    image_mask: torch.Tensor
    """bool [T], true at image tokens."""
    waiting: Waiting | None = None
    """Its image, if pixel_values are made of it on the device, when its batch runs."""
    pixel_shape: tuple[int, ...] | None = None
    """The shape of the pixel_values of an image in waiting."""

    @property
    def batch_key(self) -> Hashable:
        """Equal for samples that can share a forward pass: same length, inputs and trailing shapes."""
        shapes = {name: tuple(value.shape[1:]) for name, value in self.inputs.items()}
        if self.pixel_shape is not None:
            shapes["pixel_values"] = self.pixel_shape[1:]
        return self.n_tokens, tuple(sorted(shapes.items()))


class Adapter:
    """What the engine needs of a model. Make one with `load`.

    `render` and `encode` may be called from any number of threads; `forward` from one at a time.
    """

    def __init__(self, loaded: Loaded) -> None:
        self.spec = loaded.spec
        self.model = loaded.model
        """The whole transformers model, LM head included."""
        self._loaded = loaded
        text_config = self.model.config.get_text_config()
        text_config.output_hidden_states = False  # a config may ask for all of them to be kept
        self.layers = find_decoder_layers(self.model)
        """The decoder blocks, in order."""
        self.n_layers = len(self.layers)
        self.hidden_size: int = text_config.hidden_size
        embedding = self.model.get_input_embeddings().weight
        self.dtype: torch.dtype = embedding.dtype
        """Of the hidden states."""
        # accelerate keeps offloaded weights on `meta`, and moves inputs by itself
        self.device: torch.device = choose_device("auto") if embedding.is_meta else embedding.device
        """Where inputs go; a model on several devices passes its states on from there."""
        self.max_tokens: int | None = getattr(text_config, "max_position_embeddings", None)
        self._image_token_id = _image_token_id(self.model.config) if loaded.processor is not None else None
        self.has_vision = self._image_token_id is not None
        """Whether it takes images."""
        image_token = (
            loaded.tokenizer.convert_ids_to_tokens(self._image_token_id) if self.has_vision else None
        )
        self._chat = ChatFormat(loaded.tokenizer, loaded.processor, image_token)
        self.preprocessing = Preprocessing(path="processor")
        """How images become pixel_values."""
        if self.has_vision:
            asked = (loaded.spec.preprocess, loaded.processor, self.device, self.dtype)
            self.preprocessing = choose(*asked)
        self._base = self.model.base_model
        self._takes = frozenset(inspect.signature(self._base.forward).parameters)

    def render(self, turns: Sequence[Turn]) -> str:
        """Return the prompt of a conversation, see `ChatFormat.render`. Raises RejectedSample."""
        return self._chat.render(turns)

    def answered(self, turns: Sequence[Turn], answer: str) -> Answered:
        """Return a conversation with its answer, see `ChatFormat.answered`. Raises RejectedSample."""
        return self._chat.answered(turns, answer)

    def tokenize(self, text: str) -> list[int]:
        """Return the token ids of a text as `encode` has them, but with the image's placeholder not expanded."""
        adds = self._adds_special_tokens(text)
        ids: list[int] = self._loaded.tokenizer(text, add_special_tokens=adds, truncation=False).input_ids
        return ids

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        return self._loaded.tokenizer

    @property
    def folder(self) -> Path:
        """Where the checkpoint lies."""
        return self._loaded.weights.folder

    def encode(self, text: str, pixels: Uint8Array | None, stamp: Stamp | None = None) -> Encoded:
        """Turn a rendered prompt and its image into the model's inputs, without padding or truncation.

        text: from `render`. pixels: uint8 [H, W, 3], or None for a sample without image; `stamp` is laid on them.
        Raises RejectedSample for an image without a place in the text or the other way round, for what the processor
        refuses (such as an image of an extreme shape), and for a prompt that is longer than the model takes.
        """
        if pixels is not None and not self.has_vision:
            raise RejectedSample("it has an image, but this model takes none")
        text_inputs = None if pixels is None else self._expand(text, (pixels.shape[0], pixels.shape[1]))
        if pixels is not None and text_inputs is not None:
            return self._with_pixels(self._checked(text_inputs, True), pixels, stamp)
        marked = pixels if pixels is None or stamp is None else stamp.on(pixels)
        return self._checked(self._process(text, marked), pixels is not None)

    def count_tokens(self, text: str, size: Size | None) -> int:
        """Return how many tokens a rendered prompt has with an image of (height, width). Raises as `encode` does."""
        text_inputs = None if size is None else self._expand(text, size)
        if text_inputs is not None:
            return self._checked(text_inputs, True).n_tokens
        return self.encode(text, None if size is None else np.zeros((*size, 3), np.uint8)).n_tokens

    def _expand(self, text: str, size: Size) -> dict[str, torch.Tensor] | None:
        """Return the inputs less pixel_values of a prompt with an image of this size; None: ask the processor."""
        chosen = self.preprocessing
        if chosen.host is None or chosen.expander is None or not chosen.expander.takes(text):
            return None
        try:
            output = chosen.host.plan.geometry(*size).window[2:]
        except ValueError as error:
            raise _refusal(error) from error
        return chosen.expander.expand(text, output, self._adds_special_tokens(text))

    def _with_pixels(self, encoded: Encoded, pixels: Uint8Array, stamp: Stamp | None) -> Encoded:
        """Add pixel_values, or the image that they are made of later."""
        host, device = self.preprocessing.host, self.preprocessing.device
        assert host is not None
        if device is not None and (waiting := device.wait(pixels, stamp)) is not None:
            return replace(encoded, waiting=waiting, pixel_shape=device.shape(waiting))
        values = host.pixel_values(pixels if stamp is None else stamp.on(pixels))
        return replace(encoded, inputs={**encoded.inputs, "pixel_values": values})

    def _process(self, text: str, pixels: Uint8Array | None) -> dict[str, Any]:
        """Call the processor, or the tokenizer of a text model."""
        options: dict[str, Any] = {"padding": False, "truncation": False, "return_tensors": "pt"}
        options["add_special_tokens"] = self._adds_special_tokens(text)
        processor = self._loaded.processor
        if processor is None:
            return self._taken(self._loaded.tokenizer([text], **options))
        # as a Pillow image: an array of 3 rows would be taken for one with the channels first
        images = None if pixels is None else [Image.fromarray(pixels)]
        try:
            return self._taken(processor(text=[text], images=images, **options))
        except ValueError as error:
            raise _refusal(error) from error

    def _taken(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in raw.items() if name != "token_type_ids" or name in self._takes}

    def pack(self, batch: Sequence[Encoded]) -> Packed | None:
        """Lay out a batch's images in waiting for the device; any thread may do so before `collate`."""
        device, waiting = self.preprocessing.device, [encoded.waiting for encoded in batch if encoded.waiting]
        return device.pack(waiting) if device is not None and waiting else None

    def collate(self, batch: Sequence[Encoded], packed: Packed | None = None) -> dict[str, torch.Tensor]:
        """Join samples of one `batch_key` along dimension 0; nothing is ever padded.

        For patches [n, d] (Qwen2-VL) that puts the images' patches one after another, with one row of
        `image_grid_thw` an image; for pixels [1, C, H, W] (LLaVA) it stacks them. packed: from `pack`, if it was
        called before. Images in waiting become pixel_values on the device. Raises ValueError for none, or for
        samples that cannot share a forward pass; torch.OutOfMemoryError if the device has no room for them.
        """
        if len({encoded.batch_key for encoded in batch}) != 1:
            lengths = sorted({encoded.n_tokens for encoded in batch})
            raise ValueError(f"a batch needs samples of one batch_key, got {len(batch)} of {lengths} tokens")
        names = [name for name in batch[0].inputs if name != "pixel_values"]
        joined = {name: torch.cat([encoded.inputs[name] for encoded in batch]) for name in names}
        packed = packed or self.pack(batch)
        if packed is not None:
            assert self.preprocessing.device is not None
            joined["pixel_values"] = _merge(batch, self.preprocessing.device.run(packed))
        elif "pixel_values" in batch[0].inputs:
            joined["pixel_values"] = torch.cat([encoded.inputs["pixel_values"] for encoded in batch])
        return joined

    def forward(self, inputs: Mapping[str, torch.Tensor]) -> None:
        """Run the model without LM head and KV cache, for the sake of the hooks on it.

        inputs: from `collate`. They are moved to the model's device, floating point ones also to its dtype.
        """
        moved = {
            name: value.to(self.device, self.dtype if value.is_floating_point() else None, non_blocking=True)
            for name, value in inputs.items()
        }
        with torch.inference_mode():
            self._base(**moved, use_cache=False)

    def describe(self) -> dict[str, Any]:
        """Return everything about the model that decides the numbers, JSON-able and free of local paths.

        The first call reads the weight files once more, for their hash.
        """
        return copy.deepcopy(self._description)

    @cached_property
    def _description(self) -> dict[str, Any]:
        loaded, config = self._loaded, self.model.config
        adapter = loaded.adapter_weights
        return {
            "name": loaded.name,
            "commit": loaded.commit,
            "class": type(self.model).__name__,
            "weights": {"files": list(loaded.weights.files), "xxh3_128": loaded.weights.digest()},
            "adapter": adapter
            and {"config": _without_paths(loaded.adapter_config), "xxh3_128": adapter.digest()},
            "config": _without_paths(json.loads(config.to_json_string(use_diff=False))),
            "dtype": str(self.dtype).removeprefix("torch."),
            "attention": getattr(config.get_text_config(), "_attn_implementation", None),
            "processor": loaded.processor and _describe_processor(loaded.processor),
            "tokenizer": _describe_tokenizer(loaded.tokenizer),
            "prompt": self._chat.describe(),
            "versions": {name: _version(name) for name in PACKAGES},
        }

    def _adds_special_tokens(self, text: str) -> bool:
        """Do as `apply_chat_template(tokenize=True)` does, so that no prompt begins with two BOS tokens.

        A tokenizer's adds nothing to what the template wrote; a processor's does, unless the text begins with
        BOS.
        """
        if self._chat.template is not None and not self.has_vision:
            return False
        bos = self._loaded.tokenizer.bos_token
        return bos is None or not text.startswith(bos)

    def _checked(self, inputs: dict[str, Any], has_image: bool) -> Encoded:
        if odd := [name for name, value in inputs.items() if not isinstance(value, torch.Tensor)]:
            raise ValueError(
                f"the processor returned {odd[0]} as {type(inputs[odd[0]]).__name__}, not as a tensor"
            )
        token_ids = inputs["input_ids"][0]
        n_tokens = len(token_ids)
        if not n_tokens:
            raise RejectedSample("its prompt has no tokens")
        if self.max_tokens is not None and n_tokens > self.max_tokens:
            raise RejectedSample(
                f"its prompt has {n_tokens} tokens, and the model takes at most {self.max_tokens}"
            )
        image_mask = torch.zeros(n_tokens, dtype=torch.bool)
        if self._image_token_id is not None:
            image_mask = token_ids == self._image_token_id
        if bool(image_mask.any()) != has_image:
            raise RejectedSample(
                "it has an image, but its text has no place for it"
                if has_image
                else "its text wants an image"
            )
        return Encoded(inputs=inputs, n_tokens=n_tokens, image_mask=image_mask)


def _refusal(error: ValueError) -> RejectedSample:
    return RejectedSample(f"the model's processor refuses it: {error}")


def _merge(batch: Sequence[Encoded], made: torch.Tensor) -> torch.Tensor:
    """Put pixel_values that were made on the device where the batch has images in waiting, among those it has."""
    if all(encoded.waiting for encoded in batch):
        return made
    parts, done = [], 0
    for encoded in batch:
        if encoded.waiting is None:
            parts.append(encoded.inputs["pixel_values"].to(made.device, made.dtype))
            continue
        assert encoded.pixel_shape is not None
        parts.append(made[done : done + encoded.pixel_shape[0]])
        done += encoded.pixel_shape[0]
    return torch.cat(parts)


def load(spec: ModelSpec) -> Adapter:
    """Load a model and everything that belongs to it, see `loading.load_model`.

    Raises LookupError or ValueError, saying which file, key or part of the model is not as expected.
    """
    return Adapter(load_model(spec))


def find_decoder_layers(model: Any) -> nn.ModuleList:
    """Return a transformers model's decoder blocks, found by structure.

    They are the decoder's list of as many modules as its config has layers. Raises LookupError if there is no
    such list, or several.
    """
    n_layers = model.config.get_text_config().num_hidden_layers
    decoder = model.get_decoder()
    layers = getattr(decoder, "layers", None)
    if isinstance(layers, nn.ModuleList) and len(layers) == n_layers:
        return layers
    lists = {name: m for name, m in decoder.named_modules() if isinstance(m, nn.ModuleList)}
    fitting = [m for m in lists.values() if len(m) == n_layers]
    if len(fitting) != 1:
        found = ", ".join(f"{name} ({len(m)})" for name, m in lists.items()) or "none"
        raise LookupError(
            f"cannot tell the decoder blocks of {type(model).__name__}: expected one list of {n_layers} "
            f"modules in its {type(decoder).__name__}, found {found}"
        )
    return fitting[0]


def _image_token_id(config: Any) -> int:
    for name in ("image_token_id", "image_token_index"):
        token_id = getattr(config, name, None)
        if isinstance(token_id, int):
            return token_id
    raise LookupError(
        f"the {type(config).__name__} has no image_token_id, so image tokens cannot be told from text"
    )


def _describe_processor(processor: Any) -> dict[str, Any]:
    images = processor.image_processor
    name = type(images).__name__
    backend = getattr(images, "backend", None) or ("torchvision" if name.endswith("Fast") else "pil")
    return {
        "class": type(processor).__name__,
        "image_processor": name,
        "image_backend": backend,
        "config": _without_paths(json.loads(processor.to_json_string())),
    }


def _describe_tokenizer(tokenizer: Any) -> dict[str, Any]:
    import xxhash

    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = json.dumps(sorted(tokenizer.get_vocab().items())) if backend is None else backend.to_str()
    return {
        "class": type(tokenizer).__name__,
        "xxh3_128": xxhash.xxh3_128(content.encode()).hexdigest(),
        "padding_side": tokenizer.padding_side,
    }


def _without_paths(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_paths(item) for key, item in value.items() if "name_or_path" not in key}
    return [_without_paths(item) for item in value] if isinstance(value, list) else value


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
