"""`mmextract identities`: make synthetic people."""

from __future__ import annotations

from pathlib import Path

import rich_click as click

from mmextract.cli.options import FILE


@click.command()
@click.option("--n", "-n", type=click.IntRange(min=1), default=200, show_default=True, help="How many.")
@click.option("--seed", type=int, default=0, show_default=True, help="The same seed gives the same people.")
@click.option(
    "--disjoint-from", type=FILE, multiple=True, help="Share no name or id with these. May be repeated."
)
@click.option(
    "-o", "--output", type=FILE, default="identities.jsonl", show_default=True, help="Where they go."
)
@click.option(
    "--unseen", type=FILE, help="Write as many more, out of the same pool and split at random, to FILE."
)
def identities(n: int, seed: int, disjoint_from: tuple[Path, ...], output: Path, unseen: Path | None) -> None:
    """Make synthetic people (username, id, gender, age, time and place) with Faker."""
    from mmextract.engine.identities import (
        make_disjoint_pair,
        make_identities,
        read_identities,
        write_identities,
    )

    exclude = [person for path in disjoint_from for person in read_identities(path)]
    if unseen is None:
        write_identities(output, make_identities(n, seed=seed, exclude=exclude))
        click.echo(f"{n} identities in {output}")
        return
    first, second = make_disjoint_pair(n, seed=seed, exclude=exclude)
    write_identities(output, first)
    write_identities(unseen, second)
    click.echo(f"{n} identities in {output} and {n} others in {unseen}")
