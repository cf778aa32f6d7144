"""`mmextract export`: layers of a store as a safetensors, npz or Parquet file."""

from __future__ import annotations

import json
from pathlib import Path

import rich_click as click

from mmextract.cli.reporting import printable, progress_bar, size

FORMATS = ("safetensors", "npz", "parquet")


@click.command()
@click.argument("store", default="activations.zarr")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), required=True, help="The file; it must not exist."
)
@click.option("--format", type=click.Choice(FORMATS), help="[default: by the file's ending]")
@click.option(
    "--layers", default="all", show_default=True, help="all, embed, 0,4,8, 8-15, -1, ::4 and mixtures."
)
@click.option("--position", multiple=True, help="A position of the store; may be repeated.  [default: all]")
@click.option(
    "--allow-incomplete", is_flag=True, help="Export a store that lacks samples; their rows are NaN."
)
@click.option(
    "--json",
    "as_json",
    envvar="MMEXTRACT_EXPORT_JSON",
    is_flag=True,
    help="Print the result as JSON on stdout.",
)
def export(
    store: str,
    output: Path,
    format: str | None,
    layers: str,
    position: tuple[str, ...],
    allow_incomplete: bool,
    as_json: bool,
) -> None:
    """Write layers of STORE, and its columns, into a file that other tools read.

    A layer is named layer_0 (or embed), with several positions layer_0.last and so on: [samples, hidden], rejected
    samples NaN. safetensors keeps bfloat16, npz and Parquet hold it as float32. The columns go into the same file,
    for safetensors into FILE.columns.parquet beside it.
    """
    from mmextract.engine.export import plan_export, run_export
    from mmextract.engine.store import open_store

    chosen = format or output.suffix.removeprefix(".")
    if chosen not in FORMATS:
        raise click.UsageError(f"the ending of {output} says no format: give --format {', '.join(FORMATS)}")
    plan = plan_export(
        open_store(store),
        output,
        chosen,
        layers=layers,
        positions=position,
        allow_incomplete=allow_incomplete,
    )
    with progress_bar("export", plan.n_steps, "steps") as advance:
        files = run_export(plan, advance)
    n_bytes = sum(file.stat().st_size for file in files)
    if as_json:
        names = [plan.name(layer, name) for layer in plan.layers for name in plan.positions]
        click.echo(json.dumps({"files": [str(file) for file in files], "layers": names, "bytes": n_bytes}))
        return
    written = ", ".join(printable(str(file)) for file in files)
    click.echo(
        f"{len(plan.layers)} layers of {plan.store.n_samples} samples, {size(n_bytes)} written to {written}"
    )
