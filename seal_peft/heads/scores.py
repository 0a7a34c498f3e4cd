"""Each score of `seal-peft heads` from samples to maps, by length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from .direct_effect import DirectEffect, direct_effect
from .gradient import gradient_map
from .inputs import EncodedSample
from .layers import Heads, parse_head
from .maps import summarise
from .pruning import prune_channels, pruning_map
from .retrieval import retrieval_map

ByLength = Mapping[int, Sequence[EncodedSample]]


@dataclass
class Score:
    """What a score found.

    Attributes:
        maps: `(samples, layers, heads)` by name of the map and length.
        channels: `(heads, channels)` means by length and name of the layer, for scores of channels.
        more: Anything else, as JSON values.
    """

    maps: dict[str, dict[int, Tensor]] = field(default_factory=dict)
    channels: dict[str, Tensor] = field(default_factory=dict)
    more: dict[str, Any] = field(default_factory=dict)

    def put(self, name: str, length: int, values: Tensor) -> None:
        """Add a map."""
        self.maps.setdefault(name, {})[length] = values


def score_gradient(
    heads: Heads, rows: ByLength, sites: Sequence[Any], activation_checkpointing: bool = False
) -> Score:
    """Run `gradient_map` for every length."""
    score = Score()
    for length, own in rows.items():
        for site, found in gradient_map(heads, own, sites, activation_checkpointing).items():
            values = heads.empty(len(own))
            for position, (layer, grads) in enumerate(zip(heads.layers, found, strict=True)):
                if site == "output":
                    score.channels[f"{length}.{layer.name}"] = grads.mean(0)
                    grads = grads.sum(-1)
                values[:, position, : grads.shape[1]] = grads
            score.put("gradient" if site == "output" else f"gradient_{site}", length, values)
    return score


def score_pruning(
    heads: Heads, rows: ByLength, ablations: Sequence[Any], channels_of: Sequence[str], batch_tokens: int
) -> Score:
    """Run `pruning_map` for every length and ablation, and `prune_channels` for some heads."""
    score = Score(more={"base": {}, "channels": {}})
    for length, own in rows.items():
        for ablation in ablations:
            pruned = pruning_map(heads, own, ablation, batch_tokens)
            score.put(f"pruning_{ablation}", length, pruned.logprob)
            score.put(f"pruning_{ablation}_tokens", length, pruned.tokens)
            score.put(f"pruning_{ablation}_exact", length, pruned.exact)
            score.more["base"][length] = {name: summarise(values) for name, values in pruned.base._asdict().items()}
        for name in channels_of:
            found = prune_channels(heads, own, *parse_head(name, heads), ablations[0], batch_tokens)
            score.more["channels"].setdefault(name, {})[length] = summarise(found.logprob)
    return score


def score_retrieval(heads: Heads, rows: ByLength) -> Score:
    """Run `retrieval_map` for every length."""
    score = Score()
    for length, own in rows.items():
        found = retrieval_map(heads, own)
        score.put("retrieval_copy", length, found.copy)
        score.put("retrieval_mass", length, found.mass)
    return score


def score_direct_effect(heads: Heads, rows: ByLength) -> Score:
    """Run `direct_effect` for every length; `more["wrong"]` keeps the wrong tokens."""
    score = Score(more={"parts": {}, "wrong": {}})
    for length, own in rows.items():
        score.more["wrong"][length] = add_direct_effect(score, heads, length, own, None, "")
    return score


def add_direct_effect(
    score: Score,
    heads: Heads,
    length: int,
    rows: Sequence[EncodedSample],
    wrong: Sequence[int] | None,
    suffix: str,
) -> list[int]:
    """Add the direct effect at one length under names that end in `suffix`; return the wrong tokens."""
    found = direct_effect(heads, rows, wrong)
    both: dict[str, DirectEffect] = {"direct_logit": found.logit, "direct_difference": found.difference}
    for name, effect in both.items():
        score.put(name + suffix, length, effect.heads)
        score.more["parts"].setdefault(name + suffix, {})[length] = {
            part: summarise(values) for part, values in effect._asdict().items() if part != "heads"
        }
    return found.wrong
