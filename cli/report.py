"""`mmextract report`: the figures and the report of a probe run, made again from what the run wrote down."""

from __future__ import annotations

from pathlib import Path

import rich_click as click


@click.command()
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False), default="probe")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder for the new files.  [default: FOLDER]",
)
def report(folder: Path, output: Path | None) -> None:
    """Make the figures and report.html of FOLDER again, from its probe.json and projections.parquet.

    FOLDER is what `mmextract probe` wrote. Nothing is computed anew, and no store is needed.
    """
    from mmextract.probes.outputs import write_pictures
    from mmextract.probes.results import load_results

    target = output or folder
    write_pictures(load_results(folder), target)
    click.echo(f"Report: {target / 'report.html'}")
