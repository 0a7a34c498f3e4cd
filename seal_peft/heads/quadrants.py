"""The quadrant test: heads that hurt, or help, at two lengths, and adapters that turn them down or up.

Source: "SEAL: Scaling to Emphasize Attention for Long-Context Retrieval", ACL 2025, arXiv 2501.15225, figure 2d.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from ..tuner import SealConfig, SealLayer, save_adapter
from .layers import Heads


def quadrants(shorter: Tensor, longer: Tensor) -> Tensor:
    """Sort heads by the signs of what pruning changes at two lengths.

    Args:
        shorter: `(layers, heads)`, from `pruning_map` (or `gradient_map`), means over samples; above 0 pruning helps.
        longer: The same at another length.

    Returns:
        `(layers, heads)`: 1 pruning helps at both lengths, 2 at the longer only, 3 hurts at both, 4 helps at the
        shorter only; 0 where a value is 0 or missing.
    """
    found = torch.zeros(shorter.shape, dtype=torch.long)
    for number, (right, up) in {1: (1, 1), 2: (-1, 1), 3: (-1, -1), 4: (1, -1)}.items():
        found[(shorter.sign() == right) & (longer.sign() == up)] = number
    return found


def parse_factors(text: str) -> dict[int, float]:
    """Read what to do with which quadrant.

    Args:
        text: Such as `Q1=0.9,Q3=1.1`.

    Raises:
        ValueError: It is written otherwise.
    """
    factors: dict[int, float] = {}
    for part in text.split(","):
        name, _, value = part.strip().partition("=")
        try:
            factor = float(value)
        except ValueError:
            factor = math.nan
        if name not in ("Q1", "Q2", "Q3", "Q4") or int(name[1]) in factors or not math.isfinite(factor):
            raise ValueError(f"{text!r} does not say which quadrants get which factor. Write Q1=0.9,Q3=1.1, say.")
        factors[int(name[1])] = factor
    return factors


def quadrant_scales(found: Tensor, factors: Mapping[int, float]) -> Tensor:
    """Return a scale per head `(layers, heads)`: the factor of its quadrant, 1 elsewhere.

    Args:
        found: The quadrant of each head, `(layers, heads)`, as `quadrants` gives it.
        factors: Number of a quadrant -> factor of its heads.

    Returns:
        fp32 scales for `save_head_scales`.
    """
    scales = torch.ones(found.shape)
    for number, factor in factors.items():
        scales[found == number] = factor
    return scales


def save_head_scales(heads: Heads, scales: Tensor | Sequence[Tensor], folder: str | os.PathLike[str]) -> Path:
    """Save chosen scales of heads as a SEAL adapter like any other.

    Args:
        heads: The heads of a plain model, which is left as it was.
        scales: `(layers, heads)`, 1 for unchanged.
        folder: Adapter folder to write.

    Returns:
        The folder.

    Raises:
        ValueError: The model has an adapter already, or a scale is not finite.
    """
    base: nn.Module = heads.base
    if isinstance(heads.model, PeftModel) or getattr(base, "peft_config", None):
        raise ValueError("Chosen scales are saved for a plain model: give one without adapters.")
    names = [layer.name for layer in heads.layers]
    trained = [parameter for parameter in base.parameters() if parameter.requires_grad]
    wrapped = get_peft_model(base, SealConfig(task_type="CAUSAL_LM", target_modules=names))
    try:
        with torch.no_grad():
            for layer, own in zip(heads.layers, scales, strict=True):
                own = own[: layer.geometry.num_heads]
                if not own.isfinite().all():
                    raise ValueError(f"Scales of {layer.name} are not finite: {own.tolist()}.")
                cast(SealLayer, base.get_submodule(layer.name)).offset("default").copy_(own - 1)
        return save_adapter(wrapped, folder)
    finally:
        wrapped.unload()
        for attribute in ("peft_config", "active_adapter"):
            if hasattr(base, attribute):
                delattr(base, attribute)
        for parameter in trained:
            parameter.requires_grad_(True)
