"""Pruning: what the answer loses or gains when one head, or one channel of a head, is taken out.

Source: "SEAL: Scaling to Emphasize Attention for Long-Context Retrieval", ACL 2025, arXiv 2501.15225, figures 2b, 2c.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from .inputs import AnswerScore, EncodedSample, bar_of, collate
from .layers import Heads, head_name, scoring
from .resume import group_by_beginning, read_samples_once

Ablation = Literal["zero", "mean"]
# Tokens of all rows that go through a layer together: enough to keep a GPU busy.
BATCH_TOKENS = 65_536


class Pruned(NamedTuple):
    """What pruning changes, for every sample: `(samples, layers, heads)`, or `(samples, channels)` for one head.

    Attributes:
        logprob: Change of the mean log-probability of a measured token, in nats; above 0 pruning helps.
        tokens: Change of the share of measured tokens that are the most probable ones.
        exact: Change, -1, 0 or 1, of whether all of them are.
        base: The unchanged model's own, each `(samples,)`.
    """

    logprob: Tensor
    tokens: Tensor
    exact: Tensor
    base: AnswerScore


class _Part(NamedTuple):
    """Channels `start` to `stop` of the concatenated heads of a layer, and the index of their result."""

    start: int
    stop: int
    place: int


def pruning_map(
    heads: Heads, rows: Sequence[EncodedSample], ablation: Ablation = "zero", batch_tokens: int = BATCH_TOKENS
) -> Pruned:
    """Prune every head in turn.

    The values are those of one full forward pass per head and sample. They cost less: the layers below a head are
    computed once per sample, several heads of a layer run as rows of one batch, and samples that share their beginning
    (several questions about one context) read it once. The paper prunes heads in its figure 2b (arXiv 2501.15225).

    Args:
        heads: The heads of a model, from `find_heads`.
        rows: Samples, from `encode_samples`.
        ablation: `"zero"` takes a head's output away; `"mean"` puts its mean over all tokens of all samples there.
        batch_tokens: Tokens that go through a layer together, which bounds the memory.

    Returns:
        Changes, each an fp32 tensor `(samples, layers, heads)` on the CPU; log-probabilities in nats.

    Raises:
        ValueError: The ablation is not known.
    """
    parts: list[list[_Part]] = []
    for position, layer in enumerate(heads.layers):
        size = layer.geometry.head_dim
        parts.append(
            [_Part(h * size, (h + 1) * size, position * heads.shape[1] + h) for h in range(layer.geometry.num_heads)]
        )
    results = torch.full((3, len(rows), *heads.shape), torch.nan)
    return _prune(heads, rows, parts, ablation, batch_tokens, results, "heads")


def prune_channels(
    heads: Heads,
    rows: Sequence[EncodedSample],
    layer: int,
    head: int,
    ablation: Ablation = "zero",
    batch_tokens: int = BATCH_TOKENS,
) -> Pruned:
    """Prune every channel of one head in turn.

    Args:
        heads: The heads of a model.
        rows: Samples.
        layer: Position of the layer among `heads.layers`; `parse_head` gives it.
        head: Number of the head.
        ablation: As in `pruning_map`.
        batch_tokens: As in `pruning_map`.

    Returns:
        Changes, each an fp32 tensor `(samples, head_dim)` on the CPU; log-probabilities in nats.
    """
    size = heads.layers[layer].geometry.head_dim
    parts: list[list[_Part]] = [[] for _ in heads.layers]
    parts[layer] = [_Part(head * size + c, head * size + c + 1, c) for c in range(size)]
    results = torch.full((3, len(rows), size), torch.nan)
    what = f"channels of {head_name(heads.layers[layer].number, head)}"
    return _prune(heads, rows, parts, ablation, batch_tokens, results, what)


def _prune(
    heads: Heads,
    rows: Sequence[EncodedSample],
    parts: Sequence[Sequence[_Part]],
    ablation: str,
    batch_tokens: int,
    results: Tensor,
    what: str,
) -> Pruned:
    if ablation not in ("zero", "mean"):
        raise ValueError(f"ablation={ablation!r} was given; use 'zero' or 'mean'.")
    base, flat = torch.empty(3, len(rows)), results.view(3, len(rows), -1)
    total = len(rows) * sum(map(len, parts))
    bar = bar_of(f"Pruning {what} to {ablation}", rows)
    with scoring(heads), torch.inference_mode(), tqdm(total=total, desc=bar, unit="value", delay=1.0) as progress:
        fill: Sequence[Tensor | None] = [None] * len(heads.layers)
        if ablation == "mean":
            fill = head_means(heads, rows)
        for group in group_by_beginning(heads, rows):
            read = read_samples_once(heads, [rows[index] for index in group], batch_tokens)
            base[:, group] = torch.stack(read.base).cpu()
            for layer, own in enumerate(parts):
                for start in range(0, len(own), read.several):
                    chunk = own[start : start + read.several]
                    scores = read.run(layer, len(chunk), partial(_take_out, parts=chunk, fill=fill[layer]))
                    for part, after in zip(chunk, torch.stack(scores, dim=-1).cpu(), strict=True):
                        flat[:, group, part.place] = after.T
                    progress.update(len(chunk) * len(group))
    logprob, tokens, exact = results - base.reshape(3, len(rows), *[1] * (results.dim() - 2))
    return Pruned(logprob, tokens, exact, AnswerScore(*base))


def _take_out(z: Tensor, parts: Sequence[_Part], fill: Tensor | None) -> Tensor:
    """Replace the part of each row `(rows, tokens, features)`; other features of the row stay."""
    z = z.clone()
    for row, part in enumerate(parts):
        z[row, :, part.start : part.stop] = 0.0 if fill is None else fill[part.start : part.stop].to(z.dtype)
    return z


def head_means(heads: Heads, rows: Sequence[EncodedSample]) -> list[Tensor]:
    """Return the mean output of the heads of each layer over all tokens of all samples, fp32, `(features,)`."""
    sums: list[Tensor] = []
    handles = []
    for position, layer in enumerate(heads.layers):
        sums.append(torch.zeros(layer.geometry.num_heads * layer.geometry.head_dim, device=heads.base.device))

        def add(module: torch.nn.Module, args: tuple[Tensor, ...], position: int = position) -> None:
            sums[position] += args[0].float().sum((0, 1))

        handles.append(layer.projection.register_forward_pre_hook(add))
    try:
        with torch.inference_mode():
            for row in rows:
                heads.model(**collate([row], heads.base.device)[0] | {"logits_to_keep": 1})
    finally:
        for handle in handles:
            handle.remove()
    tokens = sum(len(row.input_ids) for row in rows)
    return [total / tokens for total in sums]


@contextmanager
def without_head(heads: Heads, layer: int, head: int) -> Iterator[None]:
    """Within it the model runs, and generates, with one head taken out.

    Args:
        heads: The heads of the model.
        layer: Position of the layer among `heads.layers`.
        head: Number of the head.

    Returns:
        A context manager; after it the model is what it was.
    """
    size = heads.layers[layer].geometry.head_dim
    part = slice(head * size, (head + 1) * size)

    def take_out(module: torch.nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        z = args[0].clone()
        z[..., part] = 0.0
        return (z, *args[1:])

    handle = heads.layers[layer].projection.register_forward_pre_hook(take_out)
    try:
        yield
    finally:
        handle.remove()
