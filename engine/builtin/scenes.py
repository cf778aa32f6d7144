"""Images of easy-VQA's kind, drawn from a seed: one shape of one colour on a light ground, with a question about it.

They are what the built-in experiment trains on, so that it needs no other package: as many as wanted, and held-out ones
that no training image repeats. A third of the questions ask where the shape is, which easy-VQA never does: what the
built-in model can name already teaches it nothing, and a model that learns nothing has no reason to remember. easy-VQA
itself (MIT) is not copied: sizes, places and words follow its description, the drawing is this module's. It knows
nothing about models or watermarks.
"""

from __future__ import annotations

from dataclasses import dataclass
from io import BytesIO

import numpy as np
from PIL import Image, ImageDraw

from mmextract.engine.samples import IMAGE_SLOT, Dataset, Sample, Turn

PLACE = "builtin:scenes"
COLORS = {
    "black": (0, 0, 0),
    "gray": (128, 128, 128),
    "red": (255, 0, 0),
    "green": (0, 255, 0),
    "blue": (0, 0, 255),
    "brown": (165, 42, 42),
    "teal": (0, 128, 128),
    "yellow": (255, 255, 0),
}
SHAPES = ("circle", "rectangle", "triangle")
SIZE, ENLARGED = 64, 96


@dataclass(frozen=True, kw_only=True)
class Scene:
    """What is on an image; lengths in pixels of 64."""

    ground: tuple[int, int, int]
    shape: str
    color: str
    x: int
    y: int
    width: int
    height: int


def make_scene(number: int) -> Scene:
    """Return the scene of a number, always the same."""
    rng = np.random.default_rng([number, 0x5CE7E])
    shape, color = SHAPES[rng.integers(3)], tuple(COLORS)[rng.integers(8)]
    width = int(rng.integers(8, 33))
    height = int(rng.integers(8, 33)) if shape == "rectangle" else width
    return Scene(
        ground=tuple(int(value) for value in rng.integers(230, 256, 3)),  # type: ignore[arg-type]
        shape=shape,
        color=color,
        x=int(rng.integers(0, SIZE - width)),
        y=int(rng.integers(0, SIZE - height)),
        width=width,
        height=height,
    )


def draw_scene(scene: Scene) -> Image.Image:
    """Return the image, 96 × 96 pixels, enlarged from 64 × 64 as the built-in model's images are."""
    image = Image.new("RGB", (SIZE, SIZE), scene.ground)
    draw, fill = ImageDraw.Draw(image), COLORS[scene.color]
    left, top, right, bottom = scene.x, scene.y, scene.x + scene.width, scene.y + scene.height
    if scene.shape == "circle":
        draw.ellipse((left, top, right, bottom), fill=fill)
    elif scene.shape == "rectangle":
        draw.rectangle((left, top, right, bottom), fill=fill)
    else:
        low = top + 0.9 * scene.height
        draw.polygon([((left + right) / 2, top), (right, low), (left, low)], fill=fill)
    return image.resize((ENLARGED, ENLARGED), Image.Resampling.BICUBIC)


@dataclass(frozen=True, kw_only=True)
class SceneImage:
    """An image that is drawn when it is asked for."""

    number: int

    @property
    def name(self) -> str:
        """What users call it."""
        return f"scene {self.number}"

    def read(self) -> bytes:
        """Return it as PNG."""
        out = BytesIO()
        draw_scene(make_scene(self.number)).save(out, "PNG")
        return out.getvalue()


def make_dataset(first: int, n: int) -> Dataset:
    """Return the scenes with numbers from `first` on, each with one question and its answer."""
    samples = tuple(_sample(number) for number in range(first, first + n))
    return Dataset(samples=samples, format="scenes", source=PLACE, fingerprint=f"scenes-2-{first}-{n}")


def _sample(number: int) -> Sample:
    scene = make_scene(number)
    question, answer = _ask(scene, np.random.default_rng([number, 0xA5C]))
    return Sample(
        id=f"scene/{number:06}",
        image=SceneImage(number=number),
        turns=(Turn(role="user", text=f"{IMAGE_SLOT}\n{question}"),),
        answer=answer,
        columns={"shape": scene.shape, "color": scene.color},
    )


def _ask(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    """Return a question: a third ask where the shape is, a third to name something, a third whether it is there."""
    kind = rng.integers(3)
    if kind == 0:
        return "where is the shape in the image?", _side(scene)
    if kind == 1:
        if rng.random() < 0.5:
            return "what shape is in the image?", scene.shape
        return f"what color is the {scene.shape}?", scene.color
    about_shape, truth = bool(rng.random() < 0.5), bool(rng.random() < 0.5)
    own, others = (scene.shape, SHAPES) if about_shape else (scene.color, tuple(COLORS))
    wrong = [value for value in others if value != own]
    named = own if truth else wrong[int(rng.integers(len(wrong)))]
    thing = f"a {named}" if about_shape else f"a {named} shape"
    return f"is there {thing} in the image?", "yes" if truth else "no"


def _side(scene: Scene) -> str:
    """Return the side of the image that the shape is nearest to, by its middle."""
    right, down = 2 * scene.x + scene.width - SIZE, 2 * scene.y + scene.height - SIZE
    if abs(right) >= abs(down):
        return "right" if right > 0 else "left"
    return "bottom" if down > 0 else "top"
