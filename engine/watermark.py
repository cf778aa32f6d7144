"""Which sample carries whose identity, where, and the pixels of it.

Everything drawn at random is a pure function of (seed, sample id): it does not depend on order, batch, worker or
resume. This module knows nothing about files, models or stores.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mmextract.engine.identities import FIELDS, Identity
from mmextract.kernels.reference import Uint8Array, composite_text

SMALLEST_FONT_PX = 6
"""Below this no glyph of Pillow's default font can be told from another."""


@dataclass(frozen=True, kw_only=True)
class WatermarkSpec:
    """How a watermark looks. The defaults are the published ones (arXiv 2503.01208), but for the relative size."""

    seed: int = 0
    """Decides who is marked, with whom and where."""
    fields: tuple[str, ...] = FIELDS
    """The lines, in order."""
    field_names: bool = True
    """Write `username: jane7` rather than `jane7`."""
    font_px: int | None = None
    """Font size in pixels; None makes it relative to the image."""
    font_scale: float = 0.045
    """Font size as a share of the image's shorter side, when `font_px` is None."""
    color: tuple[int, int, int] = (255, 255, 255)
    """RGB of the ink."""
    opacity: int = 128
    """Alpha of the ink, 1 to 255."""

    def __post_init__(self) -> None:
        unknown = [name for name in self.fields if name not in FIELDS]
        if unknown or not self.fields or len(set(self.fields)) != len(self.fields):
            raise ValueError(
                f"watermark fields must be distinct names out of {', '.join(FIELDS)}; got {self.fields}"
            )
        if not 1 <= self.opacity <= 255:
            raise ValueError(f"opacity must be 1 to 255, got {self.opacity}")
        if self.font_px is not None and self.font_px < SMALLEST_FONT_PX:
            raise ValueError(
                f"font size must be at least {SMALLEST_FONT_PX} px to be legible, got {self.font_px}"
            )
        if not 0 < self.font_scale <= 1:
            raise ValueError(f"font scale must be in (0, 1], got {self.font_scale}")
        if len(self.color) != 3 or not all(0 <= c <= 255 for c in self.color):
            raise ValueError(f"color must be three numbers from 0 to 255, got {self.color}")

    def text(self, person: Identity) -> str:
        """Return the lines that a watermark of `person` shows."""
        lines = [(name, getattr(person, name)) for name in self.fields]
        return "\n".join(f"{name}: {value}" if self.field_names else value for name, value in lines)


@dataclass(frozen=True, kw_only=True)
class Draw:
    """The random numbers of one sample, each uniform in [0, 1)."""

    marked: float
    """A sample is watermarked where this is below the rate, so a higher rate marks a superset."""
    identity: float
    """Which identity, as a share of how many there are."""
    x: float
    """Place, as a share of the free width."""
    y: float
    """Place, as a share of the free height."""


def draw(seed: int, sample_id: str) -> Draw:
    """Return the random numbers of a sample, a pure function of (seed, sample id)."""
    marked, identity, x, y = random_numbers(f"{seed}\0{sample_id}")
    return Draw(marked=marked, identity=identity, x=x, y=y)


def random_numbers(key: str) -> tuple[float, float, float, float]:
    """Return four independent numbers, each uniform in [0, 1), a pure function of `key`."""
    digest = hashlib.blake2b(key.encode(), digest_size=32).digest()
    below_one = float(np.nextafter(1.0, 0.0))
    first, second, third, fourth = (
        min(int.from_bytes(digest[i : i + 8], "little") / 2**64, below_one) for i in range(0, 32, 8)
    )
    return first, second, third, fourth


