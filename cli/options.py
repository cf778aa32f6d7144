"""Options that several commands share, and the objects they become. It reads nothing but identity files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import rich_click as click

if TYPE_CHECKING:
    from mmextract.engine.loading import ModelSpec
    from mmextract.engine.rows import Marking
    from mmextract.engine.samples import Dataset
    from mmextract.engine.watermark import WatermarkSpec

Command = TypeVar("Command", bound=Callable[..., Any])
FORMATS = ("images", "jsonl", "csv", "parquet", "json", "llava", "qwen", "datasets")
FILE = click.Path(path_type=Path, dir_okay=False)

_DATA = (
    click.option("--format", type=click.Choice(FORMATS), help="Format of DATA; recognised if not given."),
    click.option("--prompt", help="Ask this of every sample, in place of its own question."),
    click.option(
        "--image-root",
        type=click.Path(path_type=Path, file_okay=False),
        help="Folder that image paths are relative to and must not leave.  [default: that of DATA]",
    ),
    click.option(
        "--id-column", help="Column that holds the ids; `row` numbers the rows.  [default: id, if there]"
    ),
    click.option("--limit", type=click.IntRange(min=1), help="Take the first N samples only."),
)

_DESIGN = (
    click.option("--identities", type=FILE, help="Watermark a share of the images with identities of FILE."),
    click.option("--rate", type=click.FloatRange(0, 1), default=1.0, show_default=True, help="That share."),
    click.option("--seen", type=FILE, help="Paired design: each image once with an identity of this FILE …"),
    click.option("--unseen", type=FILE, help="… and once, at the same place, with one of this FILE."),
)

_LOOK = (
    click.option(
        "--seed", type=int, default=0, show_default=True, help="Decides who is marked, with whom, where."
    ),
    click.option("--fields", help="Lines of the watermark, separated by commas.  [default: all six]"),
    click.option(
        "--field-names/--no-field-names", default=None, help="Write `username: jane7` or just `jane7`."
    ),
    click.option("--font-px", type=click.IntRange(min=1), help="Fixed font size in pixels."),
    click.option(
        "--font-scale", type=float, help="Font size as a share of the image's shorter side.  [default: 0.045]"
    ),
    click.option("--color", help="RGB of the text as R,G,B.  [default: 255,255,255]"),
    click.option("--opacity", type=click.IntRange(1, 255), help="Alpha of the text.  [default: 128]"),
)

_MODEL = (
    click.option("--revision", help="Revision on the hub."),
    click.option("--dtype", default="auto", show_default=True, help="Dtype of the model's weights."),
    click.option(
        "--device",
        default="auto",
        show_default=True,
        help="cuda, cuda:1, cpu; auto takes a GPU if there is one.",
    ),
    click.option("--device-map", help="Spread the model over devices (accelerate): auto, balanced, …"),
    click.option("--attn-implementation", help="eager, sdpa, flash_attention_2, …"),
    click.option("--trust-remote-code", is_flag=True, help="Run code that comes with the model."),
)


def data_options(command: Command) -> Command:
    """Add the options that say how DATA is read."""
    return _add(command, _DATA)


def marking_options(command: Command) -> Command:
    """Add the options that say which watermarks the images get."""
    return _add(command, (*_DESIGN, *_LOOK))


def look_options(command: Command) -> Command:
    """Add the options that say how watermarks look, and where they go."""
    return _add(command, _LOOK)


def model_options(command: Command) -> Command:
    """Add the options that say how a model is loaded, but not which one."""
    return _add(command, _MODEL)


def take_model(options: dict[str, Any], model: str, adapter: str | None = None) -> ModelSpec:
    """Take the model options out of `options`, and name the model with them; `builtin:` names are looked up."""
    from mmextract.engine import builtin
    from mmextract.engine.loading import ModelSpec

    folder, own_adapter = builtin.locate_model(model)
    names = ("revision", "dtype", "device", "device_map", "attn_implementation", "trust_remote_code")
    settings = {name: options.pop(name) for name in names}
    return ModelSpec(model=folder, adapter=adapter or own_adapter, **settings)


def take_look(options: dict[str, Any], default: WatermarkSpec | None = None) -> WatermarkSpec:
    """Take the options of `look_options` out of `options` and return the look: `default` with what was given."""
    from dataclasses import replace

    from mmextract.engine.watermark import WatermarkSpec

    return replace(default or WatermarkSpec(), **_take_look(options))


def _add(command: Command, options: tuple[Callable[[Command], Command], ...]) -> Command:
    for option in reversed(options):
        command = option(command)
    return command


def read_data(data: Path, options: dict[str, Any]) -> Dataset:
    """Take the data options out of `options` and read DATA with them."""
    from mmextract.engine.samples import read_samples

    return read_samples(
        data, **{name: options.pop(name) for name in ("format", "prompt", "image_root", "id_column", "limit")}
    )


def take_marking(options: dict[str, Any], default: Marking | None = None) -> Marking | None:
    """Take the marking options out of `options` and make the marking they describe.

    default is what holds where no identity file is given; its look can still be changed by the options.
    Raises click.UsageError for a mixture of the two designs.
    """
    from dataclasses import replace

    from mmextract.engine.identities import read_identities
    from mmextract.engine.rows import PairedMarking, RandomMarking
    from mmextract.engine.watermark import WatermarkSpec

    files = {name: options.pop(name) for name in ("identities", "seen", "unseen")}
    rate = options.pop("rate")
    look = _take_look(options)
    if files["identities"] and (files["seen"] or files["unseen"]):
        raise click.UsageError(
            "give --identities (a share of the images) or --seen and --unseen (pairs), not both"
        )
    if bool(files["seen"]) != bool(files["unseen"]):
        raise click.UsageError("the paired design needs both --seen and --unseen")
    if files["identities"]:
        people = tuple(read_identities(files["identities"]))
        spec = WatermarkSpec(**look)
        return RandomMarking(spec=spec, identities=people, rate=rate, set_name=files["identities"].stem)
    if files["seen"]:
        seen, unseen = (tuple(read_identities(files[name])) for name in ("seen", "unseen"))
        return PairedMarking(spec=WatermarkSpec(**look), seen=seen, unseen=unseen)
    if default is not None:
        return replace(default, spec=replace(default.spec, **look))
    return None


def _take_look(options: dict[str, Any]) -> dict[str, Any]:
    """Return what was given of `WatermarkSpec`."""
    names = ("seed", "fields", "field_names", "font_px", "font_scale", "color", "opacity")
    look = {name: value for name in names if (value := options.pop(name)) is not None}
    if "fields" in look:
        look["fields"] = tuple(name.strip() for name in look["fields"].split(","))
    if "color" in look:
        try:
            look["color"] = tuple(int(part) for part in look["color"].split(","))
        except ValueError as error:
            raise click.UsageError(f"--color takes three numbers R,G,B, got {look['color']!r}") from error
    return look
