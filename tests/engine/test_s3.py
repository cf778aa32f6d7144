from __future__ import annotations

import pickle
import sys
import traceback
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from mmextract.engine.objects import LocalObjects, Objects, locate
from mmextract.engine.s3 import PART_BYTES, S3Objects
from mmextract.engine.store import open_store
from tests.engine.test_store import complete, open_new, states, tree, write
from tests.faults.s3_proxy import Plan, Proxy, faulty
from tests.s3_server import ACCESS_KEY, SECRET_KEY, TOKEN, Bucket, request

FIRST = {"zarr.json": b"root", "sample/zarr.json": b"{}", "sample/c/0": b"ids"}


@pytest.fixture(params=["folder", "bucket"])
def objects(request: pytest.FixtureRequest, tmp_path: Path) -> Objects:
    if request.param == "folder":
        return LocalObjects(tmp_path / "some where" / "a.zarr")
    return S3Objects(request.getfixturevalue("bucket").url("some where/a.zarr"))


@pytest.fixture
def begun(objects: Objects) -> Objects:
    """The same, in a place that is there: a folder is made by `create` alone."""
    if isinstance(objects, LocalObjects):
        objects.root.mkdir(parents=True)
    return objects


@pytest.fixture
def s3(bucket: Bucket) -> S3Objects:
    return S3Objects(bucket.url("a.zarr"), max_retries=1)


