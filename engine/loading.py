"""From a folder or hub id to a transformers model, its processor and tokenizer, with nothing left to chance.

Weights come from safetensors (or one GGUF file), never from pickle. Every parameter of the model must be in
the checkpoint and every tensor of the checkpoint in the model. This module knows nothing about prompts,
samples, layers or hidden states.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mmextract.engine.checkpoints import Weights, check_base, find_adapter, find_folder, find_weights

DTYPES = ("auto", "float32", "float16", "bfloat16")
PREPROCESS = ("auto", "processor", "cpu", "kernels")

PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt"),
    *("spiece.model", "sentencepiece.bpe.model", "tekken.json", "*.tiktoken"),
)


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """Which model to load, and how."""

    model: str
    """A folder, or the id of a model on Hugging Face's hub."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    adapter: str | None = None
    """A LoRA made by peft: a folder or a hub id."""
    dtype: str = "auto"
    """One of DTYPES; auto is what the checkpoint says."""
    device: str = "auto"
    """A torch device; auto is cuda where there is one, else cpu."""
    device_map: str | None = None
    """accelerate's way of spreading one model over devices, such as `auto`."""
    attn_implementation: str | None = None
    """Such as `eager`, `sdpa` or `flash_attention_2`; None is transformers' own choice."""
    trust_remote_code: bool = False
    """Run Python files that come with the model."""
    preprocess: str = "auto"
    """One of PREPROCESS: how images become pixel_values, which are the same in each way."""

    def __post_init__(self) -> None:
        if not self.model:
            raise ValueError("expected a model folder or a hub id, got an empty string")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        if self.preprocess not in PREPROCESS:
            raise ValueError(f"preprocess must be one of {', '.join(PREPROCESS)}, got {self.preprocess!r}")
        if self.device_map is not None and self.device != "auto":
            raise ValueError(
                f"give either a device or a device map, got {self.device!r} and {self.device_map!r}"
            )
        if self.device != "auto":
            try:
                torch.device(self.device)
            except RuntimeError as error:
                raise ValueError(f"device must be auto, cpu, cuda or cuda:N, got {self.device!r}") from error


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A model with all that belongs to it."""

    spec: ModelSpec
    name: str
    """The hub id, or the folder's name without its path."""
    commit: str | None
    """Commit of a hub id; None for a folder."""
    model: Any
    """A transformers PreTrainedModel in evaluation mode, with the LoRA's layers in place if there is one."""
    tokenizer: Any
    processor: Any | None
    """None for a text model."""
    weights: Weights
    adapter_weights: Weights | None = None
    adapter_config: dict[str, Any] = field(default_factory=dict)


def load_model(spec: ModelSpec) -> Loaded:
    """Load everything that `spec` names.

    A local folder is never looked up on the network. Raises LookupError for what is not there, ValueError for
    what is there and cannot be used; both say which file or key, and what to do.
    """
    folder, commit = find_folder(spec.model, spec.revision, with_code=spec.trust_remote_code)
    weights = find_weights(folder)
    adapter_weights: Weights | None = None
    adapter_config: dict[str, Any] = {}
    if spec.adapter is not None:
        adapter_weights, adapter_config = find_adapter(find_folder(spec.adapter, None, with_code=False)[0])
        check_base(adapter_weights, weights)
    options: dict[str, Any] = {"trust_remote_code": spec.trust_remote_code, "local_files_only": True}
    if weights.gguf is not None:
        options["gguf_file"] = weights.gguf
    config = _load_config(folder, options)
    auto_class = _auto_class(config)
    processor, tokenizer = _load_processor(folder, auto_class.__name__, options)
    _settle(tokenizer)
    device = choose_device(spec.device)
    model = _load_weights(auto_class, config, weights, spec, device, options)
    if adapter_weights is not None:
        model = _add_lora(model, adapter_weights)
    if spec.device_map is None:
        model = model.to(device)
    return Loaded(
        spec=spec,
        name=spec.model if commit is not None else folder.resolve().name,
        commit=commit,
        model=model.eval().requires_grad_(False),
        tokenizer=tokenizer,
        processor=processor,
        weights=weights,
        adapter_weights=adapter_weights,
        adapter_config=adapter_config,
    )


def _load_config(folder: Path, options: dict[str, Any]) -> Any:
    from transformers import AutoConfig

    if "gguf_file" not in options and not (folder / "config.json").is_file():
        raise LookupError(f"{folder} holds no config.json, which says what kind of model it is")
    return _from_pretrained(AutoConfig, folder, options)


def _from_pretrained(auto_class: Any, folder: Path, options: dict[str, Any], **more: Any) -> Any:
    try:
        return auto_class.from_pretrained(folder, **options, **more)
    except ValueError as error:
        if not options["trust_remote_code"] and "trust_remote_code" in str(error):
            raise ValueError(
                f"{folder} needs its own Python files to be run: read them, and pass --trust-remote-code "
                "if you trust them"
            ) from error
        raise
    except OSError as error:
        if error.errno is not None:
            raise  # the disk's; transformers' own have none, and mean that a file is not as it should be
        raise ValueError(f"{folder} cannot be loaded: {error}") from error


