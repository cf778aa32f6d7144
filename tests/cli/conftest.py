"""The command line, called as the shell calls it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmextract.cli.main import main


@dataclass(frozen=True)
class Ran:
    """What a command left behind."""

    code: int
    out: str
    err: str


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """Run `mmextract` with these arguments in this process."""

    def call(*arguments: object) -> Ran:
        monkeypatch.setattr(sys, "argv", ["mmextract", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main()
        captured = capsys.readouterr()
        assert isinstance(stopped.value.code, int)
        return Ran(stopped.value.code, captured.out, captured.err)

    return call


def save_photos(
    folder: Path, n_images: int, *, size: tuple[int, int] = (90, 120), suffix: str = "jpg"
) -> Path:
    """Write images of noise, 0.jpg, 1.jpg, … of (height, width), into a new folder."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for index in range(n_images):
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(folder / f"{index}.{suffix}")
    return folder
