"""The positions that an adapter was trained under: recorded, compared at loading, applied where it asks for them."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from peft.config import PeftConfig
from torch import nn

from .config import SealConfig
from .layer import SealLayer

# These two measure by `max_position_embeddings`; for all other types it is no more than a note.
_MEASURED_BY_LENGTH = ("dynamic", "longrope")
_BASE = "as the base model has it"


def wanted(rope: Any, config: PeftConfig, model: nn.Module) -> Any:
    """Complete what a config asks for, and record in it what its base has.

    Missing RoPE parameters come from the base that the adapter was trained on, not from the one that it is loaded on.

    Args:
        rope: The model's `PositionSwitch`; `None` for models without RoPE.
        config: Config of a new or loaded adapter.
        model: The base model.

    Returns:
        The switch's `Request`, or `None` if the adapter takes what the model has.

    Raises:
        ValueError: The model cannot take what the config asks for.
    """
    if not isinstance(config, SealConfig):
        return None
    if rope is None:
        if config.rope_parameters is not None or config.self_extend is not None:
            raise ValueError(
                f"{type(model).__name__} has no rotary position embedding that this package knows, so an adapter "
                f"cannot bring rope_parameters={config.rope_parameters} and self_extend={config.self_extend}."
            )
        return None
    expected, (own, own_self_extend) = config._expected_base_rope, rope.own
    request = rope.resolve(config.rope_parameters, config.self_extend, expected)
    difference = _difference(expected, own) if expected is not None else ""
    if difference and config.rope_parameters is None:
        warnings.warn(
            f"This adapter was trained with other RoPE parameters than the base model has: {difference}. Its scales "
            "may not fit. To apply those of the adapter while it is in use, load it with `config = "
            "SealConfig.from_pretrained(folder); config.rope_parameters = config.base_rope; "
            "PeftModel.from_pretrained(base_model, folder, config=config)`; or load the base model with them "
            "(`rope_parameters=...`).",
            stacklevel=2,
        )
    elif difference and config.rope_parameters != expected and _difference(request.rope, own):
        # A base that has it all is the merged model of the adapter's other site.
        warnings.warn(
            f"The base model has other RoPE parameters than the one that this adapter was trained on: {difference}. "
            "The adapter's own rope_parameters are applied, completed from the base that it was trained on: "
            f"{request.rope}.",
            stacklevel=2,
        )
    trained = config._expected_base_self_extend
    if expected is not None and config.self_extend is None and trained != own_self_extend:
        warnings.warn(
            f"This adapter was trained on a base with self_extend={trained}, but the base model has "
            f"{own_self_extend}. Its scales may not fit. Set `config.self_extend` to have it applied while the "
            "adapter is in use, or use `apply_self_extend` on the base model.",
            stacklevel=2,
        )
    # What a loaded adapter was trained on stays on record, unless it goes on training here.
    if expected is None or (config.rope_parameters is None and not config.inference_mode):
        config.base_rope = own
    if expected is None or (config.self_extend is None and not config.inference_mode):
        config.base_self_extend = own_self_extend
    return request


def connect(rope: Any, model: nn.Module, configs: Mapping[str, PeftConfig], adapter_name: str, request: Any) -> None:
    """Register an injected adapter, so that its layers bring what it asks for in and out of force."""
    if not isinstance(configs[adapter_name], SealConfig):
        return
    layers = [module for module in model.modules() if isinstance(module, SealLayer)]
    for layer in layers:
        layer.rope = rope
    rope.add(adapter_name, request, layers)


@contextmanager
def unloading(rope: Any, model: nn.Module, adapter_names: Sequence[str]) -> Iterator[None]:
    """Around the removal of all adapters: the model keeps the positions of what is in its weights.

    Args:
        rope: The model's `PositionSwitch`; `None` for models without RoPE.
        model: The model.
        adapter_names: Those that are merged on the way out.

    Raises:
        ValueError: They, and those that are merged already, ask for different RoPE or Self-Extend.
    """
    if rope is None:
        yield
        return
    layers = [module for module in model.modules() if isinstance(module, SealLayer)]
    names = [*dict.fromkeys(name for layer in layers for name in layer.merged_adapters), *adapter_names]
    request = rope.wanted(names)
    for layer in layers:  # what is active but not merged counts no more
        layer.rope = None
    try:
        yield
    except BaseException:
        for layer in layers:
            layer.rope = rope
        raise
    rope.finish(names)
    if request is not None and request.self_extend is not None:
        warnings.warn(
            f"The merged model needs self_extend={request.self_extend}. It is in force in this model, and its "
            "`config.json` will say so, but no engine reads that: after loading the saved model, call "
            "`seal_peft.context.self_extend.apply_self_extend(model, **model.config.self_extend)`.",
            stacklevel=2,
        )


def asking_otherwise(model: nn.Module, adapter_names: Sequence[str]) -> list[str]:
    """Return those of some SEAL adapters that ask for other positions than the first of them."""
    rope = _switch_of(model)
    return [name for name in adapter_names if rope and rope.requests[name] is not rope.requests[adapter_names[0]]]


def ask_before(model: nn.Module, adapter_names: str | Sequence[str]) -> None:
    """Give the model what adapters ask for that are about to be active, before PEFT changes anything else.

    PEFT switches modules and layers one after the other; a refusal half way would leave a mixture that runs.

    Raises:
        ValueError: They ask for different things, or the model does not take it.
    """
    rope = _switch_of(model)
    if rope is not None and rope.users:
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        (rope.wanted if rope.users[0].disable_adapters else rope.use)(names)


def check_same_positions(config: SealConfig, model: nn.Module, adapter_name: str) -> None:
    """Refuse to put the scales of one adapter in the place of another that was trained under other positions.

    Where both take what the model has, there is a warning if the new one was trained on something else.

    Raises:
        ValueError: The two ask for different RoPE or Self-Extend.
    """
    rope = _switch_of(model)
    if rope is None:
        wanted(rope, config, model)
        return
    # By what the settings come to: the same may be written in several ways.
    saved = rope.resolve(config.rope_parameters, config.self_extend, config.base_rope)
    own = rope.requests[adapter_name]
    if saved != own:
        asked = {"rope_parameters": config.rope_parameters, "self_extend": config.self_extend}
        flags = [f"--{name} '{json.dumps(value)}'" for name, value in asked.items() if value is not None]
        raise ValueError(
            f"The saved adapter asks for RoPE and Self-Extend {saved or _BASE}, and adapter {adapter_name!r} of the "
            f"model for {own or _BASE}. Create the latter with the settings of the saved one first (on the command "
            f"line: {' '.join(flags) or 'neither --rope_parameters nor --self_extend'}), then swap; or load the saved "
            "one as an adapter of its own."
        )
    if config.base_rope is None or config.rope_parameters is not None:
        return
    if difference := _difference(config.base_rope, rope.own[0]):
        warnings.warn(
            f"The saved adapter was trained with other RoPE parameters than the base model has: {difference}. Its "
            "scales may not fit.",
            stacklevel=3,
        )


def _switch_of(model: nn.Module) -> Any:
    """The `PositionSwitch` of a model with SEAL; `None` for models without RoPE."""
    return next((module.rope for module in model.modules() if isinstance(module, SealLayer)), None)


def _difference(trained: Mapping[str, Any], base: Mapping[str, Any]) -> str:
    """Name every parameter that differs, with both values; empty if none does."""
    sides = [_flat(side) for side in (trained, base)]
    if not any(str(value) in _MEASURED_BY_LENGTH for side in sides for value in side.values()):
        for side in sides:
            side.pop("max_position_embeddings", None)
    names = sorted(name for name in {**sides[0], **sides[1]} if sides[0].get(name) != sides[1].get(name))
    return ", ".join(f"{name} {sides[0].get(name)} (adapter) and {sides[1].get(name)} (base)" for name in names)


def _flat(parameters: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in parameters.items():
        flat |= {f"{name}.{key}": v for key, v in value.items()} if isinstance(value, Mapping) else {name: value}
    return flat
