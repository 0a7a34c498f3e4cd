"""Accuracy without a head, by generation: for the few heads that pruning changes most."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from ..generation import generate_answers, make_batches
from ..statistics import mean_interval, paired_difference
from ..tasks import Sample, get_task
from ..tokens import encode_prompt
from .layers import Heads, parse_head
from .maps import top_heads
from .pruning import without_head

_BATCH_SIZE = 8


def generation_without(
    heads: Heads,
    pruned: Mapping[int, Tensor],
    samples: Sequence[Sample],
    tokenizer: PreTrainedTokenizerBase,
    count: int,
) -> dict[str, Any]:
    """Generate answers without each of the heads whose pruning helps, or hurts, most, and score them.

    Args:
        heads: The heads of a model.
        pruned: Change of the log-probability `(samples, layers, heads)` by length.
        samples: The samples, of all lengths.
        tokenizer: The model's tokenizer.
        count: How many heads at either end of the mean over all lengths.

    Returns:
        By length `base` (accuracy and its 95% interval) and for each head the difference to it with its interval.
    """
    mean = sum((values.mean(0) for values in pruned.values()), start=0.0 * next(iter(pruned.values()))[0])
    names = dict.fromkeys(name for name, _ in top_heads(mean, heads, count) + top_heads(-mean, heads, count))
    scores = {None: _scores(heads, samples, tokenizer)}
    for name in tqdm(names, desc="Generating without a head", unit="head", delay=1.0):
        with without_head(heads, *parse_head(name, heads)):
            scores[name] = _scores(heads, samples, tokenizer)
    result: dict[str, Any] = {}
    for length in pruned:
        chosen = [i for i, sample in enumerate(samples) if sample.length == length]
        base = [scores[None][i] for i in chosen]
        own = {name: [values[i] for i in chosen] for name, values in scores.items() if name}
        result[str(length)] = {
            "base": _interval(mean_interval(base)),
            "heads": {name: _interval(paired_difference(values, base)) for name, values in own.items()},
        }
    return result


def _interval(values: tuple[float, float, float]) -> dict[str, float]:
    return dict(zip(("mean", "low", "high"), values, strict=True))


def _scores(heads: Heads, samples: Sequence[Sample], tokenizer: PreTrainedTokenizerBase) -> list[float]:
    prompts = [encode_prompt(sample, tokenizer) for sample in samples]
    limits = [get_task(sample.task).max_new_tokens for sample in samples]
    scores = [0.0] * len(samples)
    for batch in make_batches(prompts, limits, _BATCH_SIZE):
        answers = generate_answers(heads.model, tokenizer, [prompts[i] for i in batch], limits[batch[0]])
        for i, answer in zip(batch, answers, strict=True):
            scores[i] = get_task(samples[i].task).score(answer, samples[i].answers)
    return scores
