"""First-order importance of every head and channel: one backward pass per sample in place of a pass per head.

With `s` a scale on a head's output, `dL/ds` at `s = 1` is how fast the loss falls as the head is turned down. To first
order it is the change of the answer's log-probability when the head is pruned.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from tqdm.auto import tqdm

from ..tuner.scale import scale_channels
from .attention import around_attention
from .inputs import EncodedSample, bar_of, collate, score_logits
from .layers import Heads, scoring

Site = Literal["output", "query"]


def gradient_map(
    heads: Heads,
    rows: Sequence[EncodedSample],
    sites: Sequence[Site] = ("output",),
    activation_checkpointing: bool = False,
) -> dict[str, list[Tensor]]:
    """Compute `dL/ds` at `s = 1`, L being the mean negative log-likelihood of a measured token.

    One forward and one backward pass per sample give it for every channel and query, all sites together. Where the
    model wears an adapter, `s` stands on top of the adapter's scales.

    Args:
        heads: The heads of a model, from `find_heads`.
        rows: Samples, from `encode_samples`.
        sites: `"output"` scales the output of each head. `"query"` scales its queries, that is its attention logits.
        activation_checkpointing: Keep only what enters each layer and compute it again for the backward pass: less
            memory, a forward pass more.

    Returns:
        By site, for each layer with heads, an fp32 tensor on the CPU: `(samples, num_heads, head_dim)` for outputs,
        whose sum over channels is the head's; `(samples, num_heads)` for queries. Above 0, turning down helps.

    Raises:
        ValueError: A site is not known, or the model's queries cannot be seen.
    """
    for site in sites:
        if site not in get_args(Site):
            raise ValueError(f"The site {site!r} was given; use some of: {', '.join(get_args(Site))}.")
    device = heads.base.device
    shapes = {
        site: [layer.geometry if site == "output" else layer.geometry[:1] for layer in heads.layers] for site in sites
    }
    found: dict[str, list[list[Tensor]]] = {site: [[] for _ in heads.layers] for site in sites}
    with ExitStack() as stack:
        stack.enter_context(scoring(heads))
        if activation_checkpointing:
            stack.enter_context(_checkpointing(heads.blocks))
        for row in tqdm(rows, desc=bar_of("Gradients", rows), unit="sample", delay=1.0):
            scales = {
                site: [torch.ones(shape, device=device, requires_grad=True) for shape in own]
                for site, own in shapes.items()
            }
            batch, labels = collate([row], device)
            with ExitStack() as scaling:
                for site, own in scales.items():
                    scaling.enter_context(_SCALED[site](heads, own))
                loss = -score_logits(heads.model(**batch).logits, labels).logprob.sum()
                # Queries that were not seen have no gradient; leaving the context says so.
                flat = [scale for own in scales.values() for scale in own]
                grads = iter(torch.autograd.grad(loss, flat, allow_unused=True) if loss.requires_grad else ())
            for layer in (layer for own in found.values() for layer in own):
                layer.append(next(grads).cpu())
    return {site: [torch.stack(layer) for layer in own] for site, own in found.items()}


@contextmanager
def _scaled_outputs(heads: Heads, scales: Sequence[Tensor]) -> Iterator[None]:
    def scaled(module: nn.Module, args: tuple[Tensor, ...], scale: Tensor) -> tuple[Tensor, ...]:
        return (scale_channels(args[0], scale.flatten()), *args[1:])

    handles = [
        layer.projection.register_forward_pre_hook(partial(scaled, scale=scale))
        for layer, scale in zip(heads.layers, scales, strict=True)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _scaled_queries(heads: Heads, scales: Sequence[Tensor]) -> Iterator[None]:
    def scaled(
        layer: int, original: Callable[..., Any], module: Any, query: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        # Queries are (B, heads, tokens, head_dim). A rotation commutes with the scale of a whole head.
        return original(module, (query * scales[layer][:, None, None]).to(query.dtype), *args, **kwargs)

    with around_attention(heads, scaled):
        yield


_SCALED = {"output": _scaled_outputs, "query": _scaled_queries}


@contextmanager
def _checkpointing(blocks: nn.ModuleList) -> Iterator[None]:
    """Checkpoint every layer. The Trainer's way works in training mode only, where dropout would act."""
    own = [block.__dict__.get("forward") for block in blocks]
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    try:
        yield
    finally:
        for block, forward in zip(blocks, own, strict=True):
            if forward is None:
                del block.forward
            else:
                block.forward = forward
