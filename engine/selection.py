"""What the user asks for, as numbers: which layers of a model, which tokens of a sample.

This module knows nothing about modules, tensors on devices or stores.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mmextract.engine.images import RejectedSample

EMBED = -1
"""Number of the embedding (the input of block 0) in a store's layer coordinate."""

NAMED_POSITIONS = ("last", "first", "mean", "image", "prompt", "all")
"""Position names beside indices such as `-2` or `5`."""

_INDEX = re.compile(r"-?\d{1,9}")
_RANGE = re.compile(r"(-?\d{1,9})-(-?\d{1,9})")
_SLICE = re.compile(r"(-?\d{1,9})?:(-?\d{1,9})?(?::(\d{1,9})?)?")

IndexArray = NDArray[np.int64]


def parse_layers(text: str, n_layers: int) -> tuple[int, ...]:
    """Return the layers that `text` asks for, sorted, each once; EMBED comes first if asked for.

    text: `all` (every decoder block), `embed`, an index (`4`, `-1` is the last), an inclusive range (`8-15`),
    a slice as in Python (`::4`, `2:10:2`, its end excluded), or several of these separated by commas.
    n_layers: decoder blocks of the model. Raises ValueError for anything else and for what lies outside the
    model, naming the valid range.
    """
    layers: set[int] = set()
    for term in text.split(","):
        layers.update(_parse_term(term.strip(), n_layers))
    return tuple(sorted(layers))


def _parse_term(term: str, n_layers: int) -> Sequence[int]:
    if term == "all":
        return range(n_layers)
    if term == "embed":
        return (EMBED,)
    if _INDEX.fullmatch(term):
        return (_layer(term, n_layers, term),)
    if match := _RANGE.fullmatch(term):
        first, last = (_layer(bound, n_layers, term) for bound in match.groups())
        return _not_empty(range(first, last + 1), term)
    if match := _SLICE.fullmatch(term):
        start, stop, step = match.groups()
        first = _layer(start, n_layers, term) if start else 0
        # the end is excluded, so one past the last layer is valid
        end = n_layers if not stop or int(stop) == n_layers else _layer(stop, n_layers, term)
        if step and int(step) == 0:
            raise ValueError(f"layers {term!r}: the step must be at least 1")
        return _not_empty(range(first, end, int(step) if step else 1), term)
    raise ValueError(
        f"layers {term!r} not understood: expected all, embed, an index (4, -1), a range (8-15), "
        "a slice (::4, 2:10:2), or several of these separated by commas"
    )


def _layer(number: str, n_layers: int, term: str) -> int:
    index = int(number)
    if not -n_layers <= index < n_layers:
        where = "" if number == term else f" in {term!r}"
        raise ValueError(
            f"layer {index}{where} is out of range: the model has layers 0 to {n_layers - 1} "
            f"(or -{n_layers} to -1 counted from the end), and embed"
        )
    return index % n_layers


def _not_empty(layers: range, term: str) -> range:
    if not layers:
        raise ValueError(f"layers {term!r} selects none: its first layer comes after its last")
    return layers


class HasImageMask(Protocol):
    """A sample that is ready for the model."""

    @property
    def image_mask(self) -> ArrayLike:
        """bool [T], true at image tokens."""


@dataclass(frozen=True)
class Position:
    """A token, or a named span of tokens that is pooled to its mean."""

    name: str
    """`last`, `first`, an index such as `-2` or `5`, `mean` (of all tokens), `image` (mean of the image
    tokens), `prompt` (mean of the text tokens: all that are not image tokens), or `all` (each, unpooled).
    """

    def __post_init__(self) -> None:
        if self.name not in NAMED_POSITIONS and not _INDEX.fullmatch(self.name):
            raise ValueError(
                f"position {self.name!r} not understood: expected {', '.join(NAMED_POSITIONS)} "
                "or an index such as -2 or 5"
            )

    def tokens(self, image_mask: ArrayLike) -> IndexArray:
        """Return the indices of the tokens of this position in one sample, int64 [n], ascending, n ≥ 1.

        image_mask: bool [T], true at image tokens; T is the sample's number of tokens. Raises RejectedSample
        if the sample has no such token.
        """
        mask = np.asarray(image_mask, dtype=bool)
        match self.name:
            case "image":
                found = np.flatnonzero(mask)
            case "prompt":
                found = np.flatnonzero(~mask)
            case "mean" | "all":
                found = np.arange(len(mask))
            case "first":
                found = _one(0, len(mask))
            case "last":
                found = _one(-1, len(mask))
            case index:
                found = _one(int(index), len(mask))
        if not len(found):
            kind = {"image": "image ", "prompt": "text "}.get(self.name, "")
            raise RejectedSample(f"position {self.name}: the sample has no {kind}tokens")
        return found.astype(np.int64)

    def check(self, sample: HasImageMask) -> None:
        """Raise RejectedSample if the sample has no token of this position."""
        self.tokens(sample.image_mask)


def _one(index: int, n_tokens: int) -> IndexArray:
    if not -n_tokens <= index < n_tokens:
        raise RejectedSample(f"position {index} is out of range: the sample has {n_tokens} tokens")
    return np.array([index % n_tokens])


def parse_positions(names: Sequence[str]) -> tuple[Position, ...]:
    """Return the positions in the order given.

    Raises ValueError for an unknown name, none, the same one twice, or `all` beside others.
    """
    if not names:
        raise ValueError(f"at least one position is needed: {', '.join(NAMED_POSITIONS)} or an index")
    positions = tuple(
        Position(str(int(name)) if _INDEX.fullmatch(name.strip()) else name.strip()) for name in names
    )
    chosen = [position.name for position in positions]
    if len(set(chosen)) != len(chosen):
        raise ValueError(f"every position can be asked for once, got {', '.join(chosen)}")
    if "all" in chosen and len(chosen) > 1:
        raise ValueError(f"position all keeps every token and goes with no other, got {', '.join(chosen)}")
    return positions
