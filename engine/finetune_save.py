"""The result of a fine-tune as files that every other tool loads: a LoRA as peft saves it, or a whole model.

Safetensors only. This module knows nothing about training.
"""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

from mmextract.engine.checkpoints import ADAPTER_CONFIG, ADAPTER_FILE, FINETUNE_RECORD, METADATA_PATTERNS
from mmextract.engine.files import flush_folder, flush_tree
from mmextract.engine.finetune_model import Trainee
from mmextract.engine.finetune_spec import FinetuneSpec


def save_result(out: Path, trainee: Trainee, spec: FinetuneSpec) -> None:
    """Write the trained weights into `out`, beside what is there: aside first, then each file into its place."""
    aside = out / ".result"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    if trainee.peft_model is None:
        _save_model(aside, trainee)
    else:
        _save_lora(aside, trainee, spec)
    flush_tree(aside)
    for path in sorted(aside.iterdir(), key=lambda path: path.name in (ADAPTER_CONFIG, "config.json")):
        path.replace(out / path.name)
    aside.rmdir()
    flush_folder(out)


def snapshot_folder(out: Path, step: int) -> Path:
    """Return where the model as it was after `step` steps lies."""
    return out / f"step-{step}"


def save_snapshot(out: Path, step: int, trainee: Trainee, spec: FinetuneSpec) -> None:
    """Write the weights into a folder of their own in `out`, with its record, whole or not at all.

    One that is there stays: a run that goes on from an earlier checkpoint comes by the same weights again.
    """
    place = snapshot_folder(out, step)
    if place.is_dir():
        return
    aside = out / ".snapshot"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    shutil.copyfile(out / FINETUNE_RECORD, aside / FINETUNE_RECORD)
    save_result(aside, trainee, spec)
    aside.replace(place)
    flush_folder(out)


def require_snapshots(out: Path, spec: FinetuneSpec, n_done: int) -> None:
    """Raise ValueError for a snapshot that training has passed without taking it."""
    for step in spec.snapshots:
        if step <= n_done and not snapshot_folder(out, step).is_dir():
            raise ValueError(
                f"{out} is past step {step} and kept no snapshot of it: remove {out}, or leave the snapshot out"
            )


def _save_lora(folder: Path, trainee: Trainee, spec: FinetuneSpec) -> None:
    assert trainee.peft_model is not None
    config = trainee.peft_model.peft_config["default"]
    config.base_model_name_or_path = spec.model.model
    with warnings.catch_warnings():  # peft looks for the base's vocabulary on the hub, to compare sizes
        warnings.filterwarnings("ignore", "Could not find a config file in")
        trainee.peft_model.save_pretrained(str(folder), save_embedding_layers=False)
    for path in folder.iterdir():
        if path.name not in (ADAPTER_CONFIG, ADAPTER_FILE):
            path.unlink()
    path = folder / ADAPTER_CONFIG
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")), indent=2, sort_keys=True), "utf-8")


def _save_model(folder: Path, trainee: Trainee) -> None:
    """Save weights and configuration; tokenizer, processor and template are the base's own files."""
    trainee.adapter.model.save_pretrained(folder)
    for pattern in METADATA_PATTERNS:
        for path in trainee.adapter.folder.glob(pattern):
            if not (folder / path.name).exists() and not path.name.endswith(".index.json"):
                shutil.copyfile(path, folder / path.name)