def _auto_class(config: Any) -> Any:
    """Models that read images have an image-text class; all others must be causal language models."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    own_code = getattr(config, "auto_map", None) or {}
    if type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING or "AutoModelForImageTextToText" in own_code:
        return AutoModelForImageTextToText
    return AutoModelForCausalLM


def _load_processor(folder: Path, auto_class: str, options: dict[str, Any]) -> tuple[Any | None, Any]:
    from transformers import AutoProcessor, AutoTokenizer
    from transformers.utils.import_utils import is_torchvision_available

    if "gguf_file" not in options and not any(any(folder.glob(name)) for name in TOKENIZER_FILES):
        raise LookupError(f"{folder} holds no tokenizer: expected {TOKENIZER_FILES[0]}")
    if auto_class != "AutoModelForImageTextToText":
        return None, _from_pretrained(AutoTokenizer, folder, options)
    if not any((folder / name).is_file() for name in PROCESSOR_FILES):
        raise LookupError(f"{folder} holds no image processor: expected {' or '.join(PROCESSOR_FILES)}")
    try:
        processor = _from_pretrained(AutoProcessor, folder, options)
    except (AttributeError, ImportError) as error:
        if is_torchvision_available():
            raise
        raise ValueError(f"the processor in {folder} needs torchvision: pip install torchvision") from error
    if not hasattr(processor, "image_processor") or not hasattr(processor, "tokenizer"):
        raise LookupError(
            f"{folder} gives a {type(processor).__name__}, not a processor of images and text: "
            f"expected {PROCESSOR_FILES[0]} with its processor_class"
        )
    if getattr(processor, "patch_size", 0) is None:
        raise ValueError(
            f"{folder} does not say how many tokens an image takes: set patch_size and "
            f"vision_feature_select_strategy in {PROCESSOR_FILES[0]} as in config.json"
        )
    return processor, processor.tokenizer


def _settle(tokenizer: Any) -> None:
    """Make the first call that all later ones are like.

    A fast tokenizer changes its settings when a call asks for others than the one before (such as no truncation, if
    it was saved with some). Two threads may encode at once, but not change settings: that raises `Already borrowed`.
    """
    tokenizer([""], padding=False, truncation=False)


def choose_device(name: str) -> torch.device:
    """Return the torch device that a user named; auto is cuda where there is one. Raises ValueError."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"there is no {name} here: torch sees {torch.cuda.device_count()} CUDA devices")
    return device


def _load_weights(
    auto_class: Any,
    config: Any,
    weights: Weights,
    spec: ModelSpec,
    device: torch.device,
    options: dict[str, Any],
) -> Any:
    more: dict[str, Any] = {} if weights.gguf is not None else {"use_safetensors": True}
    if spec.attn_implementation is not None:
        more["attn_implementation"] = spec.attn_implementation
    if spec.device_map is not None:
        more["device_map"] = spec.device_map
    elif device.type == "cuda":
        more["device_map"] = {"": device}  # straight to the device, with no second copy on the host
    dtype = "auto" if spec.dtype == "auto" else getattr(torch, spec.dtype)
    # mismatched sizes are let through to be reported, and refused below
    more |= {"config": config, "dtype": dtype, "output_loading_info": True, "ignore_mismatched_sizes": True}
    try:
        model, report = _from_pretrained(auto_class, weights.folder, options, **more)
    except ImportError as error:  # of an attention or a quantisation that is not installed
        raise ValueError(f"{weights.folder} cannot be loaded as asked: {error}") from error
    _check_report(weights.folder, type(model).__name__, report)
    return model


def _check_report(folder: Path, model_class: str, report: dict[str, Any]) -> None:
    problems = [f"{name} has shape {a}, expected {b}" for name, a, b in sorted(report["mismatched_keys"])]
    missing, unexpected = sorted(report["missing_keys"]), sorted(report["unexpected_keys"])
    if missing:
        problems.append(f"{len(missing)} tensors are missing ({_few(missing)})")
    if unexpected:
        problems.append(f"{len(unexpected)} tensors have no place in the model ({_few(unexpected)})")
    if problems:
        raise ValueError(
            f"the weights in {folder} do not fit its config.json ({model_class}): {'; '.join(problems[:4])}. "
            "Nothing is filled with random numbers here: get the checkpoint that belongs to this config"
        )


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (", …" if len(names) > 4 else "")


def _add_lora(model: Any, weights: Weights) -> Any:
    """Put the LoRA's layers into the model, unmerged.

    Merging would round W + BA to the model's dtype. In bfloat16 that wipes out changes below 1/256 of a
    weight: the very trace of fine-tuning that is looked for. Unmerged, the states are those of peft's own
    PeftModel.
    """
    from peft import PeftConfig, PeftModel

    config = PeftConfig.from_pretrained(str(weights.folder))
    config.inference_mode = True
    try:
        with warnings.catch_warnings():  # peft asks transformers for it by its old name
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            wrapped = PeftModel(model, config)
        key_mapping = getattr(model, "_checkpoint_conversion_mapping", {})
        result = wrapped.load_adapter(weights.folder, "default", torch_device="cpu", key_mapping=key_mapping)
    except (ValueError, KeyError, RuntimeError) as error:
        raise ValueError(f"the LoRA in {weights.folder} does not fit this model: {error}") from error
    if wrong := sorted([*result.missing_keys, *result.unexpected_keys]):
        raise ValueError(
            f"the LoRA in {weights.folder} was made for another model: {len(result.missing_keys)} of its "
            f"tensors are missing and {len(result.unexpected_keys)} have no place in this one ({_few(wrong)})"
        )
    return wrapped.get_base_model()
