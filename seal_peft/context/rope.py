"""RoPE on a loaded model: read what is in force, apply other parameters, and put the old ones back bit for bit.

A rotary module is never computed here: it is built anew by its own class from a config with the wanted parameters, as
transformers does for a new model, and its frequencies take the place of the old ones.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from .rope_state import put_state, sizes_of, state_of
from .rope_values import MAX, NATIVE, SCALING, check_complete, check_length, check_request, plain


def read_rope(model: nn.Module) -> dict[str, Any] | None:
    """Read the RoPE parameters that a model runs with.

    Args:
        model: A model, loaded.

    Returns:
        The model's `config.rope_parameters`, per layer type where it has them, with `max_position_embeddings`; plain
        JSON values. `None` for models without RoPE.

    Example:
        ```python
        read_rope(model)  # {"rope_theta": 10000.0, "rope_type": "default", "max_position_embeddings": 2048}
        ```
    """
    config = text_config(model)
    return None if config is None or not rotary_modules(model, config) else _read(config)


def apply_rope(model: nn.Module, rope_parameters: Mapping[str, Any]) -> AppliedRope:
    """Change the RoPE of a loaded model to what it would be, had the model been built with these parameters.

    Args:
        model: A transformers model; `model.config` follows, so that saving the model saves the parameters.
        rope_parameters: As in transformers' configs: `{"rope_type": "yarn", "factor": 4.0}`. Of what is left out, the
            base (`rope_theta`) and partial rotation are the model's; so is all that a type of scaling brings, such as
            `beta_fast`, if the model has this type already; an `attention_factor` only with its factor. The type
            `"ntk"` raises the base and keeps the rest, so that the slowest rotated pair of channels slows down by the
            factor: `rope_theta * factor ** (d / (d - 2))` for `d` rotated channels; where only `r` of the `d` rotate
            (`"proportional"`), the exponent is `d / (r - 2)`. For models with RoPE per layer type, give
            `{"full_attention": {...}, ...}`; parameters without a layer type are for `full_attention`. The key
            `max_position_embeddings` beside them sets the length; otherwise it is raised by the factor, except for
            `"dynamic"`, which measures lengths by it, and for `"linear"`, where it is the native length: so published
            models have it, and engines multiply it by the factor.

    Returns:
        What puts the old parameters back: `.restore()`.

    Raises:
        TypeError: It is no dictionary, or a value is not one that JSON has, such as numpy's numbers.
        ValueError: The model has no RoPE, or layers with a RoPE of their own that its config does not name; a name or
            value is not allowed; or transformers does not build it with these parameters.

    Example:
        ```python
        applied = apply_rope(model, {"rope_type": "yarn", "factor": 4.0})
        applied.restore()
        ```
    """
    config = text_config(model)
    modules = rotary_modules(model, config) if config is not None else []
    if config is None or not modules:
        raise ValueError(
            f"{type(model).__name__} has no rotary position embedding, so it cannot take rope_parameters."
        )
    _check_configs(model, config)
    wanted = resolve_rope(model, rope_parameters)
    _check_attention(model, config.rope_parameters, wanted)
    new = copy.deepcopy(config)
    try:
        _write(new, wanted)
        new.standardize_rope_params()
        new.validate_rope()
        with torch.device("cpu"):  # as transformers does while it loads
            fresh = [type(module)(new) for module in modules]
    except (ArithmeticError, AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{type(model).__name__} cannot be built with rope_parameters={wanted}: {error}") from error
    if _read(new) != wanted or [sizes_of(module) for module in modules] != [sizes_of(module) for module in fresh]:
        raise ValueError(
            f"{type(model).__name__} does not take rope_parameters={wanted} as they are: transformers makes "
            f"{_read(new)} of them, or rotates another number of channels."
        )
    applied = AppliedRope(config, modules)
    _write(config, wanted)
    for module, other in zip(modules, fresh, strict=True):
        put_state(module, state_of(other))
    return applied


class AppliedRope:
    """What a model had before `apply_rope`.

    Attributes:
        before: The parameters, as `read_rope` gave them.
    """

    def __init__(self, config: PreTrainedConfig, modules: list[nn.Module]) -> None:
        self.before = _read(config)
        self._config = config
        names = ("rope_parameters", MAX, NATIVE)
        self._values = {name: copy.deepcopy(getattr(config, name)) for name in names if hasattr(config, name)}
        self._states = [(module, state_of(module)) for module in modules]

    def restore(self) -> None:
        """Put back the very frequencies that the model had; moved and cast as the model was since.

        Of several changes to a model, undo the last one first: an earlier one puts back what was before it, and a
        later one, undone after that, brings the earlier one's settings back.
        """
        for name, value in self._values.items():
            setattr(self._config, name, value)
        for module, state in self._states:
            put_state(module, state)


def resolve_rope(
    model: nn.Module, rope_parameters: Mapping[str, Any], own: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Fill in what a request leaves out.

    Args:
        model: The model that it is for.
        rope_parameters: See `apply_rope`.
        own: Where missing values come from, as `read_rope` gives them; `None` asks the model.

    Returns:
        All parameters, in the form of `read_rope`.

    Raises:
        TypeError: A value is not one that JSON has, such as numpy's numbers.
        ValueError: The request has the wrong form for the model, or a type, name or value that is not allowed.
    """
    own = dict(own or read_rope(model) or {})
    longest = own.pop(MAX)
    request = plain(rope_parameters)
    asked_longest = request.pop(MAX, None)
    if asked_longest is not None:
        check_length(MAX, asked_longest)
        asked_longest = int(asked_longest)
    layer_types = [name for name, value in own.items() if isinstance(value, dict)]
    nested = any(isinstance(value, dict) for value in request.values())
    if nested and not layer_types:
        raise ValueError(
            f"{type(model).__name__} has one RoPE for all layers: give rope_parameters without layer types."
        )
    if layer_types:
        request = request if nested else {"full_attention": request}
        if unknown := [name for name in request if name not in layer_types and request[name] != own.get(name)]:
            raise ValueError(f"No RoPE for the layer types {unknown}. {type(model).__name__} has {layer_types}.")
        found = {
            name: _resolve(request[name], own[name], longest, _rotated(model, f"{name}_inv_freq"), alone=False)
            for name in layer_types
            if name in request
        }
        resolved = {**own, **{name: parameters for name, (parameters, _) in found.items()}}
        new_longest = max([longest, *(length for _, length in found.values())])
    else:
        resolved, new_longest = _resolve(request, own, longest, _rotated(model, "inv_freq"), alone=True)
    return {**resolved, MAX: asked_longest or new_longest}


