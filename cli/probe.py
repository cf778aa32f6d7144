"""`mmextract probe`: one logistic probe a layer and position of a store, scored on what it has not seen."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import rich_click as click
from click.core import ParameterSource

from mmextract.cli.clusters import connect, scheduler_options
from mmextract.cli.reporting import note, printable, progress_bar

if TYPE_CHECKING:
    from mmextract.probes.description import DescriptionSettings
    from mmextract.probes.summary import Summary

_FIXED_BY_PAPER = (
    *("group", "folds", "repeats", "seed", "c", "solver"),
    *("permutations", "class_weight", "compare"),
)
_MOST_COLUMNS = 8


@click.command()
@click.argument("store", type=click.Path(), default="activations.zarr")
@click.option(
    "--label",
    default="identity_set",
    show_default=True,
    help="Column of the store with the classes; several, as in a,b, are probed one after the other.",
)
@click.option(
    "--compare",
    metavar="STORE",
    help="Store of the same samples from another checkpoint: tests the difference, layer by layer.",
)
@click.option(
    "--group",
    help="Column whose values are held out together; none: no groups.  [default: pair, else image if shared]",
)
@click.option("--where", help="Probe the samples for which this holds, such as \"condition == 'seen'\".")
@click.option(
    "--layers", default="all", show_default=True, help="all, embed, 0,4,8, 8-15, -1, ::4 and mixtures."
)
@click.option("--position", multiple=True, help="A position of the store; may be repeated.  [default: all]")
@click.option(
    "--preset",
    type=click.Choice(("default", "paper")),
    default="default",
    show_default=True,
    help="paper: the published protocol (one split, no groups, accuracy only).",
)
@click.option(
    "--folds", type=click.IntRange(min=2), default=5, show_default=True, help="Folds of the cross-validation."
)
@click.option(
    "--repeats", type=click.IntRange(min=1), default=2, show_default=True, help="Times it is repeated."
)
@click.option(
    "--c",
    type=click.FloatRange(min=0, min_open=True),
    multiple=True,
    default=(1e-4, 1e-3, 1e-2, 1e-1, 1.0),
    show_default=True,
    help="Inverse penalty C to choose from inside each training set; may be repeated.",
)
@click.option(
    "--solver",
    type=click.Choice(("auto", "dual", "primal", "sklearn", "cuml")),
    default="auto",
    show_default=True,
    help="auto: dual or primal, both exact, by shape; sklearn and cuml: those packages' own.",
)
@click.option(
    "--stream",
    type=click.Choice(("auto", "always", "never")),
    default="auto",
    show_default=True,
    help="Read states from the store in each pass in place of holding a layer in memory: slower, with the same values, "
    "and fewer permutations unless their number is given; auto: where not even one worker could hold it; with the "
    "solvers auto and primal.",
)
@click.option(
    "--permutations",
    type=click.IntRange(min=0),
    help="Shuffles of the label behind p-values and intervals; 0: no p-values.  [default: 200, fewer if costly]",
)
@click.option(
    "--class-weight",
    type=click.Choice(("none", "balanced")),
    default="none",
    show_default=True,
    help="balanced: a rare class weighs as much as a frequent one.",
)
@click.option(
    "--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Decides folds and shuffles."
)
@click.option(
    "--separability/--no-separability",
    default=True,
    help="Measure how far classes stand apart without a probe, too.  [default: yes]",
)
@click.option(
    "--projections",
    default="pca,tsne@best",
    show_default=True,
    help="pca, tsne, umap, or several; @best: of the best layer and position alone; none.",
)
@click.option(
    "--projection-device",
    type=click.Choice(("cpu", "cuda")),
    default="cpu",
    show_default=True,
    help="Where projections are made; cuda takes cuML.",
)
@click.option(
    "--workers",
    type=click.IntRange(min=0),
    default=0,
    help="Layers and positions at a time.  [default: cores]",
)
@scheduler_options
@click.option("--allow-incomplete", is_flag=True, help="Probe a store that lacks samples.")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    default="probe",
    show_default=True,
    help="Folder.",
)
@click.option("--json", is_flag=True, help="Print the result as JSON on stdout.")
@click.option(
    "--dry-run", is_flag=True, help="Say what would be done, and what time and memory it would take."
)
@click.pass_context
def probe(
    context: click.RichContext, /, store: str, layers: str, output: Path, workers: int, **options: Any
) -> None:
    """Probe each layer and position of STORE: how well do its hidden states tell the values of a label apart?

    Writes probe.json, probe.csv, probe.parquet, scores.parquet, separability and projections, figures and report.html;
    with several labels into a folder each, and the tables of all of them beside those.
    """
    from mmextract.probes import command_cost, description, planning
    from mmextract.probes.cost import predict_seconds
    from mmextract.probes.outputs import make_record, write_outputs, write_tables
    from mmextract.probes.run import plan_probe, run_probe
    from mmextract.probes.settings import ProbeSettings
    from mmextract.probes.summary import Summary

    _refuse_fixed(context, options["preset"])
    as_json, compared, dry_run = options.pop("json"), options.pop("compare"), options.pop("dry_run")
    scheduler, scheduler_file = options.pop("scheduler"), options.pop("scheduler_file")
    patience: float = options.pop("patience")
    positions, penalties = options.pop("position") or None, options.pop("c")
    wished = _read_description(options)
    labels = _read_labels(options.pop("label"))
    chosen = {
        "layers": _read_layers(store, layers),
        "positions": positions,
        "penalties": penalties,
        **options,
    }
    on_cluster = scheduler or scheduler_file
    with connect(scheduler, scheduler_file, patience) if on_cluster else nullcontext() as client:
        cluster: dict[str, Any] = {"client": client, "patience": patience}
        plans = [
            plan_probe(store, ProbeSettings(label=name, **chosen), compare_with=compared, client=client)
            for name in labels
        ]
        _announce(
            dict.fromkeys(text for plan in plans for text in plan.design.notes),
            dict.fromkeys(text for plan in plans for text in plan.design.warnings),
        )
        if dry_run:
            texts = (planning.describe(plan, workers, predict_seconds(plan), client) for plan in plans)
            click.echo("\n\n".join(texts) + ("\n" if len(plans) > 1 else ""))
            needed = command_cost.predict_command_bytes(plans, wished, workers, on_cluster=client is not None)
            click.echo(command_cost.describe_command(needed))
            return
        command_cost.check_command(plans, wished, workers, client=client)
        with progress_bar("probe", sum(len(plan.cells) for plan in plans), "probes") as advance:
            summaries = [
                Summary(plan, run_probe(plan, workers=workers, **cluster, on_progress=advance))
                for plan in plans
            ]
        descriptions = [
            description.describe(s.plan, wished, (s.best.layer, s.best.position), other=compared, **cluster)
            for s in summaries
        ]
    command = shlex.join(["mmextract", *sys.argv[1:]])
    found, selections = [], {}
    for name, summary, described in zip(labels, summaries, descriptions, strict=True):
        folder = output / _name_folder(name) if len(labels) > 1 else output
        _announce((), summary.anomalies)
        record = make_record(summary, command, described)
        files = write_outputs(summary, record, folder, described)
        found.append(_text(summary, folder))
        selections[name] = _select(summary, record, files)
    if len(labels) > 1:
        write_tables([row for summary in summaries for row in summary.rows], output)
    if as_json:
        click.echo(json.dumps(selections if len(labels) > 1 else selections[labels[0]]))
    else:
        click.echo("\n\n".join(found))


def _read_labels(text: str) -> list[str]:
    """Return the names of the columns that were asked for."""
    labels = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if not labels:
        raise click.UsageError("--label names no column: give it one, or several separated by commas")
    return labels


def _name_folder(label: str) -> str:
    """Return the name of a label's folder, which leads nowhere else."""
    return label.replace("/", "_").replace("\\", "_").lstrip(".") or "_"


