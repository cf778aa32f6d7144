"""Decoding gives what transformers gives, or a reason; it never gives wrong pixels, hangs or ends the run."""

import random
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import skimage
import xxhash
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError
from transformers.image_utils import load_image

from mmextract.engine.images import FORMATS, RejectedSample, decode, measure

BUNDLED = Path(skimage.__file__).parent / "data"
FLOAT64 = BUNDLED / "multipage_rgb.tif"
PHOTOS = sorted(
    {path for path in BUNDLED.iterdir() if path.suffix in (".png", ".jpg", ".gif", ".tif")} - {FLOAT64}
)


@dataclass(frozen=True)
class InMemory:
    data: bytes
    name: str = "test"

    def read(self) -> bytes:
        return self.data


def noise(height: int, width: int, *channels: int, top: int = 256, dtype: str = "uint8") -> np.ndarray:
    return np.random.default_rng(0).integers(0, top, (height, width, *channels)).astype(dtype)


def encoded(image: Image.Image, format: str, **options: object) -> bytes:
    file = BytesIO()
    image.copy().save(file, format, **options)  # a copy, because saving leaves settings behind in the image
    return file.getvalue()


RGB = Image.fromarray(noise(37, 23, 3))
GREY = Image.fromarray(noise(37, 23))
FIRST, SECOND = (Image.fromarray(noise(20, 30, 3)), Image.fromarray(255 - noise(20, 30, 3)))


def two_frames(format: str) -> bytes:
    return encoded(FIRST, format, save_all=True, append_images=[SECOND.copy()])


