"""A dump without a model: the real store, written and resumed as `engine.dump` does, of states made from a seed.

It runs as a command of the real command line, so that signals, errors and exit codes are the product's. It needs no
torch, so that thousands of runs fit a test suite.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import rich_click as click
from numpy.typing import NDArray

from mmextract.cli.main import group, main
from mmextract.cli.reporting import exit_code, list_rejected
from mmextract.engine.completion import complete
from mmextract.engine.layout import Layout
from mmextract.engine.lease import Lease
from mmextract.engine.objects import Objects
from mmextract.engine.writer import StoreWriter, open_writer


def _ignore(shard: int) -> None:
    """Take no notice of a shard."""


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What a run did."""

    n_resumed: int
    """Shards that an earlier run had committed."""
    n_written: int
    """Shards that this run committed."""
    rejected: dict[str, str]
    """Sample → reason, of the whole store."""


@dataclass(frozen=True, kw_only=True)
class Stub:
    """A run whose every byte follows from these fields."""

    n_samples: int = 11
    n_layers: int = 3
    hidden_size: int = 512
    shard_samples: int = 2
    codec: str = "lz4"
    reject_every: int = 7
    """Every so many-th row is rejected; 0 rejects none."""

    @property
    def layout(self) -> Layout:
        """Shapes of the store."""
        return Layout(
            n_samples=self.n_samples,
            layers=tuple(range(self.n_layers)),
            positions=("last",),
            hidden_size=self.hidden_size,
            shard_samples=self.shard_samples,
            codec=self.codec,
            record_fields=("n_tokens", "n_nonfinite", "image_hash"),
        )

    def open(self, place: Path | Objects, executor: ThreadPoolExecutor) -> StoreWriter:
        """Create the store, or open it again."""
        columns = {"sample": [f"s{row:08}" for row in range(self.n_samples)]}
        return open_writer(place, self.layout, columns, {"run": asdict(self)}, executor)

    def shard(self, index: int) -> tuple[NDArray[Any], NDArray[np.int64], dict[int, str]]:
        """Return states [L, S, P, D], records [S, F] and row within the shard → reason, as a model's run would."""
        layout = self.layout
        rng = np.random.default_rng(index)
        states, records = layout.empty_shard(), layout.empty_records()
        rejected: dict[int, str] = {}
        for place, row in enumerate(layout.rows(index)):
            if self.reject_every and row % self.reject_every == 3:
                rejected[place] = f"row {row} is no image: café.jpg"
                continue
            states[:, place] = rng.standard_normal(states[:, place].shape, np.float32)
            records[place] = rng.integers(0, 1 << 62, records.shape[1])
        return states, records, rejected

    def dump(
        self, place: Path | Objects, on_commit: Callable[[int], None] = _ignore, threads: int = 2
    ) -> Summary:
        """Write what is missing of the store and finalise it, on the path that every run takes."""
        n_written = 0

        def compute(writer: StoreWriter, shards: Sequence[int], held: Lease) -> None:
            nonlocal n_written
            for shard in shards:
                writer.write_shard(shard, *self.shard(shard))
                held.check()
                n_written += 1
                on_commit(shard)

        with ThreadPoolExecutor(threads) as executor:
            writer = self.open(place, executor)
            committed = complete(writer, compute)
            rejected = {f"s{row:08}": reason for row, reason in writer.rejected().items()}
        return Summary(n_resumed=len(committed), n_written=n_written, rejected=rejected)


def add_command(on_commit: Callable[[int], None] = _ignore) -> None:
    """Give the command line one command more, `stub`."""

    @click.command()
    @click.option("-o", "--output", type=click.Path(path_type=Path), required=True)
    @click.option("--samples", type=int, default=Stub.n_samples)
    @click.option("--shard-samples", type=int, default=Stub.shard_samples)
    @click.option("--hidden-size", type=int, default=Stub.hidden_size)
    def stub(output: Path, samples: int, shard_samples: int, hidden_size: int) -> int:
        """Dump states that no model made."""
        spec = Stub(n_samples=samples, shard_samples=shard_samples, hidden_size=hidden_size)
        summary = spec.dump(output, on_commit)
        click.echo(json.dumps(asdict(summary)))
        list_rejected(summary.rejected)
        return exit_code(summary.rejected)

    group.add_command(stub)


def run(arguments: Sequence[str]) -> NoReturn:
    """Run the command, and leave as the command line leaves."""
    sys.argv = ["mmextract", "stub", *arguments]
    main()
