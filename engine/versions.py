"""Versions of the client and of workers elsewhere, which must be the same: it must not matter where a result is made.

This module knows nothing about what is done on workers.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib import metadata
from typing import Any

PACKAGES = ("mmextract", "torch", "transformers", "zarr", "numpy")
"""Whose versions client and workers must share."""


class WorkerMismatchError(ValueError):
    """A worker has other versions, another model or another store than the run."""


def find_versions() -> dict[str, str]:
    """Return the versions that decide what a run gives, and Python's."""

    def version(name: str) -> str:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            return "not installed"

    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}


def check_same(ours: Mapping[str, str], theirs: Mapping[str, Mapping[str, str]]) -> None:
    """Compare versions of the client with those of workers, by address. Raises WorkerMismatchError: who has what."""
    lines = [
        f"worker {address} has {name} {versions.get(name)}, this process has {ours[name]}"
        for address, versions in sorted(theirs.items())
        for name in list_differing(ours, versions)
    ]
    if lines:
        raise WorkerMismatchError(
            "client and workers must be of the same versions, for their results are put together:\n  "
            + "\n  ".join(lines)
        )


def list_differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Return the names whose values differ, or that only one has."""
    return sorted(name for name in {*one, *other} if one.get(name) != other.get(name))
