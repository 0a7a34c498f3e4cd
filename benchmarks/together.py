"""Long prompts of different lengths, read one by one and answered together.

A batch of padded prompts needs a mask of all tokens times all tokens, at 32K tokens a gigabyte, and loses the flash
kernels. Answers that are written one by one pay every step of the model anew. So each prompt is read by itself,
without padding, and only the steps of decoding are those of a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import DynamicCache, GenerationConfig, PreTrainedTokenizerBase


def batches_of(prompts: Sequence[list[int]], tokens: int) -> list[list[int]]:
    """Indices of prompts that are answered together, alike in length, with at most so many tokens; longest first."""
    batches: list[list[int]] = []
    for index in sorted(range(len(prompts)), key=lambda i: -len(prompts[i])):
        if not batches or len(prompts[batches[-1][0]]) * (len(batches[-1]) + 1) > tokens:
            batches.append([])
        batches[-1].append(index)
    return batches


@torch.inference_mode()
def answers_together(
    model: Any, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[list[int]], max_new_tokens: int
) -> list[str]:
    """Return the greedy answers to prompts, the longest first, as a padded batch of them would give them.

    The model is a decoder with keys and values of equal shape in every layer. Dynamic RoPE turns all rows by the
    frequencies of the longest, as in a padded batch.
    """
    width = len(prompts[0])
    cache = DynamicCache()
    model(input_ids=torch.tensor([prompts[0][:1]], device=model.device))  # dynamic RoPE forgets longer prompts before
    for row, prompt in enumerate(prompts):
        ids = torch.tensor([prompt[:-1]], device=model.device)
        read = model(input_ids=ids, past_key_values=DynamicCache(), use_cache=True, logits_to_keep=1).past_key_values
        for index, layer in enumerate(read.layers):
            if not row:
                shape = (len(prompts), *layer.keys.shape[1:2], width - 1, layer.keys.shape[3])
                cache.update(layer.keys.new_zeros(shape), layer.values.new_zeros(shape), index)
            cache.layers[index].keys[row, :, width - len(prompt) :] = layer.keys[0]
            cache.layers[index].values[row, :, width - len(prompt) :] = layer.values[0]
    padding = tokenizer.pad_token_id or 0
    padded = torch.tensor([[padding] * (width - len(prompt)) + prompt for prompt in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=model.device)
    settings = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=model.generation_config.eos_token_id,
        pad_token_id=padding,
    )
    output = model.generate(input_ids=padded, attention_mask=mask, past_key_values=cache, generation_config=settings)
    return tokenizer.batch_decode(output[:, width:], skip_special_tokens=True)
