from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from mmextract.probes import score_table
from mmextract.probes.outputs import FILES, fingerprint, make_record, replace_all, write_outputs
from mmextract.probes.rows import COLUMNS
from mmextract.probes.summary import Summary


def read_json(folder: Path) -> dict[str, Any]:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    record = json.loads((folder / "probe.json").read_text("utf-8"), parse_constant=refuse)
    assert isinstance(record, dict)
    return record


def test_all_files_are_written_and_no_others(folder: Path) -> None:
    figures = ("map", "separability", "pca-image", "tsne-image")
    more = {f"{name}.{kind}" for name in figures for kind in ("png", "svg", "pdf")}
    tables = {"separability.csv", "separability.parquet", "projections.parquet"}
    assert {path.name for path in folder.iterdir()} == {*FILES, *more, *tables}


def test_json_csv_and_parquet_say_the_same(folder: Path, summary: Summary) -> None:
    parquet = pq.read_table(folder / "probe.parquet").to_pylist()
    csv = pyarrow.csv.read_csv(folder / "probe.csv").to_pylist()
    rows = read_json(folder)["rows"]
    assert len(rows) == len(summary.rows)
    for a, b, c in zip(rows, parquet, csv, strict=True):
        assert a == b
        assert (a["layer"], a["task"], a["metric"], a["value"]) == (
            c["layer"],
            c["task"],
            c["metric"],
            c["value"],
        )


def test_every_column_is_described_in_the_files(folder: Path) -> None:
    schema = pq.read_schema(folder / "probe.parquet")
    assert (
        {f.name: f.metadata[b"about"].decode() for f in schema}
        == dict(COLUMNS)
        == read_json(folder)["columns"]
    )


def test_the_record_has_what_is_needed_to_repeat_the_run(folder: Path, summary: Summary) -> None:
    record = read_json(folder)
    assert record["command"] == "mmextract probe x"
    assert record["store"]["fingerprint"] == fingerprint(summary.plan.attributes)
    assert record["store"]["attributes"]["run"]["model"]["name"] == "tiny"
    assert record["settings"]["penalties"] == [0.01, 1.0]
    assert (
        record["design"]["classes"] == {"unseen": 60, "seen": 60} and record["design"]["positive"] == "seen"
    )
    assert record["versions"]["scikit-learn"] and record["fits"] == {
        "n": summary.n_fits,
        "n_unconverged": 0,
        "solvers": ["primal cpu"],
        "worst_residual": pytest.approx(0, abs=1e-6),
    }


def test_held_out_scores_give_the_reported_accuracy_again(folder: Path, summary: Summary) -> None:
    scores = pq.read_table(folder / "scores.parquet").to_pandas()
    assert set(scores["task"]) == {"label", "control"}
    here = scores[(scores.layer == 1) & (scores.position == "image") & (scores.task == "label")]
    assert len(here) == 2 * 120 and here.groupby("repeat")["sample"].nunique().tolist() == [120, 120]
    right = (here["score"] > 0) == (here["class"] == "seen")
    by_fold = right.groupby([here["repeat"], here["fold"]]).mean()
    assert np.mean(by_fold) == pytest.approx(summary.row("label", "accuracy", (1, "image")).value)
    pairs = here.groupby(["repeat", "group"])["fold"].nunique()
    assert (pairs == 1).all()


def test_scores_of_the_published_protocol_are_those_of_its_test_set(
    paper_summary: Summary, tmp_path: Path
) -> None:
    write_outputs(paper_summary, make_record(paper_summary, "x"), tmp_path)
    scores = pq.read_table(tmp_path / "scores.parquet").to_pandas()
    assert len(scores) == 6 * 24 and np.isfinite(scores["score"]).all()
    assert read_json(tmp_path)["design"]["control"] is None


@pytest.mark.parametrize("rows", [7, 100, 1000])
def test_scores_that_are_written_in_parts_are_the_same(
    folder: Path, summary: Summary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    monkeypatch.setattr(score_table, "ROWS_AT_ONCE", rows)
    with (tmp_path / "scores.parquet").open("wb") as file:
        score_table.write_scores(summary, file)
    parts = pq.ParquetFile(tmp_path / "scores.parquet")
    whole = pq.ParquetFile(folder / "scores.parquet")
    assert parts.read().equals(whole.read(), check_metadata=True)
    sizes = [parts.metadata.row_group(i).num_rows for i in range(parts.num_row_groups)]
    assert max(sizes) <= rows and len(sizes) > whole.num_row_groups == 1


def test_a_second_run_replaces_the_first(folder: Path, summary: Summary, tmp_path: Path) -> None:
    for name in FILES:
        (tmp_path / name).write_text("old")
    write_outputs(summary, make_record(summary, "mmextract probe x"), tmp_path)
    for name in ("probe.csv", "probe.parquet", "scores.parquet", "curves.svg", "curves.png", "curves.pdf"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()
    assert not [path for path in tmp_path.iterdir() if path.read_bytes() == b"old"]


def test_a_folder_that_cannot_be_made_is_an_error(summary: Summary, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        write_outputs(summary, make_record(summary, "x"), tmp_path / "file" / "probe")


def test_a_disk_that_is_full_is_named_and_leaves_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"old")

    def fill(file: IO[bytes]) -> None:
        file.write(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(OSError, match=f"No space left on device: '{tmp_path}'"):
        replace_all(tmp_path, {"a.csv": b"new", "b.parquet": fill})
    assert [path.name for path in tmp_path.iterdir()] == ["a.csv"]
    assert (tmp_path / "a.csv").read_bytes() == b"old"
