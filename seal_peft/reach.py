"""How many tokens a model reads with an adapter: its window, and what the adapter's context extension makes of it."""

from __future__ import annotations

from typing import Any

from peft import PeftModel

from .context.self_extend import extended_window, read_self_extend
from .data import window_of


def reach(model: Any) -> int | None:
    """Return how many tokens a model's positions reach with its active adapter; `None` where there is no such limit.

    Nothing is computed with weights: a model on the meta device will do.

    Args:
        model: A plain model, or one with an adapter of any PEFT method.
    """
    window = window_of(model.config)  # RoPE that an adapter brings is in force, and so in the config
    if window is None or not isinstance(model, PeftModel):
        return window
    settings = read_self_extend(model.get_base_model())
    return window if settings is None else extended_window(window, settings)
