"""From the bytes of an image to its pixels, or to the reason why there are none.

This module knows nothing about folders, tables, samples or models: a source hands it bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from typing import Protocol

import numpy as np
from PIL import ExifTags, Image, ImageFile, ImageOps, UnidentifiedImageError

from mmextract.kernels.reference import Uint8Array

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
"""Pillow decoders that may see a user's bytes. The others are rare and less tested against bad input."""

MAX_PIXELS = 178_956_970
"""Pillow's own limit for a decompression bomb, which user code can switch off in Pillow but not here."""


class RejectedSample(Exception):
    """One sample cannot be used, for the reason in the message; the run goes on and its row says why.

    Reasons hold nothing that differs between two runs (addresses, times), because they are part of the store.
    """


class ImageSource(Protocol):
    """Where the bytes of one image come from: small, immutable, picklable, and read only when asked."""

    @property
    def name(self) -> str:
        """What the user calls the image: a relative path, or `row 7`."""

    def read(self) -> bytes:
        """Return the encoded image. Raises RejectedSample if there is none to be had."""


@dataclass(frozen=True, kw_only=True)
class Decoded:
    """The pixels of one image."""

    pixels: Uint8Array
    """uint8 [height, width, 3], RGB, upright."""
    hash: int
    """xxh3_64 of the encoded bytes, unsigned. It shows a flipped bit in a JPEG, which decodes silently."""


def decode(source: ImageSource) -> Decoded:
    """Read and decode an image to the pixels that `transformers.image_utils.load_image` gives.

    The EXIF orientation is applied and the mode converted to RGB by Pillow: CMYK without colour management,
    transparency dropped, 16-bit greys *clipped* at 255 rather than scaled (so a 16-bit image that uses its
    range is almost white: convert such images before). Of an animation or a multi-page file the first frame
    is taken.

    Pillow's warnings never reject an image: in the formats accepted here they tell of skipped metadata other
    than the orientation, while lost pixels raise. Raises RejectedSample if the bytes are missing, empty,
    truncated, of another format, undecodable or of more than MAX_PIXELS; MemoryError and other failures of
    the machine pass through.
    """
    import xxhash

    if ImageFile.LOAD_TRUNCATED_IMAGES:
        raise RuntimeError(
            "PIL.ImageFile.LOAD_TRUNCATED_IMAGES is set, which passes truncated images as whole: unset it"
        )
    data = _read(source)
    with _opened(data) as image:
        pixels = np.array(ImageOps.exif_transpose(image).convert("RGB"))
    return Decoded(pixels=pixels, hash=xxhash.xxh3_64_intdigest(data))


def measure(source: ImageSource) -> tuple[int, int]:
    """Return (width, height) of the upright image from its header. Raises RejectedSample as `decode` does."""
    with _opened(_read(source)) as image:
        sideways = image.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
        return image.size[::-1] if sideways else image.size


def _read(source: ImageSource) -> bytes:
    data = source.read()
    if not data:
        raise RejectedSample("the image is empty (0 bytes)")
    return data


@contextmanager
def _opened(data: bytes) -> Iterator[Image.Image]:
    """Open an image for a block of Pillow calls, whose failures are the fault of the bytes."""
    try:
        with Image.open(BytesIO(data), formats=FORMATS) as image:
            _check_size(*image.size)
            yield image
    except (RejectedSample, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise RejectedSample(f"the image has more than {MAX_PIXELS // 1_000_000} megapixels") from error
    except UnidentifiedImageError as error:
        # Pillow's own message names a memory address
        raise RejectedSample(f"the image is not a readable {', '.join(FORMATS)}") from error
    except Exception as error:
        # decoders raise SyntaxError, struct.error, IndexError, … on bad input: there is no list of them
        raise RejectedSample(f"the image cannot be decoded: {error or type(error).__name__}") from error


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise RejectedSample(
            f"the image has {width}×{height} pixels, more than {MAX_PIXELS // 1_000_000} megapixels"
        )
    if width == 0 or height == 0:
        raise RejectedSample(f"the image has no pixels ({width}×{height})")
