"""`mmextract watermark`: write a watermarked copy of a data set."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import rich_click as click

from mmextract.cli.options import data_options, marking_options, read_data, take_marking
from mmextract.cli.reporting import exit_code, list_rejected


@click.command()
@click.argument("data", type=click.Path(path_type=Path))
@click.option(
    "-o", "--output", type=click.Path(path_type=Path, file_okay=False), required=True, help="A new folder."
)
@click.option("--jpeg-quality", type=click.IntRange(1, 95), help="Write JPEG of this quality, not PNG.")
@data_options
@marking_options
def watermark(data: Path, output: Path, jpeg_quality: int | None, **options: Any) -> int:
    """Write a copy of DATA with identities on its images, and a manifest of what went where.

    The same --seed puts the same watermarks on the same samples in `dump`.
    """
    from mmextract.engine.copies import write_copy

    marking = take_marking(options)
    if marking is None:
        raise click.UsageError(
            "say whom to put on the images: --identities FILE, or --seen FILE --unseen FILE"
        )
    summary = write_copy(read_data(data, options), marking, output, jpeg_quality=jpeg_quality)
    click.echo(f"{summary.n_images} images, {summary.n_watermarked} with a watermark, in {output}")
    list_rejected(summary.rejected)
    return exit_code(summary.rejected)
