"""Only a regular file inside its root is read as an image; what is not one neither hangs nor ends a run."""

import os
import pickle
import shutil
import threading
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmextract.engine.images import RejectedSample
from mmextract.engine.sources import MAX_BYTES, ParquetImage, file_image


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "root"
    (root / "sub").mkdir(parents=True)
    (root / "a.png").write_bytes(b"a")
    (root / "sub" / "b.png").write_bytes(b"b")
    (tmp_path / "secret.png").write_bytes(b"secret")
    return root


def test_relative_absolute_and_file_url_paths_inside_the_root_name_the_same_image(root: Path) -> None:
    names = [
        "sub/b.png",
        "./sub//b.png",
        "sub/../sub/b.png",
        str(root / "sub/b.png"),
        f"file://{root}/sub/b.png",
    ]
    assert [file_image(root, name).read() for name in names] == [b"b"] * 5
    assert file_image(root, str(root / "sub/b.png")).name == "sub/b.png"


def test_an_absolute_path_is_inside_a_root_that_is_a_link_under_either_name(
    root: Path, tmp_path: Path
) -> None:
    link = tmp_path / "link"
    link.symlink_to(root)
    assert (
        file_image(link, str(link / "a.png")).read() == file_image(link, str(root / "a.png")).read() == b"a"
    )


@pytest.mark.parametrize(
    "name", ["../secret.png", "sub/../../secret.png", "/etc/passwd", "..", "file:///etc/passwd"]
)
def test_a_path_that_leaves_the_root_is_an_error_of_the_data(name: str, root: Path) -> None:
    with pytest.raises(ValueError, match=r"lies outside of the image root .*--image-root"):
        file_image(root, name)


@pytest.mark.parametrize("name", ["http://host/a.png", "s3://bucket/a.png", "data:image/png;base64,aGk="])
def test_an_image_elsewhere_is_not_fetched(name: str, root: Path) -> None:
    with pytest.raises(ValueError, match="not a local file: save it"):
        file_image(root, name)


@pytest.mark.parametrize("name", ["", ".", "a\0.png"])
def test_what_is_no_path_of_a_file_is_an_error_of_the_data(name: str, root: Path) -> None:
    with pytest.raises(ValueError, match="not a path of a file"):
        file_image(root, name)


def test_a_file_name_may_hold_a_colon_or_two_dots(root: Path) -> None:
    for name in ("10:30.png", "a..png", "...png"):
        (root / name).write_bytes(b"x")
        assert file_image(root, name).read() == b"x"


def test_links_are_followed_inside_the_root_and_rejected_where_they_leave_it(
    root: Path, tmp_path: Path
) -> None:
    (root / "inside.png").symlink_to("sub/b.png")
    (root / "outside.png").symlink_to(tmp_path / "secret.png")
    (root / "folder").symlink_to(tmp_path)
    (root / "loop.png").symlink_to("loop.png")
    assert file_image(root, "inside.png").read() == b"b"
    for name, reason in (
        ("outside.png", "out of"),
        ("folder/secret.png", "out of"),
        ("loop.png", "back to itself"),
    ):
        with pytest.raises(RejectedSample, match=reason):
            file_image(root, name).read()


def test_what_is_no_regular_file_is_rejected_without_waiting_for_it(root: Path) -> None:
    os.mkfifo(root / "fifo.png")
    for name, reason in (
        ("fifo.png", "not a regular file"),
        ("sub", "not a regular file"),
        ("missing.png", "missing"),
        ("a.png/b.png", "missing"),
        ("x" * 300 + ".png", "too long"),
    ):
        with pytest.raises(RejectedSample, match=reason):
            file_image(root, name).read()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_a_file_without_permission_is_rejected(root: Path) -> None:
    (root / "a.png").chmod(0)
    with pytest.raises(RejectedSample, match="permission denied"):
        file_image(root, "a.png").read()


def test_a_file_of_too_many_bytes_is_rejected_unread(root: Path) -> None:
    os.truncate(root / "a.png", MAX_BYTES + 1)
    with pytest.raises(RejectedSample, match="1,073,741,825 bytes"):
        file_image(root, "a.png").read()


def test_a_root_that_vanishes_ends_the_run_rather_than_rejecting_everything(root: Path) -> None:
    image = file_image(root, "a.png")
    shutil.rmtree(root)
    with pytest.raises(FileNotFoundError, match="root has vanished"):
        image.read()


def test_running_out_of_descriptors_ends_the_run_rather_than_rejecting_the_sample(root: Path) -> None:
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = os.open("/dev/null", os.O_RDONLY)
    resource.setrlimit(resource.RLIMIT_NOFILE, (taken + 1, hard))
    try:
        spare = []
        with pytest.raises(OSError, match="Too many open files"):
            while True:
                spare.append(os.open("/dev/null", os.O_RDONLY))
        with pytest.raises(OSError, match="Too many open files"):
            file_image(root, "a.png").read()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for descriptor in (taken, *spare):
            os.close(descriptor)


def parquet_images(path: Path, values: list[bytes], row_group_size: int) -> list[ParquetImage]:
    pq.write_table(pa.table({"image": values}), path, row_group_size=row_group_size)
    return [
        ParquetImage(
            path=path, column="image", row_group=i // row_group_size, row=i % row_group_size, name=f"row {i}"
        )
        for i in range(len(values))
    ]


def test_parquet_images_survive_pickling_and_concurrent_reads(tmp_path: Path) -> None:
    values = [bytes([i]) * 100 for i in range(60)]
    images = pickle.loads(pickle.dumps(parquet_images(tmp_path / "a.parquet", values, row_group_size=7)))
    found: dict[int, bytes] = {}
    threads = [
        threading.Thread(target=lambda part=part: found.update({i: images[i].read() for i in part}))
        for part in (range(0, 60, 3), range(1, 60, 3), range(59, 0, -3))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == dict(enumerate(values))


def test_a_parquet_file_written_anew_is_read_anew(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    assert parquet_images(path, [b"old"], 1)[0].read() == b"old"
    images = parquet_images(path, [b"new"], 1)
    os.utime(path, ns=(0, 0))
    assert images[0].read() == b"new"
