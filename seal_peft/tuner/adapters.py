"""Adapters as things to adjust and combine: strength, weighted sums, swapping in place, and what is left to merge."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, get_args

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper, PeftType, load_peft_weights
from torch import nn

from .config import SealConfig, Site
from .layer import SealLayer
from .positions import check_same_positions
from .reading import read_adapter
from .scales import layers_with
from .weights import SCALES, checked_weights


def set_strength(model: nn.Module, alpha: float, adapter_name: str = "default") -> None:
    """Set how strongly an adapter acts: its scales become `1 + alpha * (s - 1)`.

    1 is the adapter as trained, 0 the base model (under the RoPE that the adapter brings, if any), values between
    interpolate, values above extrapolate. The strength is a setting of the model in memory and is not saved, and it
    stays when another adapter is swapped in. `add_weighted_adapter(["default"], [alpha], "name")` makes an adapter of
    that strength; its weights are of adapters as trained, whatever strength was set.

    Args:
        model: A model that carries the adapter.
        alpha: The strength, any finite number.
        adapter_name: Which adapter.

    Raises:
        ValueError: The model has no such adapter, it is merged, or `alpha` is not finite.

    Example:
        ```python
        seal_peft.set_strength(model, 0.5)  # half way between the base model and the adapter
        ```
    """
    if not math.isfinite(alpha):
        raise ValueError(
            f"alpha={alpha} is not allowed. Use a finite number: 1 is the adapter as trained, 0 the base."
        )
    for layer in _unmerged_layers(model, adapter_name):
        layer.seal_alpha[adapter_name] = float(alpha)


def hotswap_adapter(model: nn.Module, model_id: str | os.PathLike[str], adapter_name: str = "default") -> None:
    """Replace the scales of an adapter by those of a saved one, in place and without recompilation.

    Layers that the saved adapter does not hold become the identity. Everything is checked before anything changes. An
    adapter that was trained on a base with other RoPE parameters warns, as in loading.

    Args:
        model: A model that carries an adapter of this name, compiled or not.
        model_id: Folder or Hub id of the adapter to swap in.
        adapter_name: Which adapter of the model to overwrite.

    Raises:
        ValueError: There is no such adapter, or its files do not fit: another method or granularity, layers that the
            model's adapter lacks, other `rope_parameters` or `self_extend`, whole modules beside the scales, or values
            that are not finite; or the adapter to overwrite is merged.

    Example:
        ```python
        seal_peft.hotswap_adapter(model, "runs/demo/adapter")
        ```
    """
    layers = layers_with(model, adapter_name)
    _unmerged_layers(model, adapter_name)
    config = read_adapter(str(model_id))
    if not isinstance(config, SealConfig):
        method = PeftType(config.peft_type).value
        raise ValueError(f"{model_id} is an adapter of type {method}, so it cannot replace a SEAL adapter.")
    weights = checked_weights(config, load_peft_weights(str(model_id), device="cpu"))
    check_same_positions(config, model, adapter_name)
    _check_same_heads(config, getattr(model, "peft_config", {}).get(adapter_name), model_id)
    if _trains_modules(model, adapter_name) or not all(key.endswith(SCALES) for key in weights):
        raise ValueError(
            f"{model_id} or adapter {adapter_name!r} of the model trains modules in full (`modules_to_save`), which "
            "are not swapped. Load it as an adapter of its own and switch with `set_adapter`."
        )
    saved = {key.removeprefix("base_model.model.").removesuffix(SCALES): value for key, value in weights.items()}
    if unknown := sorted(set(saved) - set(layers)):
        raise ValueError(
            f"{model_id} scales layers that adapter {adapter_name!r} of this model does not have: {unknown[:3]}. "
            "Create the adapter with the same target modules first, then swap."
        )
    for name, value in saved.items():
        own = layers[name].offset(adapter_name)
        if value.shape != own.shape:
            raise ValueError(
                f"{model_id} does not fit layer {name}: its scales have shape {tuple(value.shape)}, those of adapter "
                f"{adapter_name!r} of the model {tuple(own.shape)}. Heads, head_dim and granularity must be the same."
            )
        if not torch.isfinite(value).all():
            raise ValueError(f"{model_id} holds NaN or infinite scales in layer {name}; do not use it.")
    with torch.no_grad():
        for name, layer in layers.items():
            weight = layer.offset(adapter_name)
            weight.copy_(saved[name]) if name in saved else weight.zero_()


def check_weighted(model: Any, adapters: list[str], weights: list[float], adapter_name: str) -> None:
    """Check what `add_weighted_adapter` is asked for.

    Raises:
        ValueError: A name is unknown or taken, weights are missing or not finite, or an adapter is of another method
            or trains whole modules.
    """
    known = model.peft_config
    if adapter_name in known:
        raise ValueError(f"There already is an adapter named {adapter_name!r}. Delete it or choose another name.")
    if not adapter_name or "." in adapter_name or hasattr(nn.ModuleDict(), adapter_name):
        raise ValueError(f"PyTorch does not allow an adapter to be named {adapter_name!r}. Choose another name.")
    if unknown := [name for name in adapters if name not in known]:
        raise ValueError(f"Unknown adapters {unknown}. The model has: {', '.join(known)}.")
    if others := [name for name in adapters if not isinstance(known[name], SealConfig)]:
        raise ValueError(f"Cannot combine {others}: they are not SEAL's, and only its adapters add up.")
    if not adapters or len(adapters) != len(weights) or not all(map(math.isfinite, weights)):
        raise ValueError(f"Give one finite weight per adapter; got {len(adapters)} adapters and weights={weights}.")
    if whole := [name for name in adapters if _trains_modules(model, name)]:
        raise ValueError(
            f"Cannot combine {whole}: they train modules in full (`modules_to_save`), not by scales alone."
        )


def weighted_config(
    configs: Mapping[str, Any], adapters: Sequence[str], layers: Mapping[str, SealLayer]
) -> SealConfig:
    """Return the config of the weighted sum of some adapters, which names every layer in full."""
    parts: list[SealConfig] = [configs[adapter] for adapter in adapters]
    by_site = {site: [name for name, layer in layers.items() if layer.site == site] for site in get_args(Site)}
    first = parts[0]
    return replace(
        first,
        granularity="channel" if any(part.granularity == "channel" for part in parts) else "head",
        sites=tuple(site for site, names in by_site.items() if names),
        target_modules=by_site["output"] or first.target_modules,
        query_modules=by_site["query"] or None,
        exclude_modules=None,
        target_heads=None,
        layers_to_transform=None,
        layers_pattern=None,
        num_attention_heads=_shared([part.num_attention_heads for part in parts]),
        head_dim=_shared([part.head_dim for part in parts]),
        heads=None,
        init_weights=True,
        inference_mode=True,
    )


def write_weighted_sum(layer: SealLayer, adapters: Sequence[str], weights: Sequence[float], adapter_name: str) -> None:
    """Write `sum(weight * offset)` over a layer's adapters into another one; one per head is spread over channels."""
    target = layer.offset(adapter_name)
    total = torch.zeros_like(target)
    for name, weight in zip(adapters, weights, strict=True):
        if name in layer.seal_delta:
            offset = layer.values(name)
            total += weight * (offset if offset.dim() == target.dim() else offset.unsqueeze(-1))
    target.copy_(total)


