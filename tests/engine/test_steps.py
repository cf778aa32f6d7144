"""Steps are done once, again only if what decides them changed, and go on where they were stopped."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mmextract.engine.steps import FOLDER, RECORD, Step, hold, plan_steps, run_steps


def make_steps(log: list[str], *, seed: int = 0, fail: str = "") -> list[Step]:
    """Return a → b, a → c, (b, c) → d and an e of its own; b alone depends on the seed."""

    def does(name: str) -> Callable[[Path, Callable[[int], None]], None]:
        def run(folder: Path, advance: Callable[[int], None]) -> None:
            log.append(name)
            (folder / "part").write_text("1")
            if name == fail:
                raise OSError("stopped")
            (folder / "result").write_text(f"{name} {seed}")

        return run

    needs = {"a": (), "b": ("a",), "c": ("a",), "d": ("b", "c"), "e": ()}
    return [
        Step(
            name=name,
            kind="k",
            decision={"seed": seed if name == "b" else None},
            needs=of,
            run=does(name),
            units=2,
            unit_seconds=3.0,
        )
        for name, of in needs.items()
    ]


def test_what_is_done_is_not_done_again(tmp_path: Path) -> None:
    log: list[str] = []
    run_steps(make_steps(log), tmp_path)
    assert log == ["a", "b", "c", "d", "e"]
    run_steps(make_steps(log), tmp_path)
    assert log == ["a", "b", "c", "d", "e"]


def test_a_changed_decision_reruns_what_depends_on_it_and_nothing_else(tmp_path: Path) -> None:
    log: list[str] = []
    run_steps(make_steps(log), tmp_path)
    assert [entry.state for entry in plan_steps(make_steps(log, seed=1), tmp_path)] == [
        *("done", "changed", "done", "changed", "done")
    ]
    log.clear()
    run_steps(make_steps(log, seed=1), tmp_path)
    assert log == ["b", "d"]
    assert (tmp_path / FOLDER / "b" / "result").read_text() == "b 1"


def test_old_results_are_removed_before_a_changed_step_runs(tmp_path: Path) -> None:
    run_steps(make_steps([]), tmp_path)
    with pytest.raises(OSError, match="stopped"):
        run_steps(make_steps([], seed=1, fail="b"), tmp_path)
    assert not (tmp_path / FOLDER / "b" / "result").exists()


def test_a_stopped_step_goes_on_in_its_own_folder(tmp_path: Path) -> None:
    log: list[str] = []
    with pytest.raises(OSError, match="stopped"):
        run_steps(make_steps(log, fail="c"), tmp_path)
    states = [entry.state for entry in plan_steps(make_steps(log), tmp_path)]
    assert states == ["done", "done", "begun", "new", "new"]
    (tmp_path / FOLDER / "c" / "kept").touch()
    log.clear()
    run_steps(make_steps(log), tmp_path)
    assert log == ["c", "d", "e"]
    assert (tmp_path / FOLDER / "c" / "kept").exists()


def test_times_are_guessed_until_a_step_of_the_kind_was_measured(tmp_path: Path) -> None:
    assert [entry.seconds for entry in plan_steps(make_steps([]), tmp_path)] == [6.0] * 5
    with pytest.raises(OSError):
        run_steps(make_steps([], fail="b"), tmp_path)
    record = tmp_path / FOLDER / "a" / RECORD
    record.write_text(json.dumps(json.loads(record.read_text()) | {"seconds": 8.0}))
    assert [entry.seconds for entry in plan_steps(make_steps([]), tmp_path)] == [8.0] * 5


def test_steps_that_need_what_is_not_before_them_are_refused(tmp_path: Path) -> None:
    steps = make_steps([])
    with pytest.raises(ValueError, match="b needs a, which is no step before it"):
        plan_steps(steps[1:], tmp_path)
    with pytest.raises(ValueError, match="two steps are called a"):
        plan_steps([steps[0], *steps], tmp_path)


def test_a_damaged_record_is_named(tmp_path: Path) -> None:
    run_steps(make_steps([]), tmp_path)
    (tmp_path / FOLDER / "a" / RECORD).write_text("{")
    with pytest.raises(ValueError, match="is not the record of a step"):
        plan_steps(make_steps([]), tmp_path)


def test_two_runs_do_not_mix(tmp_path: Path) -> None:
    with hold(tmp_path / "run"):
        code = (
            "import sys; from pathlib import Path; from mmextract.engine.steps import hold\n"
            "try:\n    with hold(Path(sys.argv[1])): pass\nexcept OSError as error: print(error)"
        )
        command = [sys.executable, "-c", code, str(tmp_path / "run")]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "another run is at work" in done.stdout


def test_a_folder_with_something_else_in_it_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ValueError, match="is not empty and no experiment"), hold(tmp_path):
        pass
