"""What a rotary module keeps of its frequencies: taken from one module, put into another."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn

# What a rotary module keeps for itself; models with RoPE per layer type put the type in front.
_KEPT = (
    "inv_freq",
    "attention_scaling",
    "rope_type",
    "rope_init_fn",
    "rope_init_fns",
    "seq_len_cached",
    "original_max_seq_len",
    "mrope_section",
)


class State(NamedTuple):
    """Attributes and buffers of a rotary module; the tensors are those of the module, not copies."""

    attributes: dict[str, Any]
    buffers: dict[str, torch.Tensor]


def state_of(module: nn.Module) -> State:
    """Return what a module has now."""
    attributes = {name: value for name, value in vars(module).items() if name.endswith(_KEPT)}
    # Once a text was short again, two names of a dynamic rotary stand for one buffer.
    return State(attributes, dict(module.named_buffers(remove_duplicate=False)))


def sizes_of(module: nn.Module) -> dict[str, torch.Size]:
    """Return the shapes of all buffers."""
    return {name: buffer.shape for name, buffer in state_of(module).buffers.items()}


def put_state(module: nn.Module, state: State) -> None:
    """Put a state in place; if the model was moved or cast since, as if the state had been in place then."""
    # The last one holds the original frequencies: those that a dynamic type grows are in fp32 again.
    live, saved = ([*buffers.values()][-1] for buffers in (state_of(module).buffers, state.buffers))
    for name in [name for name in vars(module) if name.endswith(_KEPT)]:
        del vars(module)[name]
    vars(module).update(state.attributes)
    module._buffers.clear()
    for name, buffer in state.buffers.items():
        module._buffers[name] = buffer.to(live.device, buffer.dtype if live.dtype == saved.dtype else live.dtype)
    module._non_persistent_buffers_set = set(state.buffers)
