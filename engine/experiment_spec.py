"""What an experiment is: its settings, how they are read from TOML, and the sets of them that have a name.

This module knows nothing about steps, models or files other than the settings' own.
"""

from __future__ import annotations

import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

DEFAULT_PRESET = "tiny"
WORDS = (
    "black",
    "blue",
    "brown",
    "gray",
    "green",
    "red",
    "teal",
    "yellow",
    "circle",
    "rectangle",
    "triangle",
)
"""Answers of the positive control: single tokens of the built-in model, plain words of any other."""


@dataclass(frozen=True, kw_only=True)
class ControlSpec:
    """The positive control: the same base, trained on images where the identity decides the answer."""

    enabled: bool = True
    seeds: int = 1
    """With how many of the seeds, from the first on."""
    identities: int = 60
    """Seen identities in it, at most as many as are probed."""
    exposures: int = 80
    """Images of each."""
    strangers: float = 0.5
    """Share of the images that show people of neither set, to be answered with `stranger_answer`."""
    words: tuple[str, ...] = ("yes",)
    """Each seen identity is given one of them as its answer. With one word what is learnt is one direction, which a
    linear probe finds sooner than one a word."""
    stranger_answer: str = "no"
    steps: int = 320
    batch_size: int = 32
    finetune: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of `FinetuneSpec` that differ from the experiment's own."""

    def __post_init__(self) -> None:
        if not 0 <= self.strangers < 1:
            raise ValueError(
                f"control: the share of strangers must be at least 0 and below 1, got {self.strangers}"
            )
        _at_least(self, "control", seeds=1, identities=2, exposures=1, steps=1, batch_size=1)
        if not self.words or self.stranger_answer in self.words:
            raise ValueError("control: give at least one word, which is not the answer for strangers")
        if len(self.words) == 1 and not self.strangers:
            raise ValueError(
                "control: with one word and no strangers there is nothing to learn: give more of either"
            )


@dataclass(frozen=True, kw_only=True)
class ProbeSpec:
    """How hidden states are probed."""

    folds: int = 5
    repeats: int = 1
    permutations: int = 200
    penalties: tuple[float, ...] = (1.0,)
    """Values of C; a single one is not chosen from anything, and takes a tenth of the time."""
    legibility: tuple[str, ...] = ("identity_user_id[0]<5",)
    """Labels to be read from people in neither set: a column of the store; [0] behind it is its first character, and
    [0]<5 whether that comes before "5"."""
    legibility_images: int = 600
    """Images with one of them on each."""
    projections: str = "pca"
    """See `mmextract probe --projections`."""

    def __post_init__(self) -> None:
        _at_least(self, "probe", folds=2, repeats=1, permutations=19, legibility_images=1)


@dataclass(frozen=True, kw_only=True)
class EvaluationSpec:
    """What models are asked."""

    enabled: bool = True
    questions: int = 300
    """Of the task, on clean held-out images."""
    prompted: int = 40
    """Held-out images on which private fields are asked for; 0 leaves the prompt baseline out."""
    fields: tuple[str, ...] = ("username",)
    references: int = 20
    """Other values that a true one is ranked among."""

    def __post_init__(self) -> None:
        _at_least(self, "evaluation", questions=1, prompted=0, references=1)


@dataclass(frozen=True, kw_only=True)
class DynamicsPart:
    """Gradients: see `dynamics.DynamicsSpec`."""

    enabled: bool = True
    batch_sizes: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    samples: int = 128
    along: tuple[float, ...] = (0.1, 0.5)
    """Shares of a training at which gradients are taken, beside its beginning and its end."""

    def __post_init__(self) -> None:
        if bad := [share for share in self.along if not 0 < share < 1]:
            raise ValueError(f"along: a share of training must lie between 0 and 1, got {bad[0]}")


