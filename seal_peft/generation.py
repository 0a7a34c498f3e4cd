"""Greedy answers to prompts of mixed length, in batches that waste little padding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedTokenizerBase


def generate_answers(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    batch_size: int,
) -> Iterator[tuple[int, str]]:
    """Yield greedy answers, longest prompts first so that a lack of memory shows at once.

    Args:
        model: A causal language model, on its device and in inference mode.
        tokenizer: Its tokenizer.
        prompts: Token ids of each prompt.
        max_new_tokens: Longest answer in tokens.
        batch_size: Prompts generated together; each batch is padded on the left to its longest prompt.

    Yields:
        Index of the prompt and the decoded answer without special tokens.
    """
    settings = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=_stop_tokens(model, tokenizer),
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
    )
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    for start in range(0, len(order), batch_size):
        indices = order[start : start + batch_size]
        inputs = _left_padded([prompts[index] for index in indices], settings.pad_token_id, model.device)
        with torch.inference_mode():
            output = model.generate(**inputs, generation_config=settings)
        answers = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        yield from zip(indices, answers, strict=True)


def _left_padded(prompts: list[list[int]], pad_token_id: int, device: torch.device) -> dict[str, torch.Tensor]:
    width = max(len(prompt) for prompt in prompts)
    ids = [[pad_token_id] * (width - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return {
        "input_ids": torch.tensor(ids, device=device),
        "attention_mask": torch.tensor(mask, device=device),
    }


def _stop_tokens(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """End-of-text and end-of-turn tokens: the model's own list and the tokenizer's."""
    own = getattr(model, "generation_config", None)
    tokens = own.eos_token_id if own is not None and own.eos_token_id is not None else []
    tokens = [tokens] if isinstance(tokens, int) else list(tokens)
    return sorted({*tokens, *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])})
