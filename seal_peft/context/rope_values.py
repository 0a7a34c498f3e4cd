"""What may be in `rope_parameters`: the names that each type of RoPE takes, and numbers that it can be computed of."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from transformers.modeling_rope_utils import RopeParameters

MAX, NATIVE = "max_position_embeddings", "original_max_position_embeddings"
# What each type takes besides a native length; a type that is missing here takes all that transformers gives it.
_TAKES: dict[str, set[str]] = {
    "default": set(),
    "linear": {"factor"},
    "dynamic": {"factor"},
    "proportional": {"factor"},
    "yarn": {"factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"},
    "longrope": {"factor", "attention_factor", "short_factor", "long_factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor"},
}
# What one type of scaling brings and another does not want; everything else (base, partial rotation) stays.
SCALING = {"rope_type", NATIVE}.union(*_TAKES.values())
# What a type cannot be computed without.
_NEEDS: dict[str, set[str]] = {
    **dict.fromkeys(("linear", "dynamic", "yarn"), {"factor"}),
    "longrope": {"short_factor", "long_factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor"},
}
_POSITIVE = {"rope_theta", "partial_rotary_factor", "attention_factor", "beta_fast", "beta_slow"}
_POSITIVE |= {"low_freq_factor", "high_freq_factor"}
# The first of each pair must not be the greater; transformers has these where they are left out.
_ORDERED = (("low_freq_factor", "high_freq_factor"), ("beta_slow", "beta_fast"))
_BETAS = {"beta_slow": 1, "beta_fast": 32}


def plain(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Copy parameters in JSON's types, without what says nothing: `None`, and the type under its old name.

    Raises:
        TypeError: It is no dictionary, or a value is not one that JSON has.
    """
    if not isinstance(parameters, Mapping):
        raise TypeError(
            f"rope_parameters={parameters!r} is not allowed. Use a dictionary such as "
            '{"rope_type": "yarn", "factor": 4.0}.'
        )
    parameters = dict(parameters)
    if "type" in parameters:
        parameters.setdefault("rope_type", parameters.pop("type"))
    kept = {name: plain(v) if isinstance(v, Mapping) else v for name, v in parameters.items() if v is not None}
    try:
        return dict(json.loads(json.dumps(kept)))
    except TypeError as error:
        raise TypeError(
            f"rope_parameters={kept} cannot be saved as JSON ({error}). Use numbers, lists and texts of Python's own: "
            "`float(value)`, `value.tolist()`."
        ) from error


def check_length(name: str, value: Any) -> None:
    """Refuse what is no length in tokens.

    Raises:
        ValueError: It is not a positive whole number; 8192.0, as some configs have it, is one.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or value < 1 or not float(value).is_integer():
        raise ValueError(f"{name}={value!r} is not allowed in rope_parameters. Use a positive whole number of tokens.")


def check_request(kind: str, request: Mapping[str, Any], own: Mapping[str, Any], dim: int) -> None:
    """Refuse a request that a type of RoPE would not heed, or that no frequencies can be computed of.

    Args:
        kind: The type.
        request: Parameters of one layer type, as asked for.
        own: Those of the model, which may have names and values of its own.
        dim: How many channels of a head have frequencies.

    Raises:
        ValueError: A name is not known or of another type, or a value is not allowed.
    """
    new = {name: value for name, value in request.items() if value != own.get(name)}
    if unknown := sorted(new.keys() - SCALING - {*own, *RopeParameters.__annotations__}):
        raise ValueError(f"No RoPE takes {unknown}, which rope_parameters has. Correct the name, or leave it out.")
    factor = request.get("factor", 1.0)
    if not _is_positive(factor) or factor < 1:
        raise ValueError(f"factor={factor!r} is not allowed in rope_parameters. Use a number of at least 1.")
    if idle := sorted(new.keys() & SCALING - _TAKES.get(kind, SCALING) - {"rope_type", NATIVE}):
        raise ValueError(
            f"rope_type={kind!r} does nothing with {idle}. Give another rope_type, 'yarn' say, or leave {idle} out."
        )
    if NATIVE in new:
        check_length(NATIVE, new[NATIVE])
    for name in sorted(new.keys() & _POSITIVE):
        if not _is_positive(new[name]):
            raise ValueError(f"{name}={new[name]!r} is not allowed in rope_parameters. Use a positive finite number.")
    for name in sorted(new.keys() & {"short_factor", "long_factor"}):
        if not isinstance(new[name], list) or len(new[name]) != dim // 2 or not all(map(_is_positive, new[name])):
            raise ValueError(
                f"{name} in rope_parameters must have {dim // 2} positive numbers, one per rotated pair of channels; "
                f"got {new[name]!r}."
            )
    both = {**_BETAS, **own, **request}
    for low, high in _ORDERED:
        if new.keys() & {low, high} and {low, high} <= both.keys() and both[low] > both[high]:
            raise ValueError(
                f"{low}={both[low]} and {high}={both[high]} are not allowed in rope_parameters: {low} must not be the "
                "greater."
            )


def check_complete(kind: str, resolved: Mapping[str, Any]) -> None:
    """Refuse a type of RoPE that lacks what neither the request nor the model has.

    Raises:
        ValueError: Something that the type is computed of is missing.
    """
    if missing := sorted(_NEEDS.get(kind, set()) - resolved.keys()):
        raise ValueError(
            f"rope_type={kind!r} does not work without {missing}, which rope_parameters leaves out and the model does "
            'not have. Add it, as in {"rope_type": "yarn", "factor": 4.0}.'
        )


def _is_positive(value: Any) -> bool:
    """Whether it is a number above 0 that float32 has, in which frequencies are computed."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return 0 < value <= torch.finfo(torch.float32).max
