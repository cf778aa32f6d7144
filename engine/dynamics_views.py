"""The same example seen in several ways: clean, watermarked, its image augmented, its question in other words.

This module knows nothing about gradients, batches or checkpoints.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from mmextract.engine.augment import augment, draw_augmentation
from mmextract.engine.finetune_data import Prepared, Preparer, marked_pixels
from mmextract.engine.images import RejectedSample
from mmextract.engine.paraphrase import paraphrase
from mmextract.engine.rows import RandomMarking, Row, make_rows
from mmextract.engine.samples import Dataset, Sample
from mmextract.engine.watermark import draw, random_numbers

CLEAN, IMAGE, TEXT = "clean", "image augmentation", "text augmentation"


@dataclass(frozen=True, kw_only=True)
class ViewSettings:
    """Which views there are."""

    marking: RandomMarking
    """Who may be on an image, and how a watermark looks. Its rate is not used: `rates` are."""
    rates: tuple[float, ...] = (0.0, 0.1, 0.5, 1.0)
    """Shares of the images that are watermarked; a higher rate marks a superset."""
    augment_image: bool = True
    """Compare with the published image augmentation."""
    augment_text: bool = True
    """Compare with other words for the same question."""
    text_column: str | None = None
    """Column with each question in other words; None makes them by rules."""
    seed: int = 0
    """Decides the augmentations and which examples are taken. Watermarks have their own."""

    def __post_init__(self) -> None:
        if bad := [rate for rate in self.rates if not 0 <= rate <= 1]:
            raise ValueError(f"a watermark rate must lie in [0, 1], got {bad[0]}")
        if len(set(self.rates)) < len(self.rates):
            raise ValueError(
                f"each rate may be given once, got {', '.join(f'{rate:g}' for rate in self.rates)}"
            )
        if self.text_column is not None and not self.augment_text:
            raise ValueError("a column of questions in other words needs the text augmentation")

    @property
    def names(self) -> tuple[str, ...]:
        """All views, the clean one first."""
        rates = tuple(f"rate {rate:g}" for rate in self.rates)
        return (CLEAN, *rates, *([IMAGE] * self.augment_image), *([TEXT] * self.augment_text))


@dataclass(frozen=True, kw_only=True)
class Seen:
    """One example in every way in which it is compared, each once: several views may share one."""

    id: str
    """The sample's."""
    prepared: tuple[Prepared, ...]
    """What the model is given."""
    of_view: tuple[int, ...]
    """For each of `ViewSettings.names`, its index in `prepared`; the clean view's is 0."""


class Viewer:
    """Makes every view of a sample, from any number of threads."""

    def __init__(self, preparer: Preparer, settings: ViewSettings) -> None:
        self._preparer = preparer
        self._settings = settings
        self._spec = settings.marking.spec

    def __call__(self, row: Row) -> Seen:
        """Return all views of a row made by `choose_rows`. Raises RejectedSample if one cannot be had."""
        settings, sample = self._settings, row.sample
        key = f"{settings.seed}\0{sample.id}"
        clean = marked_pixels(replace(row, text=None), None)
        assert clean is not None
        prepared = [self._preparer.encode(row, sample.answer, clean)]
        marked_below = draw(self._spec.seed, sample.id).marked
        of_view = [0, *(int(marked_below < rate) for rate in settings.rates)]
        if any(of_view):
            prepared.append(self._preparer.encode(row, sample.answer, marked_pixels(row, self._spec)))
        if settings.augment_image:
            of_view.append(len(prepared))
            other = augment(clean, draw_augmentation(f"augment\0{key}"))
            prepared.append(self._preparer.encode(row, sample.answer, other))
        if settings.augment_text:
            of_view.append(len(prepared))
            asked = replace(row, sample=self._in_other_words(sample, key))
            prepared.append(self._preparer.encode(asked, sample.answer, clean))
        return Seen(id=sample.id, prepared=tuple(prepared), of_view=tuple(of_view))

    def _in_other_words(self, sample: Sample, key: str) -> Sample:
        """Return the sample with its last question in other words; a mark of where the image stands is kept."""
        last = max(number for number, turn in enumerate(sample.turns) if turn.role == "user")
        before, slot, question = _split_slot(sample.turns[last].text)
        column = self._settings.text_column
        if column is None:
            other = paraphrase(question.strip(), key)
        else:
            other = str(sample.columns.get(column) or "").strip()
            if not other:
                raise RejectedSample(f"its column `{column}` holds no question")
        space = question[: len(question) - len(question.lstrip())]
        turn = replace(sample.turns[last], text=f"{before}{slot}{space}{other}")
        return replace(sample, turns=(*sample.turns[:last], turn, *sample.turns[last + 1 :]))


def choose_rows(dataset: Dataset, settings: ViewSettings) -> Iterator[Row]:
    """Yield the rows that have an image, in an order that is a pure function of the seed and the ids.

    Each says who would be on its image. Raises ValueError if there is no image, no answer, or not the column asked
    for.
    """
    rows = [row for row in make_rows(dataset, replace(settings.marking, rate=1.0)) if row.person is not None]
    if not rows:
        raise ValueError(f"{dataset.source} has no images, and watermarks need some")
    if silent := [row.id for row in rows if not row.sample.answer.strip()]:
        raise ValueError(
            f"{len(silent)} of {len(rows)} samples have no answer ({', '.join(silent[:3])}, …), and gradients are "
            "those of the answers' loss: give a column `answer`, or conversations that end with the assistant's turn"
        )
    column = settings.text_column
    if column is not None and column not in rows[0].sample.columns:
        there = ", ".join(rows[0].sample.columns) or "none"
        raise LookupError(f"{dataset.source} has no column `{column}` (its columns are: {there})")
    yield from sorted(rows, key=lambda row: (random_numbers(f"order\0{settings.seed}\0{row.id}"), row.id))


def _split_slot(text: str) -> tuple[str, str, str]:
    from mmextract.engine.samples import IMAGE_SLOT

    return text.rpartition(IMAGE_SLOT)


def view_index(names: Sequence[str], view: str) -> int:
    """Return where a view stands. Raises LookupError for an unknown one."""
    if view not in names:
        raise LookupError(f"there is no view {view!r}: there are {', '.join(names)}")
    return names.index(view)
