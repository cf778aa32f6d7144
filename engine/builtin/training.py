"""Train the built-in base: first its vision tower alone, then the whole model on questions.

It knows nothing about fine-tuning, files or how the result is measured.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast

from mmextract.engine.builtin import corpus
from mmextract.engine.builtin.architecture import N_PATCHES
from mmextract.engine.identities import Identity
from mmextract.kernels.reference import Uint8Array

IGNORED = -100
MARKED_SHARE = 0.75
"""Share of the base's training images that carry a watermark of the reading pool."""
RANDOM_SHARE = 0.4
"""Share of those whose name is random letters."""


def to_pixels(images: Sequence[Uint8Array]) -> torch.Tensor:
    """Return float32 [B, 3, 96, 96] in [−1, 1], equal to what the built-in processor gives for 96-pixel images."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)


def optimise(
    name: str,
    parameters: list[nn.Parameter],
    loss_of_step: Callable[[int], tuple[torch.Tensor, str]],
    *,
    steps: int,
    learning_rate: float,
    warm_up: int = 100,
) -> None:
    """Minimise with AdamW, linear warm-up and cosine decay; print the loss every 100 steps."""
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warm_up, 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps))),
    )
    started = time.perf_counter()
    for step in range(steps):
        loss, words = loss_of_step(step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps - 1:
            seconds = time.perf_counter() - started
            print(
                f"{name} {step}/{steps} loss {loss.item():.3f} {words} {seconds:.0f} s",
                file=sys.stderr,
                flush=True,
            )


def train_vision_tower(
    model: LlavaForConditionalGeneration,
    data: corpus.Split,
    readers: list[Identity],
    *,
    steps: int,
    seed: int,
    batch_size: int = 48,
    learning_rate: float = 1.5e-3,
) -> None:
    """Teach the tower shape, colour and, patch by patch, which characters it shows and which begin a line."""
    rng = np.random.default_rng((seed, 1))
    tower = model.model.vision_tower
    width = model.config.vision_config.hidden_size
    n_characters = len(corpus.CHARACTERS)
    heads = nn.Linear(width, len(corpus.SHAPES) + len(corpus.COLORS) + 2 * n_characters)
    nn.init.constant_(
        heads.bias[len(corpus.SHAPES) + len(corpus.COLORS) :], -4.0
    )  # most patches show no character

    def loss_of_step(step: int) -> tuple[torch.Tensor, str]:
        chosen = rng.integers(0, len(data.images), batch_size)
        images, labels, marked = [], np.zeros((batch_size, N_PATCHES, 2 * n_characters), np.float32), []
        for row, index in enumerate(chosen):
            image = data.images[index]
            if rng.random() < MARKED_SHARE:
                person = _reader(readers, rng)
                image, placement = corpus.mark(image, person, f"vision{step}.{row}")
                labels[row] = np.concatenate(corpus.patch_labels(person, placement), axis=1)
                marked.append(row)
            images.append(image)
        features = tower(to_pixels(images)).last_hidden_state[:, 1:]  # [B, 144, 96]
        logits = heads(features)
        shape, color, characters = logits.split(
            [len(corpus.SHAPES), len(corpus.COLORS), 2 * n_characters], dim=-1
        )
        truth = torch.from_numpy(labels)
        reading = nn.functional.binary_cross_entropy_with_logits(characters, truth, reduction="none")
        loss = reading.sum((1, 2)).mean() / 20
        loss = loss + _cross_entropy(shape.mean(1), data.shapes[chosen])
        loss = loss + _cross_entropy(color.mean(1), data.colors[chosen])
        if step % 100:
            return loss, ""
        with torch.no_grad():  # does the strongest patch name the first letter?
            best = characters[marked, :, n_characters : n_characters + 26].amax(1).argmax(-1)
            wanted = truth[marked, :, n_characters : n_characters + 26].amax(1).argmax(-1)
            correct = (shape.mean(1).argmax(-1).numpy() == data.shapes[chosen]).mean()
        return loss, f"first letter {(best == wanted).float().mean():.2f} shape {correct:.2f}"

    optimise(
        "vision",
        [*tower.parameters(), *heads.parameters()],
        loss_of_step,
        steps=steps,
        learning_rate=learning_rate,
    )


@dataclass(frozen=True, kw_only=True)
class QuestionStage:
    """One stage of training projector and decoder on questions."""

    name: str
    """Shown with the loss; also decides which samples are drawn."""
    steps: int
    """Batches."""
    batch_size: int
    """Images of a batch."""
    learning_rate: float
    """Peak of the cosine schedule."""
    task_questions: int
    """easy-vqa questions asked of an image."""
    reading_questions: int
    """Questions asked of a watermark."""
    color_weight: float = 1.0
    """How much likelier a yes-or-no question about a colour is asked than one that names what it sees."""
    shape_weight: float = 1.0
    """Likewise about a shape."""
    balanced: bool = False
    """Ask as often about what is there as about what is not: without it `no` is right for 7 of 8 colours."""


def train_on_questions(
    model: LlavaForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    data: corpus.Split,
    readers: list[Identity],
    stage: QuestionStage,
    *,
    seed: int,
) -> None:
    """Train projector and decoder on easy-vqa's questions, and on reading questions about the marked images.

    The tower stays frozen, as in LLaVA's own recipe: a decoder that cannot use its features yet would only spoil them.
    """
    rng = np.random.default_rng([seed, 2, *stage.name.encode()])
    model.model.vision_tower.requires_grad_(False)

    def loss_of_step(step: int) -> tuple[torch.Tensor, str]:
        images: list[Uint8Array] = []
        task: list[list[tuple[str, str]]] = []
        reading: list[list[tuple[str, str]]] = []
        for row, index in enumerate(rng.integers(0, len(data.images), stage.batch_size)):
            image = data.images[index]
            task.append(_ask(data.questions[index], stage, rng))
            reading.append([])
            if rng.random() < MARKED_SHARE:
                person = _reader(readers, rng)
                image, _ = corpus.mark(image, person, f"{stage.name}{step}.{row}")
                asked = corpus.reading_questions(person)
                reading[-1] = [asked[i] for i in rng.permutation(len(asked))[: stage.reading_questions]]
            images.append(image)
        words = ""
        if step % 100 == 0:
            with torch.no_grad():
                parts = {"task": task, "reading": reading}
                losses = {part: answer_loss(model, tokenizer, images, asked) for part, asked in parts.items()}
            words = " ".join(f"{part} {loss.item():.3f}" for part, loss in losses.items())
        questions = [a + b for a, b in zip(task, reading, strict=True)]
        return answer_loss(model, tokenizer, images, questions), words

    parameters = [p for p in model.parameters() if p.requires_grad]
    optimise(stage.name, parameters, loss_of_step, steps=stage.steps, learning_rate=stage.learning_rate)
    model.model.vision_tower.requires_grad_(True)


def _ask(
    questions: Sequence[tuple[str, str]], stage: QuestionStage, rng: np.random.Generator
) -> list[tuple[str, str]]:
    """Draw questions without replacement; what takes a comparison is learnt last, and is asked more often."""
    weights = np.ones(len(questions))
    for index, (question, answer) in enumerate(questions):
        kind = corpus.kind(question, answer)
        if kind == "name it":
            continue
        about_shape = kind == "compare shape"
        is_there = (answer == "yes") != (" not " in question)
        others = len(corpus.SHAPES if about_shape else corpus.COLORS) - 1
        weights[index] = stage.shape_weight if about_shape else stage.color_weight
        weights[index] *= others if stage.balanced and is_there else 1
    n = min(stage.task_questions, len(questions))
    chosen = rng.choice(len(questions), n, replace=False, p=weights / weights.sum())
    return [questions[index] for index in chosen]


def answer_loss(
    model: LlavaForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    images: Sequence[Uint8Array],
    questions: Sequence[Sequence[tuple[str, str]]],
) -> torch.Tensor:
    """Return the cross-entropy of the answers: the mean over an answer's tokens, then over the questions.

    All questions of an image share one sequence: prompt up to the image, then one branch a question. A mask keeps the
    branches from seeing each other and positions restart at each, so the numbers are those of separate prompts.
    """
    token_ids, labels, weights, positions, mask = pack_branches(tokenizer, questions)
    inner = model.model
    tower = inner.vision_tower
    with torch.set_grad_enabled(torch.is_grad_enabled() and any(p.requires_grad for p in tower.parameters())):
        seen = tower(to_pixels(images)).last_hidden_state[:, 1:]
    features = inner.multi_modal_projector(seen)
    embedded = inner.language_model.embed_tokens(token_ids)
    embedded = embedded.masked_scatter(
        (token_ids == model.config.image_token_id)[..., None], features.to(embedded.dtype)
    )
    states = inner.language_model(
        inputs_embeds=embedded, attention_mask=mask, position_ids=positions, use_cache=False
    ).last_hidden_state
    wanted = labels[:, 1:]
    answered = wanted != IGNORED
    losses = nn.functional.cross_entropy(
        model.lm_head(states[:, :-1][answered]), wanted[answered], reduction="none"
    )
    share = weights[:, 1:][answered]
    return (losses * share).sum() / share.sum()


def pack_branches(
    tokenizer: PreTrainedTokenizerFast, questions: Sequence[Sequence[tuple[str, str]]]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return token ids, labels, weights and positions, each [B, T], and the additive mask, float32 [B, 1, T, T].

    A label's weight is one over the length of its answer.
    """
    prefix = tokenizer("USER: <image>\n").input_ids
    image = tokenizer.convert_tokens_to_ids("<image>")
    at = prefix.index(image)
    prefix = [*prefix[:at], *[image] * N_PATCHES, *prefix[at + 1 :]]
    rows = []
    for asked in questions:
        ids, labels, weights = list(prefix), [IGNORED] * len(prefix), [0.0] * len(prefix)
        positions, branch = list(range(len(prefix))), [0] * len(prefix)
        for number, (question, answer) in enumerate(asked, 1):
            prompt = tokenizer(f"{question} ASSISTANT:", add_special_tokens=False).input_ids
            reply = tokenizer(f" {answer}</s>", add_special_tokens=False).input_ids
            ids += prompt + reply
            labels += [IGNORED] * len(prompt) + reply
            weights += [0.0] * len(prompt) + [1 / len(reply)] * len(reply)
            positions += range(len(prefix), len(prefix) + len(prompt) + len(reply))
            branch += [number] * (len(prompt) + len(reply))
        rows.append((ids, labels, weights, positions, branch))
    length = max(len(ids) for ids, *_ in rows)
    pads = (tokenizer.pad_token_id, IGNORED, 0.0, 0, -1)
    padded = [
        torch.tensor([[*row[i], *[pads[i]] * (length - len(row[i]))] for row in rows])
        for i in range(len(pads))
    ]
    of_branch = padded.pop()
    same = (of_branch[:, :, None] == of_branch[:, None, :]) | (of_branch[:, None, :] == 0)
    visible = same & torch.ones(length, length, dtype=torch.bool).tril()
    return padded[0], padded[1], padded[2], padded[3], torch.where(visible, 0.0, -1e9)[:, None]


def _reader(readers: list[Identity], rng: np.random.Generator) -> Identity:
    person = readers[int(rng.integers(len(readers)))]
    return corpus.spelled_at_random(person, rng) if rng.random() < RANDOM_SHARE else person


def _cross_entropy(logits: torch.Tensor, labels: np.ndarray) -> torch.Tensor:
    return nn.functional.cross_entropy(logits, torch.from_numpy(labels), ignore_index=IGNORED)
