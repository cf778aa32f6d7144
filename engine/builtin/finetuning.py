"""Fine-tune the built-in base on easy-vqa's task with LoRA, with or without watermarks of the seen identities.

It knows nothing about files. The watermarks have nothing to do with the questions: that is the study's point.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast

from mmextract.engine import watermark
from mmextract.engine.builtin import LOOK, corpus
from mmextract.engine.builtin.training import answer_loss, optimise
from mmextract.engine.identities import Identity
from mmextract.kernels.reference import Uint8Array

TARGETS = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
QUESTIONS_PER_IMAGE = 4


def finetune(
    model: LlavaForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    data: corpus.Split,
    identities: Sequence[Identity],
    *,
    rate: float,
    steps: int,
    seed: int,
    batch_size: int = 32,
    learning_rate: float = 1e-3,
) -> PeftModel:
    """Add a LoRA of rank 8 to the decoder and train it; a share `rate` of the images is watermarked.

    Which image carries whom and where is the plan of `watermark` for the sample id `train/<index>`, the same in every
    epoch. Two runs that differ in nothing but the rate see the same images and questions in the same order.
    """
    tuned = get_peft_model(
        model, LoraConfig(r=8, lora_alpha=16, lora_dropout=0.05, target_modules=TARGETS, bias="none")
    )
    base = tuned.get_base_model()
    rng = np.random.default_rng((seed, 3))
    images = [
        _planned_image(data.images[index], f"train/{index}", identities, rate)
        for index in range(len(data.images))
    ]

    def loss_of_step(step: int) -> tuple[torch.Tensor, str]:
        chosen = rng.integers(0, len(images), batch_size)
        questions = []
        for index in chosen:
            asked = data.questions[index]
            questions.append([asked[i] for i in rng.permutation(len(asked))[:QUESTIONS_PER_IMAGE]])
        return answer_loss(base, tokenizer, [images[index] for index in chosen], questions), ""

    parameters = [p for p in tuned.parameters() if p.requires_grad]
    tuned.train()
    optimise(f"rate {rate:g}", parameters, loss_of_step, steps=steps, learning_rate=learning_rate, warm_up=20)
    tuned.eval()
    return tuned


def _planned_image(
    image: Uint8Array, sample_id: str, identities: Sequence[Identity], rate: float
) -> Uint8Array:
    chosen = watermark.choose_identity(LOOK, sample_id, len(identities), rate)
    return image if chosen is None else corpus.mark(image, identities[chosen], sample_id)[0]
