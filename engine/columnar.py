"""From Parquet files and saved Hugging Face data sets to records, without reading the images they hold.

Columns of binary data other than the image are left out. This module knows nothing about questions, ids or
conversations.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmextract.engine.conversations import IMAGE_NAMES
from mmextract.engine.images import ImageSource
from mmextract.engine.readers import Record
from mmextract.engine.sources import DatasetImage, ParquetImage, open_dataset

BATCH_ROWS = 1000
"""Rows that are turned into Python values at a time."""

MAX_ROW_GROUP_BYTES = 2**31
"""Most bytes of images in a Parquet row group, the unit in which they are read later and kept in memory."""


@dataclass(frozen=True, slots=True)
class ImageColumn:
    """The column that holds the bytes of images."""

    name: str
    """Its name in the table."""
    is_struct: bool
    """Whether it is a struct of `bytes` (and perhaps `path`) rather than the bytes themselves."""
    has_path: bool
    """Whether that struct has a `path`."""

    @property
    def bytes_path(self) -> str:
        """Path of the bytes in a Parquet schema."""
        return f"{self.name}.bytes" if self.is_struct else self.name

    @property
    def record_name(self) -> str:
        """The name under which a record has it."""
        return self.name if self.name in IMAGE_NAMES else IMAGE_NAMES[0]


def read_parquet(path: Path) -> Iterator[Record]:
    """Yield the rows of a Parquet file. Raises ValueError if it is damaged or its images cannot be used."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            image = find_image_column(file.schema_arrow, path)
            plain = _plain_columns(file.schema_arrow, image)
            first_row = 0
            for group in range(file.num_row_groups):
                images = [] if image is None else _parquet_images(file, path, group, image, first_row)
                table = file.read_row_group(group, columns=plain)
                yield from _records(table, path, first_row, image, images)
                first_row += table.num_rows
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} is not a readable Parquet file: {error}") from error


def read_dataset(path: Path) -> Iterator[Record]:
    """Yield the rows of a data set that `datasets` saved; class labels are given by name.

    Raises ValueError if the optional package `datasets` is missing or the folder is damaged.
    """
    dataset = open_dataset(path)
    schema = dataset.features.arrow_schema
    image = find_image_column(schema, path)
    plain = _plain_columns(schema, image)
    labels = {name: feature.names for name, feature in dataset.features.items() if hasattr(feature, "names")}
    first_row = 0
    for table in dataset.iter(batch_size=BATCH_ROWS):
        images = [] if image is None else _dataset_images(table, path, image, first_row)
        for record in _records(table.select(plain), path, first_row, image, images):
            for name, names in labels.items():
                number = record.values[name]
                record.values[name] = None if number is None or number < 0 else names[number]
            yield record
        first_row += table.num_rows


def find_image_column(schema: Any, where: Path) -> ImageColumn | None:
    """Return the column of an Arrow schema that holds the bytes of images, None if images are given by path
    or not at all.

    The first column with a recognised name is taken, else the only one shaped like an image, `{bytes, path}`.
    Raises ValueError if it holds lists of images, or if it cannot be told which column is meant.
    """
    name = next((name for name in IMAGE_NAMES if name in schema.names), None)
    if name is None:
        shaped = [field for field in schema if field.type.num_fields and _as_image(field) is not None]
        if len(shaped) > 1:
            names = ", ".join(field.name for field in shaped)
            raise ValueError(
                f"{where}: columns {names} all hold images: rename the one to use to `{IMAGE_NAMES[0]}`"
            )
        return _as_image(shaped[0]) if shaped else None
    field = schema.field(name)
    image = _as_image(field)
    if image is None and _holds_binary(field.type):
        raise ValueError(
            f"{where}: column `{name}` holds {field.type}, where one image a row is supported: "
            f"keep one, as binary or a struct of bytes and path, in a column `{IMAGE_NAMES[0]}`"
        )
    return image


def _as_image(field: Any) -> ImageColumn | None:
    import pyarrow as pa

    if _is_binary(field.type):
        return ImageColumn(field.name, is_struct=False, has_path=False)
    if not pa.types.is_struct(field.type):
        return None
    children = {field.type.field(i).name: field.type.field(i).type for i in range(field.type.num_fields)}
    kind = children.get("bytes")
    if kind is None or not (_is_binary(kind) or pa.types.is_null(kind)):  # null: all images are given by path
        return None
    return ImageColumn(field.name, is_struct=True, has_path="path" in children)


