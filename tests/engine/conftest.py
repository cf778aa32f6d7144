"""Tiny checkpoints that the engine's tests share."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from mmextract.engine.models import Adapter
from tests.engine.tiny_adapters import FAMILIES, on_cpu


@pytest.fixture(scope="session")
def tiny_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One checkpoint of each family, padding on the left; no test changes them."""
    root = tmp_path_factory.mktemp("tiny")
    return {name: save(root / name, "left") for name, save in FAMILIES.items()}


@pytest.fixture(scope="session")
def tiny_adapters(tiny_folders: dict[str, Path]) -> dict[str, Adapter]:
    """They, loaded; a test that touches a model's modules puts them back."""
    return {name: on_cpu(folder) for name, folder in tiny_folders.items()}


@pytest.fixture
def tiny_copy(tiny_folders: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    """Copies a checkpoint, so that the test may damage it."""

    def copied(name: str) -> Path:
        return Path(shutil.copytree(tiny_folders[name], tmp_path / name))

    return copied
