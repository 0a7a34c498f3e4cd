"""How many tokens a model reads with an adapter: its window, and what the adapter's context extension makes of it."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

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


def _extended(window: int | None, settings: dict[str, int] | None) -> int | None:
    return window if window is None or settings is None else extended_window(window, settings)
