from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.cli.conftest import Ran
from tests.probes.stores import make_paired_store

Run = Callable[..., Ran]
QUICK = ("--c", 0.1, "--repeats", 1, "--permutations", 0, "--projections", "none", "--no-separability")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cli") / "activations.zarr"
    return make_paired_store(path, signals=[[0, 0], [0, 1.0]])


def test_with_no_arguments_it_reads_activations_zarr_and_writes_probe(
    run: Run, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "activations.zarr").symlink_to(store)
    monkeypatch.chdir(tmp_path)
    ran = run("probe")
    assert ran.code == 0, ran.err
    assert ran.out.startswith("The hidden states tell seen from unseen") and "probe/report.html" in ran.out
    assert json.loads(Path("probe/probe.json").read_text())["command"] == "mmextract probe"
    assert {path.suffix for path in Path("probe").iterdir()} == {
        ".json",
        ".csv",
        ".parquet",
        ".png",
        ".svg",
        ".pdf",
        ".html",
    }
    made = {path.name for path in Path("probe").iterdir()}
    assert {"separability.parquet", "projections.parquet", "pca-image.pdf", "tsne-image.png"} <= made
    page = Path("probe/report.html").read_bytes()
    Path("probe/report.html").unlink()
    ran = run("report")
    assert ran.code == 0 and ran.out == "Report: probe/report.html\n", ran.err
    assert Path("probe/report.html").read_bytes() == page


def test_json_on_stdout_is_all_that_is_printed_there(run: Run, store: Path, tmp_path: Path) -> None:
    ran = run("probe", store, *QUICK, "--layers", "-1", "--position", "image", "--json", "-o", tmp_path)
    assert ran.code == 0
    printed = json.loads(ran.out)
    assert [(row["layer"], row["position"]) for row in printed["rows"]] == [(0, "image")]
    assert printed["best"]["metric"] == "auroc" and printed["design"]["group"] == "pair"
    assert all(Path(path).is_file() for path in printed["files"])


def test_the_published_protocol_is_a_preset_and_leaves_no_choice(
    run: Run, store: Path, tmp_path: Path
) -> None:
    ran = run("probe", store, "--preset", "paper", "--projections", "none", "-o", tmp_path, "--json")
    assert ran.code == 0 and {row["metric"] for row in json.loads(ran.out)["rows"]} == {"accuracy"}
    for given in (
        ("--folds", 3),
        ("--permutations", 50),
        ("--class-weight", "balanced"),
        ("--compare", store),
    ):
        ran = run("probe", store, "--preset", "paper", *given, "-o", tmp_path)
        assert ran.code == 2 and given[0] in ran.err


def test_a_grouping_that_separates_pairs_is_warned_of_on_stderr(
    run: Run, store: Path, tmp_path: Path
) -> None:
    ran = run("probe", store, *QUICK, "--layers", "embed", "--group", "none", "-o", tmp_path)
    assert ran.code == 0
    assert "WARNING: without groups, 30 identity pairs fall into training and test at once" in ran.err
    assert "WARNING" not in ran.out


def test_decisions_taken_for_the_user_are_said_on_stderr(run: Run, store: Path, tmp_path: Path) -> None:
    ran = run(
        "probe",
        store,
        *QUICK,
        "--layers",
        0,
        "--label",
        "answer",
        "--where",
        "condition == 'seen'",
        "-o",
        tmp_path,
    )
    assert ran.code == 0, ran.err
    assert json.loads((tmp_path / "probe.json").read_text())["design"]["classes"] == {"no": 30, "yes": 30}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--label", "colour"), "no column 'colour'"),
        (("--group", "colour"), "no column 'colour'"),
        (("--label", "sample"), "looks like an identifier"),
        (("--where", "condition == 'seen'"), "one class only, 'seen'"),
        (("--where", "import os"), "cannot read the filter"),
        (("--layers", "9"), "layer 9 is out of range"),
        (("--position", "prompt"), "it has last, image"),
        (("--projections", "pcs"), "expected projections out of pca, tsne, umap"),
        (("--label", "identity_set,colour"), "no column 'colour'"),
        (("--permutations", "5"), "at least 19"),
        (("--compare", "none.zarr"), "mmextract dump"),
        (("--folds", "40"), "40 folds need at least 40 groups (pair), but there are 30"),
    ],
)
def test_what_cannot_be_probed_is_one_message_and_nothing_is_written(
    run: Run, store: Path, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    ran = run("probe", store, *arguments, "-o", tmp_path / "out")
    assert ran.code == 1
    assert message in ran.err and "Traceback" not in ran.err
    assert not (tmp_path / "out").exists()


def test_several_labels_get_a_folder_each_and_one_table(run: Run, store: Path, tmp_path: Path) -> None:
    ran = run(
        "probe", store, *QUICK, "--layers", 0, "--label", "identity_set,answer", "-o", tmp_path, "--json"
    )
    assert ran.code == 0, ran.err
    assert list(json.loads(ran.out)) == ["identity_set", "answer"]
    rows = pq.read_table(tmp_path / "probe.parquet").to_pylist()
    assert {row["label"] for row in rows} == {"identity_set", "answer"}
    for label in ("identity_set", "answer"):
        record = json.loads((tmp_path / label / "probe.json").read_text())
        assert record["design"]["label"] == label and len(record["rows"]) == len(rows) / 2


def test_two_stores_are_compared(run: Run, store: Path, tmp_path: Path) -> None:
    arguments = ("--c", 0.1, "--repeats", 1, "--permutations", 19, "--layers", 0)
    ran = run("probe", store, *arguments, "--compare", store, "-o", tmp_path, "--json")
    assert ran.code == 0, ran.err
    printed = json.loads(ran.out)
    assert {row["task"] for row in printed["rows"]} == {"label", "other", "difference"}
    assert "better or worse than those compared with" in printed["headline"]


@pytest.mark.parametrize(
    "arguments",
    [
        ("--folds", "1"),
        ("--label", ","),
        ("--class-weight", "some"),
        ("--c", "0"),
        ("--preset", "papers"),
        ("--sovler", "auto"),
    ],
)
def test_a_wrong_option_is_a_usage_error(run: Run, store: Path, arguments: tuple[str, ...]) -> None:
    assert run("probe", store, *arguments).code == 2


def test_nothing_is_described_that_was_not_asked_for(run: Run, store: Path, tmp_path: Path) -> None:
    ran = run("probe", store, *QUICK, "--layers", 0, "--position", "image", "-o", tmp_path / "out")
    assert ran.code == 0, ran.err
    made = {path.name for path in (tmp_path / "out").iterdir()}
    assert not [
        name for name in made if name.startswith(("separability", "pca", "tsne", "projections", "map"))
    ]


def test_a_folder_without_a_run_has_no_report(run: Run, tmp_path: Path) -> None:
    ran = run("report", tmp_path)
    assert ran.code == 1 and "mmextract probe" in ran.err and "Traceback" not in ran.err


def test_a_store_that_is_not_there_says_how_to_make_one(run: Run, tmp_path: Path) -> None:
    ran = run("probe", tmp_path / "none.zarr", "-o", tmp_path / "out")
    assert ran.code == 1 and "mmextract dump" in ran.err
