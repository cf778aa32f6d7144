"""The record of a fine-tune, `finetune.json`: which run made the folder, and whether it is finished.

It is written when a run begins, and once more, last of all, when its result is there. This module knows nothing about
tensors.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from mmextract.engine.checkpoints import FINETUNE_RECORD
from mmextract.engine.files import make_root
from mmextract.engine.objects import LocalObjects
from mmextract.engine.writer import OtherRunError

FORMAT = 1


@contextmanager
def hold(out: Path) -> Iterator[None]:
    """Keep every other run out of a folder, which is made. The operating system lets go of a killed holder's hold.

    Raises OSError if another run is at it, ValueError if something else is there.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file: give a folder")
    if out.is_dir() and not (out / FINETUNE_RECORD).is_file() and _visible(out):
        raise ValueError(f"{out} is not empty and no fine-tune of mmextract: give another -o, or remove it")
    make_root(out)
    lock = FileLock(out / ".lock", timeout=0)
    try:
        with lock:
            LocalObjects(out).sweep("")  # what a killed run was writing
            yield
    except Timeout as error:
        raise OSError(f"another run is training in {out}: wait for it, or give another -o") from error


def _visible(folder: Path) -> bool:
    return any(not path.name.startswith(".") for path in folder.iterdir())


def read_record(out: Path) -> dict[str, Any] | None:
    """Return the record in a folder, None if there is none. Raises ValueError if it cannot be read."""
    path = out / FINETUNE_RECORD
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text("utf-8"))
        if not isinstance(record.get("run"), dict):
            raise TypeError("it has no run")
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not the record of a fine-tune: {error}") from error
    if record.get("format") != FORMAT:
        raise ValueError(f"{path} has format {record.get('format')}, and this version knows {FORMAT}")
    return dict(record)


def write_record(out: Path, record: Mapping[str, Any]) -> None:
    """Write the record durably, the old one replaced whole."""
    text = json.dumps({"format": FORMAT, **record}, indent=1, ensure_ascii=False, sort_keys=True)
    LocalObjects(out).put(FINETUNE_RECORD, [text.encode()])


def refuse_other(out: Path, stored: Mapping[str, Any], run: Mapping[str, Any]) -> None:
    """Raise OtherRunError, naming what differs, unless the folder's run is this run."""
    if differing := list(differences(stored, run)):
        raise OtherRunError(
            f"{out} was made by another run, and is left as it is. What differs:\n  "
            + "\n  ".join(differing)
            + "\nGive another -o, or remove it."
        )


def differences(stored: Any, wanted: Any, where: str = "") -> Iterator[str]:
    """Name each value in which two JSON values differ."""
    if isinstance(stored, Mapping) and isinstance(wanted, Mapping):
        for key in sorted({*stored, *wanted}):
            yield from differences(stored.get(key), wanted.get(key), f"{where}.{key}" if where else key)
    elif stored != wanted:
        yield f"{where}: it has {_short(stored)}, this run has {_short(wanted)}"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}…"
