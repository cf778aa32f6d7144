"""Images with questions, whatever format they come in: what the rest of the engine knows of its input.

`read_samples` tells a data set's format, reads its records and makes each a sample. What is wrong with the
data set as such (its structure, ids, slots, paths that lead elsewhere) is a ValueError here, before anything
is computed; what is wrong with one image (missing, not a file, undecodable) shows when its turn comes, as a
RejectedSample, and costs that sample alone. This module knows nothing about watermarks, models or stores.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

from mmextract.engine.columnar import read_dataset, read_parquet
from mmextract.engine.conversations import (
    IMAGE_NAMES,
    IMAGE_SLOT,
    QUESTION_NAMES,
    Dialect,
    Turn,
    as_text,
    guess_dialect,
    parse_conversation,
)
from mmextract.engine.images import ImageSource
from mmextract.engine.readers import (
    Record,
    find_metadata,
    read_csv,
    read_folder,
    read_json,
    read_jsonl,
    recognise,
)
from mmextract.engine.sources import DatasetImage, FileImage, ParquetImage, file_image

__all__ = ["FORMATS", "IMAGE_SLOT", "ROW_NUMBER", "Dataset", "ImageSource", "Sample", "Turn", "read_samples"]

ID_NAMES = ("id", "sample_id", "question_id")
"""Columns that a sample's id is looked for in, the first one that is there; row numbers serve if none is."""

ROW_NUMBER = "row"
"""The `id_column` that numbers the rows, from 0."""

READERS: Mapping[str, Callable[[Path], Iterator[Record]]] = {
    "images": read_folder,
    "jsonl": read_jsonl,
    "json": read_json,
    "csv": read_csv,
    "parquet": read_parquet,
    "datasets": read_dataset,
}

FORMATS = (*READERS, "llava", "qwen")
"""What `format` can be. The last two are conversations in a JSON list or in JSON Lines."""

FOLDER_FORMATS = ("images", "datasets")

FORCED_READERS = ("images", "jsonl", "json", "csv", "parquet")
"""Formats that name their reader; for the others the content is looked at even where the format is given."""

KNOWN_COLUMNS = frozenset((*ID_NAMES, *IMAGE_NAMES, *QUESTION_NAMES))

RECORDS_TO_GUESS_FROM = 100
"""Records looked at until one shows which conversation format a JSON file is in."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One question, about one image or none."""

    id: str
    """Unique in its data set."""
    image: ImageSource | None
    """Where the image comes from, None for text alone."""
    turns: tuple[Turn, ...]
    """The conversation up to the user turn to be answered. With an image, there is one IMAGE_SLOT in it."""
    answer: str
    """The expected answer, empty if unknown."""
    columns: Mapping[str, str | int | float | bool | None]
    """Every column of the input that is in none of the fields above, nested values as JSON."""


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """All samples of an input, in its order."""

    samples: Sequence[Sample]
    format: str
    """One of FORMATS."""
    source: str
    """The path that the user gave."""
    fingerprint: str
    """Hex digest of all ids, turns, answers, columns and image names, not of the images' bytes."""

    def describe(self) -> dict[str, str | int]:
        """Return what a store says of its input, as JSON takes it."""
        return {
            "source": self.source,
            "format": self.format,
            "fingerprint": self.fingerprint,
            "n_samples": len(self.samples),
            "n_images": sum(sample.image is not None for sample in self.samples),
        }


def read_samples(
    path: Path,
    *,
    format: str | None = None,
    prompt: str | None = None,
    image_root: Path | None = None,
    id_column: str | None = None,
    limit: int | None = None,
) -> Dataset:
    """Read a data set.

    path: a file, or a folder of images, of a saved Hugging Face data set, or with a
    `metadata.jsonl|csv|parquet`. format: one of FORMATS; None recognises it by content. prompt: replaces
    every conversation by one user turn, the image slot before it unless it has one; a folder of images needs
    it. image_root: folder that all image files are in and that their paths are relative to; None takes the
    folder that the data is in. id_column: the column of ids, or ROW_NUMBER; None takes the first of ID_NAMES.
    limit: the most samples to read, from the first one.

    Raises ValueError, naming file and line or row, for whatever is wrong with the data set.
    """
    path = Path(path)
    _check_arguments(path, format, prompt, image_root, limit)
    file, format, dialect, records = _open(path, format)
    if format == "images" and prompt is None:
        raise ValueError(
            f"{path} is a folder of images, which has no questions: give a prompt to ask of all (--prompt)"
        )
    root = (image_root or (file if file.is_dir() else file.parent)).absolute()
    builder = _SampleBuilder(root, dialect, prompt, id_column)
    samples = tuple(builder.build(row, record) for row, record in enumerate(islice(records, limit)))
    if not samples:
        raise ValueError(f"{file} holds no samples")
    _check_images(samples)
    return Dataset(samples=samples, format=format, source=str(path), fingerprint=builder.digest.hexdigest())


