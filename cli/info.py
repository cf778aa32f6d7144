"""`mmextract info`: what is in a store, how it was made, how complete it is."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import rich_click as click

from mmextract.cli.reporting import printable, size

if TYPE_CHECKING:
    from mmextract.engine.store import Store


@click.command()
@click.argument("store", type=click.Path(), default="activations.zarr")
@click.option(
    "--json",
    "as_json",
    envvar="MMEXTRACT_INFO_JSON",
    is_flag=True,
    help="Print everything as JSON on stdout.",
)
def info(store: str, as_json: bool) -> None:
    """Say what STORE holds, how it was made and how complete it is."""
    from mmextract.engine.store import open_store

    opened = open_store(store)
    record = _describe(opened)
    if as_json:
        attributes = {name: value for name, value in opened.attributes.items() if name != "digests"}
        click.echo(json.dumps({**record, "attributes": attributes}, indent=1))
        return
    for name, value in record.items():
        text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
        click.echo(f"{name:<13} {printable(text)}")


def _describe(store: Store) -> dict[str, Any]:
    on_disk = _bytes_of_committed(store)
    run: Any = store.attributes.get("run", {})
    model = run.get("model", {})
    committed = store.n_samples - store.missing
    raw = committed * store.hidden_states.nbytes // store.n_samples
    n_rejected = int(((store.columns["rejected"] != "") & store.committed).sum())
    unfinished = "incomplete: the same `mmextract dump` again continues it"
    return {
        "store": store.url,
        "samples": f"{store.n_samples} ({committed} committed, {store.missing} missing, {n_rejected} rejected)",
        "state": "complete" if store.finished else unfinished,
        "layers": [("embed" if layer < 0 else int(layer)) for layer in store.layers],
        "positions": store.positions if len(store.positions) <= 16 else f"{len(store.positions)} tokens",
        "hidden size": store.hidden_size,
        "dtype": store.attributes["dtype"],
        "size": f"{size(on_disk)}, {raw / max(on_disk, 1):.2f} × smaller than {size(raw)} raw",
        "columns": sorted(store.columns),
        "model": f"{model.get('name')} ({model.get('class')}){' with a LoRA' if model.get('adapter') else ''}",
        "data": " ".join(str(value) for value in run.get("data", {}).values()),
        "watermark": json.dumps(run.get("watermark")),
    }


def _bytes_of_committed(store: Store) -> int:
    """Return the size of the hidden states that count: not of what a run has left, or `verify` has withdrawn."""
    written = {int(name) for name in store.objects.list("hidden_states/c")}
    other = sorted(written - set(store.committed_shards.tolist()))
    without = sum(store.objects.count_bytes(f"hidden_states/c/{shard}") for shard in other)
    return store.objects.count_bytes("hidden_states/c") - without
