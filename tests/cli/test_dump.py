from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from transformers import CLIPImageProcessor

from mmextract.engine.store import open_store
from tests.cli.conftest import Ran, save_photos
from tests.engine.test_store import tree
from tests.engine.tiny_models import save_llava

Run = Callable[..., Ran]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return save_photos(tmp_path / "photos", 8)


def test_with_nothing_given_it_dumps_the_builtin_pairs(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ran = run("dump", "--layers", "all", "--limit", 6)
    assert ran.code == 0, ran.err
    assert "bottleneck: " in ran.out and "12 samples" in ran.out
    store = open_store("activations.zarr")
    assert store.columns["identity_set"].tolist() == ["seen", "unseen"] * 6
    assert len(store.layers) == 6
    assert not np.isnan(store.read(5, "last")).any()


def test_a_folder_of_images_goes_through_the_builtin_model(run: Run, photos: Path, tmp_path: Path) -> None:
    ran = run(
        "dump", photos, "--prompt", "what is it?", "--layers", "-1", "--json", "-o", tmp_path / "a.zarr"
    )
    assert ran.code == 0, ran.err
    result = json.loads(ran.out)
    assert result["n_samples"] == 8 and result["rejected"] == {}
    assert open_store(tmp_path / "a.zarr").columns["sample"].tolist() == [f"{i}.jpg" for i in range(8)]


def test_a_dry_run_writes_nothing(run: Run, photos: Path, tmp_path: Path) -> None:
    ran = run("dump", photos, "--prompt", "what?", "--dry-run", "--json", "-o", tmp_path / "a.zarr")
    assert ran.code == 0, ran.err
    plan = json.loads(ran.out)
    assert plan["bytes"] == 8 * 6 * 128 * 4
    assert not (tmp_path / "a.zarr").exists()


def test_rejected_samples_are_listed_and_the_exit_code_is_three(
    run: Run, photos: Path, tmp_path: Path
) -> None:
    (photos / "3.jpg").write_bytes((photos / "3.jpg").read_bytes()[:99])
    ran = run("dump", photos, "--prompt", "what?", "-o", tmp_path / "a.zarr")
    assert ran.code == 3
    assert "3.jpg" in ran.err
    assert run("dump", photos, "--prompt", "what?", "-o", tmp_path / "a.zarr").code == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "builtin:x"), "the built-in models are builtin:base"),
        (("--layers", "6"), "0 to 5"),
        (("--position", "middle"), "not understood"),
        (("--model", "NOWHERE"), "NOWHERE"),
        (("--image-root", "EMPTY"), "EMPTY"),
    ],
)
def test_a_mistake_is_one_clear_message(
    run: Run, photos: Path, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    (tmp_path / "EMPTY").mkdir()
    given = [str(tmp_path / a) if a in ("NOWHERE", "EMPTY") else a for a in arguments]
    ran = run("dump", photos, "--prompt", "what?", "-o", tmp_path / "a.zarr", *given)
    assert ran.code in (1, 2)
    assert message in ran.err and "Traceback" not in ran.err
    assert not (tmp_path / "a.zarr").exists()


def test_a_folder_that_cannot_be_written_is_an_error(run: Run, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    ran = run("dump", photos, "--prompt", "what?", "-o", tmp_path / "file" / "a.zarr")
    assert ran.code == 1
    assert "file" in ran.err and "Traceback" not in ran.err


@pytest.mark.skipif(
    os.geteuid() != 0 or not Path("/dev/full").exists(), reason="a full disk needs a mount, so root"
)
def test_a_full_disk_is_an_error_and_the_run_continues_on_a_larger_one(
    run: Run, photos: Path, tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=96k", "none", disk], check=False, capture_output=True
    )
    if mounted.returncode:
        pytest.skip("this machine does not let tests mount a small disk")
    options = ("--prompt", "what?", "--position", "last", "--position", "image", "--shard-samples", 2)
    try:
        ran = run("dump", photos, *options, "-o", disk / "a.zarr")
        assert ran.code == 1
        assert "No space left on device" in ran.err
        subprocess.run(["mount", "-o", "remount,size=16m", disk], check=True)
        assert run("dump", photos, *options, "-o", disk / "a.zarr").code == 0
        assert run("dump", photos, *options, "-o", tmp_path / "b.zarr").code == 0
        assert tree(disk / "a.zarr") == tree(tmp_path / "b.zarr")
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_killed_is_continued_to_the_same_bytes(
    run: Run, tmp_path: Path, sent: signal.Signals
) -> None:
    save_photos(tmp_path / "many", 120)
    command = ["dump", tmp_path / "many", "--prompt", "what?", "--shard-samples", 2, "--batch-size", 2]
    command += ["--torch-threads", 1]  # which the store records, and this process may have changed
    process = subprocess.Popen(
        [Path(sys.executable).parent / "mmextract", *map(str, command), "-o", tmp_path / "a.zarr"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    digests = tmp_path / "a.zarr/shard_digest/c"
    deadline = time.monotonic() + 120
    while not any(digests.glob("[0-9]*")) and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(sent)
    _, error = process.communicate(timeout=60)
    if sent == signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
    else:
        assert process.returncode == 130
        assert b"Run the same command again" in error and b"Traceback" not in error
    assert 0 < open_store(tmp_path / "a.zarr").missing < 120
    assert run(*command, "-o", tmp_path / "a.zarr").code == 0
    assert run(*command, "-o", tmp_path / "whole.zarr").code == 0
    assert tree(tmp_path / "a.zarr") == tree(tmp_path / "whole.zarr")


def test_the_way_images_are_preprocessed_can_be_chosen_and_is_told(
    run: Run, photos: Path, tmp_path: Path
) -> None:
    for way, mode in (("processor", None), ("cpu", "torchvision")):
        command = ("dump", photos, "--prompt", "what?", "--device", "cpu", "--preprocess", way)
        assert run(*command, "-o", tmp_path / way).code == 0
        attributes = json.loads((tmp_path / way / "zarr.json").read_text())["attributes"]
        assert attributes["preprocess"] == {"path": way, "mode": mode, "reason": None}
    ran = run("dump", photos, "--prompt", "what?", "--device", "cpu", "--preprocess", "kernels")
    assert ran.code == 1 and "--preprocess kernels is not possible for this model: " in ran.err


def test_that_the_processor_must_preprocess_is_said_once_with_the_reason(
    run: Run, photos: Path, tmp_path: Path
) -> None:
    processor = CLIPImageProcessor(do_center_crop=True, crop_size={"height": 28, "width": 28}, do_pad=True)
    processor.size = {"height": 28, "width": 28}
    model = save_llava(tmp_path / "model", image_processor=processor)
    ran = run("dump", photos, "--prompt", "what?", "--model", model, "-o", tmp_path / "a.zarr")
    assert ran.code == 0
    assert ran.err.count("images are preprocessed by the model's processor: CLIPImageProcessor pads") == 1


def test_info_describes_a_store(run: Run, photos: Path, tmp_path: Path) -> None:
    run("dump", photos, "--prompt", "what?", "-o", tmp_path / "a.zarr")
    ran = run("info", tmp_path / "a.zarr")
    assert ran.code == 0
    assert "8 (8 committed, 0 missing, 0 rejected)" in ran.out
    record = json.loads(run("info", tmp_path / "a.zarr", "--json").out)
    assert record["attributes"]["run"]["model"]["class"] == "LlavaForConditionalGeneration"
