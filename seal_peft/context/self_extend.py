"""Self-Extend on a loaded model: distant positions are grouped, so that a model reads further than it was trained to.

Source: "LLM Maybe LongLM: Self-Extend LLM Context Window Without Tuning", ICML 2024, arXiv 2401.01325. With group size
`G` and window `W`, a query at position `p` and a key at `r` count as `p` and `r` if `p - r < W`, otherwise as
`p // G + W - W // G` and `r // G`; there is one softmax over both. A model with a native length of `L` then reads
`(L - W) * G + W - W % G` tokens.

The attention is a function registered with transformers' attention interface. Keys come to it, also from a cache,
rotated to their true positions. Rotations compose, so it turns them on to their grouped ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

from .grouped import Grouping, are_known, attend
from .probe import RotaryLayer, check_frequencies, rotary_layers
from .rope import text_config

NAME = "self_extend"
_SETTINGS = "_self_extend"  # where an attention module keeps them; `None` if it attends as ever


def apply_self_extend(model: nn.Module, *, group_size: int, window: int) -> AppliedSelfExtend:
    """Let a loaded model read further by Self-Extend.

    Source: "LLM Maybe LongLM: Self-Extend LLM Context Window Without Tuning", ICML 2024, arXiv 2401.01325.

    It acts on the layers that attend to all that came before; sliding-window layers, whose distances stay within what
    the model knows, and layers without positions stay as they are. `model.config.self_extend` says that it is in
    force.

    Args:
        model: A transformers model with RoPE.
        group_size: How many positions further away become one.
        window: Distance from which on positions are grouped, in tokens.

    Returns:
        What ends it: `.restore()`.

    Raises:
        ValueError: A number is not allowed, the model's RoPE depends on the length, or it is a model that Self-Extend
            does not support.

    Example:
        ```python
        applied = apply_self_extend(model, group_size=6, window=1024)
        applied.restore()
        ```
    """
    settings = check_settings({"group_size": group_size, "window": window})
    return AppliedSelfExtend(model, rotary_layers(model), settings)


def read_self_extend(model: nn.Module) -> dict[str, int] | None:
    """Return the settings that are in force on a model, `None` if none are.

    A saved `config.json` may hold the settings, too, and a model may be loaded with
    `attn_implementation="self_extend"`; they are in force only after `apply_self_extend`.

    Args:
        model: A transformers model.

    Returns:
        `group_size`, and `window` in tokens.
    """
    config = text_config(model)
    if config is None or config._attn_implementation != NAME:
        return None
    return dict(config.self_extend) if any(_SETTINGS in vars(module) for module in model.modules()) else None


def extended_window(window: int, settings: dict[str, int]) -> int:
    """Return how many tokens a model reads by Self-Extend without a position that it does not know.

    Args:
        window: What it reads without, in tokens.
        settings: As for `apply_self_extend`.
    """
    near, group = settings["window"], settings["group_size"]
    return max(window, (window - near) * group + near - near % group)


def check_settings(settings: Any) -> dict[str, int]:
    """Return settings of Self-Extend as they are, if they are.

    Raises:
        ValueError: They are not two positive whole numbers, `group_size` and `window`.
    """
    if (
        not isinstance(settings, dict)
        or set(settings) != {"group_size", "window"}
        or not all(isinstance(n, int) and not isinstance(n, bool) and n >= 1 for n in settings.values())
    ):
        raise ValueError(
            f"self_extend={settings!r} is not allowed. Use two positive whole numbers, such as "
            '{"group_size": 6, "window": 1024}.'
        )
    return settings


@dataclass(frozen=True)
class _Settings:
    """What an attention module knows of Self-Extend; one layer of a model looks at the positions that it is given."""

    layer: RotaryLayer
    group_size: int
    window: int
    checks: bool


class AppliedSelfExtend:
    """What a model had before Self-Extend.

    Args:
        model: The model.
        layers: As `rotary_layers` gives them.
        settings: As `check_settings` gives them.

    Raises:
        ValueError: The model's RoPE depends on the length.
    """

    def __init__(self, model: nn.Module, layers: list[RotaryLayer], settings: dict[str, int]) -> None:
        self._config = cast(PreTrainedConfig, text_config(model))
        check_frequencies(model, [layer.rotary for layer in layers])
        names = ("_attn_implementation", NAME)
        self._before = {name: getattr(self._config, name) for name in names if hasattr(self._config, name)}
        self._modules = {m for m in model.modules() if getattr(m, "config", None) is self._config}
        self._modules |= {layer.attention for layer in layers}
        self._settings = {m: vars(m)[_SETTINGS] for m in self._modules if _SETTINGS in vars(m)}
        self._config._attn_implementation = NAME
        self._config.self_extend = dict(settings)
        for module in self._modules:
            vars(module)[_SETTINGS] = None
        for layer in layers:  # a module is here as often as it attends in one pass of the model
            checks = layer.attention is layers[0].attention
            vars(layer.attention)[_SETTINGS] = _Settings(layer, **settings, checks=checks)

    def restore(self) -> None:
        """Give the model its attention back; of several changes to a model, undo the last one first."""
        if hasattr(self._config, NAME):
            del self._config.self_extend
        for name, value in self._before.items():
            setattr(self._config, name, value)
        for module in self._modules:
            vars(module).pop(_SETTINGS, None)
        for module, settings in self._settings.items():
            vars(module)[_SETTINGS] = settings


def self_extend_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    position_ids: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend by Self-Extend where the module has settings, else by torch's attention; see transformers' interface.

    Args:
        module: The attention module.
        query: `(batch, heads, queries, channels)`, rotated.
        key: `(batch, key heads, keys, channels)`, rotated.
        value: `(batch, key heads, keys, channels of a value)`.
        attention_mask: What `self_extend_mask` made.
        scaling: Of the scores.
        dropout: Must be 0.
        position_ids: Of the queries, `(batch or 1, queries)`.
        **kwargs: For torch's attention.

    Returns:
        The output, `(batch, queries, heads, channels of a value)`, and `None` for its weights.

    Raises:
        ValueError: Self-Extend was not applied, a mask of four dimensions, dropout, or positions that do not follow
            each other.
    """
    if _SETTINGS not in vars(module):
        raise ValueError(
            f"The attention of this model was set to {NAME!r} by its name alone, without group_size and window. Call "
            "seal_peft.context.self_extend.apply_self_extend(model, group_size=..., window=...), or choose another "
            "attn_implementation. A model that was saved under Self-Extend has both in config.self_extend."
        )
    settings: _Settings | None = vars(module)[_SETTINGS]
    queries, keys = query.shape[2], key.shape[2]
    slots = _slots(attention_mask)
    has_own_mask = attention_mask is None or slots is not None
    if settings is not None and settings.checks and has_own_mask and position_ids is not None:
        if (
            not position_ids.is_meta
            and not torch.compiler.is_compiling()
            and not (query.is_cuda and torch.cuda.is_current_stream_capturing())
        ):
            _check_positions(position_ids, slots, keys)
    if settings is None or keys <= settings.window:
        if slots is not None:
            attention_mask = (slots[:, None] <= torch.arange(queries, device=key.device)[:, None]).unsqueeze(1)
        kwargs |= {"scaling": scaling, "dropout": dropout, "position_ids": position_ids}
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    if dropout or position_ids is None or not has_own_mask:
        raise ValueError(
            "Self-Extend takes no attention dropout, no attention mask of four dimensions, and needs position_ids; "
            f"got dropout={dropout}, position_ids={position_ids}, "
            f"attention_mask={None if attention_mask is None else tuple(attention_mask.shape)}. Set attention_dropout "
            "to 0 in the config, and pass a mask of shape (batch, tokens)."
        )
    layer = settings.layer
    if layer.interleaved is None:
        raise ValueError(
            "Self-Extend was applied to this model while it was on the meta device, where its rotation could not be "
            "checked. Apply it again now that the model has weights."
        )
    frequencies = getattr(layer.rotary, layer.frequencies).to(key.device)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    grouping = Grouping(settings.group_size, settings.window, frequencies, layer.interleaved, scale)
    out = attend(query, key, value, grouping, position_ids, slots)
    return out.transpose(1, 2).contiguous(), None


