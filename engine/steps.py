"""Named steps that need one another, each kept by a fingerprint of what decides it.

A step's results lie in `<run>/steps/<name>/`. Its fingerprint covers what decides it, the fingerprints of the steps it
needs and the version of this package: where it is the same, nothing is done again; where it is not, the old results
are removed first. The record says `finished` only when everything else is there, so a step that was killed is begun
again in its own folder, and goes on from whatever it had kept. This module knows nothing about what steps do.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from mmextract.engine.objects import LocalObjects

FORMAT = 1
FOLDER = "steps"
RECORD = "step.json"

Advance = Callable[[int], None]
Progress = Callable[[str, int, str], AbstractContextManager[Advance]]
"""Shows how far a step is: (name, units in all, what a unit is) → a context that yields what is called per unit."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """One piece of work."""

    name: str
    """Of its folder: letters, digits, `-`, `.` and `_`."""
    kind: str
    """Steps of one kind take about the same time a unit."""
    decision: Mapping[str, Any]
    """JSON-able: all that decides its results beside the steps it needs."""
    needs: tuple[str, ...] = ()
    """Names of steps before it."""
    run: Callable[[Path, Advance], None]
    """Does it, in the folder it is given, and says how many units are done."""
    units: int = 1
    """How much work it is."""
    unit: str = "steps"
    """What is counted."""
    unit_seconds: float | None = None
    """A guess at the time of a unit, before one of its kind was measured; None for no idea."""
    n_bytes: int = 0
    """A guess at the size of its results."""


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A step, and where it stands."""

    step: Step
    fingerprint: str
    state: str
    """`done`; `begun`: it was stopped and goes on; `changed`: results of other settings are there; `new`."""
    seconds: float | None
    """What it took, or is guessed to take."""


def fingerprints(steps: Sequence[Step]) -> dict[str, str]:
    """Return the fingerprint of each step, by name.

    Raises ValueError for two of one name, or one that needs what does not stand before it.
    """
    found: dict[str, str] = {}
    version = importlib.metadata.version("mmextract")
    for step in steps:
        if step.name in found:
            raise ValueError(f"two steps are called {step.name}")
        if missing := [name for name in step.needs if name not in found]:
            raise ValueError(f"{step.name} needs {missing[0]}, which is no step before it")
        needs = {name: found[name] for name in step.needs}
        content = {"name": step.name, "decision": step.decision, "needs": needs, "version": version}
        found[step.name] = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]
    return found


def plan_steps(steps: Sequence[Step], run: Path) -> list[Planned]:
    """Return where each step stands in the folder `run`, with times: measured ones, or guessed from those measured."""
    known = fingerprints(steps)
    records = {step.name: read_record(run / FOLDER / step.name) for step in steps}
    per_unit: dict[str, list[float]] = {}
    for step in steps:
        record = records[step.name]
        if record and record["finished"] and record["fingerprint"] == known[step.name]:
            per_unit.setdefault(step.kind, []).append(record["seconds"] / max(1, step.units))
    planned = []
    for step in steps:
        record = records[step.name]
        state = _state(record, known[step.name])
        measured = per_unit.get(step.kind)
        guess = sum(measured) / len(measured) if measured else step.unit_seconds
        seconds = None if guess is None else guess * step.units
        if record and state == "done":
            seconds = record["seconds"]
        planned.append(Planned(step=step, fingerprint=known[step.name], state=state, seconds=seconds))
    return planned


def _state(record: Mapping[str, Any] | None, fingerprint: str) -> str:
    if record is None:
        return "new"
    if record["fingerprint"] != fingerprint:
        return "changed"
    return "done" if record["finished"] else "begun"


def read_record(folder: Path) -> dict[str, Any] | None:
    """Return the record of a step's folder, None if there is none. Raises ValueError if it cannot be read."""
    path = folder / RECORD
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text("utf-8"))
        if record["format"] != FORMAT:
            raise ValueError(f"it has format {record['format']}, and this version knows {FORMAT}")
        return {name: record[name] for name in ("fingerprint", "finished", "seconds", "decision", "needs")}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not the record of a step: {error}; remove {folder}") from error


@contextmanager
def hold(run: Path) -> Iterator[None]:
    """Keep every other process out of a run's folder, which is made. A killed holder's hold ends with it.

    Raises OSError if another one is at it, ValueError if something else is there.
    """
    if run.exists() and not run.is_dir():
        raise ValueError(f"{run} is a file: give a folder")
    if run.is_dir() and not (run / FOLDER).is_dir() and any(p.name[0] != "." for p in run.iterdir()):
        raise ValueError(f"{run} is not empty and no experiment of mmextract: give another -o, or remove it")
    (run / FOLDER).mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(run / ".lock", timeout=0):
            yield
    except Timeout as error:
        raise OSError(f"another run is at work in {run}: wait for it, or give another -o") from error


def run_steps(
    steps: Sequence[Step],
    run: Path,
    *,
    progress: Progress = lambda name, total, unit: nullcontext(lambda n: None),
    note: Callable[[str], None] = lambda text: None,
) -> list[Planned]:
    """Do what is not done, in order, and return where each step stood before; the caller holds the folder (`hold`)."""
    planned = plan_steps(steps, run)
    waiting = [entry for entry in planned if entry.state != "done"]
    note(f"{len(planned)} steps, {len(planned) - len(waiting)} of them done before")
    for number, entry in enumerate(waiting, 1):
        step, folder = entry.step, run / FOLDER / entry.step.name
        if entry.state == "changed":
            note(f"{step.name}: its settings changed, so its results are made again")
        if entry.state in ("changed", "new"):
            _clear(folder)
        begun = time.monotonic()
        before = _seconds_before(folder)
        _write(folder, entry, finished=False, seconds=before)
        with progress(f"{number}/{len(waiting)} {step.name}", step.units, step.unit) as advance:
            step.run(folder, advance)
        _write(folder, entry, finished=True, seconds=before + time.monotonic() - begun)
    return planned


def _clear(folder: Path) -> None:
    """Remove a step's folder, its record first: without it, what is left of a removal is no step."""
    (folder / RECORD).unlink(missing_ok=True)
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)


def _seconds_before(folder: Path) -> float:
    record = read_record(folder)
    return float(record["seconds"]) if record else 0.0


def _write(folder: Path, entry: Planned, *, finished: bool, seconds: float) -> None:
    record = {
        "format": FORMAT,
        "name": entry.step.name,
        "fingerprint": entry.fingerprint,
        "decision": entry.step.decision,
        "needs": list(entry.step.needs),
        "finished": finished,
        "seconds": round(seconds, 3),
        "version": importlib.metadata.version("mmextract"),
    }
    LocalObjects(folder).put(RECORD, [json.dumps(record, indent=1, sort_keys=True).encode()])


def write_json(folder: Path, name: str, content: Any) -> None:
    """Write a file of a step's results, whole or not at all."""
    text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)
    LocalObjects(folder).put(name, [(text + "\n").encode()])
