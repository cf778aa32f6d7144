"""A store's objects in an S3 bucket, under `s3://bucket/name`, through obstore.

Where the bucket is and who asks is said by the environment, in the variables that obstore reads: AWS_ACCESS_KEY_ID,
AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN (else the role of the machine, container or web identity), AWS_REGION (or
AWS_DEFAULT_REGION; us-east-1), AWS_ENDPOINT_URL_S3 or AWS_ENDPOINT_URL for servers other than AWS,
AWS_ALLOW_HTTP=true for an endpoint without TLS (not needed on this machine's own addresses), AWS_TIMEOUT,
AWS_SKIP_SIGNATURE=true for public buckets. Profiles in ~/.aws are not read. No credentials are kept, pickled or put
into a message.

An object is visible whole once S3 has it on durable storage, which is when `put` returns; until then a reader sees
the old one. A listing shows what was put before it. Objects over PART_BYTES go up in parts; a kill in the middle
leaves parts that no reader sees and that cost money until the bucket's lifecycle rule
`AbortIncompleteMultipartUpload` removes them.

Retries: obstore tries a request again, at most `max_retries` times (10) within RETRY_SECONDS after the first attempt,
for an answer 5xx, 429 or 408, a connection that is refused or broken, and a request that takes longer than
AWS_TIMEOUT (60 s); waits double from 0.1 s to at most 10 s. What it does not dare to repeat, because it
might have had an effect, and answers that break off are tried up to ATTEMPTS times within RETRY_SECONDS: all that is
done here may be done twice. So no request takes longer than 2 × RETRY_SECONDS + AWS_TIMEOUT, 5 minutes, and a server
that is down is told of within that. 403, 404 and 412 fail at once. All of it ends early when the process is asked to
leave (see `interruptible`).

This module knows nothing about arrays or shards.
"""

from __future__ import annotations

import ipaddress
import os
import re
import time
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Callable,
    Coroutine,
    Iterator,
    Mapping,
    Sequence,
    Set,
)
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

import obstore
from obstore.exceptions import BaseError
from obstore.store import S3Store
from zarr.abc.store import ByteRequest
from zarr.abc.store import Store as ZarrStore
from zarr.core.buffer import Buffer as ZarrBuffer
from zarr.core.buffer import BufferPrototype
from zarr.storage import ObjectStore

from mmextract.engine.direct import Buffer
from mmextract.engine.interruptible import REQUESTS, LeavingError
from mmextract.engine.s3_errors import Failure

if TYPE_CHECKING:
    from obstore import Bytes, ObjectMeta

Result = TypeVar("Result")

TIMEOUT_SECONDS = 60
RETRY_SECONDS = 120
ATTEMPTS = 5
PART_BYTES = 8 << 20
"""Size above which an object goes up in parts, and of each part."""
PARTS_AT_ONCE = 4

_URL = re.compile(r"s3://([A-Za-z0-9][A-Za-z0-9._-]+)/([^\x00-\x1f\x7f\\{}^%`\[\]\"<>~#|?]+)")
_CLIENT = (
    "timeout",
    "connect_timeout",
    "allow_http",
    "allow_invalid_certificates",
    "proxy_url",
    "proxy_excludes",
    "proxy_ca_certificate",
)
"""Those of obstore's client options that are taken from AWS_<NAME>, which it leaves to us once any is given."""
_ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")


