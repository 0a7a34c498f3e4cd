"""The attention of Self-Extend: true positions nearby, grouped ones further away, one softmax over both.

Shapes: queries `(batch, heads, queries, channels)`, keys and values `(batch, key heads, keys, channels)`, positions
`(batch or 1, tokens)`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from .flash import FlashSelfExtend, fits_flash

# Scores that one step of `attend_in_blocks` holds: 256 MiB in fp32.
SCORES_PER_BLOCK = 2**26


@dataclass(frozen=True)
class Grouping:
    """Self-Extend in one attention layer.

    Attributes:
        group_size: How many positions further away become one.
        window: Distance from which on they do.
        frequencies: Of the rotation, in radians per position, shape `(rotated channels / 2,)`.
        interleaved: See `rotate`.
        scale: Of the scores.
    """

    group_size: int
    window: int
    frequencies: Tensor
    interleaved: bool
    scale: float

    def far(self, query: Tensor, key: Tensor, queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Turn queries and keys from their positions to their grouped ones.

        Those of queries are shifted so that they continue the true ones at the window's end.
        """
        shifted = queries // self.group_size + self.window - self.window // self.group_size
        return (
            rotate(query, queries, shifted, self.frequencies, self.interleaved),
            rotate(key, keys, keys // self.group_size, self.frequencies, self.interleaved),
        )


def attend(
    query: Tensor, key: Tensor, value: Tensor, grouping: Grouping, positions: Tensor, slots: Tensor | None
) -> Tensor:
    """Attend by Self-Extend, by flash where it can.

    Args:
        query: Rotated to true positions.
        key: Rotated to true positions.
        value: Values.
        grouping: What is grouped.
        positions: True positions of the queries.
        slots: Of every key, relative to the first query, `(batch, keys)`: a key counts for the queries from its slot
            on, so that padding has slots behind all. `None`: no padding, and the last keys are those of the queries.

    Returns:
        Shape `(batch, heads, queries, channels of a value)`.
    """
    batch, _, queries, _ = query.shape
    keys = key_positions(positions, slots, key.shape[2])
    if not fits_flash(query, key, value):
        return attend_in_blocks(query, key, value, grouping, positions, keys, slots)
    if slots is None:
        return _attend_by_flash(query, key, value, grouping, positions, keys)
    ranges = _ranges(slots, queries)
    if ranges is None:
        return attend_in_blocks(query, key, value, grouping, positions, keys, slots)
    positions, rows = positions.expand(batch, -1), []
    for row, (first, last, start, end) in enumerate(ranges):
        one, some, seen = slice(row, row + 1), slice(first, last), slice(start, end)
        parts = query[one, :, some], key[one, :, seen], value[one, :, seen]
        out = _attend_by_flash(*parts, grouping, positions[one, some], keys[one, seen])
        rows.append(functional.pad(out, (0, 0, first, queries - last)))
    return torch.cat(rows)


def _attend_by_flash(
    query: Tensor, key: Tensor, value: Tensor, grouping: Grouping, positions: Tensor, keys: Tensor
) -> Tensor:
    n_far = max(0, key.shape[2] - grouping.window)
    first = max(0, query.shape[2] - n_far)  # the queries before see no key beyond the window
    far = grouping.far(query[:, :, first:], key[:, :, :n_far], positions[:, first:], keys[:, :n_far])
    out: Tensor = FlashSelfExtend.apply(query, key, value, *far, grouping.scale, grouping.window)
    return out


def key_positions(positions: Tensor, slots: Tensor | None, keys: int) -> Tensor:
    """Return the positions of all keys, counted back from a query's, without padding, as `generate` counts.

    Returns:
        Shape `(batch or 1, keys)`; those of padding mean nothing.
    """
    if slots is None:
        return torch.arange(1 - keys, 1, device=positions.device) + positions[:, -1:]
    seen = slots < positions.shape[1]  # neither padding nor the free slots of a static cache
    last = torch.where(seen, slots, 0).amax(dim=-1, keepdim=True).clamp(min=0)
    anchor = positions.expand(len(slots), -1).gather(1, last)
    return anchor - seen.sum(dim=-1, keepdim=True) + seen.cumsum(dim=-1)


def are_known(positions: Tensor, slots: Tensor | None, keys: int) -> bool:
    """Whether the keys have the positions that `key_positions` gives, as far as one call can tell.

    Those of the call have the positions of their queries. Cached ones bear none, so only what `generate` counts is
    taken: from 0, without padding.
    """
    found = key_positions(positions, slots, keys)
    queries = positions.shape[1]
    if slots is None:
        own = positions == found[:, -queries:]
        return bool((own & (found[:, :1] == 0)).all() if queries < keys else own.all())
    seen = slots < queries
    cached, new = seen & (slots < 0), seen & (slots >= 0)
    own = positions.expand(len(slots), -1).gather(1, slots.clamp(0, queries - 1)) == found
    # Where a row has nothing new but padding, nobody reads its cached keys.
    counted = (found == seen.cumsum(dim=-1) - 1) | ~new.any(dim=-1, keepdim=True)
    return bool(((own | ~new) & (counted | ~cached)).all())


def _ranges(slots: Tensor, queries: int) -> list[tuple[int, int, int, int]] | None:
    """Of each row the first and last query, and the first and last key, that are no padding; ends are exclusive.

    Returns:
        `None` if there is padding in between, or a row of nothing else.
    """
    seen = slots < queries
    start, last = seen.int().argmax(dim=-1), slots.shape[1] - 1 - seen.flip(-1).int().argmax(dim=-1)
    slot = slots.gather(1, start.unsqueeze(-1)).squeeze(-1)
    known = torch.stack([slot, start, last + 1, seen.sum(dim=-1)], dim=-1).tolist()
    ranges = [(max(0, slot), slot + end - first, first, end) for slot, first, end, _ in known]
    whole = all(end - first == count for _, first, end, count in known)
    return ranges if whole and all(start < end for start, end, *_ in ranges) else None


def rotate(x: Tensor, old: Tensor, new: Tensor, frequencies: Tensor, interleaved: bool) -> Tensor:
    """Turn heads that are rotated to some positions to other positions.

    The angles are rounded to fp32 as the model rounds them, so that the old rotation is undone exactly, and applied in
    fp32, so that bf16 heads are rounded once.

    Args:
        x: Queries or keys; channels beyond the rotated ones stay.
        old: Where they are rotated to.
        new: Where they should be.
        frequencies: Of the rotation, in radians per position, shape `(rotated channels / 2,)`.
        interleaved: Whether a pair of channels lies side by side (GPT-J) or half of the rotated channels apart.
    """
    before = old.unsqueeze(-1).float() * frequencies
    after = new.unsqueeze(-1).float() * frequencies
    cos = (after.cos() * before.cos() + after.sin() * before.sin()).unsqueeze(1)
    sin = (after.sin() * before.cos() - after.cos() * before.sin()).unsqueeze(1)
    rotated = 2 * frequencies.numel()
    head, rest = x[..., :rotated], x[..., rotated:]
    first, second = (head[..., ::2], head[..., 1::2]) if interleaved else head.chunk(2, dim=-1)
    turned = (first * cos - second * sin).to(x.dtype), (second * cos + first * sin).to(x.dtype)
    if interleaved:
        return torch.cat([torch.stack(turned, dim=-1).flatten(-2), rest], dim=-1)
    return torch.cat([*turned, rest], dim=-1)


def attend_in_blocks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grouping: Grouping,
    positions: Tensor,
    keys: Tensor,
    slots: Tensor | None,
) -> Tensor:
    """Attend in plain torch, a block of queries at a time; a single block is the definition, with full matrices.

    Args:
        query: As for `attend`, like what follows.
        key: Rotated to true positions.
        value: Values.
        grouping: What is grouped.
        positions: True positions of the queries.
        keys: True positions of the keys.
        slots: See `attend`.

    Returns:
        Shape `(batch, heads, queries, channels of a value)`.
    """
    far_query, far_key = grouping.far(query, key, positions, keys)
    (batch, heads, queries, _), n_keys = query.shape, key.shape[2]
    ordered = slots is None
    if slots is None:
        slots = torch.arange(queries - n_keys, queries, device=key.device).unsqueeze(0)
    size = max(1, min(queries, SCORES_PER_BLOCK // (batch * heads * n_keys)))
    outputs = []
    for start in range(0, queries, size):
        rows = torch.arange(start, min(start + size, queries), device=key.device).unsqueeze(-1)
        end = start + len(rows)
        seen = n_keys - queries + end if ordered else n_keys
        near = max(0, n_keys - queries + start - grouping.window + 1) if ordered else 0  # those before are far for all
        arguments = (
            query[:, :, start:end],
            key[:, :, near:seen],
            value[:, :, :seen],
            far_query[:, :, start:end],
            far_key[:, :, :seen],
            grouping.scale,
            (positions[:, start:end, None] - keys[:, None, near:seen] < grouping.window).unsqueeze(1),
            (slots[:, None, :seen] <= rows).unsqueeze(1),
        )
        if torch.is_grad_enabled() and size < queries:
            outputs.append(checkpoint(_attend, *arguments, use_reentrant=False, preserve_rng_state=False))
        else:
            outputs.append(_attend(*arguments))
    return torch.cat(outputs, dim=2)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    far_query: Tensor,
    far_key: Tensor,
    scale: float,
    is_near: Tensor,
    is_seen: Tensor,
) -> Tensor:
    """Attend with a block of queries; `is_near` is about the last keys, as many as `key` holds."""
    near, far = _scores(query, key, scale), _scores(far_query, far_key, scale)
    first = far.shape[-1] - near.shape[-1]
    scores = torch.cat([far[..., :first], torch.where(is_near, near, far[..., first:])], dim=-1)
    # Not -inf: the row of a padding query sees no key, and must not become NaN.
    scores = scores.masked_fill(~is_seen, torch.finfo(scores.dtype).min)
    weights = scores.softmax(dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(value.dtype)
    return _per_key_head(weights, value.shape[1]).matmul(value).reshape(*query.shape[:3], value.shape[-1])


def _scores(query: Tensor, key: Tensor, scale: float) -> Tensor:
    scores = _per_key_head(query, key.shape[1]) @ key.transpose(-1, -2) * scale
    return scores.reshape(*query.shape[:3], key.shape[2])


def _per_key_head(x: Tensor, key_heads: int) -> Tensor:
    """Stack the query heads that share a key head, so that no key is repeated."""
    batch, heads, tokens, channels = x.shape
    return x.reshape(batch, key_heads, heads // key_heads * tokens, channels)
