"""Which attention layers can take other positions: found by running the model, not by knowing its class."""

from __future__ import annotations

import contextvars
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from transformers import AttentionInterface, AttentionMaskInterface

from .grouped import rotate
from .rope import depends_on_length, rotary_modules, text_config

_NAME = "self_extend_probe"
# Two sets of positions, far enough apart that another rotation cannot pass for the right one.
_POSITIONS = (0, 1, 2, 3, 4, 5), (3, 10, 11, 41, 40, 97)
_heard: contextvars.ContextVar[list[_Heard]] = contextvars.ContextVar("heard")


@dataclass(frozen=True)
class RotaryLayer:
    """An attention layer without a window of its own, and how it rotates queries and keys.

    Attributes:
        attention: The attention module.
        rotary: The module with the frequencies.
        frequencies: Name of the frequencies in it.
        interleaved: See `grouped.rotate`; `None` for a model on the meta device, which computes nothing.
    """

    attention: nn.Module
    rotary: nn.Module
    frequencies: str
    interleaved: bool | None


@dataclass(frozen=True)
class _Heard:
    """What one attention layer handed to its attention function."""

    attention: nn.Module
    query: Tensor
    key: Tensor
    is_full: bool
    position_ids: Tensor | None
    extras: list[str]


def rotary_layers(model: nn.Module) -> list[RotaryLayer]:
    """Find the layers that rotate queries and keys by their positions and attend to all that came before.

    The model runs twice over six tokens at different positions, with attention that gives zeros, so that nothing but
    the rotation differs. What `grouped.rotate` makes of the first run's queries and keys must be those of the second.
    Layers with a sliding window or without positions are left out. On the meta device, where nothing can be compared,
    every other layer is taken, and the loaded model may refuse what it does after the rotation.

    Raises:
        ValueError: The model does not call transformers' attention interface with `position_ids`, has no such layer,
            or one that does more than rotate and attend.
    """
    name = type(model).__name__
    config = text_config(model)
    if config is None or not (rotaries := rotary_modules(model, config)):
        raise ValueError(
            f"{name} has no rotary position embedding that this package knows, so Self-Extend cannot change its "
            "positions."
        )
    if any(hasattr(module, "qk_rope_head_dim") for module in model.modules()):
        raise ValueError(
            f"{name} has multi-head latent attention, which keeps its keys' positions apart; Self-Extend does not "
            "support it. Extend it by rope_parameters, such as YaRN."
        )
    if "mrope_section" in config.rope_parameters:
        raise ValueError(f"{name} has positions of several dimensions (M-RoPE), which Self-Extend does not support.")
    check_frequencies(model, rotaries)
    first, second = (_run(model, config, rotaries, positions) for positions in _POSITIONS)
    found = []
    for one, other in zip(first, second, strict=True):
        if one.extras:
            raise ValueError(
                f"{name} has attention with {', '.join(one.extras)} (soft capping or sinks), which Self-Extend does "
                "not support. Extend it by rope_parameters, such as YaRN."
            )
        if one.is_full and (layer := _rotary_layer(name, one, other, rotaries)):
            found.append(layer)
    if not found:
        raise ValueError(
            f"No layer of {name} rotates its queries and keys and attends to all that came before through "
            "transformers' attention interface: its layers have sliding windows, or it computes attention itself. "
            "Self-Extend has nothing to change."
        )
    return found


def check_frequencies(model: nn.Module, rotaries: list[nn.Module]) -> None:
    """Refuse rotary modules whose frequencies depend on the length.

    Raises:
        ValueError: One does.
    """
    if kind := depends_on_length(rotaries):
        raise ValueError(
            f"{type(model).__name__} has RoPE of the type {kind!r}, whose frequencies depend on the length, so "
            "that cached keys cannot be turned to other positions. Use Self-Extend with another type (default, "
            "linear, ntk, yarn, llama3), or this type without Self-Extend."
        )


def _rotary_layer(name: str, one: _Heard, other: _Heard, rotaries: list[nn.Module]) -> RotaryLayer | None:
    """Find what explains the second run best: one of the rotations, or `None` for no positions."""
    where = f"{name}, layer {getattr(one.attention, 'layer_idx', '?')} ({type(one.attention).__name__})"
    unlike, layer = min(_explained(one, other, rotaries), key=lambda pair: pair[0])
    # A model rounds twice in its own dtype. Compared so that NaN is refused.
    if not unlike <= (16 * torch.finfo(one.key.dtype).eps if one.key.dtype.itemsize < 4 else 1e-4):
        raise ValueError(
            f"{where} does not rotate queries and keys in a way that can be composed (halves or pairs of channels, "
            "nothing after the rotation but a constant), so Self-Extend would be wrong. Extend it by rope_parameters "
            "instead."
        )
    positions = one.position_ids
    if layer and (positions is None or not (positions.is_meta or positions.tolist() == [list(_POSITIONS[0])])):
        raise ValueError(f"{where} does not hand position_ids to its attention function. Self-Extend needs them.")
    return layer


