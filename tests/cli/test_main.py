from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import Ran

Run = Callable[..., Ran]


def test_an_unknown_command_is_a_usage_error(run: Run) -> None:
    assert run("dunp").code == 2


def test_a_failure_is_one_message_without_a_traceback(run: Run, tmp_path: Path) -> None:
    ran = run("info", tmp_path / "none.zarr")
    assert ran.code == 1
    assert "there is no store at" in ran.err and "mmextract dump" in ran.err
    assert "Traceback" not in ran.err


def test_an_option_can_be_set_in_the_environment(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MMEXTRACT_IDENTITIES_N", "3")
    assert run("identities", "-o", tmp_path / "p.jsonl").code == 0
    assert len((tmp_path / "p.jsonl").read_text().splitlines()) == 3


def test_an_option_can_be_set_in_a_file_and_the_command_line_wins(run: Run, tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text(f"[identities]\nn = 3\noutput = '{tmp_path}/p.jsonl'\n")
    assert run("--config", tmp_path / "c.toml", "identities").code == 0
    assert len((tmp_path / "p.jsonl").read_text().splitlines()) == 3
    assert run("--config", tmp_path / "c.toml", "identities", "--n", 4).code == 0
    assert len((tmp_path / "p.jsonl").read_text().splitlines()) == 4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[dunp]\n", "one table a command"),
        ("[dump]\nlayerz = 1\n", "no option layerz"),
        ("= 1", "cannot be read as TOML"),
    ],
)
def test_a_bad_configuration_file_is_a_usage_error(run: Run, tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "c.toml").write_text(text)
    ran = run("--config", tmp_path / "c.toml", "identities", "-o", tmp_path / "p.jsonl")
    assert ran.code == 2
    assert message in " ".join(ran.err.split())


def test_doctor_says_what_would_be_used_and_why(run: Run) -> None:
    ran = run("doctor")
    assert ran.code == 0
    for word in ("torch", "transformers", "cpu", "dump runs on", "probes"):
        assert word in ran.out


STUCK = """
import threading, time
from mmextract.cli import main

main.SECONDS_TO_LEAVE = 1

@main.group.command()
def stuck():
    lock = threading.Lock()
    lock.acquire()
    try:
        print("ready", flush=True)
        time.sleep(60)
    finally:
        lock.acquire()  # as after a signal that came while the lock was being taken

main.main()
"""


@pytest.mark.parametrize("asked", [signal.SIGINT, signal.SIGTERM])
def test_a_command_leaves_even_if_a_lock_was_never_given_back(asked: signal.Signals) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", STUCK, "stuck"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(asked)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 130 and "Run the same command again to continue." in said
