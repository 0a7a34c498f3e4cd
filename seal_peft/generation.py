"""Greedy answers to prompts of mixed length, in batches that waste little padding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import takewhile
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, PreTrainedTokenizerBase

from .prefill import cache_of, can_prefill_apart, groups_of, prefill


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
    drafts: Sequence[list[int]] | None = None,
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
        drafts: What the answer to each prompt may turn out to be, if there is a guess. They change no answer,
            except as rounding does: where prompts are read apart, so are their drafts, and what the model says as
            guessed is not generated.

    Raises:
        ValueError: If there are drafts, but not one for each prompt.
    """
    if drafts is not None and len(drafts) != len(prompts):
        raise ValueError(
            f"{len(drafts)} drafts were given for {len(prompts)} prompts. Give one for each, [] where there is none."
        )
    stops = _stop_tokens(model, tokenizer, ends)
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    answers: list[list[int]] = [[] for _ in prompts]
    rows, layers = list(range(len(prompts))), dict[int, list[Tensor]]()
    # All drafts become equally long: what fills the shorter ones is a guess like any other.
    length = min(max_new_tokens, max(map(len, drafts))) if drafts else 0
    with torch.inference_mode(), _plain_settings(model):
        if len(prompts) > 1 and can_prefill_apart(model):
            guesses = [(draft + [0] * length)[:length] for draft in drafts or answers]
            texts = [prompt + guess for prompt, guess in zip(prompts, guesses, strict=True)]
            layers, said = prefill(model, texts, groups_of(texts, model.device), length)
            answers = [_up_to_end(_confirmed(*pair), stops) for pair in zip(guesses, said, strict=True)]
            rows = [row for row in rows if len(answers[row]) < max_new_tokens and stops.isdisjoint(answers[row])]
        if rows:
            # All go on from as many tokens as each has: none runs beyond its limit while it waits for the others.
            begun = min(len(answers[row]) for row in rows)
            texts = [prompts[row] + answers[row][:begun] for row in rows]
            cache = cache_of(model, layers, rows, max(map(len, texts)) - 1, length - begun) if layers else None
            decoded = _decode(model, texts, cache, max_new_tokens - begun, stops, padding)
            for row, tokens in zip(rows, decoded, strict=True):
                answers[row] = _up_to_end(answers[row][:begun] + tokens, stops)
    return tokenizer.batch_decode(answers, skip_special_tokens=True)


def _decode(
    model: Any, texts: list[list[int]], cache: DynamicCache | None, limit: int, stops: set[int], padding: int
) -> list[list[int]]:
    """Continue texts of which a cache, if there is one, holds all but the last token of each."""
    width = max(map(len, texts))
    ids = [[padding] * (width - len(text)) + text for text in texts]
    mask = [[0] * (width - len(text)) + [1] * len(text) for text in texts]
    settings = GenerationConfig(
        do_sample=False, max_new_tokens=limit, eos_token_id=sorted(stops) or None, pad_token_id=padding
    )
    output = model.generate(
        input_ids=torch.tensor(ids, device=model.device),
        attention_mask=torch.tensor(mask, device=model.device),
        past_key_values=cache,
        generation_config=settings,
    )
    return output[:, width:].tolist()


def _confirmed(guess: list[int], said: list[int]) -> list[int]:
    """What a model said, up to the first token that was not guessed: what follows that, it said to the guess."""
    right = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(guess, said, strict=True)))
    return said[: right + 1]


def _up_to_end(tokens: list[int], stops: set[int]) -> list[int]:
    end = next((place for place, token in enumerate(tokens, start=1) if token in stops), None)
    return tokens[:end]


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


def _stop_tokens(model: Any, tokenizer: PreTrainedTokenizerBase, ends: Sequence[int]) -> set[int]:
    own = model.generation_config.eos_token_id
    return {*([own] if isinstance(own, int) else own or []), tokenizer.eos_token_id, *ends} - {None}
