"""SEAL with another tuner on the same projection: `y = W diag(s) x + B A x`, in any order, merged or not.

PEFT nests tuner layers: the later one wraps the earlier one, and both merge into the one weight at the bottom. SEAL's
layer is always the innermost tuner layer, so it has to know the layers around it: a merged LoRA is part of the weight
that SEAL scales, and PEFT's unloading would drop whatever lies inside the layer it unloads.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.nn.modules.module import register_module_module_registration_hook

from .config import SealConfig

if TYPE_CHECKING:
    from .layer import SealLayer

_watching = False


# -- knowing the layers around ----------------------------------------------------------------------------------------


def watch() -> None:
    """Notice every tuner layer that wraps a SEAL layer, at the moment when it does. Calling it again changes nothing.

    PEFT tells a wrapped layer nothing, and LoRA's own `merge_and_unload` may come before the first forward pass, so
    that looking around later would be too late.
    """
    global _watching
    if not _watching:
        register_module_module_registration_hook(_on_registration)
        _watching = True


def _on_registration(module: nn.Module, name: str, child: nn.Module | None) -> None:
    if name == "base_layer" and isinstance(module, BaseTunerLayer):
        seal = seal_inside(child)
        if seal is not None:
            surround(seal, module)


def _is_seal(module: object) -> TypeGuard[SealLayer]:
    return isinstance(module, BaseTunerLayer) and "seal_delta" in module.adapter_layer_names


def tuner_layers(module: nn.Module | None) -> list[BaseTunerLayer]:
    """Return a chain of nested tuner layers, the outermost first; the wrapped module itself is not in it."""
    chain: list[BaseTunerLayer] = []
    while isinstance(module, BaseTunerLayer):
        chain.append(module)
        module = module._modules.get("base_layer")
    return chain


def seal_inside(module: nn.Module | None) -> SealLayer | None:
    """Return the SEAL layer in a chain of nested tuner layers, if there is one."""
    return next((layer for layer in tuner_layers(module) if _is_seal(layer)), None)


def surround(seal: SealLayer, outer: BaseTunerLayer) -> None:
    """Take note of one more layer around, the new outermost one.

    The offsets become a child of that layer, so that their parameters have the same names, in files, optimizers and
    transformers' loader, as without any layer around. And PEFT's two entries to the outer layer are routed over SEAL:
    its official hook for unloading, and `merge`, which must refuse before it writes.

    Raises:
        ValueError: SEAL is merged, or the layer changes the weight before SEAL can scale its input.
    """
    if any(known is outer for known in seal.outer_layers):
        return
    if seal.merged:
        raise ValueError(
            f"SEAL ({', '.join(seal.merged_adapters)}) is merged into the weight that the new adapter builds on. "
            "Unmerge it, add the adapter, and merge again."
        )
    if isinstance(outer, ParamWrapper):
        raise ValueError(
            "LoRA on a parameter (`target_parameters`) cannot be combined with SEAL on the same module: its product "
            "would read the scaled input. Use `target_modules` instead, and inject it again."
        )
    offsets = seal.seal_delta
    holders: tuple[Any, ...] = (seal, *seal.outer_layers)
    for holder in holders:
        holder._modules.pop("seal_delta", None)
    seal.__dict__["seal_delta"] = offsets
    outer.seal_delta = offsets  # type: ignore[attr-defined]
    seal.outer_layers = (*seal.outer_layers, outer)
    outer.merge = partial(_merge_outer, outer)  # type: ignore[method-assign]
    outer.unload_and_optionally_merge_module = partial(_unload_outer, outer)  # type: ignore[attr-defined]


def _merge_outer(outer: BaseTunerLayer, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
    """Merge as the layer's own class does, after making sure that SEAL inside can still tell the parts apart."""
    for name in outer.active_adapters if adapter_names is None else adapter_names:
        _check_additive(outer, name)
    type(outer).merge(outer, safe_merge=safe_merge, adapter_names=adapter_names)


def _unload_outer(
    outer: BaseTunerLayer, merge: bool, safe_merge: bool = False, adapter_names: list[str] | None = None
) -> nn.Module:
    """Return the plain module for PEFT to put in place of the whole chain, with the chain merged into it if asked."""
    seal = seal_inside(outer)  # type: ignore[arg-type]
    assert seal is not None
    if merge:
        for layer in seal.outer_layers:
            for name in layer.active_adapters if adapter_names is None else adapter_names:
                _check_additive(layer, name)
        for layer in (seal, *seal.outer_layers):  # from the inside, where W is still the original
            layer.merge(safe_merge=safe_merge, adapter_names=adapter_names)
    return seal.get_base_layer()


# -- the algebra ------------------------------------------------------------------------------------------------------