def _check_arguments(
    path: Path, format: str | None, prompt: str | None, image_root: Path | None, limit: int | None
) -> None:
    if not path.is_file() and not path.is_dir():
        raise ValueError(f"no data at {path}: expected a file, or a folder of images or of a saved data set")
    if format is not None and format not in FORMATS:
        raise ValueError(f"unknown format {format!r}: expected one of {', '.join(FORMATS)}")
    if prompt is not None and (not prompt.strip() or prompt.count(IMAGE_SLOT) > 1):
        raise ValueError(f"the prompt must be a text with at most one {IMAGE_SLOT}, got {prompt!r}")
    if image_root is not None and not image_root.is_dir():
        raise ValueError(f"the image root {image_root} is not a folder")
    if limit is not None and limit < 1:
        raise ValueError(f"the limit must be at least 1 sample, got {limit}")


def _open(path: Path, format: str | None) -> tuple[Path, str, Dialect, Iterator[Record]]:
    """Return what to read, its format, the conversation format that its records must have, and these."""
    metadata = find_metadata(path) if path.is_dir() and format != "images" else None
    file = metadata or path
    if format is not None and file.is_dir() != (format in FOLDER_FORMATS):
        expected = "a folder" if format in FOLDER_FORMATS else "a file"
        raise ValueError(f"{file} is not {expected}, which the format {format} needs")
    kind = format if format in FORCED_READERS else recognise(file, KNOWN_COLUMNS)
    if format == "datasets" and kind != "datasets":
        raise ValueError(
            f"{file} is not a data set saved by `datasets`: it lacks state.json or dataset_info.json"
        )
    if format in ("llava", "qwen") and kind not in ("json", "jsonl"):
        raise ValueError(f"{file} is not JSON, which the format {format} needs, but {kind}")
    records = READERS[kind](file)
    dialect: Dialect = "llava" if format == "llava" else "qwen" if format == "qwen" else None
    if format is None and kind in ("json", "jsonl"):
        seen = list(islice(records, RECORDS_TO_GUESS_FROM))
        records = chain(seen, records)
        dialect = _guess_dialect(seen)
    return file, format or dialect or kind, dialect, records


def _guess_dialect(records: Sequence[Record]) -> Dialect:
    if not records or not {"messages", "conversations"} & records[0].values.keys():
        return None
    return next((dialect for record in records if (dialect := guess_dialect(record.values))), "llava")


class _SampleBuilder:
    """Makes samples out of records, and holds what must agree between them."""

    def __init__(self, image_root: Path, dialect: Dialect, prompt: str | None, id_column: str | None) -> None:
        self.image_root = image_root
        self.dialect = dialect
        self.prompt = prompt
        self.id_column = id_column
        self.where_id_is: dict[str, str] = {}
        self.digest = hashlib.blake2b(digest_size=16)

    def build(self, row: int, record: Record) -> Sample:
        try:
            return self._build(row, record)
        except ValueError as error:
            raise ValueError(f"{record.where}: {error}") from error

    def _build(self, row: int, record: Record) -> Sample:
        if self.id_column is None:
            self.id_column = next((name for name in ID_NAMES if name in record.values), ROW_NUMBER)
        conversation = parse_conversation(record.values, dialect=self.dialect, prompt=self.prompt)
        used = conversation.used | ({self.id_column} - {ROW_NUMBER})
        sample = Sample(
            id=self._id(row, record),
            image=None if conversation.image is None else self._image(conversation.image),
            turns=conversation.turns,
            answer=conversation.answer,
            columns={name: _plain(value) for name, value in record.values.items() if name not in used},
        )
        self._add_to_digest(sample)
        return sample

    def _id(self, row: int, record: Record) -> str:
        if self.id_column == ROW_NUMBER:
            return str(row)
        assert self.id_column is not None
        id = as_text(record.values.get(self.id_column))
        if not id:
            raise ValueError(
                f"no id in column `{self.id_column}` (the record has {', '.join(record.values)}): add it, or "
                f"number the rows (--id-column {ROW_NUMBER})"
            )
        if id in self.where_id_is:
            raise ValueError(
                f"id {id!r} was already used at {self.where_id_is[id]}: give every sample its own, or number "
                f"the rows (--id-column {ROW_NUMBER}), which keeps `{self.id_column}` as a column"
            )
        self.where_id_is[id] = record.where
        return id

    def _image(self, image: Any) -> ImageSource:
        if isinstance(image, str):
            return file_image(self.image_root, image)
        if isinstance(image, ParquetImage | DatasetImage):
            return image
        raise ValueError(f"an image must be given by its path, got {image!r}")

    def _add_to_digest(self, sample: Sample) -> None:
        name = None if sample.image is None else sample.image.name
        turns = [[turn.role, turn.text] for turn in sample.turns]
        content = [sample.id, name, turns, sample.answer, sample.columns]
        try:
            self.digest.update(json.dumps(content, ensure_ascii=False, sort_keys=True).encode() + b"\n")
        except UnicodeEncodeError as error:
            raise ValueError(
                f"half a surrogate pair ({error.object[error.start]!a}) is not text: correct it"
            ) from error


def _plain(value: Any) -> str | int | float | bool | None:
    return value if value is None or isinstance(value, str | int | float | bool) else as_text(value)


def _check_images(samples: Sequence[Sample]) -> None:
    """Raise ValueError if not one image file is there: one missing is an accident, all are a wrong root."""
    files = [sample.image for sample in samples if isinstance(sample.image, FileImage)]
    if files and not any(image.is_listed() for image in files):
        raise ValueError(
            f"none of the {len(files)} image files exists (the first is {files[0].root / files[0].name}): "
            "give the folder that their paths are relative to (--image-root)"
        )