def with_orientation(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(RGB, "JPEG", exif=exif)


def palette_with_transparency() -> bytes:
    return encoded(RGB.quantize(16), "PNG", transparency=bytes(range(0, 256, 16)))


def bomb(width: int, height: int) -> bytes:
    """Return a valid PNG of a hundred bytes that claims to have width × height pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b""))
        + chunk(b"IEND", b"")
    )


UNUSUAL: dict[str, Callable[[], bytes]] = {
    "cmyk-jpeg": lambda: encoded(RGB.convert("CMYK"), "JPEG"),
    "cmyk-tiff": lambda: encoded(RGB.convert("CMYK"), "TIFF"),
    "grey-16-bit-png": lambda: encoded(Image.fromarray(noise(20, 30, top=65536, dtype="uint16")), "PNG"),
    "grey-16-bit-tiff": lambda: encoded(Image.fromarray(noise(20, 30, top=65536, dtype="uint16")), "TIFF"),
    "int32-tiff": lambda: encoded(Image.fromarray(noise(20, 30, top=70_000, dtype="int32")), "TIFF"),
    "float-tiff": lambda: encoded(Image.fromarray(noise(20, 30, top=300, dtype="float32")), "TIFF"),
    "lab-tiff": lambda: encoded(Image.merge("LAB", RGB.split()), "TIFF"),
    "one-bit-png": lambda: encoded(GREY.convert("1"), "PNG"),
    "grey-alpha-png": lambda: encoded(Image.merge("LA", (GREY, GREY)), "PNG"),
    "rgba-png": lambda: encoded(Image.fromarray(noise(20, 30, 4)), "PNG"),
    "rgba-webp": lambda: encoded(Image.fromarray(noise(20, 30, 4)), "WEBP", lossless=True),
    "palette-png": lambda: encoded(RGB.quantize(7), "PNG"),
    "palette-transparent-png": palette_with_transparency,
    "animated-gif": partial(two_frames, "GIF"),
    "animated-png": partial(two_frames, "PNG"),
    "animated-webp": partial(two_frames, "WEBP"),
    "multi-picture-jpeg": partial(two_frames, "MPO"),
    "multi-page-tiff": partial(two_frames, "TIFF"),
    "progressive-jpeg": lambda: encoded(RGB, "JPEG", progressive=True),
    "bmp": lambda: encoded(RGB, "BMP"),
    "pgm": lambda: encoded(GREY, "PPM"),
    "one-pixel": lambda: encoded(RGB.resize((1, 1)), "PNG"),
    **{f"exif-orientation-{k}": partial(with_orientation, k) for k in range(1, 9)},
}


def as_transformers_loads(path: Path) -> np.ndarray:
    return np.asarray(load_image(str(path)))


@pytest.mark.parametrize("path", PHOTOS, ids=lambda path: path.name)
def test_photos_decode_to_the_pixels_that_transformers_loads(path: Path) -> None:
    decoded = decode(InMemory(path.read_bytes()))
    np.testing.assert_array_equal(decoded.pixels, as_transformers_loads(path))


def test_a_photo_that_transformers_cannot_load_is_rejected() -> None:
    with pytest.raises(UnidentifiedImageError):
        load_image(str(FLOAT64))
    with pytest.raises(RejectedSample, match="not a readable PNG"):
        decode(InMemory(FLOAT64.read_bytes()))


def test_all_photos_of_scikit_image_were_found() -> None:
    assert len(PHOTOS) >= 28


@pytest.mark.parametrize("make", UNUSUAL.values(), ids=UNUSUAL.keys())
def test_unusual_images_decode_to_the_pixels_that_transformers_loads(
    make: Callable[[], bytes], tmp_path: Path
) -> None:
    path = tmp_path / "image"
    path.write_bytes(make())
    pixels = decode(InMemory(path.read_bytes())).pixels
    np.testing.assert_array_equal(pixels, as_transformers_loads(path))
    assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3


@pytest.mark.parametrize("make", UNUSUAL.values(), ids=UNUSUAL.keys())
def test_the_size_measured_from_the_header_is_that_of_the_decoded_image(make: Callable[[], bytes]) -> None:
    source = InMemory(make())
    height, width, _ = decode(source).pixels.shape
    assert measure(source) == (width, height)


def test_measuring_rejects_what_has_no_size() -> None:
    for data, reason in ((b"", "empty"), (b"text", "not a readable"), (bomb(30_000, 30_000), "megapixels")):
        with pytest.raises(RejectedSample, match=reason):
            measure(InMemory(data))


def test_the_exif_orientation_turns_the_pixels() -> None:
    upright, turned = (decode(InMemory(with_orientation(k))).pixels for k in (1, 6))
    assert turned.shape == (23, 37, 3)
    np.testing.assert_array_equal(turned, np.rot90(upright, -1))


def test_of_an_animation_the_first_frame_is_taken() -> None:
    pixels = decode(InMemory(UNUSUAL["animated-png"]())).pixels
    np.testing.assert_array_equal(pixels, np.asarray(FIRST))


def test_sixteen_bit_greys_are_clipped_not_scaled() -> None:
    pixels = decode(
        InMemory(encoded(Image.fromarray(np.array([[7, 255, 256, 65535]], np.uint16)), "PNG"))
    ).pixels
    assert pixels[0, :, 0].tolist() == [7, 255, 255, 255]


def test_pixels_can_be_written_to_and_handed_to_torch() -> None:
    pixels = decode(InMemory(encoded(RGB, "PNG"))).pixels
    assert pixels.flags.writeable and pixels.flags.c_contiguous


def test_the_hash_is_of_the_bytes_and_shows_a_flipped_bit_that_decodes_silently() -> None:
    data = encoded(RGB, "JPEG")
    flipped = bytearray(data)
    flipped[len(data) // 2] ^= 1
    hashes = [decode(InMemory(bytes(d))).hash for d in (data, flipped)]
    assert hashes == [xxhash.xxh3_64_intdigest(bytes(d)) for d in (data, flipped)]
    assert hashes[0] != hashes[1] and min(hashes) >= 0 and max(hashes) < 2**64


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("share", [0.01, 0.2, 0.7, 0.98])
def test_truncated_images_are_rejected(format: str, share: float) -> None:
    whole = encoded(RGB, format)
    decode(InMemory(whole))
    with pytest.raises(RejectedSample, match=r"not a readable|cannot be decoded"):
        decode(InMemory(whole[: int(len(whole) * share)]))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"<html><body>404</body></html>", "not a readable PNG, JPEG"),
        (b"\0" * 1000, "not a readable"),
        (encoded(RGB, "TGA"), "not a readable"),
        (encoded(RGB, "ICO"), "not a readable"),
        (encoded(RGB, "JPEG2000"), "not a readable"),
        (encoded(RGB, "PDF"), "not a readable"),
        (bomb(5, 5), "cannot be decoded"),
        (bomb(0, 5), "no pixels|cannot be decoded|not a readable"),
        (bomb(30_000, 30_000), "178 megapixels"),
        (bomb(13_378, 13_377), "178 megapixels"),
    ],
)
def test_what_is_no_usable_image_is_rejected_with_its_reason(data: bytes, reason: str) -> None:
    with pytest.raises(RejectedSample, match=reason):
        decode(InMemory(data))


def test_bombs_are_rejected_even_where_pillows_own_limit_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    with pytest.raises(RejectedSample, match="30000×30000"):
        decode(InMemory(bomb(30_000, 30_000)))


def test_decoding_refuses_to_run_where_pillow_would_pass_truncated_images(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(RuntimeError, match="LOAD_TRUNCATED_IMAGES"):
        decode(InMemory(encoded(RGB, "PNG")))


def test_running_out_of_memory_is_not_the_fault_of_the_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(ImageOps, "exif_transpose", exhausted)
    with pytest.raises(MemoryError):
        decode(InMemory(encoded(RGB, "PNG")))


@pytest.mark.filterwarnings("ignore")
def test_damaged_bytes_give_pixels_or_the_same_reason_every_time() -> None:
    rng = random.Random(0)
    outcomes = []
    for number in range(300):
        data = bytearray(encoded(RGB, FORMATS[number % len(FORMATS)]))
        for _ in range(rng.randint(1, 5)):
            data[rng.randrange(min(len(data), 200))] = rng.randrange(256)
        outcomes.append([outcome(bytes(data)), outcome(bytes(data))])
    assert all(first == second for first, second in outcomes)
    assert {type(first) for first, _ in outcomes} == {str, bytes}
    assert not any("0x" in first for first, _ in outcomes if isinstance(first, str))


def outcome(data: bytes) -> str | bytes:
    try:
        return decode(InMemory(data)).pixels.tobytes()
    except RejectedSample as error:
        return str(error)
