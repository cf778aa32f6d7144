"""A watermarked copy of a data set: images and a manifest in LLaVA's JSON that every reader of it opens.

Every image, marked or not, is decoded, and encoded again, in the same way: nothing but the watermark tells them apart.
This module knows nothing about models or stores.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from mmextract.engine import watermark
from mmextract.engine.images import RejectedSample, decode
from mmextract.engine.objects import make_local
from mmextract.engine.rows import Marking, Row, make_columns, make_rows
from mmextract.engine.samples import Dataset

MANIFEST = "manifest.json"


@dataclass(kw_only=True)
class CopySummary:
    """What was written."""

    n_images: int = 0
    """Images written."""
    n_watermarked: int = 0
    """Those of them that carry a watermark."""
    rejected: dict[str, str] = field(default_factory=dict)
    """Sample id → why it is not in the copy."""


def write_copy(
    dataset: Dataset, marking: Marking, out: Path, *, jpeg_quality: int | None = None, threads: int = 2
) -> CopySummary:
    """Write `out`/images and `out`/manifest.json, PNG unless `jpeg_quality` (1 to 95) is given.

    Each entry of the manifest has, beside id, image and conversations, all columns of the input and what went where.
    Raises ValueError if `out` exists and is not empty, OSError if it cannot be written.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is not an empty folder: give another -o, or remove it")
    rows = make_rows(dataset, marking)
    columns = make_columns(rows, marking)
    summary = CopySummary()
    entries: list[dict[str, Any]] = []
    suffix = "png" if jpeg_quality is None else "jpg"
    objects = make_local(out)
    (out / "images").mkdir()
    with ThreadPoolExecutor(threads) as executor:
        for index, (row, made) in enumerate(
            zip(rows, _map(executor, rows, marking, jpeg_quality), strict=True)
        ):
            if isinstance(made, str):
                summary.rejected[row.id] = made
                continue
            data, found = made
            name = f"images/{index:06d}.{suffix}"
            if data:
                (out / name).write_bytes(data)
                summary.n_images += 1
            summary.n_watermarked += row.text is not None
            known = {key: values[index] for key, values in columns.items() if key not in _RENAMED}
            image = {"image": name} if data else {}
            entries.append({"id": row.id, **image, "conversations": _conversation(row), **known, **found})
    objects.put(MANIFEST, [json.dumps(entries, indent=1, ensure_ascii=False).encode()])
    return summary


_RENAMED = frozenset({"sample", "image", "question", "answer"})


def _map(
    executor: ThreadPoolExecutor, rows: Sequence[Row], marking: Marking, jpeg_quality: int | None
) -> Iterator[tuple[bytes, dict[str, int]] | str]:
    """Yield, in order, the encoded image and where its watermark is, or why there is none."""
    block = 256  # bounds the encoded images that wait to be written
    for start in range(0, len(rows), block):
        yield from executor.map(lambda row: _make(row, marking, jpeg_quality), rows[start : start + block])


def _make(row: Row, marking: Marking, jpeg_quality: int | None) -> tuple[bytes, dict[str, int]] | str:
    if row.sample.image is None:
        return b"", {}
    try:
        pixels = decode(row.sample.image).pixels
        found: dict[str, int] = {}
        if row.text is not None:
            height, width = pixels.shape[:2]
            try:
                at = watermark.place(marking.spec, row.sample.id, width, height, row.texts_to_fit)
            except ValueError as error:
                raise RejectedSample(str(error)) from error
            pixels = watermark.apply(pixels, marking.spec, row.text, at)
            found = {"watermark_x": at.x, "watermark_y": at.y, "watermark_font_px": at.font_px}
    except RejectedSample as refusal:
        return str(refusal)
    buffer = io.BytesIO()
    if jpeg_quality is None:
        Image.fromarray(pixels).save(buffer, "PNG")
    else:
        Image.fromarray(pixels).save(buffer, "JPEG", quality=jpeg_quality)
    return buffer.getvalue(), found


def _conversation(row: Row) -> list[dict[str, str]]:
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    turns = [{"from": names[turn.role], "value": turn.text} for turn in row.sample.turns]
    return [*turns, {"from": "gpt", "value": row.sample.answer}]
