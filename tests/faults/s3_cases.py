"""Cases of row E: one store after another is written through a server that errs, and what came of it.

`python tests/faults/s3_cases.py PART PARTS REQUESTS FOLDER` runs one part of the row, with a server of its own, and
prints what it found as JSON; most of its time is waiting, so that parts can run beside each other.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

ROOT = Path(__file__).parents[2]
if __name__ == "__main__":
    sys.path[0] = str(ROOT)

from mmextract.engine.layout import Layout  # noqa: E402
from mmextract.engine.objects import Objects  # noqa: E402
from mmextract.engine.s3 import S3Objects  # noqa: E402
from mmextract.engine.store import open_store  # noqa: E402
from mmextract.engine.writer import open_writer  # noqa: E402
from tests.faults.s3_proxy import KINDS, Plan, Proxy, faulty  # noqa: E402
from tests.faults.small_store import tree  # noqa: E402
from tests.s3_server import (  # noqa: E402
    ACCESS_KEY,
    ENVIRONMENT,
    SECRET_KEY,
    TOKEN,
    Bucket,
    make_bucket,
    running,
)

SEED = 20_503
RUNS_UNDER_FAULTS = 4
"""Most runs of a case that meet faults, before one without."""
PARTS_EVERY = 12
"""Every so many-th case has shards that go up in parts."""
PERSISTENT = [(kind, start) for start in (0, 7, 30, 52, 70) for kind in KINDS]
"""Kinds, and the request from which on every answer is wrong in that way."""
TIMEOUT = "1s"
"""What AWS_TIMEOUT is, so that a request without an answer costs seconds and no minutes."""

SMALL = Layout(
    n_samples=22,
    layers=(0, 1),
    positions=("last",),
    hidden_size=8,
    shard_samples=4,
    record_fields=("n_tokens", "image_hash"),
)
IN_PARTS = Layout(
    n_samples=6,
    layers=(0,),
    positions=("last",),
    hidden_size=700_000,
    shard_samples=4,
    codec="none",
    record_fields=("n_tokens",),
)
"""Shards of 11 MB, which go up in two parts."""


@dataclass
class Found:
    """What came of all cases so far."""

    cases: int = 0
    runs: int = 0
    failed_runs: int = 0
    reads_refused: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    losses: dict[str, str] = field(default_factory=dict)
    """Case → what went wrong with it."""


def states(layout: Layout) -> NDArray[np.float32]:
    """[samples, L, P, D]."""
    shape = (layout.n_samples, len(layout.layers), len(layout.positions), layout.hidden_size)
    return np.random.default_rng(7).normal(size=shape).astype(np.float32)


def run(place: Path | Objects, layout: Layout) -> None:
    """Do what `dump` does with a store, with states that need no model."""
    columns: dict[str, Any] = {
        "sample": [f"s{i}" for i in range(layout.n_samples)],
        "age": np.arange(layout.n_samples),
    }
    values = states(layout)
    with ThreadPoolExecutor(2) as executor:
        writer = open_writer(place, layout, columns, {"run": {"model": "stub"}}, executor)
        committed = writer.committed()
        for shard in sorted(set(range(layout.n_shards)) - committed):
            rows = layout.rows(shard)
            chunks, records = layout.empty_shard(), layout.empty_records()
            chunks[:, : len(rows)] = values[rows.start : rows.stop].swapaxes(0, 1)
            records[: len(rows)] = np.asarray(rows)[:, None]
            writer.write_shard(shard, chunks, records, {1: "no such file"} if shard == 1 else {})
        if not writer.finalised():
            writer.finalise()
        assert list(writer.rejected()) == [layout.shard_samples + 1]


def attempt(work: Callable[[], None]) -> BaseException | None:
    """Return the error that some work ended in, which must be one that a user can be shown."""
    try:
        work()
    except (OSError, ValueError) as error:
        shown = "".join(traceback.format_exception(error))
        assert not any(secret in shown for secret in (SECRET_KEY, TOKEN, ACCESS_KEY)), "credentials are shown"
        assert "s3://" in str(error) and len(str(error)) < 600, f"not clear: {error}"
        return error
    return None


def check_reading(objects: S3Objects, layout: Layout) -> None:
    """Read everything: what comes must be right."""
    store = open_store(objects)
    for index, layer in enumerate(store.layers):
        assert np.array_equal(store.read(int(layer), "last", threads=2), states(layout)[:, index, 0])
    assert (
        store.columns["age"].tolist() == store.columns["n_tokens"].tolist() == list(range(layout.n_samples))
    )
    assert sum(map(bool, store.columns["rejected"])) == 1


def drive(
    found: Found,
    proxy: Proxy,
    bucket: Bucket,
    name: str,
    layout: Layout,
    plans: list[Plan],
    whole: dict[str, bytes],
) -> None:
    """Run under one plan after another until a run succeeds, then without, and compare."""
    found.cases += 1
    try:
        _drive(found, proxy, bucket, name, layout, plans, whole)
    except Exception as failure:
        found.losses[name] = f"{type(failure).__name__}: {failure}"[:500]


def _drive(
    found: Found,
    proxy: Proxy,
    bucket: Bucket,
    name: str,
    layout: Layout,
    plans: list[Plan],
    whole: dict[str, bytes],
) -> None:
    objects, patient = open_objects(bucket, name, TIMEOUT), open_objects(bucket, name, "60s")
    for plan in (*plans, None):
        proxy.follow(plan)
        found.runs += 1
        place = patient if plan is None else objects  # a busy machine may answer late, which is no fault
        error = attempt(partial(run, place, layout))
        if error is None:
            break
        assert plan is not None, f"the run without faults failed: {error}"
        found.failed_runs += 1
        found.errors[type(error).__name__] += 1
    if plans[0].persistent_from is None:
        proxy.follow(plans[0])
        found.reads_refused += attempt(lambda: check_reading(objects, layout)) is not None
    proxy.follow(None)
    check_reading(patient, layout)
    assert bucket.contents(name) == whole, "the store is not that of an undisturbed run"


def open_objects(bucket: Bucket, name: str, timeout: str) -> S3Objects:
    """Return a place in a bucket whose requests may take so long each."""
    os.environ["AWS_TIMEOUT"] = timeout
    objects = S3Objects(bucket.url(name), max_retries=3)
    assert not objects.occupied()  # which reads the environment
    return objects


def transient(seed: int) -> list[Plan]:
    return [Plan(seed=seed * 1000 + n) for n in range(RUNS_UNDER_FAULTS)]


def write_wholes(folder: Path) -> dict[int, dict[str, bytes]]:
    """Return hidden size → the objects of an undisturbed run of that layout."""
    for layout in (SMALL, IN_PARTS):
        run(folder / f"{layout.hidden_size}.zarr", layout)
    return {layout.hidden_size: tree(folder / f"{layout.hidden_size}.zarr") for layout in (SMALL, IN_PARTS)}


def drive_until(
    n_requests: int, proxy: Proxy, bucket: Bucket, folder: Path, *, first: int = 0, step: int = 1
) -> Found:
    """Drive every `step`-th case until so many requests were made under a plan that errs on one in ten."""
    wholes, found, case = write_wholes(folder), Found(), first
    while proxy.planned < n_requests:
        layout = IN_PARTS if case % PARTS_EVERY == PARTS_EVERY - 1 else SMALL
        plans = transient(SEED + case)
        drive(found, proxy, bucket, f"{case}.zarr", layout, plans, wholes[layout.hidden_size])
        case += step
    return found


def drive_persistent(
    found: Found, cases: Sequence[tuple[str, int]], proxy: Proxy, bucket: Bucket, folder: Path
) -> None:
    """Drive cases (kind, request) of a server that answers wrongly in that way from that request on."""
    whole = write_wholes(folder)[SMALL.hidden_size]
    for kind, start in cases:
        plan = Plan(kinds=(kind,), persistent_from=start)
        drive(found, proxy, bucket, f"{kind}-{start}.zarr", SMALL, [plan], whole)


def main(part: int, n_parts: int, n_requests: int, folder: Path) -> None:
    """Run every `n_parts`-th case, and print what was found."""
    os.environ |= ENVIRONMENT
    with running() as endpoint, faulty(endpoint) as proxy:
        os.environ["AWS_ENDPOINT_URL"] = proxy.url
        bucket = make_bucket(endpoint, "bucket-0")
        found = drive_until(n_requests // n_parts, proxy, bucket, folder, first=part, step=n_parts)
        counts = {"requests": proxy.planned, "wrong": proxy.injected.total()}
        drive_persistent(found, PERSISTENT[part::n_parts], proxy, bucket, folder)
        print(json.dumps({**vars(found), **counts, "injected": dict(proxy.injected)}))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
