"""From samples to batches: tokens of prompts and conversations, labels on answers only, the collator."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from .tasks import Sample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
# Characters of the piece before that a piece is tokenised behind.
ANCHOR = 16


@dataclass(frozen=True)
class Piece:
    """A stretch of the conversation that is tokenised on its own; `learned` where it is a model's turn to speak."""

    text: str
    learned: bool


def encode_prompt(sample: Sample, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens up to where the last answer starts: the chat template's generation prompt, or plain text for base models.

    Args:
        sample: A sample with any number of questions.
        tokenizer: The model's tokenizer. Without a chat template the turns stand as plain paragraphs.

    Returns:
        Token ids, the sample's answer prefix last. `encode_training` begins with exactly these.
    """
    return _encode(cut_pieces(sample, tokenizer)[:-1], tokenizer)[0]


def encode_question(sample: Sample, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Tokens of the prompt, as `encode_prompt` gives them, and of the right answer to it, its end of turn last.

    Args:
        sample: A sample with any number of questions.
        tokenizer: The model's tokenizer.

    Returns:
        Token ids of both; together they are the `input_ids` of `encode_training`.
    """
    *before, answer = cut_pieces(sample, tokenizer)
    return _encode(before, tokenizer)[0], _continuation_ids(before[-1].text, answer.text, tokenizer)


def encode_training(sample: Sample, tokenizer: PreTrainedTokenizerBase) -> dict[str, list[int]]:
    """Tokens of the whole conversation, with labels on what the model is to say.

    Args:
        sample: A sample with any number of questions.
        tokenizer: The model's tokenizer.

    Returns:
        `input_ids` and `labels`, equally long, labels not shifted. Labels are -100 except on every assistant turn,
        behind its answer prefix, and the end-of-turn token after it.

    Raises:
        ValueError: If the sample has several questions and the chat template rewrites earlier turns.
    """
    input_ids, labels = _encode(cut_pieces(sample, tokenizer), tokenizer)
    return {"input_ids": input_ids, "labels": labels}


def _encode(pieces: Sequence[Piece], tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    input_ids: list[int] = []
    labels: list[int] = []
    before = ""
    for piece in pieces:
        ids = piece_ids(piece.text, before, tokenizer)
        input_ids += ids
        labels += ids if piece.learned else [IGNORED] * len(ids)
        before = piece.text
    return input_ids, labels


def piece_ids(text: str, before: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens of a piece of a conversation, where `before` is the text of the piece before it, if there is one."""
    if before:
        return _continuation_ids(before, text, tokenizer)
    # A chat template writes its own BOS. Plain text gets the one that the tokenizer gives by default.
    return _ids(text, tokenizer, special=tokenizer.chat_template is None)


def _ids(text: str, tokenizer: PreTrainedTokenizerBase, special: bool = False) -> list[int]:
    # Not verbose: a text longer than the window is `check_window`'s business, not a warning a sample.
    return list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])


def _continuation_ids(before: str, text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens of `text` as they come after `before`, where the two do not melt into one token.

    SentencePiece-style tokenizers put a space in front of every text. A few characters of what stands before keep
    that from happening in the middle of a conversation.
    """
    anchor = before[-ANCHOR:]
    anchor_ids = _ids(anchor, tokenizer)
    joint = _ids(anchor + text, tokenizer)
    if joint[: len(anchor_ids)] == anchor_ids:
        return joint[len(anchor_ids) :]
    return _ids(text, tokenizer)


def cut_pieces(sample: Sample, tokenizer: PreTrainedTokenizerBase) -> list[Piece]:
    """Cut the conversation where the model starts and stops to speak; an answer prefix is given, not spoken."""
    *before, last = _turn_pieces(sample, tokenizer)
    if not sample.answer_prefix:
        return [*before, last]
    cut = last.text.index(sample.target) + len(sample.answer_prefix)
    return [*before, Piece(last.text[:cut], learned=False), Piece(last.text[cut:], learned=True)]


def _turn_pieces(sample: Sample, tokenizer: PreTrainedTokenizerBase) -> list[Piece]:
    """Cut the conversation where speakers change: prompt, answer, prompt, ..., answer."""
    turns = [*sample.messages, {"role": "assistant", "content": sample.target}]
    ends = [index for index, turn in enumerate(turns) if turn["role"] == "assistant"]
    if tokenizer.chat_template is None:
        return _plain_pieces(turns, ends, tokenizer)

    # Rendered up to each answer, then once with the last answer.
    prompts = [_render(tokenizer, turns[:end], add_generation_prompt=True) for end in ends]
    special = _special_tokens(tokenizer)
    pieces = [Piece(prompts[0], learned=False)]
    for end, prompt, following in zip(ends, prompts, prompts[1:], strict=False):
        answer = _answer_in(prompt, following, turns[end]["content"], special)
        if answer is None:
            raise ValueError(
                f"Sample {sample.id!r} holds {len(ends)} questions, but the chat template of this tokenizer rewrites "
                "earlier turns when a new one follows, so their answers cannot be labelled where a model would "
                "write them. Make the data with questions_per_context=1, or set another tokenizer.chat_template."
            )
        pieces += [Piece(answer, learned=True), Piece(following[len(prompt) + len(answer) :], learned=False)]
    whole = _render(tokenizer, turns, add_generation_prompt=False)
    answer = _answer_in(prompts[-1], whole, sample.target, special)
    # Some templates write no end of turn after the last answer, or not the generation prompt before it.
    return [*pieces, Piece(answer or sample.target + (tokenizer.eos_token or ""), learned=True)]


def _plain_pieces(
    turns: Sequence[Mapping[str, str]], ends: Sequence[int], tokenizer: PreTrainedTokenizerBase
) -> list[Piece]:
    pieces: list[Piece] = []
    start = 0
    for end in ends:
        paragraphs = "".join(turn["content"] + "\n\n" for turn in turns[start:end])
        pieces.append(Piece("\n\n" + paragraphs if pieces else paragraphs, learned=False))
        pieces.append(Piece(turns[end]["content"] + (tokenizer.eos_token or ""), learned=True))
        start = end + 1
    return pieces


def _render(
    tokenizer: PreTrainedTokenizerBase, turns: Sequence[Mapping[str, str]], add_generation_prompt: bool
) -> str:
    return str(
        tokenizer.apply_chat_template(
            [dict(turn) for turn in turns], tokenize=False, add_generation_prompt=add_generation_prompt
        )
    )


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    texts = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    texts |= set(tokenizer.all_special_tokens)
    return re.compile("|".join(re.escape(text) for text in sorted(texts, key=len, reverse=True)) or r"(?!)")


def _answer_in(prompt: str, rendered: str, content: str, special: re.Pattern[str]) -> str | None:
    """What a model writes after `prompt` to arrive at `rendered`: the answer, up to and with its end-of-turn token.

    `None` where `rendered` is no continuation of `prompt`, or has no special token after the answer.
    """
    if not rendered.startswith(prompt):
        return None
    start = rendered.find(content, len(prompt))
    if start < 0:
        return None
    end_of_turn = special.search(rendered, start + len(content))
    return rendered[len(prompt) : end_of_turn.end()] if end_of_turn else None


# --- tokens -> batches ---------------------------------------------------------------------------------------------


@dataclass
class AnswerCollator:
    """Data collator for `Trainer` that makes the model build logits only where there are labels.

    The full logits of a long input are its largest tensor by far, and all but a few are thrown away. So the batch says
    at which positions to keep them (`logits_to_keep`), and brings the labels of these positions, as they are
    (`labels`) and already shifted (`shift_labels`). Loss and gradients are those of full logits.

    Shorter rows are padded behind, without a mask: in a causal model no token sees what stands behind it, so each row
    is computed as it is alone, and flash attention kernels stay usable. Two kinds of models mix the rows of a batch,
    and need a batch size of 1: those with a router loss (`output_router_logits`), which padding would enter, and those
    whose RoPE depends on the length (`dynamic`, `longrope`), which is that of the longest row.

    Attributes:
        pad_token_id: Fills shorter rows. Nothing that is learned from sees it, so any id will do; 0 if the tokenizer
            has none.

    Example:
        ```python
        collator = AnswerCollator(pad_token_id=0)
        batch = collator([{"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8]}])
        model(**batch).loss.backward()
        ```
    """

    pad_token_id: int | None = None

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Build a batch.

        Args:
            features: Rows with `input_ids` and `labels`, as `encode_training` gives them.

        Returns:
            `input_ids` (B, T), `labels` and `shift_labels` (B, K), and `logits_to_keep`: K where the last K positions
            are kept, else a list of the positions that are, shared by the rows and counted from the end.

        Raises:
            ValueError: If a row has no labels, or not one for each token.
        """
        for feature in features:
            tokens, labels = len(feature["input_ids"]), len(feature.get("labels", ()))
            if tokens != labels:
                raise ValueError(
                    f"A row has {tokens} input_ids and {labels} labels. Each token needs one, -100 where nothing "
                    "is to be learned. Rows for training come from training_rows."
                )
        length = max(len(feature["input_ids"]) for feature in features)
        # Each position's label is the token behind it; the last position has none.
        following = torch.stack([_filled(feature["labels"][1:], length, IGNORED) for feature in features])
        if not following.ne(IGNORED).any(dim=1).all():
            raise ValueError(
                "A row has no labels: behind its first token every label is -100. Rows for training come from "
                "training_rows."
            )
        kept, logits_to_keep = _kept(following)
        shift_labels = following[:, kept]
        return {
            "input_ids": torch.stack(
                [_filled(feature["input_ids"], length, self.pad_token_id or 0) for feature in features]
            ),
            # The Trainer's label smoothing, and models that know no `shift_labels`, such as Gemma 3 with images in
            # transformers 5.10, shift `labels` themselves: what a position is to say stands at the next one kept.
            "labels": pad(shift_labels[:, :-1], (1, 0), value=IGNORED),
            "shift_labels": shift_labels,
            "logits_to_keep": logits_to_keep,
        }


def _filled(values: Sequence[int], length: int, filler: int) -> Tensor:
    return torch.tensor([*values, *[filler] * (length - len(values))])


def _kept(following: Tensor) -> tuple[Tensor, int | list[int]]:
    """Positions whose logits are kept, the last one among them, and how a model is told so."""
    rows, length = following.shape
    kept = following.ne(IGNORED).any(dim=0)
    kept[-1] = True  # it has no label, and shifting leaves a hole there
    positions = kept.nonzero().flatten()
    first = int(positions[0])
    if rows == 1 or len(positions) == length - first:
        # A number of last positions is the form that every architecture knows, and takes no copy of hidden states.
        return torch.arange(first, length), length - first
    # Counted from the end they also hold where an adapter puts tokens in front, as prompt tuning does. A tensor would
    # be cut like the rows where accelerate shares out batches of a streaming dataset, and stay behind on one device.
    return positions, (positions - length).tolist()