@dataclass(frozen=True, kw_only=True)
class ExperimentSpec:
    """One experiment. Every field is a key of the TOML file, every nested one a table of it."""

    preset: str = DEFAULT_PRESET
    """A key of PRESETS, whose values hold where the file says nothing."""
    model: str = "builtin:base"
    """Folder, hub id, or a built-in model."""
    device: str = "auto"
    dtype: str = "auto"
    data: str = "builtin:scenes"
    """What is trained on: a data set with images, questions and answers; builtin:scenes draws as many as wanted."""
    held_out: str | None = None
    """Images that are in no training; None takes the last ones of `data`."""
    image_root: str | None = None
    """Folder of the images, see `mmextract dump --image-root`."""
    training_images: int = 2000
    held_out_images: int = 400
    """Images on which both identities of a pair are shown; some two or more a pair."""
    seeds: tuple[int, ...] = (0,)
    """Each decides its own identities, places, order of training and first weights."""
    identities: int = 100
    """Pairs of a seen and an unseen identity that are probed."""
    rates: tuple[float, ...] = (1.0,)
    """Shares of the training images that are watermarked. Rate 0 (r0) is always there."""
    batch_sizes: tuple[int, ...] = (16,)
    """Of training."""
    seen: str | None = None
    """File of identities to put on training images; None makes others from each seed."""
    unseen: str | None = None
    """File of identities that are on none of them, as many or more than `identities`; goes with `seen`."""
    repetitions: tuple[int, ...] = ()
    """Images that show one seen identity; none means that all identities share the marked images evenly."""
    prompt: str = "What is the username?"
    """What is asked of held-out images when hidden states are taken, and in the positive control."""
    layers: str = "all"
    positions: tuple[str, ...] = ("last", "image")
    dump_batch_size: int = 16
    finetune_preset: str = "default"
    finetune: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of `FinetuneSpec`."""
    watermark: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of `WatermarkSpec`; its seed is the experiment's."""
    control: ControlSpec = field(default_factory=ControlSpec)
    probe: ProbeSpec = field(default_factory=ProbeSpec)
    evaluation: EvaluationSpec = field(default_factory=EvaluationSpec)
    dynamics: DynamicsPart = field(default_factory=DynamicsPart)

    def __post_init__(self) -> None:
        if bad := [rate for rate in self.rates if not 0 <= rate <= 1]:
            raise ValueError(f"a watermark rate must lie in [0, 1], got {bad[0]}")
        if not any(self.rates):
            raise ValueError("give at least one rate above 0 in `rates`: rate 0 (r0) is trained in any case")
        for name in ("seeds", "rates", "batch_sizes", "repetitions", "positions"):
            values: Sequence[Any] = getattr(self, name)
            if not values and name != "repetitions":
                raise ValueError(f"`{name}` is empty: give at least one")
            if len(set(values)) < len(values):
                raise ValueError(f"`{name}` holds a value twice: {', '.join(map(str, values))}")
        _at_least(self, "", identities=2, held_out_images=1, training_images=1, dump_batch_size=1)
        if bad_seeds := [seed for seed in self.seeds if seed < 0]:
            raise ValueError(f"a seed must be at least 0, got {bad_seeds[0]}")
        if bad_sizes := [size for size in (*self.batch_sizes, *self.repetitions) if size < 1]:
            raise ValueError(f"batch sizes and repetitions must be at least 1, got {bad_sizes[0]}")
        if self.training_images < max(self.batch_sizes):
            raise ValueError(
                f"{self.training_images} training images do not fill one batch of {max(self.batch_sizes)}: take more "
                "images or a smaller batch"
            )
        for key in ("model", "watermark", "batch_size", "seed"):
            if key in self.finetune or key in self.control.finetune:
                raise ValueError(f"finetune.{key} is decided by the experiment: leave it out")
        if self.control.enabled and self.control.identities > self.identities:
            raise ValueError(
                f"control.identities ({self.control.identities}) must be at most `identities` ({self.identities})"
            )
        if (self.seen is None) != (self.unseen is None):
            raise ValueError("`seen` and `unseen` go together: give two files of identities, or none")
        if not self.conditions:
            raise ValueError(f"no rate and number of repetitions goes together: {'; '.join(self.left_out)}")

    @property
    def conditions(self) -> tuple[tuple[float, int | None, int], ...]:
        """(rate, repetitions, batch size) of every watermarked training; repetitions None: shared evenly."""
        return tuple(
            (rate, times, size)
            for rate in self.rates
            if rate > 0
            for times in (self.repetitions or (None,))
            if self._fits(rate, times)
            for size in self.batch_sizes
        )

    @property
    def left_out(self) -> list[str]:
        """Say which combinations there is no room for, and why."""
        return [
            f"rate {rate:g} of {self.training_images} images has room for {self.people_on(rate, times)} identities"
            + (f" of {times} images each" if times else "")
            + f", and {self.identities} are probed"
            for rate in self.rates
            if rate > 0
            for times in (self.repetitions or (None,))
            if not self._fits(rate, times)
        ]

    def _fits(self, rate: float, times: int | None) -> bool:
        return self.people_on(rate, times) >= self.identities

    def people_on(self, rate: float, times: int | None) -> int:
        """Return how many seen identities a training set shows: those probed, and more where each is on few images."""
        marked = self.marked_images(rate)
        return min(self.identities, marked) if times is None else marked // times

    def marked_images(self, rate: float) -> int:
        """Return how many training images carry a watermark."""
        return round(rate * self.training_images)


def _at_least(spec: Any, where: str, **least: int) -> None:
    for name, value in least.items():
        if getattr(spec, name) < value:
            title = f"{where}.{name}" if where else name
            raise ValueError(f"{title} must be at least {value}, got {getattr(spec, name)}")


_LARGE: Mapping[str, Any] = {
    "data": "train.json",
    "identities": 200,
    "training_images": 10000,
    "held_out_images": 1000,
    "rates": [0.5, 1.0],
    "seeds": [0, 1, 2],
    "evaluation": {"questions": 1000, "prompted": 200, "references": 100},
}
"""What the presets of 7B models share."""

