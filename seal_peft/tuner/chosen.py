"""Adapters of chosen heads only: `target_heads=["L14H7", ...]`, named by layer and head, both from 0."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .config import SealConfig
    from .layer import SealLayer
    from .offset import ScaleOffset


def check_names(names: Sequence[str]) -> list[str]:
    """Return names of heads as a list.

    Raises:
        ValueError: They are not different names such as `L14H7`.
    """
    valid = not isinstance(names, str) and all(re.fullmatch(r"L(0|[1-9]\d*)H(0|[1-9]\d*)", str(n)) for n in names)
    if not valid or not names or len(set(names)) < len(names):
        raise ValueError(
            f"target_heads={names!r} is not allowed. Use a list of different heads such as ['L14H7', 'L20H1'] "
            "(layer 14, head 7, both from 0), or None for all."
        )
    return list(names)


def chosen_heads(config: SealConfig, name: str) -> list[int] | None:
    """Return the heads of a module that get a scale; `None` for all of them.

    Args:
        config: The adapter's config.
        name: Full name of the module. Its first number is that of its layer.
    """
    if config.target_heads is None:
        return None
    start = _layer(name)
    return [int(head.removeprefix(start)) for head in config.target_heads if head.startswith(start)]


def check_chosen(config: SealConfig, found: Mapping[str, int], all_found: Callable[[], Mapping[str, int]]) -> None:
    """Make sure that every chosen head exists.

    Args:
        config: The adapter's config.
        found: Number of heads of each module that is adapted, by name.
        all_found: Returns the same of each module that would be adapted if all heads were chosen.

    Raises:
        ValueError: A chosen head is in none of them, or the name of one is that of several, as where an encoder and a
            decoder count their layers from 0.
    """
    if config.target_heads is None:
        return
    modules: dict[str, str] = {}
    for name in found:
        parent = name.rpartition(".")[0]
        if (other := modules.setdefault(_layer(name), parent)) != parent:
            raise ValueError(
                f"target_heads={config.target_heads} cannot tell the heads of {other} from those of {parent}: both "
                f"begin with {_layer(name)}. Leave one of them out with `exclude_modules`, or take all heads."
            )
    known = {f"{_layer(name)}{head}" for name, heads in found.items() for head in range(heads)}
    missing = [head for head in config.target_heads if head not in known]
    if missing:
        raise ValueError(
            f"target_heads names heads that the model does not have, or that other settings leave out: "
            f"{', '.join(missing)}. Heads to choose from: {_describe(all_found())}. They are named L14H7: layer 14, "
            "head 7, both from 0."
        )


def keep_chosen(layer: SealLayer, adapter_name: str, config: SealConfig, name: str) -> None:
    """Let an adapter scale the chosen heads of its layer and no others.

    Args:
        layer: A layer that has the adapter.
        adapter_name: Which adapter.
        config: Its config.
        name: Full name of the module.
    """
    heads = chosen_heads(config, name)
    if heads is not None:
        cast("ScaleOffset", layer.seal_delta[adapter_name]).choose(heads)


def only_chosen(config: SealConfig, name: str, offset: Tensor) -> Tensor:
    """Return saved offsets of a module with 0 for the heads that a config, perhaps edited since, does not choose."""
    heads = chosen_heads(config, name)
    if heads is None:
        return offset
    kept = torch.zeros_like(offset)
    kept[heads] = offset[heads]
    return kept


def _describe(found: Mapping[str, int]) -> str:
    """Say which layers have which heads: `L0 to L5, L7 with H0 to H3; L6 with H0 to H7`."""
    layers: dict[int, set[int]] = {}
    for name, heads in found.items():
        if number := _number(name):
            layers.setdefault(heads, set()).add(int(number))
    return "; ".join(f"{_ranges(numbers)} with H0 to H{heads - 1}" for heads, numbers in layers.items()) or "none"


def _ranges(numbers: set[int]) -> str:
    first, last = (sorted(n for n in numbers if n + step not in numbers) for step in (-1, 1))
    return ", ".join(f"L{a}" if a == b else f"L{a} to L{b}" for a, b in zip(first, last, strict=True))


def _layer(name: str) -> str:
    """How the names of a layer's heads begin."""
    return f"L{_number(name) or '?'}H"


def _number(name: str) -> str | None:
    number = re.search(r"\.(\d+)\.", f".{name}.")
    return number[1] if number else None