@dataclass(frozen=True)
class S3Objects:
    """Objects under a prefix of a bucket. Cheap to pickle: the other side reads its own environment."""

    url: str
    """`s3://bucket/name`; name may have several parts."""
    max_retries: int = 10
    """Most retries of one request; see the module."""

    def __post_init__(self) -> None:
        split_url(self.url)

    def __reduce__(self) -> tuple[Any, ...]:
        return S3Objects, (self.url, self.max_retries)

    def occupied(self) -> bool:
        """Tell whether any object is under the prefix."""

        async def request() -> bool:
            async for _ in obstore.list(self._store, chunk_size=1):
                return True
            return False

        return self._do("list", "", request)

    def create(self, objects: Mapping[str, bytes], last: str) -> None:
        """Write all of `objects`, each only where there is none yet, `last` after the others.

        S3 can move nothing, so a kill leaves some of them, but never `last`. What an interrupted call with the same
        `objects` left is taken up: an object is kept if it has the very bytes that would be written. Where `last` is
        there, another writer was first and nothing is done. Raises ValueError, before anything is written, if an
        object that is none of these is there, and as soon as one with other bytes is met: what somebody else keeps
        under the prefix is never touched, nor what another run is creating at this moment.
        """
        assert last in objects
        if self.get(last) is not None:
            return
        before = objects.keys() - {last}
        there = self._do("list", "", lambda: self._keys_until_other_than(before))
        strangers = there - before
        if strangers:
            raise ValueError(
                f"{self.url} exists and is not a store of mmextract ({strangers.pop()} is there and {last} was not "
                "found): give another path"
            )
        for key in (*sorted(before), last):
            self._put_or_find(key, objects[key], known=key in there)

    def put_new(self, key: str, data: bytes) -> bool:
        """Write an object unless there is one, by a conditional write; of several writers one wins.

        An answer that was lost may have been that of our own success: then the object has our bytes, which for that
        must be like nobody else's.
        """
        try:
            self._do("create", key, lambda: obstore.put_async(self._store, key, data, mode="create"))
        except FileExistsError:
            return self.get(key) == data
        return True

    def settle(self, prefix: str) -> None:
        """Do nothing: what a listing shows is on durable storage."""

    def sweep(self, prefix: str) -> None:
        """Do nothing: what a kill left of an object has no name."""

    def put(self, key: str, parts: Sequence[Buffer]) -> None:
        """Write the concatenation of `parts` under `key`. Raises OSError; the key then holds the old or the new."""
        pieces = [memoryview(part).cast("B") for part in parts]
        whole = sum(map(len, pieces)) <= PART_BYTES

        async def request() -> None:
            await obstore.put_async(
                self._store,
                key,
                b"".join(pieces) if whole else iter(pieces),
                use_multipart=not whole,
                chunk_size=PART_BYTES,
                max_concurrency=PARTS_AT_ONCE,
            )

        self._do("write", key, request)

    def put_all(
        self, objects: Mapping[str, Sequence[Buffer]], on_read: Callable[[], None] = lambda: None
    ) -> None:
        """Write several objects, one after the other."""
        for number, (key, parts) in enumerate(objects.items()):
            self.put(key, parts)
            if number == 0:
                on_read()

    def get(self, key: str) -> bytes | None:
        """Return the bytes under `key`, or None if S3 says that there is no such object."""
        try:
            return bytes(self._do("read", key, lambda: self._fetch(key)))
        except FileNotFoundError:
            return None

    def read(self, key: str, offset: int, length: int) -> bytes:
        """Return `length` bytes from `offset`, which counts from the end if negative."""

        async def request() -> Bytes:
            if offset >= 0:
                return await obstore.get_range_async(self._store, key, start=offset, length=length)
            result = await obstore.get_async(self._store, key, options={"range": {"suffix": -offset}})
            return await result.bytes_async()

        data = bytes(self._do("read", key, request))[:length]
        if len(data) < length:
            raise ValueError(f"{self.url}/{key} is cut short: it should hold {length} bytes at {offset}")
        return data

    def delete(self, key: str) -> None:
        """Remove an object; it is no error if there is none."""
        try:
            self._do("delete", key, lambda: obstore.delete_async(self._store, key))
        except FileNotFoundError as error:  # a server without bulk deletion says so, or one that is mistaken
            if self.get(key) is not None:
                raise OSError(
                    f"{self.url}: cannot delete {key}, which the server says is not there"
                ) from error

    def list(self, prefix: str) -> Iterator[str]:
        """Yield the names of what is directly under `prefix`: objects, and prefixes of further ones."""
        found = self._do("list", prefix, lambda: obstore.list_with_delimiter_async(self._store, prefix))
        for path in (*found["common_prefixes"], *(item["path"] for item in found["objects"])):
            yield path.rpartition("/")[2]

    def count_bytes(self, prefix: str) -> int:
        """Return the size of every object under `prefix`."""

        async def request() -> int:
            return sum([item["size"] async for item in self._walk(prefix)])

        return self._do("list", prefix, request)

    def to_zarr(self) -> ZarrStore:
        """Return the same objects as Zarr reads them; errors come out as clean as here."""
        return _CleanObjectStore(self._store, read_only=True)

    @cached_property
    def _store(self) -> S3Store:
        bucket, prefix = split_url(self.url)
        backoff = {"init_backoff": timedelta(seconds=0.1), "max_backoff": timedelta(seconds=10), "base": 2}
        limit = timedelta(seconds=RETRY_SECONDS)
        retry: Any = {"max_retries": self.max_retries, "retry_timeout": limit, "backoff": backoff}
        return S3Store(bucket, prefix=prefix, client_options=_client_options(), retry_config=retry)

    async def _fetch(self, key: str) -> Bytes:
        return await (await obstore.get_async(self._store, key)).bytes_async()

    async def _walk(self, prefix: str) -> AsyncIterator[ObjectMeta]:
        async for some in obstore.list(self._store, prefix, chunk_size=1000):
            for item in some:
                yield item

    async def _keys_until_other_than(self, expected: Set[str]) -> set[str]:
        """Return the keys that are there, up to the first that is not expected."""
        keys = set()
        async for item in self._walk(""):
            keys.add(item["path"])
            if item["path"] not in expected:
                break
        return keys

    def _put_or_find(self, key: str, data: bytes, *, known: bool) -> None:
        """Write an object where there is none, or find it with the same bytes. Raises ValueError if it has others."""
        if not known and self.put_new(key, data):
            return
        if bytes(self._do("read", key, lambda: self._fetch(key))) != data:
            raise ValueError(
                f"{self.url} holds a {key} that this run would not write: another run is creating a store there, or "
                "was interrupted while it did. Give another path, or remove what is there"
            )

    def _do(self, deed: str, key: str, request: Callable[[], Coroutine[Any, Any, Result]]) -> Result:
        """Make a request, up to ATTEMPTS times.

        Raises FileNotFoundError if there is no such object, FileExistsError if there was to be none, ValueError for a
        range behind the end, another OSError for all else.
        """
        latest = time.monotonic() + RETRY_SECONDS
        for attempt in range(ATTEMPTS):
            try:
                return REQUESTS.wait_for(request)
            except LeavingError as error:
                raise LeavingError(f"{self.url}: cannot {deed} {key or 'it'}: {error}") from None
            except (BaseError, FileNotFoundError) as error:
                failure = Failure.of(error)
            if not failure.worth_another_try or time.monotonic() > latest:
                break
            time.sleep(0.1 * 2**attempt)
        raise failure.to_error(self.url, deed, key)  # out here, so that obstore's own is not its context


