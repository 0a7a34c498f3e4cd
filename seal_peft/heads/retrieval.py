"""Retrieval: does a head look at the needle while the answer is written, and at the very token that comes next?

After "Retrieval Head Mechanistically Explains Long-Context Factuality" (Wu et al., arXiv 2404.15574), teacher-forced:
the right answer is given, so that heads can be scored on models that do not find it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..tokens import IGNORED
from .attention import around_attention
from .inputs import EncodedSample, bar_of, collate
from .layers import Heads, scoring


class Retrieval(NamedTuple):
    """Each `(samples, layers, heads)`, from 0 to 1.

    Attributes:
        copy: Share of the answer's tokens whose top attended token lies in the needle and is the very token to write,
            among those that the needle holds.
        mass: Attention on the needle, mean over the answer's tokens.
    """

    copy: Tensor
    mass: Tensor


def retrieval_map(heads: Heads, rows: Sequence[EncodedSample]) -> Retrieval:
    """Score every head by its attention from the answer to the needle.

    Attention weights are computed for the rows that predict measured tokens and for no others. After "Retrieval Head
    Mechanistically Explains Long-Context Factuality", arXiv 2404.15574, with the right answer given.

    Args:
        heads: The heads of a model, from `find_heads`.
        rows: Samples, from `encode_samples`.

    Returns:
        Two scores from 0 to 1, each an fp32 tensor `(samples, layers, heads)` on the CPU.

    Raises:
        ValueError: A sample has no needle, or the model's attention is not the softmax that this score reads.
    """
    check_needles(rows)
    copy, mass = heads.empty(len(rows)), heads.empty(len(rows))
    with scoring(heads), torch.inference_mode():
        for number, row in enumerate(tqdm(rows, desc=bar_of("Retrieval", rows), unit="sample", delay=1.0)):
            weights = attention_rows(heads, row)
            needle = torch.tensor(row.needle)
            for layer, own in enumerate(weights):
                width = own.shape[0]
                copy[number, layer, :width], mass[number, layer, :width] = _score(own, row, needle)
    return Retrieval(copy, mass)


def check_needles(rows: Sequence[EncodedSample]) -> None:
    """Raise a ValueError if the answer of a sample stands nowhere in its prompt."""
    for row in rows:
        if not row.needle:
            raise ValueError(
                f"Sample {row.id!r} has no needle: its prompt spells none of its answers, so the retrieval score has "
                "no meaning for it. Leave retrieval out of --scores, or use a task whose answer stands in the context."
            )


def _score(weights: Tensor, row: EncodedSample, needle: Tensor) -> tuple[Tensor, Tensor]:
    """Score one layer's weights `(heads, answer tokens, tokens)`."""
    ids = torch.tensor(row.input_ids)
    written = torch.tensor([label for label in row.labels if label != IGNORED])
    can_copy = torch.isin(written, ids[needle])
    top = weights.argmax(-1)
    copied = torch.isin(top, needle) & (ids[top] == written)
    return copied.sum(-1) / can_copy.sum().clamp(min=1), weights[..., needle].sum(-1).mean(-1)


def attention_rows(heads: Heads, row: EncodedSample) -> list[Tensor]:
    """Return the attention weights with which measured tokens are predicted.

    Args:
        heads: The heads of a model.
        row: One sample.

    Returns:
        For each layer with heads an fp32 tensor `(num_heads, measured tokens, tokens)` on the CPU.

    Raises:
        ValueError: The model's attention is not a softmax over scaled products of queries and keys.
    """
    found: dict[int, Tensor] = {}
    batch, _ = collate([row], heads.base.device)
    places = [i - 1 for i, label in enumerate(row.labels) if label != IGNORED]

    def watch(
        layer: int,
        original: Callable[..., Any],
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        output = original(module, query, key, value, attention_mask, *args, **kwargs)
        weights = _weights(module, query[:, :, places], key, attention_mask, places, kwargs)
        repeated = value.repeat_interleave(query.shape[1] // value.shape[1], dim=1).float()
        _check_same((weights @ repeated).transpose(1, 2), output[0][:, places], heads, module)
        found[layer] = weights[0].cpu()
        return output

    with around_attention(heads, watch), torch.inference_mode():
        heads.model(**batch)
    return [found[layer] for layer in range(len(heads.layers))]


def _weights(
    module: Any, query: Tensor, key: Tensor, mask: Any, places: Sequence[int], kwargs: dict[str, Any]
) -> Tensor:
    """Softmax rows of some queries `(1, heads, rows, head_dim)`: scaled, capped, masked, with or without a sink."""
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    scaling = kwargs.get("scaling")
    logits = (query.float() @ key.float().transpose(-1, -2)) * (
        query.shape[-1] ** -0.5 if scaling is None else scaling
    )
    if softcap := kwargs.get("softcap"):
        logits = torch.tanh(logits / softcap) * softcap
    at = torch.tensor(places, device=logits.device)[:, None]
    keys = torch.arange(logits.shape[-1], device=logits.device)[None, :]
    allowed = keys <= at
    if window := kwargs.get("sliding_window"):
        allowed &= keys > at - window
    if isinstance(mask, Tensor) and mask.dim() == 4:
        rows = mask[:, :, places, : logits.shape[-1]]
        logits = logits.masked_fill(~rows, -torch.inf) if rows.dtype == torch.bool else logits + rows.float()
    logits = logits.masked_fill(~allowed, -torch.inf)
    sink = kwargs.get("s_aux")
    if sink is not None:
        logits = torch.cat([logits, sink.float().reshape(1, -1, 1, 1).expand(*logits.shape[:-1], 1)], dim=-1)
    return logits.softmax(-1)[..., : key.shape[2]]


def _check_same(own: Tensor, models: Tensor, heads: Heads, module: Any) -> None:
    """Compare what the weights make of the values with what the model's attention made of them."""
    tolerance = 1e-4 if models.dtype == torch.float32 else 3e-2
    scale = own.abs().amax().clamp(min=1e-6)
    if own.shape != models.shape or (own - models.float()).abs().amax() > tolerance * scale:
        raise ValueError(
            f"The attention of {type(module).__name__} in {type(heads.base).__name__} is not the softmax of scaled "
            "products of queries and keys that the retrieval score reads, so its weights would be wrong. Load the "
            "model with another --attn_implementation, such as sdpa or eager, or leave retrieval out of --scores."
        )
