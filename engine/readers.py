"""From a file or folder to its records, one at a time: folders of images, CSV and JSON. It also tells formats
apart.

A record is a row as the format has it, names and values. Columnar formats are read by `columnar`. This module
knows nothing about questions, ids or conversations.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn

IMAGE_SUFFIXES = frozenset({
    *(".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".webp", ".bmp", ".dib", ".gif", ".tif"),
    *(".tiff", ".pbm", ".pgm", ".ppm", ".pnm", ".avif", ".heic", ".heif", ".jp2", ".ico", ".tga", ".psd"),
})  # fmt: skip
"""What counts as an image of a folder, also where it cannot be decoded: to be rejected, not overlooked."""

METADATA_NAMES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
"""A table that lists the images of its folder, as Hugging Face's `imagefolder` has it."""

MAX_CSV_FIELD = 2**30
"""Characters of the longest CSV field; Python's own limit of 131,072 is less than a long prompt."""


@dataclass(frozen=True, slots=True)
class Record:
    """One row of the input."""

    where: str
    """File and line, or file and row from 0, for error messages."""
    values: dict[str, Any]
    """Column → value; an image's bytes are given as an ImageSource."""


def find_metadata(folder: Path) -> Path | None:
    """Return the table of a folder's images, None if it has none."""
    return next((folder / name for name in METADATA_NAMES if (folder / name).is_file()), None)


def recognise(path: Path, known_columns: frozenset[str]) -> str:
    """Return which of images, datasets, parquet, json, jsonl and csv a file or folder is, by its content.

    known_columns: names of which a CSV file's first line must have one, so that not every text is a table.
    Raises ValueError if it is none of them.
    """
    if path.is_dir():
        if (path / "dataset_dict.json").is_file():
            _refuse_splits(path)
        return (
            "datasets"
            if (path / "state.json").is_file() and (path / "dataset_info.json").is_file()
            else "images"
        )
    with path.open("rb") as file:
        head = file.read(65_536).removeprefix(b"\xef\xbb\xbf")
    if not head.strip():
        raise ValueError(f"{path} is empty")
    if head.startswith(b"PAR1"):
        return "parquet"
    if head.lstrip()[:1] in (b"[", b"{"):
        return "json" if head.lstrip()[:1] == b"[" else "jsonl"
    header = head.splitlines()[0].decode("utf-8", "replace")
    if known_columns & {name.strip(' "') for name in header.split(_delimiter(header))}:
        return "csv"
    raise ValueError(
        f"{path} is in no known format: expected Parquet, JSON, JSON Lines, or UTF-8 text whose first line "
        f"names CSV columns, one of them {' or '.join(sorted(known_columns))}; for images, give their folder"
    )


def _refuse_splits(path: Path) -> NoReturn:
    names = sorted(place.parent.name for place in path.glob("*/state.json"))
    example = path / (names[0] if names else "SPLIT")
    raise ValueError(f"{path} holds the splits {', '.join(names)}: name one of them, such as {example}")


