"""Keys and values of a text's beginning, behind which several ends are read: a cache that copies them once.

transformers' own copies them when they come, and anew when more come behind them. For every sample and pruned head
these copies would move as many bytes as a layer's products do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer


class EnoughError(Exception):
    """The model has read as far as anybody asks."""


class BeginningLayer(DynamicLayer):
    """Keys and values of one layer, `(rows, heads, tokens, size)`; each row may stand before several ends."""

    keys: Any
    values: Any

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Take in those of the beginning; later, those of the ends, whose rows are a multiple of the beginning's."""
        if self.is_initialized:
            key_states, value_states = _behind(self.keys, key_states), _behind(self.values, value_states)
        self.keys, self.values, self.is_initialized = key_states, value_states, True
        self.dtype, self.device = key_states.dtype, key_states.device
        return key_states, value_states

    def copy(self) -> BeginningLayer:
        """Return a layer of the same tensors, behind which other ends may go."""
        other = BeginningLayer()
        other.update(self.keys, self.values)
        return other


class LastBeginningLayer(BeginningLayer):
    """The layer whose keys and values are the last that anybody asks for."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Take them in and raise `EnoughError`."""
        super().update(key_states, value_states)
        raise EnoughError


def cache_of(layers: Sequence[BeginningLayer]) -> DynamicCache:
    """Return a cache of these layers, none of which forgets what a sliding window has passed."""
    cache = DynamicCache()
    cache.layers = list(layers)
    return cache


def _behind(start: Tensor, end: Tensor) -> Tensor:
    """Join `(rows, heads, tokens, size)` with `(rows * ends, heads, tokens, size)`, every row with all of its ends."""
    ends = end.unflatten(0, (start.shape[0], -1))
    start = start.unsqueeze(1).expand(-1, ends.shape[1], -1, -1, -1)
    return torch.cat([start, ends], dim=-2).flatten(0, 1)
