"""Maps of heads: numbers by layer and head for several lengths, as JSON values; ranks, tops and the table over all."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .layers import Heads, head_name

# What the values of each map say; a map that is not here is described where it is made.
MEANING = {
    "gradient": "dL/ds of a scale on the head's output at 1; to first order what pruning adds to the log-probability",
    "gradient_query": "dL/ds of a scale on the head's query at 1; above 0 a flatter attention lowers the loss",
    "pruning_zero": "change of the answer's mean log-probability in nats when the head's output is 0",
    "pruning_mean": "the same when the head's output is its mean over all tokens",
    "retrieval_copy": "share of the answer's tokens whose top attended token is that very token in the needle",
    "retrieval_mass": "attention from the answer to the needle",
    "direct_logit": "the head's share of the logit of the answer's first token",
    "direct_difference": "the same for its lead over the most probable wrong token",
    "scale": "learned scale of the head's output, mean over channels; 1 is unchanged",
    "scale_query": "learned scale of the head's query; 1 is unchanged",
}
# What stands at the colours of a picture; red are the greater values.
LABELS = {
    "gradient": "dL/ds in nats\n(red: better without the head)",
    "gradient_query": "dL/ds in nats\n(red: better with flatter attention)",
    "pruning_zero": "change of log-probability, nats\n(red: better without the head)",
    "pruning_mean": "change of log-probability, nats\n(red: better without the head)",
    "retrieval_copy": "share of the answer's tokens",
    "retrieval_mass": "share of attention",
    "direct_logit": "logit\n(red: towards the answer)",
    "direct_difference": "difference of logits\n(red: towards the answer)",
    "scale": "scale\n(red: emphasised, blue: muted)",
    "scale_query": "scale\n(red: sharper attention, blue: flatter)",
}

Summary = dict[str, Any]


def summarise(values: Tensor) -> Summary:
    """Return mean and standard error over samples as JSON values, `null` where a layer has no such head.

    Args:
        values: One value per sample in the first dimension.
    """
    n = len(values)
    error = values.std(0) / math.sqrt(n) if n > 1 else torch.full_like(values[0], torch.nan)
    return {"n": n, "mean": _rows(values.mean(0)), "standard_error": _rows(error)}


def as_tensor(rows: Any) -> Tensor:
    """Return what `summarise` wrote as a tensor, NaN for `null`."""
    if isinstance(rows, list):
        return torch.stack([as_tensor(row) for row in rows])
    return torch.tensor(math.nan if rows is None else rows)


def _rows(values: Tensor) -> Any:
    if values.dim():
        return [_rows(row) for row in values]
    return None if values.isnan() else values.item()


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Return Spearman's correlation of two maps over the heads that both have; NaN if one is constant.

    Args:
        a: Values of any shape.
        b: Values of the same shape.

    Returns:
        -1 to 1.
    """
    both = a.isfinite() & b.isfinite()
    x, y = _ranks(a[both]), _ranks(b[both])
    x, y = x - x.mean(), y - y.mean()
    size = (x.square().sum() * y.square().sum()).sqrt()
    return float((x * y).sum() / size) if size else math.nan


def _ranks(values: Tensor) -> Tensor:
    """Ranks from 0, the mean rank for equal values."""
    _, place, counts = values.double().unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts + 1) / 2)[place]


def top_heads(values: Tensor, heads: Heads, count: int) -> list[tuple[str, float]]:
    """Return the heads with the greatest values by name, the greatest first.

    Args:
        values: `(layers, heads)`.
        heads: The heads of the model.
        count: How many at most.
    """
    flat = values.flatten().nan_to_num(nan=-torch.inf)
    order = flat.argsort(descending=True, stable=True)[:count].tolist()
    width = values.shape[1]
    return [
        (head_name(heads.layers[i // width].number, i % width), flat[i].item()) for i in order if flat[i].isfinite()
    ]


def compare(maps: Mapping[str, Mapping[Any, Tensor]], heads: Heads, tops: int = 10) -> dict[str, Any]:
    """Put all maps beside each other.

    Args:
        maps: `(layers, heads)` by name of the map and length; learned scales, which are of all lengths, stand
            under `None`. Length 0 is that of samples that were not made to fill one.
        heads: The heads of the model.
        tops: Heads listed at either end of each map.

    Returns:
        `heads`: a row per head with every value; `rank_correlations`: between maps at each length; `across_lengths`:
        of each map between its lengths; `top` and `bottom`: names and values at either end of each map.
    """
    rows = []
    for position, layer in enumerate(heads.layers):
        for head in range(layer.geometry.num_heads):
            row: dict[str, Any] = {"name": head_name(layer.number, head), "layer": layer.number, "head": head}
            for name, by_length in maps.items():
                for length, values in by_length.items():
                    value = values[position, head]
                    row[_column(name, length)] = None if value.isnan() else value.item()
            rows.append(row)
    lengths = sorted({length for by_length in maps.values() for length in by_length if length is not None})
    between = {str(length): _between({n: m.get(length, m.get(None)) for n, m in maps.items()}) for length in lengths}
    ends = {_column(name, length): values for name, own in maps.items() for length, values in own.items()}
    return {
        "heads": rows,
        "rank_correlations": between,
        "across_lengths": {name: _between(own) for name, own in maps.items() if len(own) > 1},
        "top": {name: top_heads(values, heads, tops) for name, values in ends.items()},
        "bottom": {
            name: [(head, -value) for head, value in top_heads(-values, heads, tops)] for name, values in ends.items()
        },
    }


def _column(name: str, length: int | None) -> str:
    return name if length is None else f"{name}@{length}"


def _between(maps: Mapping[Any, Tensor | None]) -> dict[str, dict[str, float | None]]:
    known = {str(name): values for name, values in maps.items() if values is not None}
    pairs = {a: {b: rank_correlation(x, y) for b, y in known.items() if b != a} for a, x in known.items()}
    return {a: {b: None if math.isnan(r) else r for b, r in own.items()} for a, own in pairs.items()}


def scale_columns(scales: Mapping[str, Tensor], heads: Heads) -> dict[str, dict[None, Tensor]]:
    """Return learned scales as maps: `scale` and `scale_query`, as far as the adapter has them.

    Args:
        scales: What `seal_peft.scales` returns.
        heads: The heads of the model.
    """
    found: dict[str, dict[None, Tensor]] = {}
    for position, layer in enumerate(heads.layers):
        beside = layer.name.rpartition(".")[0] + "."
        for name, values in scales.items():
            if name != layer.name and not name.startswith(beside):
                continue
            column = "scale" if name == layer.name else "scale_query"
            per_head = values.mean(-1) if values.dim() == 2 else values
            maps = found.setdefault(column, {None: torch.full(heads.shape, torch.nan)})
            maps[None][position, : len(per_head)] = per_head
    return found
