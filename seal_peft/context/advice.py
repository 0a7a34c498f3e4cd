"""Which context extension reaches a length: settings in tokens, from a model's config alone."""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.utils import logging

from .probe import rotary_layers
from .rope import apply_rope, reach_of, read_rope, resolve_rope, rotary_modules, text_config
from .self_extend import extended_window

# The authors' rule: the positions in use should stay within this share of those that the model was trained on.
_SHARES = 2 / 3, 1 / 2
# Of the native length; the authors' windows for Llama-2 are an eighth to three eighths of it.
_WINDOW_SHARE = 1 / 8

# Factors are whole quarters, so that windows stay whole numbers, up to this; angles may be off by float32's rounding.
_LARGEST, _ROUNDING = 400_000, 1 + 1e-5

_NOTES = {
    "linear": "squeezes all positions, also of short texts; few models bear it untrained",
    "dynamic": "exact up to the native length; keys in a cache keep the frequencies of their time",
    "ntk": "raises the base of the rotation once, which engines serve as rope_theta",
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

    Factors are the smallest that reach, rounded up to quarters. A RoPE reaches a length within which no rotated pair
    of channels turns to an angle that the model has not seen; pairs that made a full turn within the native length
    have seen all. The static NTK-aware base needs a factor above the ratio of the lengths for that: it slows down the
    slowest pair by its factor, and those before it by less. For Self-Extend the window `W` is an eighth of the
    length `L` that the model reads already, and the group `G` is the smallest that keeps the authors' rule with 2/3:
    `2/3 L > W + (length - W) / G`. The note names the group that keeps it with 1/2.

    Args:
        config: The model's config. A model is built from it without weights, to see what it takes. How it rotates only
            its weights show, so the loaded model may still refuse Self-Extend, and the note says so.
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
    model = _without_weights(config)
    own = read_rope(model)
    if own is None:
        raise ValueError(
            f"{type(model).__name__} has no rotary position embedding that this package knows, so nothing extends it."
        )
    window = reach_of(own)
    if length <= window:
        return [Advice("none", {}, window, "within the model's own window")]
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # what transformers thinks of factors that are only tried is nobody's concern
    try:
        return [*(_rope(model, kind, length, window) for kind in _NOTES), _self_extend(model, length, window)]
    finally:
        logging.set_verbosity(verbosity)


def _without_weights(config: PreTrainedConfig) -> nn.Module:
    with torch.device("meta"):
        try:
            return cast(nn.Module, AutoModelForCausalLM.from_config(config))
        except ValueError:  # of a model that reads images, too, say
            return cast(nn.Module, AutoModel.from_config(config))


def _rope(model: nn.Module, kind: str, length: int, window: int) -> Advice:
    def holds(quarters: int, tokens: int) -> bool:
        applied = apply_rope(model, {"rope_type": kind, "factor": quarters / 4})
        try:
            longest, turned = reach_of(read_rope(model) or {}), _angles(model, tokens)
        finally:
            applied.restore()
        return tokens <= longest and bool(((seen >= 2 * math.pi) | (turned <= seen * _ROUNDING)).all())

    try:
        # What a factor multiplies: of a model that is extended already, not always its window.
        unit = reach_of(resolve_rope(model, {"rope_type": kind, "factor": 1000.0})) // 1000
        least = math.ceil(4 * length / unit)
        apply_rope(model, {"rope_type": kind, "factor": least / 4}).restore()
        seen = _angles(model, window)
        quarters = bisect_left(range(_LARGEST), True, lo=least, key=lambda value: holds(value, length))
    except ValueError as error:
        return Advice(kind, None, 0, str(error))
    if not holds(quarters, length):
        return Advice(kind, None, 0, "whatever its factor, some channels turn to angles that the model has not seen")
    longest = int(quarters * unit / 4)
    beyond = bisect_left(range(longest + 1), True, lo=length, key=lambda tokens: not holds(quarters, tokens))
    note = _NOTES[kind] + ("; reaches less than its window" if beyond <= longest else "")
    return Advice(kind, {"rope_parameters": {"rope_type": kind, "factor": quarters / 4}}, beyond - 1, note)


def _angles(model: nn.Module, length: int) -> torch.Tensor:
    """How far each rotated pair of channels in full attention turns, in radians, in texts of up to a length."""
    config = text_config(model)
    assert config is not None
    with torch.device("cpu"):  # the model has none, being on the meta device
        rotary: Any = type(rotary_modules(model, config)[0])(config)
    layer = "full_attention" if isinstance(rotary.rope_type, dict) else None
    kind = str(rotary.rope_type[layer] if layer else rotary.rope_type)
    if kind not in ("dynamic", "longrope"):
        return length * getattr(rotary, f"{layer}_inv_freq" if layer else "inv_freq")
    # They slow down as a text grows, so a shorter one may turn a pair further; most just before they begin to.
    rope = config.rope_parameters[layer] if layer else config.rope_parameters
    starts = rope.get("original_max_position_embeddings"), config.max_position_embeddings
    lengths = {n for n in (*starts, *(length * part // 64 for part in range(1, 65))) if n and n <= length}
    turned = [
        n * ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), seq_len=n, layer_type=layer)[0] for n in lengths
    ]
    return torch.stack(turned).amax(0)


def _self_extend(model: nn.Module, length: int, window: int) -> Advice:
    try:
        rotary_layers(model)
    except ValueError as error:
        return Advice("self_extend", None, 0, str(error))
    except RuntimeError:  # its layers need values that the meta device does not have
        pass
    near = max(1, int(window * _WINDOW_SHARE))
    groups = [math.floor((length - near) / (share * window - near)) + 1 for share in _SHARES]
    settings = {"group_size": groups[0], "window": near}
    note = (
        "needs this package where it runs; may be refused by the loaded model; "
        f"group_size={groups[1]} keeps to half of the native positions"
    )
    return Advice("self_extend", {"self_extend": settings}, extended_window(window, settings), note)