def choose_identity(spec: WatermarkSpec, sample_id: str, n_identities: int, rate: float = 1.0) -> int | None:
    """Return the index of the identity that a sample carries, or None where it carries none.

    Raises ValueError for a rate outside [0, 1].
    """
    if not 0 <= rate <= 1:
        raise ValueError(f"the watermark rate must lie in [0, 1], got {rate}")
    numbers = draw(spec.seed, sample_id)
    return int(numbers.identity * n_identities) if numbers.marked < rate else None


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where a watermark stands in an image, in pixels of that image."""

    x: int
    """Left edge of the text."""
    y: int
    """Top edge of the text."""
    font_px: int
    """Font size used."""


def place(spec: WatermarkSpec, sample_id: str, width: int, height: int, texts: Sequence[str]) -> Placement:
    """Return the one place at which each of `texts` fits into an image of `width` × `height`.

    Given both texts of a pair it returns a place that serves both. A relative font size shrinks until the text fits;
    a fixed one does not. Raises ValueError if the text does not fit.
    """
    relative = max(SMALLEST_FONT_PX, round(spec.font_scale * min(width, height)))
    font_px = spec.font_px or relative
    while True:
        boxes = [text_size(text, font_px) for text in texts]
        text_width, text_height = max(w for w, _ in boxes), max(h for _, h in boxes)
        if text_width <= width and text_height <= height:
            break
        if spec.font_px is not None or font_px == SMALLEST_FONT_PX:
            raise ValueError(
                f"a watermark of {text_width}×{text_height} px does not fit into an image of {width}×{height} px "
                f"at font size {font_px}: use fewer --fields, a smaller font or larger images"
            )
        font_px -= 1
    numbers = draw(spec.seed, sample_id)
    return Placement(
        x=int(numbers.x * (width - text_width + 1)),
        y=int(numbers.y * (height - text_height + 1)),
        font_px=font_px,
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class Stamp:
    """A watermark that is ready to be laid on an image."""

    alpha: Uint8Array
    """uint8 [h, w], the ink's alpha at each pixel, read-only; the same array for the same text, size and opacity."""
    x: int
    """Column of the image where the mask's left edge falls."""
    y: int
    """Row of the image where its top edge falls."""
    color: tuple[int, int, int]
    """RGB of the ink."""

    def on(self, image: Uint8Array) -> Uint8Array:
        """Return `image` (uint8 [H, W, 3]) with it, byte-equal to Pillow's `Image.alpha_composite`."""
        return composite_text(image, self.alpha, self.x, self.y, self.color)


def make_stamp(spec: WatermarkSpec, text: str, placement: Placement) -> Stamp:
    """Return the watermark that shows `text` at this place."""
    alpha = render_alpha(text, placement.font_px, spec.opacity)
    return Stamp(alpha=alpha, x=placement.x, y=placement.y, color=spec.color)


def apply(image: Uint8Array, spec: WatermarkSpec, text: str, placement: Placement) -> Uint8Array:
    """Return `image` (uint8 [H, W, 3]) with `text` on it, byte-equal to Pillow's `Image.alpha_composite`."""
    return make_stamp(spec, text, placement).on(image)


@lru_cache(maxsize=64)
def _font(font_px: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(font_px)
    if not isinstance(font, ImageFont.FreeTypeFont):
        raise RuntimeError(
            "this Pillow was built without FreeType: install a Pillow wheel from the package index"
        )
    return font


@lru_cache(maxsize=4096)
def _text_box(text: str, font_px: int) -> tuple[int, int, int, int]:
    canvas = ImageDraw.Draw(Image.new("L", (1, 1)))
    left, top, right, bottom = canvas.multiline_textbbox((0, 0), text, font=_font(font_px))
    return int(np.floor(left)), int(np.floor(top)), int(np.ceil(right)), int(np.ceil(bottom))


def text_size(text: str, font_px: int) -> tuple[int, int]:
    """Return (width, height) in pixels of the box that Pillow gives the text."""
    left, top, right, bottom = _text_box(text, font_px)
    return right - left, bottom - top


@lru_cache(maxsize=4096)
def render_alpha(text: str, font_px: int, opacity: int) -> Uint8Array:
    """Rasterise text with Pillow's default font. Returns uint8 [h, w]: the ink's alpha at each pixel, read-only."""
    left, top, right, bottom = _text_box(text, font_px)
    mask = Image.new("L", (right - left, bottom - top), 0)
    ImageDraw.Draw(mask).multiline_text((-left, -top), text, font=_font(font_px), fill=opacity)
    alpha = np.asarray(mask)
    alpha.flags.writeable = False
    return alpha
