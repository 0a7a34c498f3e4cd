"""Greedy answers to prompts of mixed length, in batches that waste little padding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from transformers import GenerationConfig, PreTrainedTokenizerBase

from .prefill import can_prefill_apart, groups_of, prefill


def make_batches(prompts: Sequence[list[int]], limits: Sequence[int], batch_size: int) -> list[list[int]]:
    """Group prompts that are generated together, the largest batch first so that a lack of memory shows at once.

    No batch has more tokens, padding and answers included, than `batch_size` of the longest prompts with their
    answers: shorter prompts share a batch with more others. Which prompts share one depends on nothing but these
    arguments: a restart pads as the first run did.

    Args:
        prompts: Token ids of each prompt.
        limits: Longest answer of each; a batch holds prompts of one limit.
        batch_size: Prompts of the greatest length in a batch.

    Returns:
        Indices of the prompts of each batch.
    """
    # A step's logits are as large for a short prompt as for a long one, so very short ones do not come by the hundred.
    tokens = [max(128, len(prompt) + limit) for prompt, limit in zip(prompts, limits, strict=True)]
    budget = batch_size * max(tokens)
    batches: list[list[int]] = []
    for index in sorted(range(len(prompts)), key=lambda index: (limits[index], -tokens[index], index)):
        first = batches[-1][0] if batches else index
        if not batches or limits[first] != limits[index] or tokens[first] * (len(batches[-1]) + 1) > budget:
            batches.append([])
        batches[-1].append(index)
    return sorted(batches, key=lambda batch: (-tokens[batch[0]] * len(batch), batch))


def generate_answers(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    ends: Sequence[int] = (),
) -> list[str]:
    """Return the greedy answers to one batch of prompts, without special tokens.

    An answer ends at an end-of-text token of the model or its tokenizer, or at one of `ends`. Prompts are read apart,
    where the model allows it, and answered together.

    Args:
        model: A causal language model, on its device and in inference mode.
        tokenizer: Its tokenizer.
        prompts: Token ids of each prompt; shorter ones are padded on the left.
        max_new_tokens: Longest answer in tokens.
        ends: Further tokens that end an answer.
    """
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    settings = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=_stop_tokens(model, tokenizer, ends),
        pad_token_id=padding,
    )
    width = max(len(prompt) for prompt in prompts)
    ids = [[padding] * (width - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    with torch.inference_mode(), _plain_settings(model):
        apart = len(prompts) > 1 and can_prefill_apart(model)
        output = model.generate(
            input_ids=torch.tensor(ids, device=model.device),
            attention_mask=torch.tensor(mask, device=model.device),
            past_key_values=prefill(model, prompts, groups_of(prompts, model.device)) if apart else None,
            generation_config=settings,
        )
    return tokenizer.batch_decode(output[:, width:], skip_special_tokens=True)


@contextmanager
def _plain_settings(model: Any) -> Iterator[None]:
    """Within it a model has none of the settings that it was published with.

    transformers fills what a call leaves open from them: a repetition penalty would hit the very keys that an answer
    has to copy, and beams are not greedy.
    """
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    own, inner.generation_config = inner.generation_config, GenerationConfig()
    try:
        yield
    finally:
        inner.generation_config = own


def _stop_tokens(model: Any, tokenizer: PreTrainedTokenizerBase, ends: Sequence[int]) -> list[int] | None:
    own = model.generation_config.eos_token_id
    tokens = {*([own] if isinstance(own, int) else own or []), tokenizer.eos_token_id, *ends} - {None}
    return sorted(tokens) or None
