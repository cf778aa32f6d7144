"""`mmextract experiment`: does the model remember? The whole study, with its controls, in one command."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import rich_click as click

from mmextract.cli.reporting import REJECTED, note, printable, progress_bar, size

if TYPE_CHECKING:
    from mmextract.engine.steps import Planned, Step


@click.command()
@click.argument("config", type=click.Path(path_type=Path, dir_okay=False, exists=True), required=False)
@click.option(
    "--preset",
    help="Settings that hold where CONFIG says nothing: tiny (the default), demo (smaller, minutes on two cores), "
    "llava-1.5-7b, qwen2-vl-7b.",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    default="run",
    show_default=True,
    help="Folder for steps and report.",
)
@click.option("--dry-run", is_flag=True, help="Print the steps, which are done, their sizes and times.")
@click.option("--json", is_flag=True, help="Print the result as JSON on stdout.")
def experiment(config: Path | None, preset: str | None, output: Path, dry_run: bool, **options: Any) -> int:
    """Fine-tune with and without watermarked identities, probe every layer, and report what is remembered.

    CONFIG is a TOML file of settings; without it, the built-in model is studied on images drawn for the purpose. The
    same command again continues an interrupted run; after a change of settings only what depends on it is done anew.
    """
    from transformers.utils.logging import disable_progress_bar

    from mmextract.engine.experiment import Experiment
    from mmextract.engine.experiment_spec import read_experiment
    from mmextract.engine.experiment_steps import model_steps
    from mmextract.engine.steps import hold, plan_steps, run_steps
    from mmextract.probes.experiment_steps import probe_steps

    spec = read_experiment(config, preset)
    planned = Experiment(spec)
    for text in spec.left_out:
        note(f"left out: {text}")
    steps = [*model_steps(planned, output), *probe_steps(planned, output)]
    if dry_run:
        plan = plan_steps(steps, output)
        click.echo(json.dumps(_plan_record(plan)) if options["json"] else _plan_text(plan, output))
        return 0
    disable_progress_bar()  # transformers' own, of the weights
    with hold(output):
        run_steps(steps, output, progress=_progress, note=note)
        return _report(planned, output, steps, as_json=options["json"])


def _report(planned: Any, output: Path, steps: Sequence[Step], *, as_json: bool) -> int:
    from mmextract.probes.experiment_report import RECORD, write_report
    from mmextract.probes.experiment_results import collect

    results = collect(planned, output, steps)
    paths = write_report(results, shlex.join(["mmextract", *sys.argv[1:]]))
    record = json.loads((output / RECORD).read_text("utf-8"))
    for warning in record["warnings"]:
        click.secho(f"WARNING: {printable(warning)}", err=True, fg="red", bold=True)
    if as_json:
        kept = (
            "statement",
            "qualification",
            "sensitive",
            "legible",
            "control",
            "sensitivity",
            "warnings",
            "best",
        )
        click.echo(json.dumps({name: record[name] for name in kept} | {"files": list(map(str, paths))}))
    else:
        lines = [record["statement"], record["qualification"], *record["sensitivity"]]
        click.echo("\n".join([*map(printable, lines), f"\nReport: {paths[0]}"]))
    return REJECTED if results.rejected else 0


@contextmanager
def _progress(name: str, total: int, unit: str) -> Iterator[Any]:
    """Show a bar where stderr is a terminal, and a line a step where it is not."""
    if not sys.stderr.isatty():
        note(name)
    with progress_bar(name, total, unit) as advance:
        yield advance


def _plan_record(plan: Sequence[Planned]) -> list[dict[str, Any]]:
    return [
        {
            "step": entry.step.name,
            "state": entry.state,
            "fingerprint": entry.fingerprint,
            "units": entry.step.units,
            "unit": entry.step.unit,
            "seconds": entry.seconds,
            "bytes": entry.step.n_bytes,
            "needs": list(entry.step.needs),
        }
        for entry in plan
    ]


def _plan_text(plan: Sequence[Planned], output: Path) -> str:
    width = max(len(entry.step.name) for entry in plan)
    lines = [
        f"{entry.step.name:<{width}}  {entry.state:<7}  {entry.step.units:>9,} {entry.step.unit:<9}  "
        f"{_duration(entry.seconds):>9}  {size(entry.step.n_bytes) if entry.step.n_bytes else '':>9}"
        for entry in plan
    ]
    waiting = [entry for entry in plan if entry.state != "done"]
    known = sum(entry.seconds or 0 for entry in waiting)
    unknown = sum(entry.seconds is None for entry in waiting if entry.step.units > 1)
    n_bytes = sum(entry.step.n_bytes for entry in waiting)
    lines += [
        "",
        f"{output}: {len(plan)} steps, {len(plan) - len(waiting)} done; to do: about {_duration(known)}"
        + (f" and {unknown} steps of unknown time" if unknown else "")
        + f", {size(n_bytes)}. Times are guesses until a step of the kind was measured here.",
    ]
    return "\n".join(lines)


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "?"
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.0f} h"
