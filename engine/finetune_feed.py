"""The batches of a training in their order, prepared by threads ahead of it, and kept if they come again.

This module knows nothing about models' weights or optimisers.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice

from mmextract.engine.finetune_data import Prepared, Preparer
from mmextract.engine.finetune_rows import Example
from mmextract.engine.finetune_spec import FinetuneSpec
from mmextract.engine.images import RejectedSample
from mmextract.engine.pipeline import in_order


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What one step learns from."""

    examples: Sequence[Example]
    """Those of the batch that could be had."""
    prepared: Sequence[Prepared]
    """The same, as the model takes them."""


@dataclass(kw_only=True)
class Feed:
    """Iterates over the batches of steps [start, stop), preparing them in threads."""

    spec: FinetuneSpec
    examples: Sequence[Example]
    prepare: Preparer
    rejected: dict[str, str] = field(default_factory=dict)
    """Id → why it cannot be had, of the examples met so far."""
    _uses: Counter[int] = field(default_factory=Counter)
    _kept: dict[int, Prepared] = field(default_factory=dict)
    _kept_bytes: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def batches(self, start: int, stop: int) -> Iterator[Batch]:
        """Yield one batch a step. Raises ValueError for a batch of which no example can be had."""
        chosen = [self.spec.batch(step, len(self.examples)) for step in range(start, stop)]
        self._uses = Counter(index for batch in chosen for index in batch)
        window = max(2 * self.spec.batch_size, 4 * self.spec.threads)
        with ThreadPoolExecutor(self.spec.threads, "mmextract-prepare") as executor:
            items = in_order(executor, self._prepared, (i for batch in chosen for i in batch), window)
            for batch in chosen:
                yield self._batch(batch, list(islice(items, len(batch))))

    def _batch(self, chosen: Sequence[int], results: Sequence[Prepared | RejectedSample]) -> Batch:
        examples, prepared = [], []
        for index, result in zip(chosen, results, strict=True):
            if isinstance(result, RejectedSample):
                self.rejected[self.examples[index].row.id] = str(result)
            else:
                examples.append(self.examples[index])
                prepared.append(result)
        if not prepared:
            raise ValueError(
                f"none of the {len(chosen)} examples of a batch can be used, such as "
                f"{self.examples[chosen[0]].row.id!r}: {results[0]}"
            )
        return Batch(examples=examples, prepared=prepared)

    def _prepared(self, index: int) -> Prepared | RejectedSample:
        if index in self._kept:
            return self._kept[index]
        try:
            prepared = self.prepare(self.examples[index])
        except RejectedSample as refusal:
            return refusal
        if self._uses[index] < 2:
            return prepared
        with self._lock:
            if index not in self._kept and self._kept_bytes + prepared.n_bytes <= self.spec.cache_bytes:
                self._kept[index] = prepared
                self._kept_bytes += prepared.n_bytes
        return prepared