def self_extend_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Any = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Tensor | None:
    """Say which keys count, without a mask of queries times keys; see transformers' mask interface.

    Returns:
        For layers with a window of their own what torch's attention wants. Otherwise the slot of every key relative
        to that of the first query, `(batch, 1, 1, keys)`; that of padding is behind all queries. `None`: all keys
        are those of the queries, without padding, or there is one query that sees them all.

    Raises:
        ValueError: The mask is not causal: packed sequences, or blocks that see each other.
    """
    arguments: dict[str, Any] = {"q_offset": q_offset, "kv_offset": kv_offset, "mask_function": mask_function}
    if local_size is not None:
        arguments |= {"attention_mask": attention_mask, "local_size": local_size, "device": device, **kwargs}
        return sdpa_mask(batch_size, q_length, kv_length, **arguments)
    if mask_function is not causal_mask_function:
        raise ValueError(
            "Self-Extend takes one text per row, each token of which sees those before it. This batch has other "
            "masks: packed sequences (pass an attention_mask, one text per row), or tokens that see each other, as of "
            "images."
        )
    compiling = torch.compiler.is_compiling()
    plain = attention_mask is None or (not compiling and bool(attention_mask.all()))
    if plain and isinstance(q_offset, int) and kv_length == q_offset + q_length and q_length in (1, kv_length):
        return None
    slots = torch.arange(kv_length, device=device) + kv_offset
    seen = torch.ones_like(slots, dtype=torch.bool).expand(batch_size, -1)
    if attention_mask is not None:
        known = attention_mask[:, kv_offset : kv_offset + kv_length]
        seen = torch.nn.functional.pad(known, (0, kv_length - known.shape[1]), value=True)
    return torch.where(seen, slots - q_offset, kv_length + q_length)[:, None, None, :]


def _check_positions(position_ids: Tensor, slots: Tensor | None, keys: int) -> None:
    """Refuse positions from which those of the keys do not follow; it waits for the device, so one layer does it."""
    if not are_known(position_ids, slots, keys):
        raise ValueError(
            "Self-Extend needs position_ids that follow each other within a row and, to read on from a cache, ones "
            "that count from 0 without padding in every call, as `generate` makes them; got ones that begin at "
            f"{position_ids[:, 0].tolist()}. Pass (attention_mask.cumsum(-1) - 1).clamp(min=0), cut to the new "
            "tokens. Packed texts belong in rows of their own."
        )


def _slots(attention_mask: Tensor | None) -> Tensor | None:
    """The slots in a mask of `self_extend_mask`, `(batch, keys)`; `None` if it is none of its."""
    if attention_mask is None or attention_mask.dtype != torch.int64 or attention_mask.dim() != 4:
        return None
    return attention_mask[:, 0, 0]


AttentionInterface.register(NAME, self_extend_attention)
AttentionMaskInterface.register(NAME, self_extend_mask)
