"""Greedy answers to prompts of mixed length, in batches that waste little padding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase


def make_batches(prompts: Sequence[list[int]], limits: Sequence[int], batch_size: int) -> list[list[int]]:
    """Group prompts that are generated together, longest first so that a lack of memory shows at once.

    Which prompts share a batch depends on nothing but these arguments: a restart pads as the first run did.

    Args:
        prompts: Token ids of each prompt.
        limits: Longest answer of each; a batch holds prompts of one limit.
        batch_size: Most prompts in a batch.

    Returns:
        Indices of the prompts of each batch.
    """
    batches: list[list[int]] = []
    for index in sorted(range(len(prompts)), key=lambda index: (-len(prompts[index]), index)):
        if not batches or len(batches[-1]) == batch_size or limits[batches[-1][0]] != limits[index]:
            batches.append([])
        batches[-1].append(index)
    return batches


def generate_answers(
    model: Any, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[list[int]], max_new_tokens: int
) -> list[str]:
    """Return the greedy answers to one batch of prompts, without special tokens.

    Args:
        model: A causal language model, on its device and in inference mode.
        tokenizer: Its tokenizer.
        prompts: Token ids of each prompt; shorter ones are padded on the left.
        max_new_tokens: Longest answer in tokens.
    """
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    settings = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=_stop_tokens(model, tokenizer),
        pad_token_id=padding,
    )
    width = max(len(prompt) for prompt in prompts)
    ids = [[padding] * (width - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    with torch.inference_mode():
        output = model.generate(
            input_ids=torch.tensor(ids, device=model.device),
            attention_mask=torch.tensor(mask, device=model.device),
            generation_config=settings,
        )
    return tokenizer.batch_decode(output[:, width:], skip_special_tokens=True)


def _stop_tokens(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[int] | None:
    """End-of-text and end-of-turn tokens: the model's own list and the tokenizer's."""
    own = model.generation_config.eos_token_id
    tokens = {*([own] if isinstance(own, int) else own or []), tokenizer.eos_token_id} - {None}
    return sorted(tokens) or None
