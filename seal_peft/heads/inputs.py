"""What the scores are measured on: tokens of samples, the tokens whose probability counts, and where the needle is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from ..spans import encode_answers, needle_positions
from ..tasks import Sample
from ..tokens import IGNORED, AnswerCollator, encode_training

Measure = Literal["answer", "target"]


@dataclass(frozen=True)
class EncodedSample:
    """One sample as the model reads it.

    Attributes:
        id: Name of the sample.
        length: Its target length in tokens, by which maps are grouped.
        input_ids: Tokens of prompt and answer.
        labels: The same where a token's log-probability is measured, else -100.
        needle: Indices of the tokens of the lines or sentences of the prompt that hold the answer; may be empty.
    """

    id: str
    length: int
    input_ids: list[int]
    labels: list[int]
    needle: list[int]

    @property
    def first(self) -> int:
        """Index of the last token before the first one that is measured."""
        return next(i for i, label in enumerate(self.labels) if label != IGNORED) - 1


def encode_samples(
    samples: Sequence[Sample], tokenizer: PreTrainedTokenizerBase, measure: Measure = "answer"
) -> list[EncodedSample]:
    """Tokenise samples for the scores.

    Args:
        samples: Samples of any task.
        tokenizer: The model's tokenizer.
        measure: Whose log-probability counts: `"answer"` the tokens of the accepted answers where they stand in the
            last assistant turn, `"target"` all that training teaches (every assistant turn, with its end).

    Returns:
        Token ids, labels and places of the needle, in the order of the samples.

    Raises:
        ValueError: A sample cannot be measured so.
    """
    if measure not in get_args(Measure):
        raise ValueError(f"measure={measure!r} was given; use one of: {', '.join(get_args(Measure))}.")
    encode = encode_answers if measure == "answer" else encode_training
    encoded = []
    for sample in tqdm(samples, desc="Tokenising", unit="sample", delay=1.0):
        row = encode(sample, tokenizer)
        needle = needle_positions(sample, tokenizer)
        encoded.append(EncodedSample(sample.id, sample.length, row["input_ids"], row["labels"], needle))
    return encoded


def bar_of(what: str, rows: Sequence[EncodedSample]) -> str:
    """Name the progress bar of a score: what is done, at which lengths."""
    lengths = sorted({row.length for row in rows} - {0})  # 0 is that of samples that were not made to fill one
    return ", ".join([what, *(f"{length:,} tokens" for length in lengths)])


def collate(rows: Sequence[EncodedSample], device: torch.device) -> tuple[dict[str, Any], Tensor]:
    """Return the model's arguments for some rows, and the labels `(B, K)` of the K logits a row that it builds."""
    batch = AnswerCollator()([{"input_ids": row.input_ids, "labels": row.labels} for row in rows])
    del batch["labels"]
    labels = batch.pop("shift_labels").to(device)
    batch = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
    return {**batch, "use_cache": False}, labels


class AnswerScore(NamedTuple):
    """How a model does on the measured tokens, each `(B,)`.

    Attributes:
        logprob: Mean log-probability of a measured token, in nats.
        tokens: Share of measured tokens that are the most probable ones.
        exact: 1 where all of them are: greedy decoding would write just these tokens there, after what comes before.
    """

    logprob: Tensor
    tokens: Tensor
    exact: Tensor


def score_logits(logits: Tensor, labels: Tensor) -> AnswerScore:
    """Score logits `(B, K, vocabulary)` against labels `(B, K)`, -100 where nothing is measured."""
    measured = labels != IGNORED
    counts = measured.sum(-1)
    wanted = labels.clamp(min=0).unsqueeze(-1)
    logits = logits[:, -labels.shape[1] :].float()
    logprob = logits.gather(-1, wanted).squeeze(-1) - logits.logsumexp(-1)
    right = (logits.argmax(-1) == labels) & measured
    return AnswerScore(
        (logprob * measured).sum(-1) / counts, right.sum(-1) / counts, (right.sum(-1) == counts).float()
    )
