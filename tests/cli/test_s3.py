"""The command line with a store in a bucket."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mmextract.engine.store import open_store
from tests.cli.conftest import Ran, save_photos
from tests.engine.test_store import tree
from tests.faults.s3_proxy import Plan, faulty
from tests.probes.stores import make_paired_store
from tests.s3_server import ACCESS_KEY, SECRET_KEY, TOKEN, Bucket

Run = Callable[..., Ran]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return save_photos(tmp_path / "photos", 40)


def test_a_dump_to_a_bucket_is_killed_and_continued_to_the_bytes_of_a_local_one(
    run: Run, bucket: Bucket, photos: Path, tmp_path: Path
) -> None:
    command = ["dump", photos, "--prompt", "what?", "--shard-samples", 1, "--batch-size", 1]
    command += ["--torch-threads", 1]  # which the store records, and this process may have changed
    process = subprocess.Popen(
        [Path(sys.executable).parent / "mmextract", *map(str, command), "-o", bucket.url("a.zarr")],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 200
    while not bucket.keys("a.zarr/shard_digest/c") and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait(60) == -signal.SIGKILL
    assert 0 < open_store(bucket.url("a.zarr")).missing < 40
    ran = run(*command, "-o", bucket.url("a.zarr"))
    assert ran.code == 0, ran.err
    assert "were there already" in ran.out and bucket.url("a.zarr") in ran.out
    assert run(*command, "-o", tmp_path / "whole.zarr").code == 0
    assert bucket.contents("a.zarr") == tree(tmp_path / "whole.zarr")
    again = run(*command, "-o", bucket.url("a.zarr"))
    assert again.code == 0 and "nothing to do" in again.out
    described = run("info", bucket.url("a.zarr"))
    assert described.code == 0 and "40 (40 committed, 0 missing, 0 rejected)" in described.out


@pytest.mark.parametrize(("sent", "answered"), [(signal.SIGTERM, 60), (signal.SIGINT, 3)])
def test_a_run_whose_server_hangs_leaves_within_ten_seconds_and_can_be_continued(
    run: Run, bucket: Bucket, photos: Path, sent: signal.Signals, answered: int
) -> None:
    command = ["dump", photos, "--prompt", "what?", "--shard-samples", 1, "--batch-size", 1]
    command += ["--limit", 20, "--torch-threads", 1, "-o", bucket.url("a.zarr")]
    with faulty(bucket.endpoint) as proxy:
        proxy.follow(Plan(kinds=("timeout",), persistent_from=answered))
        process = subprocess.Popen(
            [Path(sys.executable).parent / "mmextract", *map(str, command)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"AWS_ENDPOINT_URL": proxy.url},
        )
        deadline = time.monotonic() + 200
        while not proxy.injected["timeout"] and time.monotonic() < deadline:
            time.sleep(0.005)
        process.send_signal(sent)
        started = time.monotonic()
        _, error = process.communicate(timeout=100)
    assert process.returncode == 130 and "Run the same command again" in error, error
    assert "Traceback" not in error and time.monotonic() - started < 10
    ran = run(*command)
    assert ran.code == 0, ran.err
    assert open_store(bucket.url("a.zarr")).missing == 0


def test_a_store_in_a_bucket_is_probed_as_on_a_disk(run: Run, bucket: Bucket, tmp_path: Path) -> None:
    make_paired_store(tmp_path / "a.zarr", signals=[[0, 0], [0, 1.0]])
    bucket.upload(tmp_path / "a.zarr", "a.zarr")
    options = ("--c", 0.1, "--repeats", 1, "--layers", "-1", "--position", "image", "--json")
    there = run("probe", bucket.url("a.zarr"), *options, "-o", tmp_path / "there")
    here = run("probe", tmp_path / "a.zarr", *options, "-o", tmp_path / "here")
    assert there.code == here.code == 0, there.err
    assert json.loads(there.out)["rows"] == json.loads(here.out)["rows"]
    record = json.loads((tmp_path / "there" / "probe.json").read_text())
    assert record["store"]["path"] == bucket.url("a.zarr")


@pytest.mark.parametrize("command", ["dump", "probe", "info"])
def test_a_bucket_that_does_not_exist_is_one_clear_message(
    run: Run, bucket: Bucket, photos: Path, tmp_path: Path, command: str
) -> None:
    place = "s3://no-such-bucket/a.zarr"
    arguments = (photos, "--prompt", "what?", "-o", place) if command == "dump" else (place,)
    ran = run(command, *arguments)
    assert ran.code == 1
    assert "there is no such bucket" in ran.err and place in ran.err and "Traceback" not in ran.err


@pytest.mark.parametrize("command", ["dump", "probe", "info"])
def test_expired_credentials_are_one_clear_message_and_are_never_printed(
    run: Run,
    bucket: Bucket,
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: str,
) -> None:
    place = bucket.url("a.zarr")
    arguments = (photos, "--prompt", "what?", "-o", place) if command == "dump" else (place,)
    with faulty(bucket.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        proxy.follow(Plan(kinds=("403",), persistent_from=0))
        ran = run(command, *arguments)
    assert ran.code == 1
    assert "403 ExpiredToken: the credentials have expired" in ran.err and "Traceback" not in ran.err
    assert not any(secret in ran.out + ran.err for secret in (SECRET_KEY, TOKEN, ACCESS_KEY))


def test_a_store_that_is_not_in_the_bucket_says_how_to_make_one(run: Run, bucket: Bucket) -> None:
    ran = run("info", bucket.url("none.zarr"))
    assert ran.code == 1 and f"mmextract dump -o {bucket.url('none.zarr')}" in ran.err


def test_other_schemes_are_refused(run: Run) -> None:
    ran = run("info", "gs://bucket/a.zarr")
    assert ran.code == 1 and "gs:// is not supported" in ran.err
