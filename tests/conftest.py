"""A real S3 server for the tests that store objects, which starts with the first of them; and threads for all tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import count

import pytest

from tests.s3_server import ENVIRONMENT, Bucket, make_bucket, running

_numbers = count()


def pytest_configure(config: pytest.Config) -> None:
    """Give each of several processes one thread.

    Every core has a process already: libraries that start a thread a core, there and in what tests start, would only
    wait for each other. The processes of pytest-xdist are started after this, with this environment.
    """
    if config.getoption("numprocesses", default=None):
        os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    """URL of the server."""
    with running() as endpoint:
        yield endpoint


@pytest.fixture
def bucket(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    """An empty bucket, and an environment in which `s3://` leads to it."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in {**ENVIRONMENT, "AWS_ENDPOINT_URL": s3_endpoint}.items():
        monkeypatch.setenv(name, value)
    return make_bucket(s3_endpoint, f"bucket-{next(_numbers)}")
