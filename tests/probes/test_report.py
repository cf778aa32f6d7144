from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from mmextract.probes.figures import Look, draw, save
from mmextract.probes.outputs import make_record
from mmextract.probes.report import render
from mmextract.probes.settings import ProbeSettings
from mmextract.probes.summary import Summary
from tests.probes.conftest import summarise
from tests.probes.stores import make_store, paired_columns, paired_states

HOSTILE = "</script><img src=x onerror=alert(1)>$\\frac{$"


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
        self.inside = tag
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "srcset")]

    def handle_endtag(self, tag: str) -> None:
        self.inside = None

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.texts[self.inside] = self.texts.get(self.inside, "") + data


@pytest.fixture(scope="module")
def html(summary: Summary) -> str:
    return render(summary, make_record(summary, "mmextract probe x"))


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Summary:
    """A label, a class, a position and a model whose names would break out of HTML, of JSON and of mathtext."""
    columns = paired_columns(30, 15)
    columns["<b>$x"] = [HOSTILE if name == "seen" else "it's" for name in columns["identity_set"]]
    path = make_store(
        tmp_path_factory.mktemp("hostile") / "$a$.zarr",
        np.repeat(paired_states(columns, 4)[:, None, None], 2, axis=2),
        layers=[0],
        positions=["last", HOSTILE],
        columns=columns,
        run={"model": {"name": HOSTILE}},
    )
    settings = ProbeSettings(label="<b>$x", penalties=(0.1,), repeats=1, permutations=0)
    return summarise(path, settings)


def test_the_first_sentence_says_what_was_found_and_how_sure_it_is(html: str, summary: Summary) -> None:
    assert Page(html).texts["h1"] == summary.statement


def test_nothing_is_loaded_from_elsewhere(html: str) -> None:
    assert all(address.startswith("data:image/svg+xml;base64,") for address in Page(html).addresses)
    assert "@import" not in html and "url(" not in html


def test_the_page_carries_its_numbers(html: str, summary: Summary) -> None:
    assert len(json.loads(Page(html).texts["script"])["rows"]) == len(summary.rows)
    best = summary.row("label", "auroc", (1, "image"))
    assert f"<td>{best.value:.3f}</td>" in html
    assert html.count('class="marked"') == len(summary.above_chance) == 1


def test_the_page_says_what_the_design_controls_and_what_it_cannot_say(html: str) -> None:
    assert "never tested on an identity it was trained on" in html
    assert "not yet memorisation" in html and "without watermarks (r0)" in html
    assert "The p-values compare the label with 49 shuffles" in html


def test_warnings_stand_on_the_page(store: Path) -> None:
    quick = ProbeSettings(group="none", layers=(0,), penalties=(0.1,), repeats=1, permutations=0)
    made = summarise(store, quick)
    html = render(made, make_record(made, "x"))
    assert html.count('class="warning"') == len(made.warnings) >= 2


def test_the_published_protocol_is_reported_without_intervals(paper_summary: Summary) -> None:
    html = render(paper_summary, make_record(paper_summary, "x"))
    assert "Published protocol of identity_set" in html and "all at once" not in html


def test_hostile_names_stay_text(hostile: Summary) -> None:
    html = render(hostile, make_record(hostile, f"mmextract probe {HOSTILE}"))
    page = Page(html)
    assert page.tags.count("script") == 1 and page.tags.count("img") == 1
    assert json.loads(page.texts["script"])["positions"] == ["last", HOSTILE]


def test_hostile_names_do_not_break_the_figure(hostile: Summary) -> None:
    assert save(draw(hostile, Look()), "svg").startswith(b"<?xml")


def test_figures_are_the_same_bytes_again_and_fit_the_window(summary: Summary) -> None:
    def size(svg: bytes) -> dict[str, float]:
        return {
            name.decode(): float(value) for name, value in re.findall(rb'(width|height)="([\d.]+)pt"', svg)
        }

    wide, again, narrow = (save(draw(summary, look), "svg") for look in (Look(), Look(), Look().narrowed()))
    assert wide == again
    assert size(wide)["width"] > size(wide)["height"] and size(narrow)["width"] < size(narrow)["height"]


def test_many_positions_become_a_heat_map(tmp_path: Path) -> None:
    columns = paired_columns(30, 15)
    states = np.repeat(paired_states(columns, 4)[:, None, None], 8, axis=2)
    tokens = [str(index) for index in range(8)]
    path = make_store(tmp_path / "s.zarr", states, layers=[0], positions=tokens, columns=columns)
    made = summarise(path, ProbeSettings(penalties=(0.1,), repeats=1, permutations=0))
    assert len(draw(made, Look()).axes) == 2  # the map and its colour bar
    assert render(made, make_record(made, "x")).count("<details>") == 8
