"""Run a model again from one of its layers on, for many variants at once: what lies below is computed one time.

Nothing of any architecture is repeated here. The model's own forward runs with the layers below skipped, so masks,
positions, norms and logits are its own.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ..tokens import IGNORED
from .beginning import BeginningLayer, EnoughError, LastBeginningLayer, cache_of
from .inputs import AnswerScore, EncodedSample, collate, score_logits
from .layers import Heads

# Rows from which on a product of matrices is no small one.
_LARGE_PASS = 4096

# Given the concatenated heads `(rows, tokens, features)` of a layer, returns what its output projection reads instead.
Edit = Callable[[Tensor], Tensor]


class Resumable(Protocol):
    """Samples that a model has read once.

    Attributes:
        several: Variants that fit in one batch.
        base: How the unchanged model does on each sample.
    """

    several: int
    base: AnswerScore

    def run(self, layer: int, variants: int, edit: Edit) -> AnswerScore:
        """Score variants of one layer, `(variants, samples)` each.

        Args:
            layer: Position of the layer among those with heads.
            variants: Rows that `edit` gets, all alike; it makes them differ.
            edit: What is done to them.
        """


def read_samples_once(heads: Heads, rows: Sequence[EncodedSample], batch_tokens: int) -> Resumable:
    """Run the unchanged model over samples that share a beginning, or over one sample.

    Args:
        heads: The heads of a model.
        rows: The samples.
        batch_tokens: Tokens that go through a layer together.
    """
    if len(rows) > 1:
        return _Shared(heads, rows, batch_tokens)
    return _Single(heads, rows[0], batch_tokens)


def group_by_beginning(heads: Heads, rows: Sequence[EncodedSample]) -> list[list[int]]:
    """Group samples whose common beginning is at least half of each, as samples with one context have it.

    Every group is computed in one go where the model can continue from a cache; elsewhere each sample stands alone.

    Returns:
        Indices of the rows of each group.
    """
    groups: list[list[int]] = []
    shared: list[list[int]] = []
    for index, row in enumerate(rows):
        for number, start in enumerate(shared if _can_continue(heads) else ()):
            common = _common(start, row.input_ids[: row.first])
            if 2 * common >= len(row.input_ids) and 2 * common >= len(rows[groups[number][0]].input_ids):
                groups[number].append(index)
                shared[number] = start[:common]
                break
        else:
            groups.append([index])
            shared.append(row.input_ids[: row.first])
    return groups


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _can_continue(heads: Heads) -> bool:
    """Whether every layer of the model keeps keys and values of its own, behind which it can read on."""
    config = heads.base.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    types = {kind.get("rope_type") for kind in (rope, *rope.values()) if isinstance(kind, dict)}
    return (
        "past_key_values" in inspect.signature(type(heads.base).forward).parameters
        and len(heads.layers) == len(heads.blocks)
        and not getattr(config, "num_kv_shared_layers", 0)
        # These turn keys by how long the whole input is, which the beginning alone does not tell.
        and not types & {"dynamic", "longrope"}
    )


class _Single:
    """One sample. What enters each layer is kept; a variant costs the layers from its own on."""

    def __init__(self, heads: Heads, row: EncodedSample, batch_tokens: int) -> None:
        self._heads = heads
        self._batch, self._labels = collate([row], heads.base.device)
        self.several = max(1, batch_tokens // len(row.input_ids))
        with _recording(heads) as self._record:
            self.base = score_logits(_logits(heads, self._batch), self._labels)

    def run(self, layer: int, variants: int, edit: Edit) -> AnswerScore:
        batch = self._batch | {"input_ids": self._batch["input_ids"].expand(variants, -1)}
        with _editing(self._heads.layers[layer].projection, edit), _starting(self._heads, layer, self._record):
            scores = score_logits(_logits(self._heads, batch), self._labels.expand(variants, -1))
        return AnswerScore(*(value.unsqueeze(-1) for value in scores))


class _Shared:
    """Samples with one beginning, which a variant reads once; the rest of every sample continues from its cache."""

    def __init__(self, heads: Heads, rows: Sequence[EncodedSample], batch_tokens: int) -> None:
        self._heads = heads
        start = rows[0].input_ids[: rows[0].first]
        for row in rows[1:]:
            start = start[: _common(start, row.input_ids[: row.first])]
        self._length, self._samples = len(start), len(rows)
        # Keys and values are copied for every sample, which takes less memory than a token on its way through a layer.
        self.several = max(1, batch_tokens // (self._length * max(1, self._samples // 4)))
        self._start = torch.tensor([start], device=heads.base.device)
        ends = [row.input_ids[len(start) :] for row in rows]
        # The unchanged ends run in a batch like those of the variants, too.
        variants = min(self.several, heads.shape[1])
        longest = max(map(len, ends))
        width = self._width(longest, variants)
        # Padding stands behind the end, where nothing that counts sees it; before it, it would fill sliding windows.
        self._ends = torch.tensor([end + [0] * (width - len(end)) for end in ends], device=heads.base.device)
        labels = [
            row.labels[len(start) + 1 :] + [IGNORED] * (longest - len(end) + 1)
            for row, end in zip(rows, ends, strict=True)
        ]
        self._keep = torch.arange(min(row.first - len(start) for row in rows), longest, device=heads.base.device)
        self._labels = torch.tensor(labels, device=heads.base.device)[:, self._keep]
        with _recording(heads) as self._start_record:
            self._read_layers = self._read(1)
        with _recording(heads) as self._end_record:
            self.base = AnswerScore(*(value[0] for value in self._finish(self._read_layers, variants)))
        self._end_record.inputs[:] = [hidden[: self._samples].clone() for hidden in self._end_record.inputs]

    def _width(self, longest: int, variants: int) -> int:
        """Tokens of each end, with padding: a batch of ends has as many rows as a full pass, or as a large one.

        A product of few rows gets another kernel than one of many, which adds up its columns in another order.
        """
        rows = min(self._length + longest, _LARGE_PASS)
        window = getattr(self._heads.base.config.get_text_config(), "max_position_embeddings", None)
        wanted = rows // (variants * self._samples)
        return max(longest, min(wanted, (window or wanted + self._length) - self._length))

    def run(self, layer: int, variants: int, edit: Edit) -> AnswerScore:
        def edit_all(z: Tensor) -> Tensor:
            # A variant's samples stand together, and an edit does not ask where in its row a token is.
            return edit(z.reshape(variants, -1, z.shape[-1])).reshape(z.shape)

        number = self._heads.layers[layer].number
        with _editing(self._heads.layers[layer].projection, edit_all):
            # The keys and values of the edited layer itself come before the edit.
            layers = self._read_layers[: number + 1]
            if len(layers) < len(self._read_layers):
                with _starting(self._heads, layer, self._start_record):
                    layers += self._read(variants)[number + 1 :]
            with _starting(self._heads, layer, self._end_record):
                return self._finish(layers, variants)

    def _read(self, variants: int) -> list[BeginningLayer]:
        """Read the beginning, one row for every variant, and return keys and values of each layer."""
        layers = [BeginningLayer() for _ in self._heads.blocks[1:]]
        layers.append(LastBeginningLayer())
        start = self._start.expand(variants, -1)
        with suppress(EnoughError):
            self._heads.model(input_ids=start, past_key_values=cache_of(layers), use_cache=True, logits_to_keep=1)
        return layers

    def _finish(self, read: list[BeginningLayer], variants: int) -> AnswerScore:
        """Read the ends of all samples behind the cached beginning of every variant."""
        cache = cache_of([layer.copy() for layer in read])
        batch = {"input_ids": self._ends.repeat(variants, 1), "past_key_values": cache, "use_cache": True}
        logits = self._heads.model(**batch, logits_to_keep=self._keep).logits
        scores = score_logits(logits, self._labels.repeat(variants, 1))
        return AnswerScore(*(value.unflatten(0, (variants, self._samples)) for value in scores))


def _logits(heads: Heads, batch: dict[str, Any]) -> Tensor:
    return heads.model(**batch).logits


class _Record(NamedTuple):
    """What entered each layer, `(rows, tokens, hidden)`, and how many values each returned; 0 for a bare tensor."""

    inputs: list[Tensor]
    returned: list[int]


@contextmanager
def _recording(heads: Heads) -> Iterator[_Record]:
    record = _Record([], [])

    def keep(block: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        record.inputs.append(args[0] if args else kwargs["hidden_states"])
        record.returned.append(len(output) if isinstance(output, tuple) else 0)

    handles = [block.register_forward_hook(keep, with_kwargs=True) for block in heads.blocks]
    try:
        yield record
    finally:
        for handle in handles:
            handle.remove()
    if any(hidden.dim() != 3 for hidden in record.inputs):
        raise ValueError(
            f"The layers of {type(heads.base).__name__} hand on {tuple(record.inputs[0].shape)}, not (batch, tokens, "
            "hidden), so the model cannot be run from one of them on. Use gradient in place of pruning in --scores."
        )


@contextmanager
def _editing(projection: nn.Module, edit: Edit) -> Iterator[None]:
    """Change what an output projection, with its adapters, reads."""
    handle = projection.register_forward_pre_hook(lambda module, args: (edit(args[0]), *args[1:]))
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _starting(heads: Heads, layer: int, record: _Record) -> Iterator[None]:
    """Let the model's layers below `layer` do nothing, and what was recorded enter it, once for every variant."""
    index = heads.layers[layer].number
    below = list(heads.blocks)[:index]
    own = [block.__dict__.get("forward") for block in below]  # accelerate puts its hooks there

    def enter(block: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        given, kept = args[0] if args else kwargs["hidden_states"], record.inputs[index]
        hidden = kept.expand(given.shape[0] // kept.shape[0], *kept.shape).flatten(0, 1)
        return ((hidden, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": hidden})

    handle = heads.blocks[index].register_forward_pre_hook(enter, with_kwargs=True)
    for block, returned in zip(below, record.returned, strict=False):
        block.forward = partial(_skip, returned)
    try:
        yield
    finally:
        handle.remove()
        for block, forward in zip(below, own, strict=True):
            if forward is None:
                del block.forward
            else:
                block.forward = forward


def _skip(returned: int, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
    return (hidden_states, *[None] * (returned - 1)) if returned else hidden_states
