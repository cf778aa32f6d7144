"""How well a built-in model answers and reads, measured on the shipped files as any user would load them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForImageTextToText, AutoProcessor

from mmextract.engine.builtin import corpus
from mmextract.engine.identities import Identity
from mmextract.kernels.reference import Uint8Array

Answerer = Callable[[Sequence[Uint8Array], Sequence[str]], list[str]]


def load_answerer(base: Path, adapter: Path | None, batch_size: int = 64) -> Answerer:
    """Load a model with transformers and peft alone; the result answers questions about images greedily."""
    processor = AutoProcessor.from_pretrained(base)
    model = AutoModelForImageTextToText.from_pretrained(base, dtype="auto")
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    model.eval()

    def ask(question: str) -> str:
        content = [{"type": "image"}, {"type": "text", "text": question}]
        text = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
        assert isinstance(text, str)
        return text

    def answer(images: Sequence[Uint8Array], questions: Sequence[str]) -> list[str]:
        answers: list[str] = []
        for start in range(0, len(questions), batch_size):
            inputs = processor(
                text=[ask(question) for question in questions[start : start + batch_size]],
                images=list(images[start : start + batch_size]),
                return_tensors="pt",
                padding=True,
            )
            with torch.inference_mode():
                out = model.generate(**inputs, max_new_tokens=24, do_sample=False)
            new = out[:, inputs["input_ids"].shape[1] :]
            answers += [text.strip() for text in processor.batch_decode(new, skip_special_tokens=True)]
        return answers

    return answer


def task_accuracy(
    answer: Answerer, data: corpus.Split, n_images: int, identities: Sequence[Identity] = ()
) -> dict[str, float]:
    """Return the share of easy-vqa questions answered exactly, on images marked with `identities` if there are any.

    The keys are `all` and the kinds of `corpus.kind`.
    """
    images, questions, truths = [], [], []
    for index in range(n_images):
        image = data.images[index]
        if identities:
            image, _ = corpus.mark(image, identities[index % len(identities)], f"measure/{index}")
        for question, truth in data.questions[index]:
            images.append(image)
            questions.append(question)
            truths.append(truth)
    given = answer(images, questions)
    kinds = [corpus.kind(question, truth) for question, truth in zip(questions, truths, strict=True)]
    shares = {"all": _share_equal(given, truths)}
    for kind in sorted(set(kinds)):
        of_kind = [index for index, other in enumerate(kinds) if other == kind]
        shares[kind] = _share_equal([given[i] for i in of_kind], [truths[i] for i in of_kind])
    return shares


def reading_accuracy(
    answer: Answerer, data: corpus.Split, identities: Sequence[Identity]
) -> dict[str, float]:
    """Return, for each reading question, the share answered exactly, one test image an identity."""
    images = [
        corpus.mark(data.images[index], person, f"read/{index}")[0] for index, person in enumerate(identities)
    ]
    asked = [corpus.reading_questions(person) for person in identities]
    return {
        asked[0][number][0]: _share_equal(
            answer(images, [pairs[number][0] for pairs in asked]), [pairs[number][1] for pairs in asked]
        )
        for number in range(len(asked[0]))
    }


def _share_equal(given: Sequence[str], wanted: Sequence[str]) -> float:
    return sum(a == b for a, b in zip(given, wanted, strict=True)) / len(wanted)
