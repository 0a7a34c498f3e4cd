"""How many tokens a model reads with an adapter: its window, and what the adapter's context extension makes of it."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

from .context.rope import read_rope
from .context.self_extend import check_settings, extended_window, read_self_extend
from .data import window_of


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
    """Say what an adapter brings to read further that changes nothing for texts of up to a length.

    Args:
        model: A model with an adapter.
        longest: Tokens of the longest text.

    Returns:
        A sentence for each, with what to do about it.
    """
    configs = getattr(model, "peft_config", {}).values()
    settings, rope, found = read_self_extend(model), read_rope(model), []
    own = any(getattr(config, "self_extend", None) for config in configs)  # what a base has is nobody's mistake here
    if settings is not None and own and longest <= settings["window"]:
        found.append(
            f"Self-Extend is never in force in this training: the longest sample has {longest} tokens, and its window "
            f"is {settings['window']}. Train on longer samples, or give a smaller window."
        )
    kinds = {kind for config in configs for kind in _kinds(getattr(config, "rope_parameters", None) or {})}
    if rope is not None and kinds == {"dynamic"} and longest <= (native := rope["max_position_embeddings"]):
        found.append(
            f"rope_type 'dynamic' is never in force in this training: the longest sample has {longest} tokens, and up "
            f"to {native} it changes nothing. Train on longer samples, or choose another rope_type."
        )
    return found


def _kinds(rope_parameters: dict[str, Any]) -> list[Any]:
    """The types asked for, one a type of layers where they are given so."""
    each = [value for value in rope_parameters.values() if isinstance(value, dict)] or [rope_parameters]
    return [parameters.get("rope_type", parameters.get("type")) for parameters in each]


def _extended(window: int | None, settings: dict[str, int] | None) -> int | None:
    return window if window is None or settings is None else extended_window(window, settings)
