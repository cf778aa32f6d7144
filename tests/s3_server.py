"""A bucket on a real S3 server on loopback, looked into without the code that is tested."""

from __future__ import annotations

import logging
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from obstore.store import S3Store

ACCESS_KEY, SECRET_KEY, TOKEN = (
    "AKIAIOSFODNN7CANARY",
    "wJalrXUtnFEMI/K7MDENG/CANARY",
    "FwoGZXIvYXdzCANARYTOKEN",
)
ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": ACCESS_KEY,
    "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
    "AWS_SESSION_TOKEN": TOKEN,
    "AWS_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}


@dataclass(frozen=True)
class Bucket:
    """A bucket of its own for one test."""

    name: str
    endpoint: str

    def url(self, name: str) -> str:
        """Return the URL of a store in it."""
        return f"s3://{self.name}/{name}"

    def contents(self, name: str) -> dict[str, bytes]:
        """Return key → bytes of everything under a prefix."""
        store = self._store(name)
        return {
            item["path"]: bytes(store.get(item["path"]).bytes())
            for some in store.list(chunk_size=1000)
            for item in some
        }

    def keys(self, name: str) -> set[str]:
        """Return the keys under a prefix."""
        return {item["path"] for some in self._store(name).list(chunk_size=1000) for item in some}

    def upload(self, folder: Path, name: str) -> None:
        """Put every file of a folder under a prefix."""
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                self.put(f"{name}/{file.relative_to(folder)}", file.read_bytes())

    def put(self, key: str, data: bytes) -> None:
        """Put an object."""
        self._store("").put(key, data)

    def delete(self, key: str) -> None:
        """Delete an object."""
        self._store("").delete(key)

    def _store(self, prefix: str) -> S3Store:
        return S3Store(
            self.name,
            prefix=prefix or None,
            endpoint=self.endpoint,
            access_key_id="any",
            secret_access_key="any",
            client_options={"allow_http": True, "timeout": timedelta(seconds=60)},
        )


@contextmanager
def running() -> Iterator[str]:
    """Run a server, and give its URL."""
    from moto.moto_server.threaded_moto_server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        yield f"http://{host}:{port}"
    finally:
        server.stop()


def make_bucket(endpoint: str, name: str) -> Bucket:
    """Create a bucket."""
    request("PUT", f"{endpoint}/{name}")
    return Bucket(name, endpoint)


def request(method: str, url: str, data: bytes | None = None) -> None:
    """Make a plain request to the server."""
    headers = {"Content-Type": "text/plain"}
    with urllib.request.urlopen(urllib.request.Request(url, data, headers, method=method), timeout=60):
        pass