def layers_to_merge(
    model: nn.Module, adapter_names: list[str] | None, sites: Sequence[Site] | None
) -> dict[BaseTunerLayer, list[str]]:
    """Return the layers, of all methods, that hold something of adapters that is not merged yet; warn if none does.

    With each are the adapters that it holds, in the order in which they are merged.

    Args:
        model: The model inside of the PEFT model.
        adapter_names: Adapters to merge; `None` for the active ones.
        sites: Only SEAL's layers at these sites; `None` for all.

    Raises:
        ValueError: None of the adapters has scales at one of `sites`.
    """
    held: dict[BaseTunerLayer, list[str]] = {}
    for layer in model.modules():
        if isinstance(layer, BaseTunerLayer):
            there = layer._get_available_adapters()
            held[layer] = [
                n for n in (layer.active_adapters if adapter_names is None else adapter_names) if n in there
            ]
    if sites is not None:
        found = {layer.site for layer, names in held.items() if names and isinstance(layer, SealLayer)}
        if set(sites) - found:
            known = ", ".join(sorted(found)) or "no site"
            raise ValueError(
                f"sites={sites!r} is not allowed. What is to be merged has scales at {known}; give a list of some of "
                "its sites, or leave sites out to merge all of it."
            )
        held = {layer: names for layer, names in held.items() if getattr(layer, "site", None) in sites}
    left = {layer: names for layer, names in held.items() if set(names) - set(layer.merged_adapters)}
    if not left and any(held.values()):
        warnings.warn("All adapters are already merged, nothing to do.", stacklevel=3)
    return left


def _check_same_heads(saved: Any, own: Any, model_id: object) -> None:
    chosen, wanted = getattr(own, "target_heads", None), getattr(saved, "target_heads", None)
    if chosen is not None and (wanted is None or set(wanted) - set(chosen)):
        raise ValueError(
            f"{model_id} scales other heads (target_heads={wanted}) than the adapter that it would replace "
            f"({chosen}), which keeps all others at 1. Load it as an adapter of its own and switch with `set_adapter`."
        )


def _trains_modules(model: nn.Module, adapter_name: str) -> bool:
    wrappers = (module for module in model.modules() if isinstance(module, ModulesToSaveWrapper))
    return any(adapter_name in wrapper.modules_to_save for wrapper in wrappers)


def _shared(values: list[int | None]) -> int | None:
    return values[0] if len(set(values)) == 1 else None


def _unmerged_layers(model: nn.Module, adapter_name: str) -> list[SealLayer]:
    layers = list(layers_with(model, adapter_name).values())
    if any(adapter_name in layer.merged_adapters for layer in layers):
        raise ValueError(f"Adapter {adapter_name!r} is merged into the weights. Call `unmerge_adapter` first.")
    return layers
