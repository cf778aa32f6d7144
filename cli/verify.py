"""`mmextract verify`: read a store back, say what is damaged, and let the same dump repair it."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

import rich_click as click

from mmextract.cli.reporting import LISTED, note, printable, progress_bar, size

if TYPE_CHECKING:
    from mmextract.engine.verify import Report

UNSOUND = 1


@click.command()
@click.argument("store", default="activations.zarr")
@click.option("--read-only", is_flag=True, help="Look, and change nothing.")
@click.option(
    "--threads",
    type=click.IntRange(min=1),
    help="Threads that read; each holds one shard in memory.  [default: all cores]",
)
@click.option(
    "--json", "as_json", envvar="MMEXTRACT_VERIFY_JSON", is_flag=True, help="Print as JSON on stdout."
)
def verify(store: str, read_only: bool, threads: int | None, as_json: bool) -> int:
    """Read all of STORE back and hold it against its digests; exit 1 if it is not whole.

    Every shard that is damaged is named, and so are metadata and columns. Then they are withdrawn: they count as not
    written, and the same `mmextract dump` again writes them, and only them, anew. Nothing is withdrawn from a store
    that a run is writing.
    """
    from mmextract.engine.lease import StoreBusyError
    from mmextract.engine.verify import plan_verify, run_verify, withdraw

    started = time.perf_counter()
    plan = plan_verify(store)
    with progress_bar("verify", plan.n_checks, "objects") as advance:
        report = run_verify(plan, threads=threads, on_progress=advance)
    withdrawn = False
    try:
        withdrawn = not read_only and withdraw(plan, report)
    except StoreBusyError as error:
        note(f"Error: nothing was withdrawn: {error}. When that run has ended, verify again")
    except OSError as error:
        note(f"Error: {store} cannot be written, so that nothing could be withdrawn: {error}")
    seconds = time.perf_counter() - started
    click.echo(
        json.dumps(_record(report, store, withdrawn, seconds)) if as_json else _text(report, store, seconds)
    )
    if not as_json:
        _list_damage(report, withdrawn, read_only)
    return 0 if report.sound else UNSOUND


def _record(report: Report, store: str, withdrawn: bool, seconds: float) -> dict[str, Any]:
    return {
        "store": store,
        "sound": report.sound,
        "finished": report.finished,
        "n_shards": report.n_shards,
        "n_committed": report.n_committed,
        "bad_shards": report.bad_shards,
        "damage": [{"key": found.key, "shard": found.shard, "why": found.why} for found in report.damage],
        "withdrawn": withdrawn,
        "bytes_read": report.bytes_read,
        "seconds": seconds,
    }


def _text(report: Report, store: str, seconds: float) -> str:
    """Return one line: what state the store is in."""
    n_other = sum(found.shard is None for found in report.damage)
    bad = [f"{len(report.bad_shards)} shards"] if report.bad_shards else []
    bad += [f"{n_other} objects of metadata and columns"] if n_other else []
    of = "" if report.n_shards is None else f" of {report.n_shards}"
    state = (
        f"damaged: {' and '.join(bad)}"
        if bad
        else "sound"
        if report.sound
        else "sound so far, and incomplete"
    )
    read = f"{report.n_committed}{of} shards, {size(report.bytes_read)} read back in {seconds:.1f} s"
    return f"{printable(store)} is {state}. {read}"


def _list_damage(report: Report, withdrawn: bool, read_only: bool) -> None:
    """Name what is damaged, every bad shard among it, and say what to do."""
    for found in report.damage[:LISTED]:
        where = "" if found.shard is None else f"shard {found.shard}: "
        click.echo(f"  {printable(f'{where}{found.key}: {found.why}')}")
    if len(report.damage) > LISTED:
        click.echo(
            f"  … and {len(report.damage) - LISTED} more; bad shards: {', '.join(map(str, report.bad_shards))}"
        )
    if withdrawn:
        click.echo(
            "This is withdrawn. Run the same `mmextract dump` again: it writes what is withdrawn anew."
        )
    elif report.damage and read_only:
        click.echo(
            "Nothing was changed. Without --read-only, it is withdrawn, and the same dump again repairs it."
        )
    elif not report.damage and not report.finished:
        click.echo("Run the same `mmextract dump` again to finish it.")
