"""How many tokens a model reads with an adapter: its window, and what the adapter's context extension makes of it."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

from .context.rope import reach_of, read_rope
from .context.self_extend import check_settings, extended_window, read_self_extend
from .data import window_of
from .tuner import SealConfig


def reach(model: Any) -> int | None:
    """Return how many tokens a model's positions reach with its active adapter; `None` where there is no such limit.

    Nothing is computed with weights: a model on the meta device will do.

    Args:
        model: A plain model, or one with an adapter of any PEFT method.
    """
    # RoPE that an adapter brings is in force, and so in the config.
    return _extended(window_of(model.config), read_self_extend(model))


def reach_of_folder(model_config: PretrainedConfig) -> int | None:
    """Return how many tokens a saved model reads as `load_model` loads it; `None` where there is no such limit.

    Args:
        model_config: As `load_config` gives it. Self-Extend that it notes counts.

    Raises:
        ValueError: It notes what is no Self-Extend.
    """
    noted = getattr(model_config.get_text_config(), "self_extend", None)
    return _extended(window_of(model_config), None if noted is None else check_settings(noted))


def idle_extensions(model: Any, longest: int) -> list[str]:
    """Say which settings that an adapter brings to read further are of no use in training on texts of some length.

    Args:
        model: A model with an adapter.
        longest: Tokens of the longest text.

    Returns:
        A sentence for each, with what to do about it. What the base has by itself is not meant.
    """
    settings, rope, found = read_self_extend(model), read_rope(model), []
    for config in _active_configs(model):
        if config.self_extend is not None and settings is not None and longest <= settings["window"]:
            found.append(
                f"Self-Extend is never in force in this training: the longest sample has {longest} tokens, and its "
                f"window is {settings['window']}. Train on longer samples, or give a smaller window."
            )
        if config.rope_parameters is None or rope is None or config.base_rope is None:
            continue
        asked = [value for value in config.rope_parameters.values() if isinstance(value, dict)]
        asked = asked or [config.rope_parameters]
        kinds = {one.get("rope_type", one.get("type")) for one in asked}
        if kinds == {"dynamic"} and longest <= (native := rope["max_position_embeddings"]):
            found.append(
                f"rope_type 'dynamic' is never in force in this training: the longest sample has {longest} tokens, "
                f"and up to {native} it changes nothing. Train on longer samples, or choose another rope_type."
            )
        if any((one.get("factor") or 1) > 1 for one in asked) and reach_of(rope) <= reach_of(config.base_rope):
            found.append(
                f"rope_parameters={config.rope_parameters} bring no longer window: the model reads {reach_of(rope)} "
                "tokens. Give a larger factor, or leave original_max_position_embeddings out; `seal-peft advise` says "
                "which settings reach a length."
            )
    return found


def _active_configs(model: Any) -> list[SealConfig]:
    if not getattr(model, "peft_config", None):
        return []
    active = model.active_adapters
    names = active() if callable(active) else active  # a method of transformers' models
    return [config for name in names if isinstance(config := model.peft_config[name], SealConfig)]


def _extended(window: int | None, settings: dict[str, int] | None) -> int | None:
    return window if window is None or settings is None else extended_window(window, settings)
