"""Which modules SEAL may wrap, and whether an adapter fits the ones it finds."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer, _ExcludedModule, check_target_module_exists
from peft.utils import resolve_quantization_backend
from torch import nn
from transformers.pytorch_utils import Conv1D

from .beside import seal_inside, tuner_layers
from .chosen import check_chosen, chosen_heads
from .config import SealConfig
from .geometry import HeadGeometry, attention_of, head_geometry
from .queries import QUERY_NAMES, QueryLayout, query_layout, query_name

# What makes queries, keys and values: the sizes often fit those of an output projection, the meaning does not.
_NO_OUTPUT_PROJECTIONS = frozenset((*QUERY_NAMES, *"k_proj v_proj q_a_proj kv_a_proj_with_mqa kv_b_proj".split()))


def is_target(config: SealConfig, model: nn.Module, name: str) -> Any:
    """Tell whether a config targets a module, at any of its sites; as PEFT does, with a falsy value for excluded ones.

    Args:
        config: The adapter's config, its target modules decided.
        model: The base model, with or without adapters.
        name: Full name of the module.
    """
    output = check_target_module_exists(config, name)
    if isinstance(output, _ExcludedModule):
        return output
    if chosen_heads(config, name) == []:
        return False
    if output and ("output" in config.sites or not config.sites):  # without a site they only carry the adapter's name
        return output
    return "query" in config.sites and is_query(config, model, name)


def is_query(config: SealConfig, model: nn.Module, name: str) -> bool:
    """Tell whether a module is where a config finds queries, whatever sites it asks for."""
    if check_target_module_exists(config, name):
        return False  # named as an output projection; whether it is one is checked elsewhere
    if config.query_modules is not None:
        by_name = copy.copy(config)
        by_name.target_modules = config.query_modules
        return bool(check_target_module_exists(by_name, name))
    parent, _, child = name.rpartition(".")
    return child in QUERY_NAMES and _outputs(config, model, parent) != [] and child == _query_child(model, parent)


def _outputs(config: SealConfig, model: nn.Module, parent: str) -> list[str]:
    """Names of the targeted output projections among the children of a module."""
    names = [f"{parent}.{child}" for child, _ in model.get_submodule(parent).named_children()]
    return [name for name in names if check_target_module_exists(config, name)]


def _query_child(model: nn.Module, parent: str) -> str:
    return query_name(model.get_submodule(parent), parent)


def check_targets(config: SealConfig, model: nn.Module) -> list[list[int]]:
    """Check every module that a config targets, changing nothing.

    Args:
        config: The adapter's config, its targets decided.
        model: The base model, with or without adapters.

    Returns:
        `[num_heads, head_dim]` of every target, in the order of the model.

    Raises:
        ValueError: `target_modules` names what makes queries, keys or values; a target's heads, or the query beside an
            output projection, cannot be found; or they are not those that the adapter was trained on.
        TypeError: A target is of a kind that cannot be wrapped.
    """
    found: list[list[int]] = []
    heads: dict[str, int] = {}
    for name, module in _outermost(model):
        if check_target_module_exists(config, name):
            _check_name(name)
            if "query" in config.sites and config.query_modules is None:
                _query_child(model, name.rpartition(".")[0])
        if is_target(config, model, name):
            if not is_query(config, model, name):
                _check_supported(module, name)
            found.append(list(geometry_of(config, model, module, name)[0]))
            heads[name] = found[-1][0]
    check_chosen(config, heads, partial(_all_heads, config, model))
    if config.query_modules is not None and not any(
        is_query(config, model, name) for name, _ in model.named_modules()
    ):
        raise ValueError(
            f"No module of the base model has one of the names query_modules={config.query_modules}. Name the modules "
            "whose output is the query, or leave it at None to look beside the output projections."
        )
    expected = config._expected_heads
    if expected is not None and found != [list(pair) for pair in expected]:
        raise ValueError(
            f"This adapter was trained on {_describe(expected)}, but the base model has {_describe(found)}. Load "
            "it on the model it was trained on"
            + (f": {config.base_model_name_or_path}." if config.base_model_name_or_path else ".")
        )
    return found


def _outermost(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules of a model by their names, without what lies within layers of a tuner."""
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if not name.startswith(inside):
            if isinstance(module, BaseTunerLayer):
                inside += (name + ".",)
            yield name, module


