"""Checkpoints of a training: one safetensors file each, that exists whole or not at all.

A file is written aside, flushed, and renamed to its place by the one process that trains. Its header holds the step
and a hash of every tensor's bytes. Order, dropout and learning rate are functions of the step, so weights and the
optimiser's moments are all there is to keep. This module knows nothing about data or models beyond names and tensors.
"""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from mmextract.engine.files import flush_folder, make_folders, naming

_NAME = re.compile(r"step-(\d{8})\.safetensors")
_MOMENTS = ("exp_avg", "exp_avg_sq", "step")


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints in one folder, kept by one process at a time."""

    folder: Path
    keep: int = 2
    """How many are kept."""

    def save(
        self, step: int, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
    ) -> None:
        """Commit the state after `step` steps, then remove what is older than the last `keep`."""
        tensors = collect(parameters, optimizer)
        target = self.folder / f"step-{step:08d}.safetensors"
        temporary = self.folder / f".{target.name}.{uuid.uuid4().hex}.partial"
        with naming(target):
            for changed in make_folders(self.folder, self.folder.parent):
                flush_folder(changed)
            try:
                save_file(tensors, temporary, {"step": str(step), "xxh3_128": _digest(tensors)})
                with temporary.open("rb") as file:
                    os.fsync(file.fileno())
                temporary.replace(target)
            finally:
                temporary.unlink(missing_ok=True)
            flush_folder(self.folder)
        for old in sorted(self._committed())[: -self.keep]:
            self._committed()[old].unlink()

    def restore(
        self,
        parameters: Mapping[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        note: Callable[[str], None],
    ) -> int:
        """Put the newest whole checkpoint into parameters and optimiser, and return its step; 0 if there is none.

        A damaged one is named to `note` and passed over. Raises ValueError if its tensors are those of other weights.
        """
        self._sweep()
        for step, path in sorted(self._committed().items(), reverse=True):
            try:
                tensors = _read(path)
            except (SafetensorError, ValueError) as error:
                note(f"{path} is damaged ({error}): going on from an earlier state")
                continue
            _put(path, tensors, parameters, optimizer)
            return step
        return 0

    def remove(self) -> None:
        """Remove all of them, and the folder if nothing else is in it."""
        self._sweep()
        for path in self._committed().values():
            path.unlink()
        if self.folder.is_dir() and not any(self.folder.iterdir()):
            self.folder.rmdir()

    def _committed(self) -> dict[int, Path]:
        if not self.folder.is_dir():
            return {}
        found = ((_NAME.fullmatch(path.name), path) for path in self.folder.iterdir())
        return {int(match[1]): path for match, path in found if match}

    def _sweep(self) -> None:
        """Remove what killed processes left: our partial files, and those that safetensors renames to ours."""
        for pattern in (".*.partial", ".tmp*"):
            for left in self.folder.glob(pattern):
                left.unlink(missing_ok=True)


def collect(
    parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> dict[str, torch.Tensor]:
    """Return trained weights and AdamW's moments on the CPU, by name."""
    tensors = {f"weight/{name}": p.detach().cpu().contiguous() for name, p in parameters.items()}
    for name, parameter in parameters.items():
        state = optimizer.state.get(parameter, {})
        tensors |= {f"{key}/{name}": value.detach().cpu().contiguous() for key, value in state.items()}
    return tensors


def _put(
    path: Path,
    tensors: dict[str, torch.Tensor],
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
) -> None:
    there = {key.removeprefix("weight/"): t.shape for key, t in tensors.items() if key.startswith("weight/")}
    wanted = {name: p.shape for name, p in parameters.items()}
    if wrong := sorted(name for name in {*there, *wanted} if there.get(name) != wanted.get(name)):
        raise ValueError(
            f"{path} is a checkpoint of another base: {len(wrong)} tensors differ, such as {', '.join(wrong[:4])}"
        )
    for name, parameter in parameters.items():
        parameter.data.copy_(tensors[f"weight/{name}"])
        moments = {key: tensors[f"{key}/{name}"] for key in _MOMENTS if f"{key}/{name}" in tensors}
        if moments:
            optimizer.state[parameter] = {key: t.to(parameter.device) for key, t in moments.items()}


def _read(path: Path) -> dict[str, torch.Tensor]:
    with safe_open(path, "pt") as file:
        digest = (file.metadata() or {}).get("xxh3_128")
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if _digest(tensors) != digest:
        raise ValueError("its bytes are not those that were written")
    return tensors


def _digest(tensors: Mapping[str, torch.Tensor]) -> str:
    digest = xxhash.xxh3_128()
    for name in sorted(tensors):
        digest.update(f"{name}\0".encode())
        digest.update(np.ascontiguousarray(tensors[name].reshape(-1).view(torch.uint8)).data)
    return digest.hexdigest()
