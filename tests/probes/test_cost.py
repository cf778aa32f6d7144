from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from mmextract.probes import cost
from mmextract.probes.cost import (
    LEAST_PERMUTATIONS,
    MOST_PERMUTATIONS,
    choose_permutations,
    predict_permutation,
)
from mmextract.probes.run import plan_probe
from mmextract.probes.settings import ProbeSettings


def test_a_small_store_gets_all_the_permutations_and_no_note(store: Path) -> None:
    plan = plan_probe(store, ProbeSettings())
    assert plan.settings.permutations == MOST_PERMUTATIONS and plan.design.notes == ()


@pytest.mark.parametrize(("affordable", "chosen"), [(100, 100), (LEAST_PERMUTATIONS - 1, 0)])
def test_costly_permutations_are_fewer_or_none_and_it_is_said(
    store: Path, monkeypatch: pytest.MonkeyPatch, affordable: int, chosen: int
) -> None:
    plan = plan_probe(store, ProbeSettings())
    seconds = predict_permutation(plan)
    monkeypatch.setattr(cost, "PERMUTATION_SECONDS", (affordable + 0.5) * seconds)
    made = choose_permutations(replace(plan, settings=ProbeSettings()))
    assert made.settings.permutations == chosen
    assert f"{chosen or 'no'} permutations instead of {MOST_PERMUTATIONS}" in made.design.notes[-1]
    asked = choose_permutations(replace(plan, settings=ProbeSettings(permutations=150)))
    assert asked.settings.permutations == 150 and asked.design.notes == ()


def test_a_million_samples_of_a_large_model_get_none(store: Path) -> None:
    plan = plan_probe(store, ProbeSettings())
    design = replace(plan.design, rows=plan.design.rows.repeat(10_000))
    huge = replace(plan, settings=ProbeSettings(), design=design, hidden_size=4096)
    assert choose_permutations(huge).settings.permutations == 0
