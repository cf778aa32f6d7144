"""What a model answers, and how likely it finds given answers.

Answers are generated greedily, in batches of prompts of one length, so that nothing is padded. Likelihoods share the
prompt: it goes through the model once, and its keys and values serve every answer. This module knows nothing about
tasks or scores.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from mmextract.engine.finetune_data import (
    Preparer,
    collate,
    marked_pixels,
    takes_logits_to_keep,
    token_losses,
)
from mmextract.engine.finetune_rows import Example
from mmextract.engine.images import RejectedSample
from mmextract.engine.models import Adapter, Encoded
from mmextract.engine.pipeline import in_order
from mmextract.engine.rows import Row
from mmextract.engine.samples import Turn
from mmextract.engine.watermark import WatermarkSpec


@dataclass(frozen=True, kw_only=True)
class Likelihood:
    """How likely a model finds one answer, the token that ends it included."""

    log_probability: float
    """Natural logarithm, summed over tokens."""
    n_tokens: int

    @property
    def mean(self) -> float:
        """Mean log-probability of a token: the negative of the loss."""
        return self.log_probability / self.n_tokens


class Answerer:
    """Asks one model. Its methods are called from one thread."""

    def __init__(self, adapter: Adapter, *, batch_size: int = 16, threads: int = 2) -> None:
        if batch_size < 1 or threads < 1:
            raise ValueError(f"batch size and threads must be at least 1, got {batch_size} and {threads}")
        self.adapter = adapter
        self.batch_size = batch_size
        self.threads = threads
        self._tokenize = lru_cache(maxsize=1 << 14)(lambda text: tuple(adapter.tokenize(text)))

    def generate(
        self,
        rows: Sequence[Row],
        spec: WatermarkSpec | None,
        *,
        max_new_tokens: int = 32,
        on_progress: Callable[[int], None] = lambda n_rows: None,
    ) -> list[str | RejectedSample]:
        """Return the greedy answer to each row's question, stripped, or why it cannot be asked."""
        answers: list[str | RejectedSample] = [RejectedSample("it was not asked")] * len(rows)
        buckets: dict[Any, list[tuple[int, Encoded]]] = {}

        def ask(bucket: list[tuple[int, Encoded]]) -> None:
            texts = self._generate([encoded for _, encoded in bucket], max_new_tokens)
            for (place, _), text in zip(bucket, texts, strict=True):
                answers[place] = text
            on_progress(len(bucket))

        for place, encoded in enumerate(self.encoded(rows, spec)):
            if isinstance(encoded, RejectedSample):
                answers[place] = encoded
                on_progress(1)
                continue
            bucket = buckets.setdefault(encoded.batch_key, [])
            bucket.append((place, encoded))
            if len(bucket) == self.batch_size:
                ask(buckets.pop(encoded.batch_key))
        for bucket in buckets.values():
            ask(bucket)
        return answers

    def encoded(self, rows: Sequence[Row], spec: WatermarkSpec | None) -> Iterator[Encoded | RejectedSample]:
        """Yield the rows' prompts as the model takes them, in order, made in threads."""

        def encode(row: Row) -> Encoded | RejectedSample:
            try:
                return self.adapter.encode(self.adapter.render(row.sample.turns), marked_pixels(row, spec))
            except RejectedSample as refusal:
                return refusal

        window = max(2 * self.batch_size, 4 * self.threads)
        with ThreadPoolExecutor(self.threads, "mmextract-encode") as executor:
            yield from in_order(executor, encode, iter(rows), window)

    def _generate(self, batch: Sequence[Encoded], max_new_tokens: int) -> list[str]:
        inputs = self._moved(self.adapter.collate(batch))
        tokenizer = self.adapter.tokenizer
        with torch.inference_mode():
            out = self.adapter.model.generate(
                **inputs,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                eos_token_id=self.stop_tokens,
                pad_token_id=self.stop_tokens[0]
                if tokenizer.pad_token_id is None
                else tokenizer.pad_token_id,
            )
        texts = tokenizer.batch_decode(out[:, batch[0].n_tokens :], skip_special_tokens=True)
        return [text.strip() for text in texts]

    @property
    def stop_tokens(self) -> list[int]:
        """The tokens that end an answer: the model's own, and what its chat template writes there."""
        own = self.adapter.model.generation_config.eos_token_id
        tokens = [] if own is None else [own] if isinstance(own, int) else list(own)
        ending = self._tokenize(self.adapter.answered([Turn(role="user", text="Yes?")], "yes").text)[-1]
        return list(dict.fromkeys([*tokens, ending]))

    def likelihoods(
        self, row: Row, spec: WatermarkSpec | None, encoded: Encoded, answers: Sequence[str]
    ) -> list[Likelihood]:
        """Return how likely each answer to a row's question is.

        encoded: the row's prompt, of `encoded`. Raises RejectedSample for an answer that the template cannot write.
        """
        prompt = self._tokenize(self.adapter.render(row.sample.turns))
        endings = [self._tokenize(self.adapter.answered(row.sample.turns, a).text) for a in answers]
        if all(ending[: len(prompt)] == prompt for ending in endings):
            return self._from_shared_prompt(encoded, [ending[len(prompt) :] for ending in endings])
        return self.likelihoods_one_by_one(row, spec, answers)  # a token crosses from prompt to answer

    def likelihoods_one_by_one(
        self, row: Row, spec: WatermarkSpec | None, answers: Sequence[str]
    ) -> list[Likelihood]:
        """Do as `likelihoods` does, with the whole conversation through the model for every answer."""
        preparer = Preparer(self.adapter, spec, 1 << 30)
        results: list[Likelihood] = []
        for answer in answers:
            prepared = preparer(Example(row=row, answer=answer))
            with torch.inference_mode():
                losses, _ = token_losses(self.adapter.model, collate([prepared], 0), self.adapter.device)
            results.append(
                Likelihood(log_probability=-float(losses.sum()), n_tokens=prepared.n_answer_tokens)
            )
        return results

    def _from_shared_prompt(self, encoded: Encoded, endings: Sequence[Sequence[int]]) -> list[Likelihood]:
        model, device = self.adapter.model, self.adapter.device
        keeps = {"logits_to_keep": 1} if takes_logits_to_keep(model) else {}
        with torch.inference_mode():
            prompt = model(**self._moved(self.adapter.collate([encoded])), use_cache=True, **keeps)
            first = prompt.logits[0, -1].float().log_softmax(-1)  # [V]
            results = [float(first[ending[0]]) for ending in endings]
            longer = [place for place, ending in enumerate(endings) if len(ending) > 1]
            for start in range(0, len(longer), self.batch_size):
                places = longer[start : start + self.batch_size]
                chosen = [torch.tensor(endings[place], device=device) for place in places]
                rest = self._rest(prompt.past_key_values, chosen)
                for place, value in zip(places, rest.tolist(), strict=True):
                    results[place] += value
        return [
            Likelihood(log_probability=value, n_tokens=len(ending))
            for value, ending in zip(results, endings, strict=True)
        ]

    def _rest(self, past: Any, endings: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return [n]: the log-probability of all tokens but the first of each ending, given the prompt's cache.

        Endings are padded behind their last token, where no token that counts can see it.
        """
        ids = nn.utils.rnn.pad_sequence(list(endings), batch_first=True, padding_value=0)
        cache = copy.deepcopy(past)
        cache.batch_repeat_interleave(len(endings))
        logits = self.adapter.model(input_ids=ids[:, :-1], past_key_values=cache, use_cache=True).logits
        lengths = torch.tensor([len(ending) for ending in endings], device=ids.device)
        wanted = ids[:, 1:].masked_fill(
            torch.arange(1, ids.shape[1], device=ids.device)[None] >= lengths[:, None], -100
        )
        losses = nn.functional.cross_entropy(
            logits.float().flatten(0, 1), wanted.flatten(), ignore_index=-100, reduction="none"
        )
        return -losses.view(wanted.shape).sum(1)

    def _moved(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        dtype = self.adapter.dtype
        return {
            name: tensor.to(self.adapter.device, dtype if tensor.is_floating_point() else None)
            for name, tensor in inputs.items()
        }