def reach_of(parameters: Mapping[str, Any]) -> int:
    """Return how many tokens parameters in the form of `read_rope` reach.

    Usually it is the maximum. `dynamic` and, for all layers at once, `linear` keep their factor out of it, and so do
    models whose YaRN was switched on by hand, which left the maximum at the native length.
    """
    longest: int = parameters[MAX]
    by_layer: list[Mapping[str, Any]] = [value for value in parameters.values() if isinstance(value, dict)]
    reached = [longest]
    for kind in by_layer or [parameters]:
        native = {"dynamic": longest, "yarn": kind.get(NATIVE, longest), "longrope": kind.get(NATIVE, longest)}
        native |= {} if by_layer else {"linear": longest}
        reached.append(int(native.get(str(kind.get("rope_type")), 0) * kind.get("factor", 1)))
    return max(reached)


def _resolve(
    request: dict[str, Any], own: dict[str, Any], longest: int, dim: int, alone: bool
) -> tuple[dict[str, Any], int]:
    """Complete the parameters of one layer type, `alone` if all layers have it; say which maximum goes with them."""
    kind = request.get("rope_type", own.get("rope_type", "default"))
    known = sorted({"default", "ntk", *ROPE_INIT_FUNCTIONS})
    if kind not in known:
        raise ValueError(
            f"rope_type={kind!r} is not known. This version of transformers, and this package, know {known}."
        )
    check_request(kind, request, own, dim)
    factor = request.get("factor", 1.0)
    # Gemma 3 has a scaling for some of its layers, and its maximum is the extended one.
    stretched = own.get("factor", 1) if own.get("rope_type") == "linear" and not alone else 1
    native = own.get(NATIVE) or int(longest / stretched)
    if kind == "ntk":
        if "factor" not in request or set(request) - {"rope_type", "factor", "rope_theta"}:
            raise ValueError(f"rope_type='ntk' takes a factor and, if you like, rope_theta; got {request}.")
        # `proportional` spreads frequencies over all channels, but lets only the first of them rotate.
        share = own.get("partial_rotary_factor", 1.0) if own.get("rope_type") == "proportional" else 1.0
        rotated = 2 * int(share * dim // 2)
        if rotated <= 2:
            raise ValueError(f"rope_type='ntk' needs more than 2 rotated channels per head; this model has {rotated}.")
        theta = request.get("rope_theta", own["rope_theta"]) * factor ** (dim / (rotated - 2))
        return {**own, "rope_theta": theta}, int(factor * longest)
    if "rope_type" not in request:  # a change to what the model has
        return {**own, **request}, longest
    same = kind == own.get("rope_type")
    kept = {name: value for name, value in own.items() if same or name not in SCALING}
    if factor != own.get("factor"):
        kept.pop("attention_factor", None)  # it belongs to a factor
    if "llama_4_scaling_beta" in own:  # attention scales its queries by the native length, whatever turns them
        kept[NATIVE] = native
    resolved = {**kept, **request}
    check_complete(kind, resolved)
    if kind in ("llama3", "longrope", "yarn"):
        resolved.setdefault(NATIVE, native)
    if kind == "dynamic":
        return resolved, longest
    if kind == "linear" and alone:
        return resolved, native
    return resolved, max(longest, int(factor * resolved.get(NATIVE, native)))


def text_config(model: nn.Module) -> PreTrainedConfig | None:
    """The config that the decoder reads its RoPE from, if it has one."""
    config = getattr(model, "config", None)
    if not isinstance(config, PreTrainedConfig):
        return None
    config = config.get_text_config()
    return config if getattr(config, "rope_parameters", None) else None


def rotary_modules(model: nn.Module, config: PreTrainedConfig) -> list[nn.Module]:
    """Those that read this very config: a vision tower has its own."""
    return [m for m in model.modules() if hasattr(m, "rope_type") and getattr(m, "config", None) is config]


def depends_on_length(rotaries: Iterable[nn.Module]) -> str | None:
    """The first RoPE type whose frequencies depend on the length: cached keys may have been rotated by others."""
    kinds = [value for rotary in rotaries for name, value in vars(rotary).items() if name.endswith("rope_type")]
    flat = [kind for value in kinds for kind in (value.values() if isinstance(value, dict) else [value])]
    return next((kind for kind in flat if kind in ("dynamic", "longrope")), None)


def _rotated(model: nn.Module, name: str) -> int:
    """How many channels of a head have frequencies."""
    config = text_config(model)
    assert config is not None
    frequencies = getattr(rotary_modules(model, config)[0], name, None)
    if frequencies is None:
        kind = name.removesuffix("_inv_freq")
        raise ValueError(
            f"{type(model).__name__} has no layer of type {kind!r}, so it cannot take rope_parameters for it."
        )
    return 2 * int(frequencies.numel())


def _read(config: PreTrainedConfig) -> dict[str, Any]:
    return {**plain(config.rope_parameters), MAX: config.max_position_embeddings}


def _write(config: PreTrainedConfig, parameters: Mapping[str, Any]) -> None:
    rope = copy.deepcopy({name: value for name, value in parameters.items() if name != MAX})
    config.rope_parameters = {**config.rope_parameters, **rope} if _per_layer(rope) else rope
    config.max_position_embeddings = parameters[MAX]
    if hasattr(config, NATIVE) and NATIVE in rope:  # Phi-3 has it in both places, and this one wins
        config.original_max_position_embeddings = rope[NATIVE]


def _per_layer(parameters: Mapping[str, Any]) -> bool:
    return any(isinstance(value, dict) for value in parameters.values())


def _check_configs(model: nn.Module, config: PreTrainedConfig) -> None:
    """Refuse models of which a part reads a copy of the config; parts of another kind have a config of their own."""
    read: list[Any] = [getattr(module, "config", None) for module in model.modules() if hasattr(module, "rope_type")]
    if any(type(other) is type(config) and other is not config for other in read):
        raise ValueError(
            f"{type(model).__name__} gives some of its layers a RoPE of their own, from copies of its config that "
            "rope_parameters would not reach. Load the base model with the RoPE that you want instead."
        )


def _check_attention(model: nn.Module, *parameters: Mapping[str, Any]) -> None:
    """Refuse what reaches into attention: multi-head latent attention computes its scaling from `mscale_all_dim`."""
    latent = any(hasattr(module, "qk_rope_head_dim") for module in model.modules())
    if latent and any(p.get("mscale_all_dim") for p in parameters):
        raise ValueError(
            f"{type(model).__name__} scales its attention by mscale_all_dim, which cannot change once it is loaded. "
            "Load the base model with these rope_parameters instead."
        )
