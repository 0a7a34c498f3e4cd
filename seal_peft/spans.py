"""Where in the tokens of a sample its facts stand: the answers in what the model is to say, the needle before."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from .tasks import Sample
from .tokens import ANCHOR, IGNORED, Piece, cut_pieces, encode_training, piece_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# The end of a line, or of a sentence within it.
_SENTENCE_END = re.compile(r"\n|(?<=[.!?])[\"')\]]?\s")


def encode_answers(sample: Sample, tokenizer: PreTrainedTokenizerBase) -> dict[str, list[int]]:
    """As `encode_training`, with labels only on the accepted answers where they stand in the last assistant turn.

    Args:
        sample: A sample with any number of questions.
        tokenizer: The model's tokenizer, a fast one.

    Raises:
        ValueError: The last turn spells none of the answers, or the tokenizer does not tell where its tokens stand.
    """
    ids = encode_training(sample, tokenizer)["input_ids"]
    *_, before, last = cut_pieces(sample, tokenizer)
    spans = _spans(last, before.text, tokenizer)
    said = _overlapping(spans, _occurrences(sample.answers, last.text))
    if not said:
        raise ValueError(
            f"Sample {sample.id!r}: what the model is to say, {last.text!r:.80}, spells none of the accepted answers "
            f"{sample.answers!r:.80}, so their tokens cannot be measured alone. Measure all of it: --measure target."
        )
    start = len(ids) - len(spans)
    measured = {start + index for index in said}
    return {"input_ids": ids, "labels": [token if i in measured else IGNORED for i, token in enumerate(ids)]}


def needle_positions(sample: Sample, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Where the fact that is asked for stands: the tokens of the lines or sentences of the prompt that hold an answer.

    Args:
        sample: A sample with any number of questions; only the answers to the last one count.
        tokenizer: The model's tokenizer, a fast one.

    Returns:
        Indices into the tokens of `encode_training`, rising; none where the prompt spells no answer.

    Raises:
        ValueError: The tokenizer does not tell where its tokens stand.
    """
    context = cut_pieces(sample, tokenizer)[0]
    ends = [match.span() for match in _SENTENCE_END.finditer(context.text)]
    sentences = []
    for start, end in _occurrences(sample.answers, context.text):
        first = max((stop for _, stop in ends if stop <= start), default=0)
        last = min((begin for begin, _ in ends if begin >= end), default=len(context.text))
        sentences.append((first, last))
    return _overlapping(_spans(context, "", tokenizer), sentences)


def _occurrences(texts: Sequence[str], inside: str) -> list[tuple[int, int]]:
    """Where texts stand as whole words: 12 is not in 4123."""
    patterns = [rf"(?<!\w){re.escape(text)}(?!\w)" for text in texts if text]
    return [match.span() for pattern in patterns for match in re.finditer(pattern, inside)]


def _overlapping(spans: Sequence[tuple[int, int]], places: Sequence[tuple[int, int]]) -> list[int]:
    return [i for i, (a, b) in enumerate(spans) if any(a < end and start < b for start, end in places)]


def _spans(piece: Piece, before: str, tokenizer: PreTrainedTokenizerBase) -> list[tuple[int, int]]:
    """Start and end of every token of a piece in its text."""
    if not tokenizer.is_fast:
        raise ValueError(
            f"{type(tokenizer).__name__} does not tell where its tokens stand in the text. Load the fast tokenizer of "
            "the model (AutoTokenizer does where there is one)."
        )
    ids = piece_ids(piece.text, before, tokenizer)
    special = not before and tokenizer.chat_template is None
    # Behind its anchor, or alone where the two melt into one token.
    for anchor in (before[-ANCHOR:], ""):
        encoded = tokenizer(
            anchor + piece.text, add_special_tokens=special, return_offsets_mapping=True, verbose=False
        )
        if list(encoded["input_ids"])[-len(ids) :] == ids:
            return [(a - len(anchor), b - len(anchor)) for a, b in encoded["offset_mapping"][-len(ids) :]]
    raise ValueError(f"The tokenizer does not cut {piece.text!r:.80} the same way twice.")
