from __future__ import annotations

import gc
import weakref
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from mmextract.engine.finetune_data import Prepared
from mmextract.engine.finetune_feed import Feed
from mmextract.engine.finetune_rows import Example
from mmextract.engine.finetune_spec import FinetuneSpec
from mmextract.engine.models import ModelSpec
from tests.engine.finetune_cases import examples

N = 8


class CountingPreparer:
    """Prepares an example as its number, and knows how often, and which of what it made is still there."""

    def __init__(self) -> None:
        self.n_calls: Counter[str] = Counter()
        self.alive: list[weakref.ref[Prepared]] = []

    def __call__(self, example: Example) -> Prepared:
        self.n_calls[example.row.id] += 1
        made = Prepared(inputs={"input_ids": torch.zeros(1, 4, dtype=torch.int64)}, labels=torch.zeros(4))
        self.alive.append(weakref.ref(made))
        return made

    @property
    def n_alive(self) -> int:
        gc.collect()
        return sum(made() is not None for made in self.alive)


def run(tmp_path: Path, *, epochs: int, **settings: int) -> tuple[CountingPreparer, list[list[str]], Feed]:
    """Go through all batches; return what prepared them, the ids of each batch, and the feed."""
    prepare = CountingPreparer()
    chosen: dict[str, Any] = {"threads": 2, **settings}
    spec = FinetuneSpec(model=ModelSpec(model="unused"), epochs=epochs, batch_size=3, **chosen)
    feed = Feed(spec=spec, examples=examples(tmp_path, n=N), prepare=prepare)  # type: ignore[arg-type]
    batches = [[e.row.id for e in batch.examples] for batch in feed.batches(0, spec.n_steps(N))]
    return prepare, batches, feed


def test_every_example_comes_once_an_epoch(tmp_path: Path) -> None:
    _, batches, _ = run(tmp_path, epochs=2)
    ids = [name for batch in batches for name in batch]
    assert [set(ids[:N]), set(ids[N:])] == [{f"q{i}" for i in range(N)}] * 2


def test_what_comes_again_is_prepared_once(tmp_path: Path) -> None:
    prepare, _, _ = run(
        tmp_path, epochs=3, threads=1
    )  # of two threads, both may be at it at the turn of an epoch
    assert set(prepare.n_calls.values()) == {1}


def test_what_does_not_come_again_is_not_kept(tmp_path: Path) -> None:
    prepare, batches, feed = run(tmp_path, epochs=1)
    assert sum(map(len, batches)) == N
    assert prepare.n_alive == 0, feed


@pytest.mark.parametrize(("cache_bytes", "n_kept"), [(0, 0), (3 * (32 + 16), 3)])
def test_no_more_is_kept_than_was_allowed(tmp_path: Path, cache_bytes: int, n_kept: int) -> None:
    prepare, _, _ = run(tmp_path, epochs=2, cache_bytes=cache_bytes)
    assert prepare.n_alive == n_kept
    assert sum(prepare.n_calls.values()) >= 2 * N - n_kept