class _CleanObjectStore(ObjectStore[S3Store]):
    """Zarr's store, with errors that hold no credentials."""

    async def get(
        self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None
    ) -> ZarrBuffer | None:
        try:
            return await super().get(key, prototype, byte_range)
        except BaseError as error:
            failure = Failure.of(error)
        raise failure.to_error(self._url, "read", key)

    async def exists(self, key: str) -> bool:
        try:
            return await super().exists(key)
        except BaseError as error:
            failure = Failure.of(error)
        raise failure.to_error(self._url, "read", key)

    async def list_dir(self, prefix: str) -> AsyncGenerator[str, None]:
        try:
            async for name in super().list_dir(prefix):
                yield name
            return
        except BaseError as error:
            failure = Failure.of(error)
        raise failure.to_error(self._url, "list", prefix)

    @property
    def _url(self) -> str:
        return f"s3://{self.store.config['bucket']}/{self.store.prefix}"


def split_url(url: str) -> tuple[str, str]:
    """Return bucket and prefix of `s3://bucket/name`. Raises ValueError for anything else."""
    match = _URL.fullmatch(url)
    if not match or {"", ".", ".."} & set(match[2].split("/")):
        shown = "one that is not shown, for it may hold a password" if "@" in url else repr(url)
        raise ValueError(
            f'a store in a bucket is s3://bucket/name, without any of \\{{}}^%`[]"<>~#|?; got {shown}'
        )
    return match[1], match[2]


def _client_options() -> Any:
    """Return how connections are made, from the environment. Raises ValueError for an endpoint that cannot be used."""
    given = {
        name: os.environ[f"AWS_{name.upper()}"] for name in _CLIENT if f"AWS_{name.upper()}" in os.environ
    }
    options: dict[str, Any] = {"timeout": f"{TIMEOUT_SECONDS}s", **given}
    name = next((name for name in _ENDPOINTS if os.environ.get(name)), None)
    if name is None:
        return options
    endpoint = urlsplit(os.environ[name])
    if endpoint.scheme not in ("http", "https") or not endpoint.hostname or endpoint.username:
        raise ValueError(f"{name} must be http://host:port or https://host:port, without a user's name")
    if endpoint.scheme == "http" and "allow_http" not in options:
        if not _is_this_machine(endpoint.hostname):
            raise ValueError(
                f"{name} has no TLS, so that others could read the data on their way: set AWS_ALLOW_HTTP=true if that "
                "is meant"
            )
        options["allow_http"] = True
    return options


def _is_this_machine(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
