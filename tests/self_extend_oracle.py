"""Self-Extend by its definition: one text at a time, all at once, on queries and keys that were never rotated."""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from seal_peft.context.rope import rotary_modules, text_config


class _NoRotation(nn.Module):
    """Stands where the rotary module stood, and rotates by nothing."""

    def __init__(self, rotary: nn.Module) -> None:
        super().__init__()
        self.rotary = rotary

    def forward(self, x: Tensor, position_ids: Tensor, *args: object, **kwargs: object) -> tuple[Tensor, Tensor]:
        cos, sin = self.rotary(x, position_ids, *args, **kwargs)
        return torch.ones_like(cos), torch.zeros_like(sin)


def turn(x: Tensor, positions: Tensor, frequencies: Tensor, interleaved: bool, scaling: float) -> Tensor:
    """Rotate heads `(heads, tokens, channels)` as complex numbers, in double precision."""
    half = len(frequencies)
    rotated, rest = x[..., : 2 * half].double(), x[..., 2 * half :].double()
    real, imaginary = (rotated[..., ::2], rotated[..., 1::2]) if interleaved else rotated.split(half, dim=-1)
    angles = (positions[:, None].float() * frequencies.float()).double()  # as models round them
    result = torch.complex(real, imaginary) * torch.exp(1j * angles) * scaling
    if interleaved:
        return torch.cat([torch.view_as_real(result).flatten(-2), rest], dim=-1)
    return torch.cat([result.real, result.imag, rest], dim=-1)


def by_definition(
    query: Tensor, key: Tensor, value: Tensor, group: int, window: int, scale: float, start: int, rope: tuple
) -> Tensor:
    """Attend for one text, `(heads, tokens, channels)`; every pair of tokens is looked up by itself."""
    heads, tokens, _ = query.shape
    key, value = (x.repeat_interleave(heads // len(x), dim=0) for x in (key, value))
    positions = torch.arange(start, start + tokens)
    shifted = torch.tensor([math.floor(p / group) + window - math.floor(window / group) for p in positions.tolist()])
    grouped = torch.tensor([math.floor(p / group) for p in positions.tolist()])
    near = turn(query, positions, *rope) @ turn(key, positions, *rope).mT * scale
    far = turn(query, shifted, *rope) @ turn(key, grouped, *rope).mT * scale
    scores = torch.full_like(near, -math.inf)
    for i in range(tokens):
        for j in range(i + 1):
            scores[:, i, j] = (near if i - j < window else far)[:, i, j]
    return scores.softmax(-1) @ value.double()


def oracle(model: nn.Module, group: int, window: int, *, interleaved: bool = False, start: int = 0) -> nn.Module:
    """Return a copy of a model whose full layers attend by definition; give it one text without padding at a time."""
    model = copy.deepcopy(model)
    config = text_config(model)
    rotary = rotary_modules(model, config)[0]
    (name,) = [name for name, _ in rotary.named_buffers() if name in ("inv_freq", "full_attention_inv_freq")]
    scaling = getattr(rotary, name.replace("inv_freq", "attention_scaling"))
    frequencies = getattr(rotary, name)
    local = [name for name, _ in rotary.named_buffers() if name == "sliding_attention_inv_freq"]

    def attend(module, query, key, value, attention_mask, scaling_=None, **kwargs):
        scale = kwargs["scaling"]
        width = kwargs.get("sliding_window")
        if width is None:
            rope = (frequencies, interleaved, scaling)
            rows = [
                by_definition(*row, group, window, scale, start, rope) for row in zip(query, key, value, strict=True)
            ]
        else:  # a window of its own: ordinary attention within it
            rope = (getattr(rotary, local[0]) if local else frequencies, interleaved, 1.0)
            rows = []
            for q, k, v in zip(query, key, value, strict=True):
                seen = torch.ones(q.shape[1], q.shape[1]).tril().triu(1 - width).bool()
                positions = torch.arange(start, start + q.shape[1])
                k, v = (x.repeat_interleave(len(q) // len(x), dim=0) for x in (k, v))
                scores = turn(q, positions, *rope) @ turn(k, positions, *rope).mT * scale
                rows.append(scores.masked_fill(~seen, -math.inf).softmax(-1) @ v.double())
        return torch.stack(rows).transpose(1, 2).to(query.dtype), None

    AttentionInterface.register("by_definition", attend)
    AttentionMaskInterface.register("by_definition", lambda *args, **kwargs: None)
    config._attn_implementation = "by_definition"
    for parent in list(model.modules()):
        for child, module in list(parent.named_children()):
            if module is rotary:
                setattr(parent, child, _NoRotation(rotary))
    return model