@pytest.fixture
def proxy(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    with faulty(bucket.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        yield proxy


@pytest.fixture
def executor() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as pool:
        yield pool


def always(kind: str) -> Plan:
    return Plan(kinds=(kind,), persistent_from=0)


# What holds of objects wherever they are


def test_where_nothing_is_there_is_nothing(objects: Objects) -> None:
    assert not objects.occupied()
    assert objects.get("zarr.json") is None
    assert list(objects.list("")) == [] == list(objects.list("shard_digest/c"))
    assert objects.count_bytes("hidden_states") == 0
    objects.delete("shard_digest/c/0")
    with pytest.raises(FileNotFoundError):
        objects.read("hidden_states/c/0", 0, 1)
    with pytest.raises(FileNotFoundError):
        objects.read("hidden_states/c/0", -1, 1)


def test_what_is_put_is_read_back_whole_and_in_pieces(begun: Objects) -> None:
    begun.put("a/c/0", [b"0123", memoryview(b"45"), bytearray(b"6789")])
    assert begun.get("a/c/0") == b"0123456789"
    assert begun.read("a/c/0", 2, 3) == b"234"
    assert begun.read("a/c/0", -4, 4) == b"6789"
    assert begun.read("a/c/0", -4, 2) == b"67"
    for offset in (8, 10, 99):
        with pytest.raises(ValueError, match="cut short"):
            begun.read("a/c/0", offset, 3)
    begun.put("a/c/0", [])
    assert begun.get("a/c/0") == b""


def test_a_listing_names_what_is_directly_there(begun: Objects) -> None:
    for key in ("zarr.json", "a/zarr.json", "a/c/0", "a/c/1", "a/c/10/0", "ab/c/0"):
        begun.put(key, [b"xy"])
    assert begun.occupied()
    assert sorted(begun.list("")) == ["a", "ab", "zarr.json"]
    assert sorted(begun.list("a/c")) == ["0", "1", "10"]
    assert begun.count_bytes("a") == 8
    begun.delete("a/c/1")
    assert sorted(begun.list("a/c")) == ["0", "10"]


def test_creation_leaves_all_objects_and_those_of_a_writer_who_was_first(objects: Objects) -> None:
    objects.create(FIRST, last="zarr.json")
    assert {key: objects.get(key) for key in FIRST} == FIRST
    objects.create({**FIRST, "zarr.json": b"other"}, last="zarr.json")
    assert {key: objects.get(key) for key in FIRST} == FIRST


def test_of_several_new_objects_under_one_key_the_first_stays(begun: Objects) -> None:
    assert begun.put_new("lease", b"first")
    assert not begun.put_new("lease", b"second")
    assert begun.get("lease") == b"first"
    begun.delete("lease")
    assert begun.put_new("lease", b"third") and begun.get("lease") == b"third"


def test_creation_leaves_what_others_keep_there_alone(begun: Objects) -> None:
    begun.put("thesis.txt", [b"precious"])
    with pytest.raises(ValueError, match="not a store of mmextract"):
        begun.create(FIRST, last="zarr.json")
    assert sorted(begun.list("")) == ["thesis.txt"]


def test_objects_go_to_another_process_and_work_there(begun: Objects) -> None:
    begun.put("a", [b"1"])
    copied = pickle.loads(pickle.dumps(begun))
    assert copied == begun and copied.url == begun.url and copied.get("a") == b"1"
    assert not any(secret.encode() in pickle.dumps(begun) for secret in (SECRET_KEY, TOKEN, ACCESS_KEY))


def test_a_store_is_the_same_objects_wherever_it_is(
    bucket: Bucket, tmp_path: Path, executor: ThreadPoolExecutor
) -> None:
    complete(tmp_path / "a.zarr", executor)
    complete(S3Objects(bucket.url("a.zarr")), executor)  # type: ignore[arg-type]
    assert bucket.contents("a.zarr") == tree(tmp_path / "a.zarr")
    store, local = open_store(bucket.url("a.zarr")), open_store(tmp_path / "a.zarr")
    assert np.array_equal(store.read(3, "image"), states("float32")[:, 2, 1].numpy())
    assert store.columns.keys() == local.columns.keys()
    for name, values in local.columns.items():
        assert store.columns[name].tolist() == values.tolist()


@pytest.mark.parametrize("lost", ["sample/c/0", "age/c/0", "n_tokens/c/0", "layer/c/0"])
def test_a_lost_chunk_of_a_column_is_an_error_and_never_zeros(
    objects: Objects, executor: ThreadPoolExecutor, lost: str
) -> None:
    complete(objects, executor)  # type: ignore[arg-type]
    objects.delete(lost)
    store = open_store(objects)
    with pytest.raises(ValueError, match=rf"is damaged \({lost}: it is missing\)"):
        _ = store.layers if lost.startswith("layer") else store.columns


def test_a_lost_shard_is_an_error_and_never_nan(objects: Objects, executor: ThreadPoolExecutor) -> None:
    complete(objects, executor)  # type: ignore[arg-type]
    objects.delete("hidden_states/c/1/0/0/0")
    with pytest.raises(FileNotFoundError, match="lost shard 1"):
        open_store(objects).read(0, "last")


# What S3 adds


def test_a_large_object_goes_up_in_parts_and_arrives_whole(s3: S3Objects, bucket: Bucket) -> None:
    pieces = [bytes([n]) * (3 << 20) for n in range(4)]
    assert sum(map(len, pieces)) > PART_BYTES
    s3.put("big", pieces)
    assert bucket.contents("a.zarr")["big"] == b"".join(pieces)
    assert s3.read("big", (9 << 20) - 1, 2) == b"\x02\x03"


@pytest.mark.parametrize("n_there", range(len(FIRST)))
def test_an_interrupted_creation_is_taken_up_again(s3: S3Objects, bucket: Bucket, n_there: int) -> None:
    for key in sorted(FIRST)[:n_there]:  # the last in order is not written before the others
        if key != "zarr.json":
            bucket.put(f"a.zarr/{key}", FIRST[key])
    s3.create(FIRST, last="zarr.json")
    assert bucket.contents("a.zarr") == FIRST


def test_a_store_whose_creation_was_interrupted_is_continued(
    bucket: Bucket, tmp_path: Path, executor: ThreadPoolExecutor
) -> None:
    complete(tmp_path / "a.zarr", executor)
    open_new(S3Objects(bucket.url("a.zarr")), executor)  # type: ignore[arg-type]
    bucket.delete("a.zarr/zarr.json")
    bucket.delete("a.zarr/sample/c/0")
    complete(S3Objects(bucket.url("a.zarr")), executor)  # type: ignore[arg-type]
    assert bucket.contents("a.zarr") == tree(tmp_path / "a.zarr")


def test_what_another_run_began_to_create_is_not_mixed_with(s3: S3Objects, bucket: Bucket) -> None:
    bucket.put("a.zarr/sample/c/0", b"other ids")
    with pytest.raises(ValueError, match="sample/c/0 that this run would not write"):
        s3.create(FIRST, last="zarr.json")
    assert bucket.contents("a.zarr")["sample/c/0"] == b"other ids"
    assert "zarr.json" not in bucket.keys("a.zarr")


def test_a_creation_whose_answer_is_lost_is_known_as_our_own(bucket: Bucket, proxy: Proxy) -> None:
    proxy.follow(Plan(share=0.5, kinds=("lost",), seed=5))
    S3Objects(bucket.url("a.zarr"), max_retries=8).create(FIRST, last="zarr.json")
    assert proxy.injected["lost"] and bucket.contents("a.zarr") == FIRST


@pytest.mark.parametrize("kind", ["500", "503", "reset", "lost", "truncated"])
def test_what_passes_is_tried_again(bucket: Bucket, proxy: Proxy, kind: str) -> None:
    s3 = S3Objects(bucket.url("a.zarr"), max_retries=8)
    proxy.follow(Plan(share=0.3, kinds=(kind,), seed=1))
    for n in range(6):
        s3.put(f"a/{n}", [b"%d" % n])
        assert s3.get(f"a/{n}") == b"%d" % n
    assert sorted(s3.list("a")) == [str(n) for n in range(6)]
    assert proxy.injected[kind] >= 2


def test_a_server_that_stays_down_is_told_of_and_nothing_is_waited_for(s3: S3Objects, proxy: Proxy) -> None:
    proxy.follow(always("503"))
    with pytest.raises(OSError, match=r"cannot write a: the server answered 503 SlowDown \(tried 2 times\)"):
        s3.put("a", [b"1"])
    assert proxy.requests == 2


def test_an_endpoint_that_is_not_there_is_an_error(s3: S3Objects, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(ConnectionError, match=r"cannot be reached.*AWS_ENDPOINT_URL"):
        s3.get("zarr.json")


def test_a_server_that_does_not_answer_is_an_error(
    s3: S3Objects, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_TIMEOUT", "300ms")
    proxy.follow(always("timeout"))
    with pytest.raises(TimeoutError, match="did not answer in time"):
        s3.get("zarr.json")


def test_a_bucket_that_does_not_exist_is_never_taken_for_an_empty_one(bucket: Bucket) -> None:
    nowhere = S3Objects("s3://no-such-bucket/a.zarr")
    for work in (
        nowhere.occupied,
        lambda: nowhere.get("zarr.json"),
        lambda: nowhere.read("a", 0, 1),
        lambda: list(nowhere.list("")),
        lambda: nowhere.put("a", [b"1"]),
        lambda: nowhere.put("a", [bytes(PART_BYTES), b"1"]),
        lambda: nowhere.delete("a"),
        lambda: nowhere.create(FIRST, last="zarr.json"),
    ):
        with pytest.raises(OSError, match="no such bucket") as raised:
            work()
        assert not isinstance(raised.value, FileNotFoundError)


def test_expired_credentials_are_told_of_and_never_shown(
    s3: S3Objects, proxy: Proxy, executor: ThreadPoolExecutor
) -> None:
    complete(s3, executor)  # type: ignore[arg-type]
    store = open_store(s3)
    proxy.follow(always("403"))
    for work in (
        s3.occupied,
        lambda: s3.get("zarr.json"),
        lambda: s3.put("a", [b"1"]),
        lambda: s3.put("a", [bytes(PART_BYTES), b"1"]),
        lambda: s3.create(FIRST, last="zarr.json"),
        lambda: list(s3.list("")),
        lambda: s3.delete("a"),
        lambda: store.read(0, "last"),
        lambda: store.columns,
    ):
        with pytest.raises(PermissionError, match="credentials have expired") as raised:
            work()
        shown = "".join(traceback.format_exception(raised.value)) + repr(raised.value)
        assert not any(secret in shown for secret in (SECRET_KEY, TOKEN, ACCESS_KEY))
        assert raised.value.__context__ is None


def test_credentials_that_the_server_does_not_know_are_told_of(s3: S3Objects, bucket: Bucket) -> None:
    request("POST", f"{bucket.endpoint}/moto-api/reset-auth", b"0")
    try:
        with pytest.raises(PermissionError, match=r"403 Invalid.*credentials are not accepted") as raised:
            s3.get("zarr.json")
    finally:
        request("POST", f"{bucket.endpoint}/moto-api/reset-auth", b"inf")
    assert ACCESS_KEY not in str(raised.value)


def test_no_credentials_at_all_is_told_of(s3: S3Objects, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    with pytest.raises(PermissionError, match="there are no credentials"):
        s3.get("zarr.json")
    for name in ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(PermissionError, match="there are no credentials"):
        S3Objects(s3.url, max_retries=0).get("zarr.json")


@pytest.mark.parametrize(
    ("endpoint", "message"),
    [
        ("http://10.0.0.1:9000", "AWS_ALLOW_HTTP"),
        ("minio:9000", "must be http"),
        ("http://me:hunter2@minio", "must be"),
    ],
)
def test_an_endpoint_that_cannot_be_meant_is_refused(
    s3: S3Objects, monkeypatch: pytest.MonkeyPatch, endpoint: str, message: str
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    with pytest.raises(ValueError, match=message) as raised:
        s3.get("zarr.json")
    assert "hunter2" not in str(raised.value)


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("gs://bucket/a.zarr", "gs:// is not supported"),
        ("s3://bucket", "s3://bucket/name"),
        ("s3://bucket/a//b", "s3://bucket/name"),
        ("s3://bucket/../b", "s3://bucket/name"),
        ("s3://bucket/a?versionId=1", "s3://bucket/name"),
        ("s3://key:hunter2@bucket/a.zarr", "not shown"),
        (Path("s3://bucket/a.zarr"), "give it as a string"),
    ],
)
def test_a_place_that_is_no_place_is_refused(place: str | Path, message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        locate(place)
    assert "hunter2" not in str(raised.value)


def test_a_url_and_a_path_are_told_apart() -> None:
    assert locate("s3://bucket/deep/a.zarr/") == S3Objects("s3://bucket/deep/a.zarr")
    for path in ("a.zarr", "./s3:/x", "C:/a", "s3:x"):
        assert locate(path) == LocalObjects(Path(path))


def test_without_obstore_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "obstore", None)
    monkeypatch.delitem(sys.modules, "mmextract.engine.s3")
    with pytest.raises(ImportError, match=r"pip install 'mmextract\[s3\]'"):
        locate("s3://bucket/a.zarr")


def test_zarr_takes_a_store_in_a_bucket_to_another_process(
    s3: S3Objects, executor: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    complete(s3, executor)  # type: ignore[arg-type]
    pickled = pickle.dumps(open_store(s3))
    assert not any(secret.encode() in pickled for secret in (SECRET_KEY, TOKEN, ACCESS_KEY))
    store = pickle.loads(pickled)
    assert np.array_equal(np.asarray(store.hidden_states[:]), states("float32").numpy())


def test_an_unfinished_store_in_a_bucket_lacks_what_is_not_committed(
    s3: S3Objects, executor: ThreadPoolExecutor
) -> None:
    writer = open_new(s3, executor)  # type: ignore[arg-type]
    write(writer, 1)
    assert writer.committed() == {1}
    assert open_store(s3).missing == 6
