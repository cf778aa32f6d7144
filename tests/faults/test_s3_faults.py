"""Row E: an S3 server that errs.

Whatever it answers, a run ends in success or in a clear error, after which the same run continues to the very objects
of an undisturbed one.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.faults import s3_cases
from tests.faults.outcomes import record, skip_if_passed
from tests.faults.s3_cases import SEED, Found, drive_persistent, drive_until
from tests.faults.s3_proxy import KINDS, Proxy, faulty
from tests.s3_server import Bucket

N_PARTS = 8
"""Processes that share the row: they wait for most of their time."""


@pytest.fixture
def proxy(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    with faulty(bucket.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        monkeypatch.setenv("AWS_TIMEOUT", "")  # which the cases set, and is to be put back
        yield proxy


def test_a_sample_of_faults_loses_nothing(proxy: Proxy, bucket: Bucket, tmp_path: Path) -> None:
    found = drive_until(150, proxy, bucket, tmp_path)
    assert not found.losses and proxy.injected.total() >= 10


@pytest.mark.parametrize("kind", ["503", "403", "404"])
def test_a_server_that_errs_for_good_is_survived(
    proxy: Proxy, bucket: Bucket, tmp_path: Path, kind: str
) -> None:
    found = Found()
    drive_persistent(found, [(kind, random.Random(kind).randrange(20, 60))], proxy, bucket, tmp_path)
    assert found.failed_runs == 1 and not found.losses


@pytest.mark.faults
@pytest.mark.timeout(3600)
def test_ten_thousand_requests_with_one_in_ten_wrong_lose_nothing(tmp_path: Path) -> None:
    skip_if_passed("E")
    found = run_row(10_000, tmp_path)
    assert not found["reproduce"] and set(found["injected"]) == set(KINDS)


def run_row(n_requests: int, folder: Path) -> dict[str, Any]:
    """Run all parts beside each other, record what they found together, and return it."""
    started = time.monotonic()
    parts = []
    for part in range(N_PARTS):
        place = folder / str(part)
        place.mkdir()
        command = [sys.executable, s3_cases.__file__, str(part), str(N_PARTS), str(n_requests), str(place)]
        with (place / "stderr").open("w") as errors:  # the server tells of requests that were broken off
            parts.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True))
    outputs = [part.communicate()[0] for part in parts]
    assert [part.returncode for part in parts] == [0] * N_PARTS, f"see {folder}/*/stderr"
    found = _add([json.loads(output) for output in outputs])
    losses = found.pop("losses")
    outcome = {"losses": len(losses), "reproduce": losses, "seed": SEED, **found}
    record("E", outcome, time.monotonic() - started)
    return outcome


def _add(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Add numbers up, and put tables together."""
    whole: dict[str, Any] = {}
    for part in parts:
        for name, value in part.items():
            if name == "losses":
                whole[name] = whole.get(name, {}) | value
            elif isinstance(value, dict):
                whole[name] = dict(Counter(whole.get(name, {})) + Counter(value))
            else:
                whole[name] = whole.get(name, 0) + value
    return whole
