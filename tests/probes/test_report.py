from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
import pytest

from mmextract.probes.charts import PALETTE, make_charts, resolve
from mmextract.probes.description import Description, DescriptionSettings, describe
from mmextract.probes.figures import draw_all, draw_map, save
from mmextract.probes.outputs import make_record, write_pictures
from mmextract.probes.pictures import file_stem
from mmextract.probes.projections import Wish
from mmextract.probes.report import render
from mmextract.probes.results import Results, load_results
from mmextract.probes.settings import ProbeSettings
from mmextract.probes.summary import Summary
from tests.probes.conftest import summarise
from tests.probes.stores import make_store, paired_columns, paired_states

HOSTILE = "</script><img src=x onerror=alert(1)>$\\frac{$"
PROJECTED = DescriptionSettings(separability=False, projections=(Wish("pca"),))


class Page(HTMLParser):
    """What a browser would see: elements, addresses, the text of each element."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.texts: dict[str, str] = {}
        self.inside: str | None = None
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.inside = dict(attrs).get("id") or tag
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "srcset")]

    def handle_endtag(self, tag: str) -> None:
        self.inside = None

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.texts[self.inside] = self.texts.get(self.inside, "") + data


def make_results(
    summary: Summary, settings: DescriptionSettings | None = None, command: str = "x"
) -> Results:
    description = None
    if settings:
        description = describe(summary.plan, settings, (summary.best.layer, summary.best.position))
    record = json.loads(json.dumps(make_record(summary, command, description)))
    return Results(record, description.projections if description else None)


@pytest.fixture(scope="module")
def results(summary: Summary, description: Description) -> Results:
    return Results(json.loads(json.dumps(make_record(summary, "x", description))), description.projections)


@pytest.fixture(scope="module")
def html(results: Results) -> str:
    return render(results, {"curves": b"<svg/>"})


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """A label, a class, a position and a model whose names would break out of HTML, of JSON and of mathtext."""
    columns = paired_columns(30, 15)
    columns["<b>$x"] = [HOSTILE if name == "seen" else "_it's" for name in columns["identity_set"]]
    path = make_store(
        tmp_path_factory.mktemp("hostile") / "$a$.zarr",
        np.repeat(paired_states(columns, 4)[:, None, None], 2, axis=2),
        layers=[0],
        positions=["img[/red].png", HOSTILE],
        columns=columns,
        run={"model": {"name": HOSTILE}},
    )
    settings = ProbeSettings(label="<b>$x", penalties=(0.1,), repeats=1, permutations=0)
    return make_results(summarise(path, settings), PROJECTED, command=f"mmextract probe {HOSTILE}")


def with_comparison(results: Results) -> Results:
    """Add what a newer run has: p-values, baselines, and the difference to another store."""
    rows = []
    for row in results.record["rows"]:
        tested = row["task"] == "label" and row["metric"] == "auroc"
        p = 0.005 if (row["layer"], row["position"]) == (1, "image") else 0.9
        rows.append({**row, "chance": 0.5, **({"p": p, "p_corrected": p} if tested else {})})
        if row["task"] == "label":
            rows.append({**row, "task": "other", "value": 0.5})
            ends = ("value", "low", "high", "simultaneous_low", "simultaneous_high")
            less = {k: row[k] - 0.5 for k in ends if row[k] is not None}
            corrected = {"p_corrected": p} if tested else {}
            rows.append({**row, **less, "task": "difference", "chance": 0.0, **corrected})
        if row["task"] == "majority":
            rows.append({**row, "task": "random", "value": 0.51})
    extra = {"permutations": {"n": 200}, "compare": {"path": "r0.zarr"}, "rows": rows, "format": 2}
    return Results({**results.record, **extra}, results.projections)


def test_the_first_sentence_says_what_was_found_and_how_sure_it_is(html: str, summary: Summary) -> None:
    assert Page(html).texts["h1"].replace("\u00a0", " ") == summary.statement


def test_nothing_is_loaded_from_elsewhere_and_the_page_stays_small(html: str) -> None:
    assert all(address.startswith("data:image/svg+xml;base64,") for address in Page(html).addresses)
    assert "@import" not in html and "url(" not in html and "default-src 'none'" in html
    assert len(html) < 3e6


def test_the_page_carries_its_numbers(html: str, summary: Summary) -> None:
    charts = json.loads(Page(html).texts["charts"])
    image = charts["groups"]["curves"]["options"][0]["panels"][1]
    drawn = next(trace for trace in image["data"] if trace["name"] == "probe")["y"]
    scores = [summary.row("label", "auroc", (layer, "image")).value for layer in (-1, 0, 1)]
    assert image["title"] == "position image" and drawn == pytest.approx(scores, rel=1e-5)
    assert f"<td>{scores[2]:.3f}</td>" in html
    assert html.count('class="marked"') == len(summary.above_chance) == 1


def test_the_page_says_what_the_design_controls_and_what_it_cannot_say(html: str) -> None:
    assert "never tested on an identity it was trained on" in html
    assert "not yet memorisation" in html and "without watermarks (r0)" in html


def test_warnings_stand_on_the_page(store: Path) -> None:
    quick = ProbeSettings(group="none", layers=(0,), penalties=(0.1,), repeats=1, permutations=0)
    made = summarise(store, quick)
    assert render(make_results(made), {}).count('class="warning"') == len(made.warnings) >= 2


def test_the_published_protocol_is_reported_without_intervals(paper_summary: Summary) -> None:
    html = render(make_results(paper_summary), {})
    assert "Published protocol of identity_set" in html and "all at once" not in Page(html).texts["th"]


def test_hostile_names_stay_text(hostile: Results) -> None:
    page = Page(render(hostile, {"curves": b"<svg/>"}))
    assert page.tags.count("script") == 4 and page.tags.count("img") == 1
    assert json.loads(page.texts["probe"])["positions"] == ["img[/red].png", HOSTILE]
    assert HOSTILE in json.loads(page.texts["charts"])["projections"]["names"]


def test_hostile_names_break_neither_figures_nor_files(hostile: Results, tmp_path: Path) -> None:
    names = {path.name for path in write_pictures(hostile, tmp_path)}
    stem = file_stem(f"pca-{hostile.best[1]}")
    assert {f"{stem}.png", f"{stem}.svg", f"{stem}.pdf", "report.html"} <= names
    assert names == {path.name for path in tmp_path.iterdir()}


def test_file_names_are_plain_different_and_not_too_long() -> None:
    names = [
        "$\\frac{$",
        "img[/red].png",
        "../up",
        ".hidden",
        "a/b",
        "a%2Fb",
        "CON*",
        "ä" * 90,
        "ä" * 91,
        "last",
    ]
    stems = [file_stem(name) for name in names]
    assert len(set(stems)) == len(names) and stems[-1] == "last"
    assert all(re.fullmatch(r"[\w%-][\w.%-]{0,99}", stem, re.ASCII) for stem in stems)


def test_figures_are_the_same_bytes_again(results: Results) -> None:
    first, again = (draw_map(results) for _ in range(2))
    for kind, start in (("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")):
        assert first is not None and again is not None
        made = save(first, kind)
        assert made == save(again, kind) and made.startswith(start)


def test_baselines_and_differences_are_drawn_where_there_are_any(results: Results) -> None:
    newer = with_comparison(results)
    curves = make_charts(newer)["groups"]["curves"]["options"][0]
    names = [line["name"] for line in curves["legend"]]
    assert {"probe", "probe, other store", "random directions", "embedding"} < set(names)
    assert "differences" in draw_all(newer) and "differences" not in draw_all(results)
    difference = make_charts(newer)["groups"]["differences"]["options"][0]["panels"][1]["data"]
    marks = next(t for t in difference if "less" in t["name"])["marker"]["color"]
    assert marks == ["@paper", "@paper", "@probe"]  # p ≤ 0.05 in layer 1 alone


def test_p_values_decide_what_stands_out_where_there_are_any(results: Results) -> None:
    html = render(with_comparison(results), {})
    assert html.count('class="marked"') == 1 and "<td>0.005</td>" in html
    untested = Results({**results.record, "permutations": None}, results.projections)
    assert "No permutation test" in render(untested, {}) and "No permutation test" not in html


def specs(charts: Any) -> list[dict[str, Any]]:
    return [p for g in charts["groups"].values() for o in g["options"] for p in o["panels"]]


def test_every_chart_is_one_that_plotly_takes_in_both_schemes(results: Results, hostile: Results) -> None:
    for charts in (make_charts(with_comparison(results)), make_charts(hostile)):
        for spec in specs(charts):
            for scheme in (0, 1):
                shown = resolve({"data": spec["data"], "layout": spec["layout"]}, scheme)
                assert "@" not in re.sub(r"[^@]@\w+\.", "", json.dumps(shown))
                go.Figure(shown)  # raises for a property that plotly does not know


def contrast(colour: str, ground: str) -> float:
    def luminance(code: str) -> float:
        parts = np.array([int(code[i : i + 2], 16) / 255 for i in (1, 3, 5)])
        linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722])

    light, dark = sorted([luminance(colour), luminance(ground)], reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("name", sorted(set(PALETTE) - {"paper", "line"}))
def test_every_colour_can_be_seen_on_its_ground(name: str) -> None:
    for colour, ground in zip(PALETTE[name], PALETTE["paper"], strict=True):
        assert contrast(colour, ground) >= 3  # WCAG 2.1, 1.4.11, for graphics


def test_many_positions_become_a_map_and_curves_of_the_best(tmp_path: Path) -> None:
    columns = paired_columns(30, 15)
    states = np.repeat(paired_states(columns, 4)[:, None, None], 9, axis=2)
    tokens = [str(index) for index in range(9)]
    path = make_store(tmp_path / "s.zarr", states, layers=[0], positions=tokens, columns=columns)
    made = make_results(
        summarise(path, ProbeSettings(penalties=(0.1,), repeats=1, permutations=0)), PROJECTED
    )
    charts = make_charts(made)["groups"]
    assert len(charts["curves"]["options"][0]["panels"]) == 6
    assert np.shape(charts["map"]["options"][0]["panels"][0]["data"][0]["z"]) == (1, 9)
    assert {position for _, position in made.maps} == {made.best[1]}


def test_the_report_is_made_again_from_what_was_written_down(folder: Path) -> None:
    again = load_results(folder)
    figures = draw_all(again)
    assert list(figures) == ["curves", "map", "separability", "pca-image", "tsne-image"]
    for name in ("map", "tsne-image"):
        assert save(figures[name], "svg") == (folder / f"{name}.svg").read_bytes()
    page = render(again, {name: (folder / f"{name}.svg").read_bytes() for name in figures})
    assert page == (folder / "report.html").read_text("utf-8")


def test_folders_that_hold_no_run_are_errors(tmp_path: Path, results: Results) -> None:
    with pytest.raises(ValueError, match="give a folder that `mmextract probe` wrote"):
        load_results(tmp_path)
    (tmp_path / "probe.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be read as JSON"):
        load_results(tmp_path)
    (tmp_path / "probe.json").write_text('{"format": 99}')
    with pytest.raises(ValueError, match="format 1 or 2, but 99"):
        load_results(tmp_path)
    (tmp_path / "probe.json").write_text(json.dumps(results.record))
    with pytest.raises(ValueError, match=r"projections\.parquet is missing"):
        load_results(tmp_path)
