"""Row E: an S3 server that errs.

Whatever it answers, a run ends in success or in a clear error, after which the same run continues to the very objects
of an undisturbed one.
"""

from __future__ import annotations

import random
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from mmextract.engine.layout import Layout
from mmextract.engine.objects import Objects
from mmextract.engine.s3 import S3Objects
from mmextract.engine.store import open_store
from mmextract.engine.writer import open_writer
from tests.engine.test_store import tree
from tests.faults.outcomes import record
from tests.faults.s3_proxy import KINDS, Plan, Proxy, faulty
from tests.s3_server import ACCESS_KEY, SECRET_KEY, TOKEN, Bucket

SEED = 20_503
RUNS_UNDER_FAULTS = 4
"""Most runs of a case that meet faults, before one without."""
PERSISTENT = ("500", "503", "reset", "lost", "timeout", "truncated", "403", "404", "412")

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
    losses: list[str] = field(default_factory=list)


@pytest.fixture
def proxy(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    with faulty(bucket.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        monkeypatch.setenv("AWS_TIMEOUT", "2s")
        yield proxy


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
    objects = S3Objects(bucket.url(name), max_retries=3)
    found.cases += 1
    for plan in (*plans, None):
        proxy.follow(plan)
        found.runs += 1
        error = attempt(lambda: run(objects, layout))
        if error is None:
            break
        assert plan is not None, f"{name}: the run without faults failed: {error}"
        found.failed_runs += 1
        found.errors[type(error).__name__] += 1
    if plans[0].persistent_from is None:
        proxy.follow(plans[0])
        found.reads_refused += attempt(lambda: check_reading(objects, layout)) is not None
    proxy.follow(None)
    check_reading(objects, layout)
    if bucket.contents(name) != whole:
        found.losses.append(name)


def transient(seed: int) -> list[Plan]:
    return [Plan(seed=seed * 1000 + n) for n in range(RUNS_UNDER_FAULTS)]


def drive_until(n_requests: int, proxy: Proxy, bucket: Bucket, folder: Path, *, parts_every: int) -> Found:
    """Drive case after case until so many requests were made under a plan that errs on one in ten."""
    wholes = {}
    for layout in (SMALL, IN_PARTS):
        run(folder / f"{layout.hidden_size}.zarr", layout)
        wholes[layout.hidden_size] = tree(folder / f"{layout.hidden_size}.zarr")
    found = Found()
    while proxy.requests < n_requests:
        case = found.cases
        layout = IN_PARTS if case % parts_every == parts_every - 1 else SMALL
        drive(
            found, proxy, bucket, f"{case}.zarr", layout, transient(SEED + case), wholes[layout.hidden_size]
        )
    return found


def outcome(found: Found, proxy: Proxy, seconds: float) -> dict[str, Any]:
    return {
        "seed": SEED,
        "cases": found.cases,
        "runs": found.runs,
        "failed_runs": found.failed_runs,
        "errors": dict(found.errors),
        "reads_refused": found.reads_refused,
        "requests": proxy.requests,
        "injected": dict(proxy.injected),
        "losses": found.losses,
        "seconds": round(seconds, 1),
    }


def test_a_sample_of_faults_loses_nothing(proxy: Proxy, bucket: Bucket, tmp_path: Path) -> None:
    found = drive_until(200, proxy, bucket, tmp_path, parts_every=100)
    assert found.losses == [] and sum(proxy.injected.values()) >= 10


@pytest.mark.parametrize("kind", ["503", "403", "404"])
def test_a_server_that_errs_for_good_is_survived(
    proxy: Proxy, bucket: Bucket, tmp_path: Path, kind: str
) -> None:
    run(tmp_path / "whole.zarr", SMALL)
    found = Found()
    plan = Plan(kinds=(kind,), persistent_from=random.Random(kind).randrange(20, 60))
    drive(found, proxy, bucket, "a.zarr", SMALL, [plan], tree(tmp_path / "whole.zarr"))
    assert found.failed_runs == 1 and found.losses == []


@pytest.mark.faults
@pytest.mark.timeout(3600)
def test_ten_thousand_requests_with_one_in_ten_wrong_lose_nothing(
    proxy: Proxy, bucket: Bucket, tmp_path: Path
) -> None:
    started = time.monotonic()
    found = drive_until(10_000, proxy, bucket, tmp_path, parts_every=12)
    run(tmp_path / "whole.zarr", SMALL)
    whole = tree(tmp_path / "whole.zarr")
    for kind in PERSISTENT:
        for start in (0, 7, 30, 52, 70):
            plan = Plan(kinds=(kind,), persistent_from=start)
            drive(found, proxy, bucket, f"{kind}-{start}.zarr", SMALL, [plan], whole)
    record("E", outcome(found, proxy, time.monotonic() - started))
    assert found.losses == []
    assert set(proxy.injected) == set(KINDS)