def _explained(one: _Heard, other: _Heard, rotaries: list[nn.Module]) -> Iterator[tuple[float, RotaryLayer | None]]:
    """Say how unlike the second run the first one is: as it is, and turned by every rotation."""
    is_meta, parts = one.query.is_meta, (one.query, one.key)
    yield float(any(x.requires_grad for x in parts)) if is_meta else _unlike(parts, other), None
    old, new = (torch.tensor([positions], device=one.key.device) for positions in _POSITIONS)
    for rotary in rotaries:
        for buffer, frequencies in rotary.named_buffers():
            if not buffer.endswith("inv_freq") or "original" in buffer or 2 * len(frequencies) > one.key.shape[-1]:
                continue
            if is_meta:
                yield 0.0, RotaryLayer(one.attention, rotary, buffer, None)
                continue
            for interleaved in (False, True):
                turned = [rotate(x, old, new, frequencies.to(x.device), interleaved) for x in parts]
                yield _unlike(turned, other), RotaryLayer(one.attention, rotary, buffer, interleaved)


def _unlike(parts: Sequence[Tensor], other: _Heard) -> float:
    """How far queries and keys are from those of another run, as a share of their norm."""
    pairs = zip(parts, (other.query, other.key), strict=True)
    return max(float((x - y).float().norm() / y.float().norm().clamp(min=1e-30)) for x, y in pairs)


def _run(model: nn.Module, config: Any, rotaries: list[nn.Module], positions: tuple[int, ...]) -> list[_Heard]:
    device = next(model.parameters()).device
    is_meta = device.type == "meta"
    ids = torch.arange(1, 1 + len(positions), device=device).unsqueeze(0)
    # Without values none may be asked for: models look into their mask, and choose experts by what a token needs.
    mask = torch.ones(ids.shape, dtype=ids.dtype, device="cpu" if is_meta else device)
    changes = {"_attn_implementation": _NAME} | ({"_experts_implementation": "batched_mm"} if is_meta else {})
    heard: list[_Heard] = []
    token = _heard.set(heard)
    try:
        with _in_eval(model), _changed(config, changes), _grad_of(rotaries, model) if is_meta else torch.no_grad():
            position_ids = torch.tensor([positions], device=device)
            model(input_ids=ids, attention_mask=mask, position_ids=position_ids, use_cache=False)
    finally:
        _heard.reset(token)
    return heard


@contextmanager
def _grad_of(rotaries: list[nn.Module], model: nn.Module) -> Iterator[None]:
    """Within the context, a tensor requires a gradient if and only if it depends on what rotary modules return."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    hooks = [rotary.register_forward_hook(_with_grad) for rotary in rotaries]
    try:
        for parameter in trained:
            parameter.requires_grad = False
        with torch.enable_grad():
            yield
    finally:
        for parameter in trained:
            parameter.requires_grad = True
        for hook in hooks:
            hook.remove()


def _with_grad(_: nn.Module, __: Any, rotation: Any) -> Any:
    return tree_map(lambda part: part.detach().requires_grad_(), rotation)


@contextmanager
def _changed(config: Any, changes: dict[str, str]) -> Iterator[None]:
    """Within the context, a config has other values."""
    before = {name: getattr(config, name) for name in changes}
    for name, value in changes.items():
        setattr(config, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(config, name, value)


@contextmanager
def _in_eval(model: nn.Module) -> Iterator[None]:
    """Dropout would make the two runs differ."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _listen(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    extras = [name for name in ("softcap", "s_aux", "position_bias") if kwargs.get(name) is not None]
    is_full = attention_mask is not None and attention_mask.dtype == torch.int64
    _heard.get().append(_Heard(module, query, key, is_full, kwargs.get("position_ids"), extras))
    batch, heads, tokens, _ = query.shape
    return value.new_zeros(batch, tokens, heads, value.shape[-1]), None


def _mask(batch_size: int, *_: Any, local_size: int | None = None, device: Any = "cpu", **__: Any) -> Tensor:
    """Say by its dtype whether a layer sees all that came before; sliding and chunked layers have a `local_size`."""
    return torch.ones(batch_size, 1, 1, 1, dtype=torch.int64 if local_size is None else torch.bool, device=device)


AttentionInterface.register(_NAME, _listen)
AttentionMaskInterface.register(_NAME, _mask)
