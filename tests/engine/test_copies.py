from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mmextract.engine.copies import MANIFEST, write_copy
from mmextract.engine.identities import make_identities
from mmextract.engine.rows import RandomMarking
from mmextract.engine.samples import read_samples
from mmextract.engine.watermark import Placement, WatermarkSpec, apply

PEOPLE = tuple(make_identities(5, seed=0))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    rng = np.random.default_rng(0)
    lines: list[dict[str, Any]] = []
    for i in range(20):
        Image.fromarray(rng.integers(0, 256, (120, 160, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        lines.append(
            {"id": f"s{i}", "image": f"{i}.png", "question": f"what {i}?", "answer": "x", "kind": "ab"[i % 2]}
        )
    (folder / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / "samples.jsonl"


def marking(rate: float = 0.5) -> RandomMarking:
    spec = WatermarkSpec(fields=("username", "user_id"), field_names=False, font_px=12)
    return RandomMarking(spec=spec, identities=PEOPLE, rate=rate, set_name="people")


def test_the_manifest_says_what_went_where_and_the_pixels_agree(data: Path, tmp_path: Path) -> None:
    summary = write_copy(read_samples(data), marking(), tmp_path / "out")
    entries = json.loads((tmp_path / "out" / MANIFEST).read_text("utf-8"))
    assert summary.n_images == len(entries) == 20
    assert 0 < summary.n_watermarked < 20
    assert summary.n_watermarked == sum(entry["condition"] == "watermarked" for entry in entries)
    for i, entry in enumerate(entries):
        before = np.asarray(Image.open(data.parent / f"{i}.png"))
        after = np.asarray(Image.open(tmp_path / "out" / entry["image"]))
        if entry["condition"] == "clean":
            assert np.array_equal(after, before) and entry["identity"] == ""
            continue
        at = Placement(x=entry["watermark_x"], y=entry["watermark_y"], font_px=entry["watermark_font_px"])
        text = f"{entry['identity_username']}\n{entry['identity_user_id']}"
        assert np.array_equal(after, apply(before, marking().spec, text, at))


def test_the_copy_is_read_like_the_original(data: Path, tmp_path: Path) -> None:
    write_copy(read_samples(data), marking(), tmp_path / "out")
    original, copy = read_samples(data), read_samples(tmp_path / "out" / MANIFEST)
    assert copy.format == "llava"
    for before, after in zip(original.samples, copy.samples, strict=True):
        assert (before.id, before.turns, before.answer) == (after.id, after.turns, after.answer)
        assert before.columns.items() <= after.columns.items()


def test_every_image_of_a_jpeg_copy_goes_through_the_same_encoder(data: Path, tmp_path: Path) -> None:
    write_copy(read_samples(data), marking(), tmp_path / "out", jpeg_quality=80)
    tables = {
        str(Image.open(file).quantization)  # type: ignore[attr-defined]
        for file in (tmp_path / "out" / "images").iterdir()
    }
    assert len(tables) == 1


def test_the_same_seed_gives_the_same_bytes(data: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_copy(read_samples(data), marking(), tmp_path / name, threads=2)
    for file in (tmp_path / "a").rglob("*"):
        if file.is_file():
            assert file.read_bytes() == (tmp_path / "b" / file.relative_to(tmp_path / "a")).read_bytes()


def test_images_that_cannot_be_used_are_named_and_left_out(data: Path, tmp_path: Path) -> None:
    (data.parent / "3.png").write_bytes(b"nonsense")
    Image.new("RGB", (10, 10)).save(data.parent / "4.png")
    summary = write_copy(read_samples(data), marking(1.0), tmp_path / "out")
    assert set(summary.rejected) == {"s3", "s4"}
    assert "does not fit" in summary.rejected["s4"]
    assert len(json.loads((tmp_path / "out" / MANIFEST).read_text("utf-8"))) == 18


def test_a_folder_with_something_in_it_is_left_alone(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not an empty folder"):
        write_copy(read_samples(data), marking(), data.parent)