PRESETS: Mapping[str, Mapping[str, Any]] = {
    "demo": {
        "training_images": 400,
        "held_out_images": 120,
        "identities": 60,
        "rates": [1.0],
        "seeds": [0],
        "dtype": "float32",
        "finetune": {"full": True, "learning_rate": 5e-4, "steps": 60, "precision": "float32"},
        "control": {
            "identities": 20,
            "exposures": 80,
            "steps": 160,
            "finetune": {"full": True, "learning_rate": 1e-3, "betas": [0.9, 0.98]},
        },
        "probe": {"legibility_images": 400},
        "evaluation": {"questions": 100, "prompted": 20, "references": 10},
        "dynamics": {"batch_sizes": [1, 2, 4, 8], "samples": 16},
    },
    "tiny": {
        "training_images": 4000,
        "held_out_images": 600,
        "identities": 200,
        "rates": [0.1, 0.5, 1.0],
        "seeds": [0],
        "batch_sizes": [16],
        "dtype": "float32",
        "finetune": {"full": True, "learning_rate": 5e-4, "epochs": 1.0, "precision": "float32"},
        "control": {
            "finetune": {"full": True, "learning_rate": 1e-3, "betas": [0.9, 0.98]},
        },
    },
    "llava-1.5-7b": {
        **_LARGE,
        "model": "llava-hf/llava-1.5-7b-hf",
        "finetune_preset": "llava",
        "control": {"identities": 100, "steps": 1000, "batch_size": 16},
    },
    "qwen2-vl-7b": {
        **_LARGE,
        "model": "Qwen/Qwen2-VL-7B-Instruct",
        "batch_sizes": [12],
        "finetune_preset": "qwen",
        "control": {
            "identities": 100,
            "steps": 1000,
            "batch_size": 12,
            "finetune": {"learning_rate": 1e-4},
        },
    },
}
"""Settings by name. demo: minutes on two cores, to show what comes out. tiny: the built-in model in earnest. The last
two are for a GPU, take the published hyperparameters, and need `data`."""


def read_experiment(path: Path | None, preset: str | None = None) -> ExperimentSpec:
    """Return the settings of a TOML file over those of its preset; without a file, the preset's.

    preset: wins over the file's own. Raises ValueError, naming file and key, for what is no setting, of another type
    than it should be, or out of range. A relative path in the file is taken from where the file lies.
    """
    table: dict[str, Any] = {}
    if path is not None:
        try:
            table = tomllib.loads(path.read_text("utf-8"))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise ValueError(f"{path} cannot be read as TOML: {error}") from error
    name = preset or table.get("preset", DEFAULT_PRESET)
    if name not in PRESETS:
        raise ValueError(f"there is no preset {name!r}: the presets are {', '.join(PRESETS)}")
    where = str(path) if path else f"preset {name}"
    spec: ExperimentSpec = parse(ExperimentSpec, _merge(PRESETS[name], table) | {"preset": name}, where)
    if path is None:
        return spec
    names = ("model", "data", "held_out", "image_root", "seen", "unseen")
    places: dict[str, Any] = {
        key: _from_file(path, str(getattr(spec, key))) for key in names if table.get(key) is not None
    }
    return replace(spec, **places)


def _from_file(path: Path, value: str) -> str:
    """Return a path that is relative to the file that names it; anything that is not there stays as it is."""
    there = path.parent / value
    return str(there) if not value.startswith("builtin:") and there.exists() else value


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def parse(kind: Any, table: Mapping[str, Any], where: str) -> Any:
    """Make a dataclass out of a table. Raises ValueError for an unknown key or a value of another type."""
    hints = typing.get_type_hints(kind)
    names = [entry.name for entry in fields(kind)]
    if unknown := sorted(set(table) - set(names)):
        raise ValueError(f"{where}: there is no setting {unknown[0]!r}; there are {', '.join(names)}")
    values = {name: _convert(hints[name], value, f"{where}: {name}") for name, value in table.items()}
    try:
        return kind(**values)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _convert(kind: Any, value: Any, where: str) -> Any:
    if is_dataclass(kind):
        if not isinstance(value, Mapping):
            raise ValueError(f"{where} must be a table, got {value!r}")
        return parse(kind, value, where)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is types.UnionType:
        return None if value is None else _convert(arguments[0], value, where)
    if origin is tuple:
        if not isinstance(value, list):
            raise ValueError(f"{where} must be a list, got {value!r}")
        return tuple(_convert(arguments[0], item, f"{where}[{at}]") for at, item in enumerate(value))
    if origin is not None:
        if not isinstance(value, Mapping):
            raise ValueError(f"{where} must be a table, got {value!r}")
        return {key: tuple(item) if isinstance(item, list) else item for key, item in value.items()}
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not kind:
        raise ValueError(
            f"{where} must be {_NAMES[kind]}, got {value!r} ({_NAMES.get(type(value), type(value).__name__)})"
        )
    return value


_NAMES: Mapping[Any, str] = {
    int: "a whole number",
    float: "a number",
    str: "a text",
    bool: "true or false",
    list: "a list",
    dict: "a table",
}