def _all_heads(config: SealConfig, model: nn.Module) -> dict[str, int]:
    """Return the number of heads of each target, also of those in layers where `target_heads` chooses none."""
    config = copy.copy(config)
    config.target_heads = None
    targets = [(name, module) for name, module in _outermost(model) if is_target(config, model, name)]
    return {name: geometry_of(config, model, module, name)[0].num_heads for name, module in targets}


def geometry_of(
    config: SealConfig, model: nn.Module, target: nn.Module, name: str
) -> tuple[HeadGeometry, QueryLayout | None]:
    """Find the heads that a target reads or, with their layout, the query heads that it returns.

    Where adapters stand already, theirs hold.

    Raises:
        ValueError: The heads cannot be found, or disagree with the adapters already there.
        TypeError: The target's module is never called.
    """
    seal = seal_inside(target)
    if seal is not None:
        for field, own in zip(("num_attention_heads", "head_dim"), seal.geometry, strict=True):
            value = getattr(config, field)
            if value not in (None, own):
                raise ValueError(
                    f"SealConfig({field}={value}) disagrees with the adapters that {name} carries already, which "
                    f"have {field}={own}. Adapters of one module share its heads: give the same number, or None."
                )
        return seal.geometry, getattr(seal, "layout", None)
    target = tuner_layers(target)[-1].get_base_layer() if isinstance(target, BaseTunerLayer) else target
    parent = model.get_submodule(name.rpartition(".")[0])
    if isinstance(parent, nn.MultiheadAttention):
        raise TypeError(
            f"{name} belongs to a torch.nn.MultiheadAttention, which reads its weight without calling it, so that "
            "scales on its input would do nothing. Leave it out with `exclude_modules`."
        )
    if not is_query(config, model, name):
        attention = attention_of(model, name)
        return head_geometry(attention, target, name, config.num_attention_heads, config.head_dim), None
    num_heads = config.num_attention_heads
    for output in _outputs(config, model, name.rpartition(".")[0])[:1]:
        num_heads = geometry_of(config, model, model.get_submodule(output), output)[0].num_heads
    model_config: Any = getattr(model, "config", None)
    text_config = model_config.get_text_config() if hasattr(model_config, "get_text_config") else model_config
    return query_layout(parent, target, name, getattr(text_config, "model_type", None), num_heads, config.head_dim)


def check_untied(model: nn.Module, layers: Iterable[nn.Module]) -> None:
    """Refuse to write to weights that other places of the model use, too: one scale would be in all of them.

    Raises:
        ValueError: A layer's weight is a parameter of another module, or its module is called from two places.
    """
    places: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        places.setdefault(id(parameter), []).append(name)
    for layer in layers:
        names = places.get(id(tuner_layers(layer)[-1].get_base_layer()._parameters.get("weight")), [])
        if len(names) > 1:
            raise ValueError(
                f"Scales cannot be merged into a weight that the model uses in several places: {', '.join(names)}. "
                "Keep the adapter unmerged."
            )


def _describe(heads: list[list[int]]) -> str:
    """Say how many attention layers there are of each number of heads and head size."""
    kinds = Counter((num_heads, head_dim) for num_heads, head_dim in heads)
    described = [f"{n} modules with (num_heads, head_dim) = {kind}" for kind, n in kinds.items()]
    return " and ".join(described) or "no module of the names it targets"


def _check_name(name: str) -> None:
    if name.rpartition(".")[2] in _NO_OUTPUT_PROJECTIONS:
        raise ValueError(
            f"{name} does not read the outputs of heads. Whatever the sites, `target_modules` names the attention "
            "output projections (often `o_proj`, `out_proj` or `dense`): name these, or leave it at None. With "
            "'query' in `sites`, queries are found beside them, or named in `query_modules`."
        )


def _check_supported(module: nn.Module, name: str) -> None:
    base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    if isinstance(base, nn.Linear | Conv1D) or resolve_quantization_backend(
        base, get_apply_tensor_subclass=lambda: None
    ):
        return
    raise TypeError(
        f"{name} is a {type(base).__name__}; SEAL can wrap torch.nn.Linear, transformers' Conv1D and the quantised "
        "linear layers that PEFT supports. Name the attention output projections in `target_modules`, or leave this "
        "module out with `exclude_modules`."
    )
