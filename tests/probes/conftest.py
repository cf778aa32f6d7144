"""Runs that several tests look at; made once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mmextract.probes.description import Description, DescriptionSettings, describe
from mmextract.probes.outputs import make_record, write_outputs
from mmextract.probes.run import plan_probe, run_probe
from mmextract.probes.settings import ProbeSettings
from mmextract.probes.summary import Summary
from tests.probes.stores import make_paired_store

QUICK = ProbeSettings(penalties=(0.01, 1.0), permutations=49)


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Layers −1, 0, 1 and positions last, image; a signal in layer 1, position image, and nowhere else."""
    path = tmp_path_factory.mktemp("probes") / "paired.zarr"
    return make_paired_store(path, signals=[[0, 0], [0, 0], [0, 1.0]])


def summarise(store: Path, settings: ProbeSettings = QUICK, **changes: Any) -> Summary:
    plan = plan_probe(store, replace(settings, **changes))
    return Summary(plan, run_probe(plan))


@pytest.fixture(scope="session")
def summary(store: Path) -> Summary:
    """A run of the default protocol."""
    return summarise(store)


@pytest.fixture(scope="session")
def paper_summary(store: Path) -> Summary:
    """A run of the published protocol."""
    return summarise(store, preset="paper")


@pytest.fixture(scope="session")
def description(summary: Summary) -> Description:
    """Separability and projections of that run."""
    return describe(summary.plan, DescriptionSettings(n_shuffles=19), (1, "image"))


@pytest.fixture(scope="session")
def folder(summary: Summary, description: Description, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What that run leaves behind."""
    out = tmp_path_factory.mktemp("out") / "probe"
    write_outputs(summary, make_record(summary, "mmextract probe x", description), out, description)
    return out
