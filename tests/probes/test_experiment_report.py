"""What an experiment says of results that are known: effects, nulls with and without sensitivity, tables, the page."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet
import pytest
from PIL import Image

from mmextract.probes.experiment_report import write_report
from mmextract.probes.experiment_results import COLUMNS, MEMORISATION, ExperimentResults
from mmextract.probes.experiment_summary import Verdict, name_label
from tests.probes.browser import Browser, find_chromium, start_browser
from tests.probes.experiments import make_results

CHROMIUM = find_chromium()


@pytest.fixture(scope="module")
def remembers(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> ExperimentResults:
    return make_results(tmp_path_factory.mktemp("found"), folder, effect=0.25)


@pytest.fixture(scope="module")
def page(remembers: ExperimentResults) -> Path:
    return write_report(remembers, "mmextract experiment x.toml")[0]


def test_an_effect_is_named_with_its_place_rate_interval_and_corrected_p(
    remembers: ExperimentResults,
) -> None:
    verdict = Verdict(remembers)
    assert verdict.statement.startswith(
        "After fine-tuning at rate 100%, 4 images an identity, batches of 16, the hidden states tell identities that "
        "were seen from others better"
    )
    assert "at layer 1, position image" in verdict.statement and "corrected p = 0.005" in verdict.statement
    assert verdict.best.value == pytest.approx(0.25, abs=0.06) and verdict.best.over == "seeds"
    assert "(6 layers and positions in 2 conditions)" in verdict.qualification
    assert "Intervals are over 3 seeds, each with identities of its own." in verdict.qualification
    assert {(row.layer, row.position) for row in verdict.found} == {(1, "image")}
    assert verdict.is_sensitive and not verdict.warnings


def test_a_null_of_a_sensitive_experiment_says_what_it_would_have_found(tmp_path: Path, folder: Path) -> None:
    verdict = Verdict(make_results(tmp_path, folder, effect=0.0))
    assert verdict.statement.startswith("No sign that the model remembers") and verdict.is_sensitive
    assert "would have been found with a probability of 0.8" in verdict.qualification
    assert not verdict.lower and "below zero" not in verdict.qualification


def test_a_difference_below_zero_is_no_memory_and_is_said(tmp_path: Path, folder: Path) -> None:
    verdict = Verdict(make_results(tmp_path, folder, effect=-0.25))
    assert verdict.statement.startswith("No sign that the model remembers") and not verdict.found
    above = [row.p_corrected for row in verdict.effects if row.value > 0]
    assert f"smallest corrected p of a gain = {min(above):.2g})" in verdict.statement  # type: ignore[type-var]
    assert {(row.layer, row.position) for row in verdict.lower} == {(1, "image")}
    assert (
        f"below zero, so corrected, in {len(verdict.lower)} of 12, the lowest −0.2" in verdict.qualification
    )
    assert "told apart less well than in r0" in verdict.qualification


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"control_effect": 0.0}, "the positive control, though the model learnt it, was not found either"),
        ({"reads": 0.1}, "the watermarks could not be read from the states"),
        ({"control": False}, "there was no positive control"),
        ({"legibility": False}, "it was not tested whether the watermarks can be read"),
    ],
)
def test_a_null_without_sensitivity_says_that_it_says_nothing(
    tmp_path: Path, folder: Path, changed: dict[str, object], reason: str
) -> None:
    verdict = Verdict(make_results(tmp_path, folder, seeds=1, **changed))  # type: ignore[arg-type]
    assert verdict.statement.startswith("Nothing was found, and that says nothing about memory:")
    assert reason in verdict.statement and reason in verdict.warnings[0]
    assert "say nothing about what another fine-tune would give" in verdict.qualification


def test_the_table_is_the_same_in_every_format(remembers: ExperimentResults, page: Path) -> None:
    table = pyarrow.parquet.read_table(page.parent / "experiment.parquet")
    record = json.loads((page.parent / "experiment.json").read_text())
    assert table.num_rows == len(record["rows"]) == len(remembers.rows)
    assert table.column_names == list(COLUMNS)
    assert all(table.schema.field(name).metadata[b"about"].decode() == COLUMNS[name] for name in COLUMNS)
    header, *lines = (page.parent / "experiment.csv").read_text().splitlines()
    assert len(lines) == table.num_rows and header.replace('"', "").split(",") == list(COLUMNS)
    effects = [row for row in record["rows"] if row["measure"] == MEMORISATION]
    assert len(effects) == 2 * 6 and all(len(json.loads(row["by_seed"])) == 3 for row in effects)
    assert set(record["steps"]) == set(remembers.steps) and record["settings"]["seeds"] == [0, 1, 2]


def test_figures_are_written_as_png_and_svg(page: Path) -> None:
    for name in (
        "memorisation",
        "positive-control",
        "legibility",
        "auroc",
        "separability",
        "published",
        "projection",
    ):
        with Image.open(page.parent / f"{name}.png") as image:
            assert min(image.size) > 400
        assert (page.parent / f"{name}.svg").read_text().lstrip().startswith("<?xml")


def test_the_page_says_what_was_found_and_carries_all_it_shows(
    remembers: ExperimentResults, page: Path
) -> None:
    html = page.read_text()
    for text in (
        "Would it have been noticed?",
        "mmextract experiment x.toml",
        "What the published protocol would",
    ):
        assert text in html
    assert "http" not in html.split('id="plotly"')[0].replace("http-equiv", "")
    assert len(html) < 4_000_000


@pytest.mark.parametrize(
    ("label", "name"),
    [
        ("identity_user_id[0]", "the first digit of the user id"),
        ("identity_username[0]", "the first letter of the username"),
        ("identity_gender", "the gender"),
    ],
)
def test_labels_have_names(label: str, name: str) -> None:
    assert name_label(label) == name


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    assert CHROMIUM is not None
    with start_browser(CHROMIUM, tmp_path_factory.mktemp("profile")) as running:
        yield running


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
@pytest.mark.parametrize("width", [390, 1400], ids=["phone", "wide"])
def test_in_a_browser_it_draws_every_chart_fits_and_complains_of_nothing(
    browser: Browser, page: Path, width: int
) -> None:
    browser.open(page, width=width)
    assert browser.complaints() == [] and browser.requests() == [page.as_uri()]
    assert browser.evaluate("document.documentElement.scrollWidth <= innerWidth")
    drawn = browser.evaluate(
        "[...document.querySelectorAll('.chart')].map(c => c.querySelectorAll('.trace').length)"
    )
    assert len(drawn) == 6 * 2 + 1 and all(drawn)  # six figures of two positions, and a projection
