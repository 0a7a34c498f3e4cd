"""RoPE in a saved `config.json` as transformers 4 reads it, beside the form of transformers 5."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from .context.rope_values import NATIVE, plain
from .files import read_json, write_json

_FULL, _SLIDING = "full_attention", "sliding_attention"
_UNSCALED = {"rope_type", "rope_theta", "partial_rotary_factor"}
# What transformers 4.57 does otherwise: models with names of their own for the base, and without scaling.
_OTHER_NAMES = {"gpt_neox", "gpt_neox_japanese", "modernbert", "modernbert-decoder"}
_UNSCALABLE = {"llama4_text", "nemotron", "olmo", "olmo2"}


def add_older_form(folder: Path, config: PreTrainedConfig) -> bool:
    """Say the RoPE of a saved model in both forms, if both mean the same to the installed transformers.

    transformers 4 does not know `rope_parameters`: without a word it would run the default RoPE.

    Args:
        folder: Of the saved model.
        config: The model's config.

    Returns:
        Whether the folder says it in both forms now, or has no RoPE; otherwise it is as it was.
    """
    text = config.get_text_config()
    parameters = getattr(text, "rope_parameters", None)
    if not parameters:
        return True
    path = folder / "config.json"
    saved = read_json(path)
    part = saved if text is config else saved.get("text_config")
    older = _older(plain(parameters), text.model_type)
    if part is None or older is None:
        return False
    write_json(path, {**saved, **older} if text is config else {**saved, "text_config": {**part, **older}})
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", FutureWarning)
            read = type(config).from_pretrained(folder).get_text_config()
        same = plain(read.rope_parameters) == plain(parameters)
    except (AttributeError, FutureWarning, KeyError, TypeError, ValueError):  # a model that never had the older form
        same = False
    if not same:
        write_json(path, saved)
    return same


def _older(rope: Mapping[str, Any], model_type: str) -> dict[str, Any] | None:
    """The same in the older form; `None` if that has no words for it, or transformers 4 none for such a model."""
    by_layer = {name: value for name, value in rope.items() if isinstance(value, Mapping)}
    sliding = by_layer.pop(_SLIDING, None)
    if set(by_layer) - {_FULL} or (sliding is not None and (sliding["rope_type"] != "default" or not by_layer)):
        return None
    full = by_layer.get(_FULL, rope)
    if model_type in _OTHER_NAMES and (by_layer or full["rope_theta"] != 10_000):
        return None
    if model_type in _UNSCALABLE and set(full) - _UNSCALED:
        return None
    older = {name: full[name] for name in ("rope_theta", "partial_rotary_factor") if name in full}
    if sliding is not None:
        older["rope_local_base_freq"] = sliding["rope_theta"]
        if not model_type.startswith("gemma3") and sliding["rope_theta"] != full["rope_theta"]:
            return None
    if full["rope_type"] == "longrope":
        older[NATIVE] = full[NATIVE]
    if full["rope_type"] != "default" or set(full) - _UNSCALED:
        # In full, because where there is one, transformers 5 takes it instead of `rope_parameters`.
        older["rope_scaling"] = dict(full)
    elif full is rope:
        older["rope_scaling"] = None  # gpt-oss would be under YaRN without
    return older