def read_folder(folder: Path) -> Iterator[Record]:
    """Yield `id`, `image` (both the relative path) and `folder` of each image below a folder, sorted by path.

    Names that start with a dot are left out. Raises ValueError if there is no image, or if a folder is a
    link.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder of images")
    names = sorted(_image_names(folder))
    if not names:
        others = sorted(
            entry.name
            for entry in folder.iterdir()
            if entry.suffix in (".json", ".jsonl", ".csv", ".parquet")
        )
        hint = f"; to read a table in it, name it, such as {folder / others[0]}" if others else ""
        raise ValueError(f"{folder} holds no image (looked for {', '.join(sorted(IMAGE_SUFFIXES))}){hint}")
    for name in names:
        parent = PurePosixPath(name).parent.as_posix().removeprefix(".")
        yield Record(str(folder / name), {"id": name, "image": name, "folder": parent})


def _image_names(folder: Path) -> Iterator[str]:
    for place, folders, files in os.walk(folder, onerror=_raise):
        here = Path(place)
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in folders:
            if (here / name).is_symlink():
                raise ValueError(
                    f"{here / name} is a link to a folder, and not followed: remove it or give its target"
                )
        for name in files:
            if Path(name).suffix.lower() in IMAGE_SUFFIXES and not name.startswith("."):
                yield _utf8_name(here / name, folder)


def _utf8_name(path: Path, folder: Path) -> str:
    try:
        return path.relative_to(folder).as_posix().encode("utf-8").decode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"the file name {os.fsencode(path)!r} is not UTF-8: rename the file") from error


def _raise(error: OSError) -> NoReturn:
    raise error


def read_jsonl(path: Path) -> Iterator[Record]:
    """Yield one record a line; empty lines are skipped. Raises ValueError naming the line."""
    for number, line in _lines(path):
        if line.strip():
            yield _record(
                _load_json(line.rstrip(), path, "one JSON object a line", number), f"{path}:{number}"
            )


def read_json(path: Path) -> Iterator[Record]:
    """Yield the records of a JSON list. Raises ValueError naming the line of invalid JSON, or the row."""
    data = path.read_bytes()
    try:
        rows = _load_json(data.decode("utf-8-sig"), path, "a JSON list")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}:{line}: not UTF-8 ({error.reason}): save the file as UTF-8") from error
    if not isinstance(rows, list):
        raise ValueError(f"{path}: expected a JSON list of records, got {_describe(rows)}")
    for row, values in enumerate(rows):
        yield _record(values, f"{path}: row {row}")


def read_csv(path: Path) -> Iterator[Record]:
    """Yield the rows of a table separated by commas, semicolons or tabs, whichever its first line has most
    of.

    Every value stays text (007 is not 7). Raises ValueError naming the line.
    """
    csv.field_size_limit(max(MAX_CSV_FIELD, csv.field_size_limit()))
    lines = (line for _, line in _lines(path))
    first = next(lines, "")
    rows = _csv_rows(path, chain([first], lines), _delimiter(first))
    header_line, header = next(rows, (1, []))
    names = [name.strip() or f"column_{number}" for number, name in enumerate(header)]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"{path}:{header_line}: two columns are named {', '.join(twice)}: rename one")
    for number, row in rows:
        if len(row) != len(names):
            raise ValueError(
                f"{path}:{number}: expected {len(names)} values ({', '.join(names)}), got {len(row)}"
            )
        yield Record(f"{path}:{number}", dict(zip(names, row, strict=True)))


def _csv_rows(path: Path, lines: Iterator[str], delimiter: str) -> Iterator[tuple[int, list[str]]]:
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    while True:
        number = reader.line_num + 1  # a row may span lines: name its first
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise ValueError(f"{path}:{number}: invalid CSV: {error}") from error
        if row:
            yield number, row


def _delimiter(header: str) -> str:
    return max(",\t;", key=header.count)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    with path.open(
        "rb"
    ) as file:  # binary: text mode would also split at characters that JSON strings may hold
        for number, line in enumerate(file, 1):
            try:
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{path}:{number}: not UTF-8 ({error.reason}): save the file as UTF-8"
                ) from error


def _load_json(text: str, path: Path, expected: str, first_line: int = 1) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise ValueError(
            f"{path}:{line}: invalid JSON, expected {expected}: {error.msg} (column {error.colno})"
        ) from error
    except (
        ValueError,
        RecursionError,
    ) as error:  # a number of more digits, or lists in more lists, than Python takes
        raise ValueError(f"{path}:{first_line}: unusable JSON: {error}") from error


def _record(values: Any, where: str) -> Record:
    if not isinstance(values, dict):
        raise ValueError(f"{where}: expected a JSON object with named columns, got {_describe(values)}")
    return Record(where, values)


def _describe(value: Any) -> str:
    if isinstance(value, dict):
        return f"an object with {', '.join(list(value)[:5]) or 'nothing'}"
    return f"{type(value).__name__} {json.dumps(value)[:60]}"
