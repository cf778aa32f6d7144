"""Which files make up a checkpoint or a LoRA, in a folder or on Hugging Face's hub, and what their bytes are.

Only safetensors, or one GGUF file, count as weights; pickle is never read. This module knows nothing about
models, processors or devices: it opens no tensor.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_FILE = "adapter_model.safetensors"
FINETUNE_RECORD = "finetune.json"
"""What `mmextract finetune` leaves beside a LoRA: it names the base that the LoRA was trained on."""
METADATA_PATTERNS = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken")
PICKLE_PATTERNS = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


@dataclass(frozen=True, kw_only=True)
class Weights:
    """The files that hold a checkpoint's tensors."""

    folder: Path
    files: tuple[str, ...]
    """Names in the folder, sorted."""
    gguf: str | None = None
    """The GGUF file, if that is what they are."""

    def digest(self) -> str:
        """Return the xxh3-128 of the files' names, sizes and bytes, as hex; reads them all, in pieces."""
        return _digest(self, tuple((self.folder / name).stat().st_mtime_ns for name in self.files))


@lru_cache(maxsize=8)  # a LoRA's base is hashed to see that it is the right one, and again for the store
def _digest(weights: Weights, _modified: tuple[int, ...]) -> str:
    import xxhash

    digest = xxhash.xxh3_128()
    for name in weights.files:
        path = weights.folder / name
        digest.update(f"{name}\0{path.stat().st_size}\0".encode())
        with path.open("rb") as file:
            while piece := file.read(8 << 20):
                digest.update(piece)
    return digest.hexdigest()


def find_folder(name: str, revision: str | None, *, with_code: bool) -> tuple[Path, str | None]:
    """Return the folder of a model, downloading what mmextract reads of a hub id, and the hub's commit.

    Raises LookupError if there is neither such a folder nor such a hub id.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        if revision is not None:
            raise ValueError(f"{name} is a folder and has no revision {revision!r}: drop --revision")
        return path, None
    if path.exists():
        raise ValueError(f"{name} is a file; expected the folder that holds the model")
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise LookupError(f"no model folder at {name}")
    return _download(name, revision, with_code)


def _download(name: str, revision: str | None, with_code: bool) -> tuple[Path, str]:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    patterns = [*METADATA_PATTERNS, *(["*.py"] if with_code else [])]
    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
        shards = _indexed_files(folder) or [SINGLE_FILE, ADAPTER_FILE]
        # by commit, so that both halves are of one state even if the branch moves in between
        snapshot_download(name, revision=folder.name, allow_patterns=shards)
    except (OSError, HFValidationError) as error:
        raise LookupError(f"{name!r} is no folder here, and the hub does not give it: {error}") from error
    return folder, folder.name


def _indexed_files(folder: Path) -> list[str]:
    index = folder / INDEX_FILE
    if not index.is_file():
        return []
    try:
        names = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is not a safetensors index with a weight_map") from error
    if outside := [name for name in names if Path(name).name != name]:
        raise ValueError(f"{index} points outside its folder: {outside[0]!r}")
    return names


def find_weights(folder: Path) -> Weights:
    """Return the files that hold the weights: safetensors or, where there are none, the one GGUF file.

    Raises LookupError if there are none, ValueError if there is only pickle, or the choice is not clear.
    """
    names = [SINGLE_FILE] if (folder / SINGLE_FILE).is_file() else _indexed_files(folder)
    if (folder / ADAPTER_CONFIG).is_file():
        base = json.loads((folder / ADAPTER_CONFIG).read_text("utf-8")).get("base_model_name_or_path")
        if names:  # transformers would quietly load the LoRA's base instead
            raise ValueError(
                f"{folder} holds a whole model and a LoRA: move {ADAPTER_CONFIG} into a folder of its own"
            )
        raise ValueError(f"{folder} is a LoRA: pass it as --adapter, and its base ({base}) as --model")
    if names:
        _check_safetensors(folder, names)
        return Weights(folder=folder, files=tuple(names))
    gguf = sorted(path.name for path in folder.glob("*.gguf"))
    if len(gguf) == 1:
        if find_spec("gguf") is None:
            raise ValueError(f"{folder / gguf[0]} needs the gguf package: pip install 'mmextract[gguf]'")
        return Weights(folder=folder, files=(gguf[0],), gguf=gguf[0])
    if gguf:
        raise ValueError(
            f"{folder} holds {len(gguf)} GGUF files ({', '.join(gguf[:4])}): keep one in a folder"
        )
    if pickled := sorted(path.name for pattern in PICKLE_PATTERNS for path in folder.glob(pattern)):
        raise ValueError(
            f"{folder} holds weights only as pickle ({', '.join(pickled[:4])}), which can run any "
            "code when it is read. If you trust it, convert it once: load it with from_pretrained(…, "
            "use_safetensors=False) and write it with save_pretrained(NEW_FOLDER)"
        )
    raise LookupError(
        f"{folder} holds no weights: expected {SINGLE_FILE}, or {INDEX_FILE} and the files it names"
    )


def _check_safetensors(folder: Path, names: Iterable[str]) -> None:
    from safetensors import SafetensorError, safe_open

    for name in names:
        if not (folder / name).is_file():
            raise LookupError(f"{folder / name} is missing: {INDEX_FILE} names it")
        try:
            with safe_open(folder / name, "pt"):
                pass
        except SafetensorError as error:
            raise ValueError(f"{folder / name} is not a whole safetensors file: {error}") from error


def find_adapter(folder: Path) -> tuple[Weights, dict[str, Any]]:
    """Return the file and the configuration of a LoRA as peft saves it.

    Raises LookupError for what is missing, ValueError for another kind of adapter.
    """
    if not (folder / ADAPTER_CONFIG).is_file():
        raise LookupError(f"{folder} holds no {ADAPTER_CONFIG}: expected a LoRA as peft saves it")
    if not (folder / ADAPTER_FILE).is_file():
        pickled = sorted(path.name for pattern in PICKLE_PATTERNS for path in folder.glob(pattern))
        only = f" (only {', '.join(pickled)}, which is pickle)" if pickled else ""
        raise LookupError(
            f"{folder} holds no {ADAPTER_FILE}{only}: save the LoRA with peft's save_pretrained"
        )
    _check_safetensors(folder, [ADAPTER_FILE])
    config = json.loads((folder / ADAPTER_CONFIG).read_text("utf-8"))
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{folder} is a {config.get('peft_type')} adapter; only LoRA can be loaded")
    return Weights(folder=folder, files=(ADAPTER_FILE,)), config


def check_base(adapter: Weights, base: Weights) -> None:
    """Raise ValueError for a LoRA of `mmextract finetune` that was trained on other weights than `base`.

    A LoRA of the same shape loads into any base of its architecture, and means nothing there. One that says nothing of
    its base is taken on trust.
    """
    record = adapter.folder / FINETUNE_RECORD
    if not record.is_file():
        return
    try:
        model = json.loads(record.read_text("utf-8"))["run"]["model"]
        name, expected = model["name"], model["weights"]["xxh3_128"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{record} is not the record of a fine-tune: remove or restore it") from error
    if base.digest() != expected:
        raise ValueError(
            f"the LoRA in {adapter.folder} was trained on another base: on {name} with weights {expected}, and "
            f"{base.folder} has {base.digest()}. Give that base as --model"
        )