def _is_binary(kind: Any) -> bool:
    import pyarrow as pa

    tests = (
        pa.types.is_binary,
        pa.types.is_large_binary,
        pa.types.is_binary_view,
        pa.types.is_fixed_size_binary,
    )
    return any(test(kind) for test in tests)


def _holds_binary(kind: Any) -> bool:
    return _is_binary(kind) or any(_holds_binary(kind.field(i).type) for i in range(kind.num_fields))


def _plain_columns(schema: Any, image: ImageColumn | None) -> list[str]:
    image_name = image.name if image else None
    return [field.name for field in schema if field.name != image_name and not _holds_binary(field.type)]


def _parquet_images(
    file: Any, path: Path, group: int, image: ImageColumn, first_row: int
) -> list[str | ImageSource | None]:
    """Return a row group's images. Their bytes are read only if its statistics say that some are missing."""
    metadata = file.metadata.row_group(group)
    chunks = {metadata.column(i).path_in_schema: metadata.column(i) for i in range(metadata.num_columns)}
    chunk = chunks[image.bytes_path]
    if chunk.total_uncompressed_size > MAX_ROW_GROUP_BYTES:
        raise ValueError(
            f"{path}: row group {group} holds {chunk.total_uncompressed_size:,} bytes of images, read at once "
            f"(limit {MAX_ROW_GROUP_BYTES:,}): write the file with smaller row groups, such as "
            "row_group_size=1000"
        )
    if chunk.statistics is not None and chunk.statistics.has_null_count and chunk.statistics.null_count == 0:
        has_bytes = [True] * metadata.num_rows
    else:
        has_bytes = _validity(file.read_row_group(group, columns=[image.bytes_path]).column(0), image)
    paths: list[str | None] = [None] * metadata.num_rows
    if image.has_path:
        paths = _paths(file.read_row_group(group, columns=[f"{image.name}.path"]).column(0))
    return [
        ParquetImage(
            path=path.absolute(),
            column=image.bytes_path,
            row_group=group,
            row=row,
            name=name or f"row {first_row + row}",
        )
        if stored
        else name
        for row, (stored, name) in enumerate(zip(has_bytes, paths, strict=True))
    ]


def _dataset_images(
    table: Any, path: Path, image: ImageColumn, first_row: int
) -> list[str | ImageSource | None]:
    column = table.column(image.name)
    paths = _paths(column) if image.has_path else [None] * table.num_rows
    return [
        DatasetImage(path=path.absolute(), column=image.name, row=row, name=name or f"row {row}")
        if stored
        else name
        for row, (stored, name) in enumerate(zip(_validity(column, image), paths, strict=True), first_row)
    ]


def _validity(column: Any, image: ImageColumn) -> list[bool]:
    import pyarrow.compute as pc

    return list(pc.is_valid(pc.struct_field(column, "bytes") if image.is_struct else column).to_pylist())


def _paths(column: Any) -> list[str | None]:
    import pyarrow.compute as pc

    return list(pc.struct_field(column, "path").to_pylist())


def _records(
    table: Any,
    path: Path,
    first_row: int,
    image: ImageColumn | None,
    images: Sequence[str | ImageSource | None],
) -> Iterator[Record]:
    table = _with_times_as_text(table)
    for start in range(0, table.num_rows, BATCH_ROWS):
        for row, values in enumerate(table.slice(start, BATCH_ROWS).to_pylist(), start):
            if image is not None:
                values[image.record_name] = images[row]
            yield Record(f"{path}: row {first_row + row}", values)


def _with_times_as_text(table: Any) -> Any:
    """Return the table with dates and times as text, since Python's own have no nanoseconds."""
    import pyarrow as pa

    for number, field in enumerate(table.schema):
        if pa.types.is_temporal(field.type):
            kind = pa.int64() if pa.types.is_duration(field.type) else pa.string()
            table = table.set_column(number, field.name, table.column(number).cast(kind))
    return table
