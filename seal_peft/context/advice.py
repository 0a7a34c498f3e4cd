"""Which context extension reaches a length: settings in tokens, from a model's config alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

from .probe import rotary_layers
from .rope import apply_rope, reach_of, read_rope, resolve_rope
from .self_extend import extended_window

# The authors' rule: the positions in use should stay within this share of those that the model was trained on.
_SHARES = 2 / 3, 1 / 2
# Of the native length; the authors' windows for Llama-2 are an eighth to three eighths of it.
_WINDOW_SHARE = 1 / 8

_NOTES = {
    "linear": "squeezes all positions, also of short texts; few models bear it untrained",
    "dynamic": "exact up to the native length; keys in a cache keep the frequencies of their time",
    "ntk": "raises the base of the rotation once; every engine serves it as rope_theta",
    "yarn": "leaves fast frequencies alone; the usual choice, and engines serve it",
}


@dataclass(frozen=True)
class Advice:
    """One way to reach a length.

    Attributes:
        method: `"none"`, a RoPE type, or `"self_extend"`.
        settings: Arguments of `SealConfig`; `None` if the model does not take the method.
        reach: How many tokens the settings reach, 0 if the model does not take the method.
        note: What to know about it, or why it is not possible.
    """

    method: str
    settings: dict[str, Any] | None
    reach: int
    note: str


def advise(config: PreTrainedConfig, length: int) -> list[Advice]:
    """Say which settings let a model read a length.

    Factors are the smallest that reach, rounded up to two digits. For Self-Extend the window `W` is an eighth of the
    length `L` that the model reads already, and the group `G` is the smallest that keeps the authors' rule with 2/3:
    `2/3 L > W + (length - W) / G`. The note names the group that keeps it with 1/2.

    Args:
        config: The model's config. A model is built from it without weights, to see what it takes.
        length: Target length in tokens, the answer included.

    Returns:
        One entry a method.

    Raises:
        ValueError: The length is not positive, or the model has no rotary position embedding.

    Example:
        ```python
        for advice in advise(AutoConfig.from_pretrained("my/model"), 32768):
            print(advice.method, advice.settings, advice.reach)
        ```
    """
    if isinstance(length, bool) or not isinstance(length, int) or length < 1:
        raise ValueError(f"length={length!r} is not allowed. Use a positive whole number of tokens.")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    own = read_rope(model)
    if own is None:
        raise ValueError(
            f"{type(model).__name__} has no rotary position embedding that this package knows, so nothing extends it."
        )
    window = reach_of(own)
    if length <= window:
        return [Advice("none", {}, window, "the model's own positions reach")]
    return [*(_rope(model, kind, length, window) for kind in _NOTES), _self_extend(model, length, window)]


def _rope(model: nn.Module, kind: str, length: int, window: int) -> Advice:
    try:
        # What a factor multiplies: of a model that is extended already, not always its window.
        asked = {"rope_type": kind, "factor": 1000.0}
        unit = reach_of(resolve_rope(model, asked)) // 1000
        factor = math.ceil(100 * length / unit) / 100
        request = {"rope_type": kind, "factor": factor}
        apply_rope(model, request).restore()
    except ValueError as error:
        return Advice(kind, None, 0, str(error))
    return Advice(kind, {"rope_parameters": request}, int(factor * unit), _NOTES[kind])


def _self_extend(model: nn.Module, length: int, window: int) -> Advice:
    try:
        rotary_layers(model)
    except ValueError as error:
        return Advice("self_extend", None, 0, str(error))
    near = max(1, int(window * _WINDOW_SHARE))
    groups = [math.floor((length - near) / (share * window - near)) + 1 for share in _SHARES]
    settings = {"group_size": groups[0], "window": near}
    note = f"needs this package where it runs; group_size={groups[1]} keeps to half of the native positions"
    return Advice("self_extend", {"self_extend": settings}, extended_window(window, settings), note)
