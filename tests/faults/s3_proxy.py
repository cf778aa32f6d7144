"""An HTTP proxy before an S3 server, which answers some requests wrongly, by a seeded plan.

Which requests is a pure function of the seed, the request and how often it came, so that threads do not change it.
The proxy knows nothing about what is stored.
"""

from __future__ import annotations

import http.client
import random
import re
import select
import socket
import struct
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

ERRORS = {
    "500": "InternalError",
    "503": "SlowDown",
    "403": "ExpiredToken",
    "404": "NoSuchKey",
    "412": "PreconditionFailed",
}
KINDS = (*ERRORS, "reset", "lost", "timeout", "truncated")
"""reset: before the request had an effect. lost: after it. timeout: no answer. truncated: half of the answer."""
LONGEST_HANG = 30.0
_HOP_BY_HOP = ("connection", "keep-alive", "transfer-encoding", "server", "date", "content-length")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Which requests are answered wrongly."""

    seed: int = 0
    """Decides which."""
    share: float = 0.1
    """How many."""
    kinds: tuple[str, ...] = KINDS
    """How."""
    persistent_from: int | None = None
    """From this request on, counted from 0, each is answered so, and none before."""

    def fault(self, number: int, request: str, attempt: int) -> str | None:
        """Return one of `kinds`, or None for a true answer."""
        if self.persistent_from is not None:
            return self.kinds[0] if number >= self.persistent_from else None
        wherever = re.sub(r"/bucket-\d+", "", request)  # each test has a bucket of its own
        drawn = random.Random(f"{self.seed}:{wherever}:{attempt}")
        return drawn.choice(self.kinds) if drawn.random() < self.share else None


@dataclass
class Proxy:
    """A running proxy."""

    upstream: str
    """URL of the server behind it."""
    url: str = ""
    """Where it listens."""
    requests: int = 0
    """Requests so far."""
    planned: int = 0
    """Those of them that came while a plan was followed."""
    injected: Counter[str] = field(default_factory=Counter)
    """Kind → requests that were answered so."""
    _plan: Plan | None = None
    _number: int = 0
    _attempts: Counter[str] = field(default_factory=Counter)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def follow(self, plan: Plan | None) -> None:
        """Answer by a plan from now on, or truly."""
        with self._lock:
            self._plan, self._number = plan, 0
            self._attempts.clear()

    def decide(self, method: str, path: str) -> str | None:
        """Count a request and return how it is answered wrongly, if it is."""
        request = f"{method} {path.partition('uploadId=')[0]}"
        with self._lock:
            self.requests += 1
            if self._plan is None:
                return None
            fault = self._plan.fault(self._number, request, self._attempts[request])
            self._number += 1
            self.planned += 1
            self._attempts[request] += 1
            if fault:
                self.injected[fault] += 1
        return fault


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or every answer waits 40 ms between its head and its body
    server: _Server

    def _handle(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        fault = self.server.proxy.decide(self.command, self.path)
        if fault in ERRORS:
            self._answer(int(fault), _error_body(ERRORS[fault], self.headers))
        elif fault == "timeout":
            select.select([self.connection], [], [], LONGEST_HANG)  # readable when the client has gone away
            self._break_off()
        elif fault == "reset":
            self._break_off()
        else:
            self._forward(body, fault)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _handle

    def _forward(self, body: bytes, fault: str | None) -> None:
        place = urlsplit(self.server.proxy.upstream)
        connection = http.client.HTTPConnection(place.hostname or "", place.port, timeout=60)
        try:
            connection.request(self.command, self.path, body, dict(self.headers.items()))
            answer = connection.getresponse()
            data = answer.read()
        finally:
            connection.close()
        if fault == "lost":
            self._break_off()
            return
        length = answer.getheader("Content-Length") if self.command == "HEAD" else str(len(data))
        headers = {name: value for name, value in answer.getheaders() if name.lower() not in _HOP_BY_HOP}
        if fault == "truncated":
            data = data[: len(data) // 2]
            length = str(int(length or 0) + 1)  # a client waits for at least one byte more
            self.close_connection = True
        self._answer(answer.status, data, {**headers, "Content-Length": length or "0"})

    def _answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response_only(status)
        for name, value in (headers or {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _break_off(self) -> None:
        """Close the connection with a reset."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True

    def finish(self) -> None:
        if self.connection.fileno() >= 0:
            super().finish()

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128
    proxy: Proxy

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing of a client that went away."""


def _error_body(code: str, headers: Message) -> bytes:
    """Return an error as AWS words it, which repeats the credentials of the request."""
    token = headers.get("x-amz-security-token", "")
    authorization = headers.get("Authorization", "")
    return (
        f'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>{code}</Code><Message>by plan</Message>'
        f"<Token-0>{token}</Token-0><AWSAccessKeyId>{authorization}</AWSAccessKeyId></Error>"
    ).encode()


@contextmanager
def faulty(upstream: str) -> Iterator[Proxy]:
    """Run a proxy before the server at a URL; it answers truly until it is told to `follow` a plan."""
    server = _Server(("127.0.0.1", 0), _Handler)
    server.proxy = Proxy(upstream, f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server.proxy
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