def _read_description(options: dict[str, Any]) -> DescriptionSettings:
    """Take the options that say what is described beside the probes, and check that it can be."""
    from mmextract.probes.description import DescriptionSettings
    from mmextract.probes.projections import check_wishes, parse_wishes

    wishes, device = parse_wishes(options.pop("projections")), options.pop("projection_device")
    check_wishes(wishes, device)
    return DescriptionSettings(separability=options.pop("separability"), projections=wishes, device=device)


def _refuse_fixed(context: click.Context, preset: str) -> None:
    """Raise UsageError for an option that the published protocol has fixed."""
    default = ParameterSource.DEFAULT
    given = [
        f"--{name.replace('_', '-')}"
        for name in _FIXED_BY_PAPER
        if context.get_parameter_source(name) is not default
    ]
    if preset == "paper" and given:
        raise click.UsageError(
            f"--preset paper leaves no choice of {', '.join(given)}: leave out the one or the other"
        )


def _read_layers(store: str, text: str) -> tuple[int, ...] | None:
    """Return the layers that were asked for, None for all there are."""
    from mmextract.engine.selection import parse_layers
    from mmextract.engine.store import open_store

    return None if text == "all" else parse_layers(text, int(open_store(store).layers.max()) + 1)


def _announce(notes: Iterable[str], warnings: Iterable[str]) -> None:
    for text in notes:
        note(printable(text))
    for text in warnings:
        click.secho(f"WARNING: {printable(text)}", err=True, fg="red", bold=True)


def _select(summary: Summary, record: Mapping[str, Any], files: Sequence[Path]) -> dict[str, Any]:
    """Return what --json prints: probe.json without what is large, and where the rest is."""
    parts = ("headline", "warnings", "notes", "best", "design", "fits")
    tasks = ("label", "other", "difference")
    rows = [row for row in record["rows"] if row["task"] in tasks and row["metric"] == summary.metric]
    return {**{name: record[name] for name in parts}, "rows": rows, "files": [str(path) for path in files]}


def _text(summary: Summary, output: Path) -> str:
    """Return the headline, a table of layers × positions if it is not too wide, and where the report is."""
    plan = summary.plan
    lines = [printable(summary.headline)]
    if len(plan.positions) <= _MOST_COLUMNS:
        width = max(8, *(len(printable(position)) for position in plan.positions)) + 2
        lines += ["", f"{summary.metric:<9}" + "".join(f"{printable(p):>{width}}" for p in plan.positions)]
        for layer in plan.layers:
            values = (summary.row("label", summary.metric, (layer, p)).value for p in plan.positions)
            name = "embed" if layer < 0 else str(layer)
            lines.append(f"{name:<9}" + "".join(f"{value:>{width}.{summary.digits}f}" for value in values))
    return "\n".join([*lines, "", f"Report: {output / 'report.html'}"])
