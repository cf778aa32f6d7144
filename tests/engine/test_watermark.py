from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from mmextract.engine.identities import make_identities
from mmextract.engine.watermark import (
    WatermarkSpec,
    apply,
    choose_identity,
    draw,
    place,
    render_alpha,
    text_size,
)

PEOPLE = make_identities(40, seed=0)


@pytest.mark.parametrize("person", PEOPLE[:10], ids=lambda person: person.username)
def test_a_watermark_is_byte_equal_to_white_text_at_alpha_128_composited_by_pillow(person: object) -> None:
    spec = WatermarkSpec()
    text = spec.text(person)  # type: ignore[arg-type]
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (336, 448, 3), dtype=np.uint8)
    at = place(spec, text, 448, 336, [text])
    # the published way: text drawn on a transparent layer, the layer composited on the image
    layer = Image.new("RGBA", (448, 336), (255, 255, 255, 0))
    canvas = ImageDraw.Draw(layer)
    font = ImageFont.load_default(at.font_px)
    left, top, _, _ = canvas.multiline_textbbox((0, 0), text, font=font)
    origin = (at.x - int(np.floor(left)), at.y - int(np.floor(top)))
    canvas.multiline_text(origin, text, font=font, fill=(255, 255, 255, 128))
    expected = np.asarray(Image.alpha_composite(Image.fromarray(image).convert("RGBA"), layer).convert("RGB"))
    marked = apply(image, spec, text, at)
    assert np.array_equal(marked, expected)
    assert (marked != image).any()


def test_the_plan_is_a_function_of_seed_and_sample_id_alone() -> None:
    forwards = [draw(0, f"s{i}") for i in range(50)]
    backwards = [draw(0, f"s{i}") for i in reversed(range(50))]
    assert forwards == backwards[::-1]
    assert draw(0, "s1") != draw(1, "s1") != draw(1, "s11")


def test_the_plan_is_the_one_of_earlier_versions() -> None:
    numbers = draw(0, "sample")
    assert (numbers.marked, numbers.identity, numbers.x, numbers.y) == pytest.approx(PINNED, abs=0)


PINNED = (0.49622997002074914, 0.055471350485425855, 0.4476221072078342, 0.8682587659899428)


def test_draws_are_uniform_and_independent() -> None:
    numbers = np.array([(d.marked, d.identity, d.x, d.y) for d in (draw(5, f"id{i}") for i in range(4000))])
    assert numbers.min() >= 0 and numbers.max() < 1
    assert np.abs(numbers.mean(0) - 0.5).max() < 0.02
    assert np.abs(np.corrcoef(numbers.T) - np.eye(4)).max() < 0.06


def test_a_higher_rate_marks_a_superset() -> None:
    spec = WatermarkSpec(seed=2)
    few, many = (
        {i for i in range(1000) if choose_identity(spec, f"s{i}", 10, rate) is not None}
        for rate in (0.2, 0.6)
    )
    assert few < many
    assert abs(len(few) - 200) < 50 and abs(len(many) - 600) < 60


def test_rates_of_zero_and_one_mark_none_and_all() -> None:
    spec = WatermarkSpec()
    assert all(choose_identity(spec, f"s{i}", 10, 0.0) is None for i in range(100))
    assert {choose_identity(spec, f"s{i}", 10, 1.0) for i in range(300)} == set(range(10))


@pytest.mark.parametrize("rate", [-0.1, 1.01, float("nan")])
def test_a_rate_outside_the_unit_interval_is_refused(rate: float) -> None:
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        choose_identity(WatermarkSpec(), "s", 10, rate)


def test_the_place_serves_both_texts_of_a_pair_and_stays_inside() -> None:
    spec = WatermarkSpec(font_px=12, fields=("username",), field_names=False)
    texts = ["short", "a much longer name"]
    for i in range(200):
        at = place(spec, f"s{i}", 160, 40, texts)
        for text in texts:
            width, height = text_size(text, at.font_px)
            assert 0 <= at.x <= 160 - width and 0 <= at.y <= 40 - height
        assert at == place(spec, f"s{i}", 160, 40, texts[::-1])


def test_a_relative_font_follows_the_image_and_shrinks_until_the_text_fits() -> None:
    spec = WatermarkSpec(font_scale=0.1, fields=("username",), field_names=False)
    assert place(spec, "s", 400, 300, ["jane"]).font_px == 30
    narrow = place(spec, "s", 400, 300, ["a name that is much too long for this"]).font_px
    assert text_size("a name that is much too long for this", narrow)[0] <= 400
    assert narrow < 30


@pytest.mark.parametrize("spec", [WatermarkSpec(font_px=20), WatermarkSpec()], ids=["fixed", "relative"])
def test_text_that_does_not_fit_is_an_error_with_both_sizes(spec: WatermarkSpec) -> None:
    with pytest.raises(ValueError, match="does not fit into an image of 20×20 px"):
        place(spec, "s", 20, 20, [spec.text(PEOPLE[0])])


def test_a_mask_holds_all_the_ink_and_is_as_opaque_as_asked() -> None:
    alpha = render_alpha("Hxg", 40, 128)
    canvas = Image.new("L", (400, 200))
    ImageDraw.Draw(canvas).text((100, 50), "Hxg", font=ImageFont.load_default(40), fill=128)
    assert alpha.max() == 128
    assert alpha.astype(int).sum() == np.asarray(canvas).astype(int).sum()
    assert alpha[0].any() and alpha[-1].any()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fields": ("shoe_size",)}, "fields must be distinct names out of username"),
        ({"fields": ()}, "fields must be"),
        ({"opacity": 0}, "opacity must be 1 to 255, got 0"),
        ({"font_px": 3}, "at least 6 px to be legible, got 3"),
        ({"font_scale": 0.0}, r"in \(0, 1\], got 0"),
        ({"color": (0, 0, 256)}, "color must be three numbers"),
    ],
)
def test_a_look_that_makes_no_sense_is_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WatermarkSpec(**settings)  # type: ignore[arg-type]
