"""Direct effect: what every head and every MLP writes on the answer token's logit, at the position that predicts it.

The stream that the last norm reads is a sum of what the layers wrote. With the norms' scales frozen at their values,
the logit is linear in it, so every part has its share, and the shares sum to the logit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from .inputs import EncodedSample, bar_of
from .layers import Heads, scoring
from .stream import Parts, read_parts

# How far the parts may miss a logit, as a share of the sum of their sizes.
_TOLERANCE, _LOW_PRECISION_TOLERANCE = 1e-4, 2e-2


class DirectEffect(NamedTuple):
    """Shares of a logit, or of the difference of two, as the model's head module gives it, before any softcapping.

    Attributes:
        heads: `(samples, layers, heads)`.
        mlps: `(samples, layers)`.
        biases: `(samples,)`: of output projections, norms and the head.
        embedding: `(samples,)`.
        rounding: `(samples,)`: what the parts miss because the model rounds its sums; 0 but for rounding in fp32.
        total: `(samples,)`: the logit, the sum of all the above.
    """

    heads: Tensor
    mlps: Tensor
    biases: Tensor
    embedding: Tensor
    rounding: Tensor
    total: Tensor


class DirectEffects(NamedTuple):
    """Shares of the right token's logit, and of its lead over the wrong one.

    Attributes:
        logit: Of the first measured token.
        difference: Of its logit minus that of `wrong`.
        wrong: The other token of each sample.
    """

    logit: DirectEffect
    difference: DirectEffect
    wrong: list[int]


def direct_effect(heads: Heads, rows: Sequence[EncodedSample], wrong: Sequence[int] | None = None) -> DirectEffects:
    """Split the logit of the first measured token into what heads, MLPs and embedding wrote on it.

    The norms' scales are frozen at their values, which makes the logit linear in the stream.

    Args:
        heads: The heads of a model, from `find_heads`.
        rows: Samples, from `encode_samples`.
        wrong: A wrong token for each sample; `None` takes the most probable one that is not the right one.

    Returns:
        Shares in logits, fp32 tensors on the CPU: of heads `(samples, layers, heads)`, of MLPs `(samples, layers)`.

    Raises:
        ValueError: The parts do not sum to what the model computes: it is built another way than a residual stream of
            attention and MLP outputs under one last norm.
    """
    both: list[list[Tensor]] = [[], []]
    others: list[int] = []
    bar = bar_of("Direct effect" if wrong is None else "Direct effect (wrong tokens given)", rows)
    with scoring(heads), torch.inference_mode():
        for number, row in enumerate(tqdm(rows, desc=bar, unit="sample", delay=1.0)):
            parts = read_parts(heads, row.input_ids[: row.first + 1])
            right = row.input_ids[row.first + 1]
            if wrong is None:
                logits = parts.logits.clone()
                logits[right] = -torch.inf
                others.append(int(logits.argmax()))
            else:
                others.append(wrong[number])
            for own, shares in zip(both, _shares(heads, parts, right, others[-1]), strict=True):
                own.append(shares)
    logit, difference = (_named(torch.stack(own), heads) for own in both)
    return DirectEffects(logit, difference, others)


def _shares(heads: Heads, parts: Parts, right: int, wrong: int) -> tuple[Tensor, Tensor]:
    """Shares of the logit and of the difference, `(layers * heads + layers + 4,)`, in the order of `_named`."""
    weight = heads.base.get_output_embeddings().weight[[right, wrong]].float()
    directions = torch.stack([weight[0], weight[0] - weight[1]])
    bias = getattr(heads.base.get_output_embeddings(), "bias", None)
    biases = torch.zeros(2) if bias is None else bias[[right, wrong]].float().cpu()
    by_head = torch.full((2, *heads.shape), torch.nan)
    for layer, own in enumerate(parts.heads):
        by_head[:, layer, : len(own)] = (own @ directions.T).T.cpu()
    mlps, rest = ((part @ directions.T).T.cpu() for part in (parts.mlps, torch.stack([parts.biases, parts.embedding])))
    rest[:, 0] += torch.stack([biases[0], biases[0] - biases[1]])
    logits = parts.logits.float().cpu()
    total = torch.stack([logits[right], logits[right] - logits[wrong]])
    known = torch.cat([by_head.flatten(1), mlps, rest], dim=1)
    rounding = total - known.nansum(1)
    _check_sum(heads, rounding, known)
    shares = torch.cat([known, rounding[:, None], total[:, None]], dim=1)
    return shares[0], shares[1]


def _check_sum(heads: Heads, rounding: Tensor, known: Tensor) -> None:
    tolerance = _TOLERANCE if heads.base.dtype == torch.float32 else _LOW_PRECISION_TOLERANCE
    if (rounding.abs() > tolerance * known.abs().nansum(1).clamp(min=1.0)).any():
        raise ValueError(
            f"The parts of {type(heads.base).__name__} miss its logits by {rounding.abs().max():.3g}, so their shares "
            "would be wrong. Load the model in float32 if it is not; else it adds up in a way that is not known here."
        )


def _named(shares: Tensor, heads: Heads) -> DirectEffect:
    layers, width = heads.shape
    by_head, mlps, rest = shares.split([layers * width, layers, 4], dim=1)
    return DirectEffect(by_head.unflatten(1, (layers, width)), mlps, *rest.unbind(1))
