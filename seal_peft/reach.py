"""How many tokens a model reads with an adapter: its window, and what the adapter's context extension makes of it."""

from __future__ import annotations

from typing import Any

from peft import PeftModel

from .context.rope import read_rope
from .context.self_extend import extended_window, read_self_extend
from .data import window_of


def reach(model: Any) -> int | None:
    """Return how many tokens a model's positions reach with its active adapter; `None` where there is no such limit.

    Nothing is computed with weights: a model on the meta device will do.

    Args:
        model: A plain model, or one with an adapter of any PEFT method.
    """
    window = window_of(model.config)
    if isinstance(model, PeftModel):
        for extension in _EXTENSIONS:
            window = window if window is None else extension(window, model)
    return window


def _by_rope(window: int, model: PeftModel) -> int:
    """RoPE that the adapter brings; it is in force already, and its parameters say how far it reaches."""
    if getattr(model.active_peft_config, "rope_parameters", None) is None:
        return window
    parameters = read_rope(model.get_base_model()) or {}
    kinds = [kind for kind in parameters.values() if isinstance(kind, dict)] or [parameters]
    # All but `dynamic` have their factor in the maximum already: `apply_rope` raised it.
    factor = max(kind["factor"] if kind.get("rope_type") == "dynamic" else 1 for kind in kinds)
    return int(factor * parameters["max_position_embeddings"])


def _by_self_extend(window: int, model: PeftModel) -> int:
    """Self-Extend that the adapter brings, in force already."""
    settings = read_self_extend(model.get_base_model())
    return window if settings is None else extended_window(window, settings)


# In the order in which they act: each is given the window that the ones before it reach.
_EXTENSIONS = (_by_rope, _by_self_extend)