def _check_additive(outer: BaseTunerLayer, name: str) -> None:
    if name not in outer._get_available_adapters():
        return
    seal: Any = seal_inside(outer)  # type: ignore[arg-type]
    if seal is not None and seal.site == "query" and getattr(outer, "lora_bias", {}).get(name):
        raise ValueError(
            f"Adapter {name!r} trains a bias (`lora_bias=True`) on a module whose outputs SEAL scales. Such a pair "
            "cannot be merged. Leave both unmerged, or exclude the module from one of them."
        )
    variants = getattr(outer, "lora_variant", {})
    if isinstance(outer, LoraLayer) and hasattr(outer, "get_delta_weight") and name not in variants:
        return
    kind = type(variants[name] if name in variants else outer)
    raise ValueError(
        f"Adapter {name!r} ({kind.__module__.removeprefix('peft.tuners.')}.{kind.__qualname__}) and SEAL are on the "
        "same module. Such a pair cannot be merged: only plain LoRA adds to the weight in a way that SEAL's scales "
        "can be told apart from. Leave both unmerged, or exclude the module from one of them."
    )


def check_can_merge(seal: SealLayer) -> None:
    """Refuse to merge scales where the layers around would then compute something else.

    Raises:
        ValueError: An adapter around reads the base weight itself, as DoRA does.
    """
    check_all_names(seal)
    for outer in seal.outer_layers:
        for name in outer.active_adapters:
            _check_additive(outer, name)


def with_merged(seal: SealLayer, weight: Any, sign: int = 1) -> Any:
    """Add what is merged from the layers around to a weight, or take it out with `sign=-1`.

    Returns:
        The very same object if nothing is merged; otherwise a new tensor in fp32 or wider, so that taking out and
        adding again gives the same weight.

    Raises:
        ValueError: What is merged is no plain LoRA, or the weight is quantised and it cannot be taken out exactly.
    """
    for outer in seal.outer_layers:
        for name in outer.merged_adapters:
            _check_additive(outer, name)
            if seal.quantization_backend is not None:
                raise ValueError(
                    f"Adapter {name!r} is merged into {seal.quantization_backend.backend_name} weights that SEAL "
                    "scales, too. Unmerge it first."
                )
            with torch.no_grad():
                delta = outer.get_delta_weight(name)  # type: ignore[attr-defined]
                wide = torch.promote_types(torch.promote_types(weight.dtype, delta.dtype), torch.float32)
                weight = weight.to(wide) + sign * delta.to(weight.device, wide)
    return weight


def merged_product(seal: SealLayer, x: Tensor) -> Tensor:
    """Return the sum of `B A x` over the adapters around that are merged into the weight; there must be one."""
    products = []
    for outer in seal.outer_layers:
        for name in outer.merged_adapters:
            _check_additive(outer, name)
            products.append(_delta_product(outer, name, x))
    return sum(products[1:], start=products[0])


def _delta_product(outer: Any, name: str, x: Tensor) -> Tensor:
    lora_a = outer.lora_A[name]
    if isinstance(lora_a, nn.Linear):  # by way of the low rank, without the bias that `lora_bias=True` adds
        a, b = lora_a.weight.detach(), outer.lora_B[name].weight.detach()
        return linear(linear(x.to(a.dtype), a), b) * outer.scaling[name]
    delta = outer.get_delta_weight(name).detach()
    return linear(x.to(delta.dtype), delta.T if outer.fan_in_fan_out else delta)


# -- names ------------------------------------------------------------------------------------------------------------


def check_names(seal: SealLayer, names: Iterable[str]) -> None:
    """Refuse adapters whose name another method took later: PEFT would mix the two in one file.

    Raises:
        ValueError: The model's config of that name is no longer SEAL's, or the other method's model deleted it but
            left the scales in place.
    """
    configs = seal.model_configs
    for name in names:
        config = configs.get(name)
        if isinstance(config, SealConfig) or not configs:
            continue
        if config is not None:
            raise ValueError(_same_name(name, config))
        raise ValueError(
            f"The SEAL adapter {name!r} was deleted through the model of another method, which does not reach its "
            "scales. Delete it through the model that `seal_peft.add_beside` or `load_adapters` returned."
        )


def check_all_names(seal: SealLayer, *_: Any) -> None:
    """`check_names` for every adapter of a layer; also its hook for the moment when PEFT collects what to save."""
    check_names(seal, [name for name in seal.seal_delta if name in seal.model_configs])


def check_free_name(model: nn.Module, name: str) -> None:
    """Refuse to add SEAL under a name that another method uses, while the model is still as it was.

    Raises:
        ValueError: The name is taken.
    """
    config = (getattr(model, "peft_config", None) or {}).get(name)
    if config is not None and not isinstance(config, SealConfig):
        raise ValueError(_same_name(name, config))
    for layer in model.modules():
        if isinstance(layer, BaseTunerLayer) and not _is_seal(layer):
            if name in layer._get_available_adapters():
                raise ValueError(_same_name(name, layer))


def _same_name(name: str, other: object) -> str:
    kind = type(other).__name__.removesuffix("Config")
    return (
        f"Both SEAL and {kind} have an adapter named {name!r}. PEFT tells adapters apart by their name alone and "
        "would write both into one file. Load the base model again and give the two different names."
    )
